"""``parallelism.module_fqns_per_model_part``: a model that is split by hand is still all of the model, in its order.

TorchTitan (``_split_module``) keeps of the model what a part names, and passes over names that it does not have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from nitp_titan.job.checks.pipeline import SINGLE, V_SHAPED, schedule_of
from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem, did_you_mean, quote
from nitp_titan.job.model_facts import modules

_KEY = "module_fqns_per_model_part"


def check_split(draft: Draft) -> Iterator[Problem]:
    """Every module is in one part, parts follow the model's order, and there is one for each stage."""
    degree, parts = draft.get("parallelism", "pipeline_parallel_degree"), draft.get("parallelism", _KEY)
    if degree <= 1 or parts is None or draft.get("model", "module") not in modules():
        return
    order = ["tok_embeddings", *(f"layers.{i}" for i in range(draft.facts().n_layers)), "norm", "lm_head"]
    counts = Counter(name for part in parts for name in part)
    for name in counts.keys() - set(order):
        yield draft.problem(
            "parallelism", _KEY, f"found {quote(name)}, no module of the model", did_you_mean(name, order)
        )
    if missing := [name for name in order if not counts[name]]:
        yield draft.problem("parallelism", _KEY, f"{quote(missing[0])} is in no part", _and_others(missing))
    if twice := [name for name in order if counts[name] > 1]:
        yield draft.problem("parallelism", _KEY, f"{quote(twice[0])} is in more than one part", _and_others(twice))
    if not all(parts):
        yield draft.problem("parallelism", _KEY, "a part has no module, expected at least one in each")
    place = {name: number for number, part in enumerate(parts) for name in part}
    places = [place[name] for name in order if name in place]
    if places != sorted(places):
        yield draft.problem("parallelism", _KEY, "parts are not in the model's order, in which their stages run")
    yield from _number_of_parts(draft, len(parts), degree)


def _number_of_parts(draft: Draft, found: int, degree: int) -> Iterator[Problem]:
    schedule = schedule_of(draft)
    if schedule is None or draft.get("parallelism", "pipeline_parallel_schedule_csv"):
        return
    if schedule in SINGLE:
        fits, expected = found == degree, f"{degree}"
    elif schedule in V_SHAPED:
        fits, expected = found == 2 * degree, f"{2 * degree}"
    else:
        fits, expected = found >= 2 * degree and found % degree == 0, f"{2 * degree} or another multiple of {degree}"
    if not fits:
        message = f"found {found} parts, expected {expected} with {schedule} over {degree} ranks"
        yield draft.problem("parallelism", _KEY, message)


def _and_others(names: list[str]) -> str:
    return f"so are {len(names) - 1} others" if len(names) > 1 else ""
