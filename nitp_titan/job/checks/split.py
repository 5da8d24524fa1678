"""``parallelism.module_fqns_per_model_part``: a model that is split by hand is still all of the model, in its order.

TorchTitan (``_split_module``) keeps of the model what a part names, and passes over names that it does not have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from nitp_titan.job.checks.pipeline import LOOPED, PARTS, numbers_of_stages, schedule_of
from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem, did_you_mean, quote
from nitp_titan.job.model_facts import modules


def check_split(draft: Draft) -> Iterator[Problem]:
    """Every module is in one part, parts follow the model's order, and there is one for each stage."""
    degree, parts = draft.get("parallelism", "pipeline_parallel_degree"), draft.get("parallelism", PARTS)
    if degree <= 1 or parts is None or draft.get("model", "module") not in modules():
        return
    order = ["tok_embeddings", *(f"layers.{i}" for i in range(draft.facts().n_layers)), "norm", "lm_head"]
    counts = Counter(name for part in parts for name in part)
    for name in [name for name in counts if name not in order]:
        yield draft.problem(
            "parallelism", PARTS, f"found {quote(name)}, no module of the model", did_you_mean(name, order)
        )
    if missing := [name for name in order if not counts[name]]:
        yield draft.problem("parallelism", PARTS, f"{quote(missing[0])} is in no part", _and_others(missing))
    if twice := [name for name in order if counts[name] > 1]:
        yield draft.problem("parallelism", PARTS, f"{quote(twice[0])} is in more than one part", _and_others(twice))
    if not all(parts):
        yield draft.problem("parallelism", PARTS, "a part has no module, expected at least one in each")
    place = {name: number for number, part in enumerate(parts) for name in part}
    places = [place[name] for name in order if name in place]
    if places != sorted(places):
        yield draft.problem("parallelism", PARTS, "parts are not in the model's order, in which their stages run")
    yield from _number_of_parts(draft, len(parts), degree)


def _number_of_parts(draft: Draft, found: int, degree: int) -> Iterator[Problem]:
    schedule = schedule_of(draft)
    if schedule is None or draft.get("parallelism", "pipeline_parallel_schedule_csv"):
        return
    numbers = numbers_of_stages(schedule, degree, found)
    expected = f"{numbers[0]} or another multiple of {degree}" if schedule in LOOPED else f"{numbers[0]}"
    if found not in numbers:
        message = f"found {found} parts, expected {expected} with {schedule} over {degree} ranks"
        yield draft.problem("parallelism", PARTS, message)


def _and_others(names: list[str]) -> str:
    return f"so are {len(names) - 1} others" if len(names) > 1 else ""
