"""Pipeline parallelism: stages that have layers, and micro-batches that the schedule can order.

torch and TorchTitan (``torchtitan/distributed/pipeline_parallel.py``) refuse the same once every rank has started.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem, did_you_mean, one_of, quote
from nitp_titan.runtime import machine

SINGLE = ("1F1B", "GPipe")
"""Schedules with one stage a rank."""

LOOPED = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble")
"""Schedules with several stages a rank, two by default."""

V_SHAPED = ("ZBVZeroBubble",)
"""Schedules with two stages a rank, one from each end. Not DualPipeV: TorchTitan logs another rank's loss with it."""

SPLIT_BACKWARD = ("InterleavedZeroBubble", *V_SHAPED)
"""Schedules that compute gradients of inputs and of weights at different times."""

PARTS = "module_fqns_per_model_part"
"""The key of a split by hand, in place of TorchTitan's own."""

SCHEDULES = (*SINGLE, *LOOPED, *V_SHAPED)


def check_pipeline(draft: Draft) -> Iterator[Problem]:
    """What pipeline parallelism asks of torch, model and training."""
    if draft.get("parallelism", "pipeline_parallel_degree") <= 1:
        return
    torch = machine.torch_version()
    if torch < (2, 13):
        yield draft.problem(
            "parallelism",
            "pipeline_parallel_degree",
            f"pipeline parallelism needs torch >= 2.13, found torch {torch[0]}.{torch[1]}",
            "install a newer torch, or set pipeline_parallel_degree = 1",
        )
    if not draft.get("training", "disable_cuda_graphs"):
        yield draft.problem(
            "training", "disable_cuda_graphs", "found false, expected true: CUDA graphs and pipelines do not mix"
        )
    if draft.facts().tied:
        yield draft.problem(
            "parallelism",
            "pipeline_parallel_degree",
            "a model with tied embeddings cannot be pipelined: its first and last stage would share a weight",
            "set pipeline_parallel_degree = 1, or untie them (model.shape.tie_embeddings = false in our models)",
        )


def check_schedule(draft: Draft) -> Iterator[Problem]:
    """The schedule exists and every stage gets a layer."""
    degree = draft.get("parallelism", "pipeline_parallel_degree")
    if degree <= 1:
        return
    if file := draft.get("parallelism", "pipeline_parallel_schedule_csv"):
        if not Path(file).is_file():
            message = f"found {quote(file)}, which is no file"
            yield draft.problem("parallelism", "pipeline_parallel_schedule_csv", message)
        return
    schedule = schedule_of(draft)
    if schedule is None:
        found = draft.get("parallelism", "pipeline_parallel_schedule")
        yield draft.problem(
            "parallelism",
            "pipeline_parallel_schedule",
            f"found {quote(found)}, expected {one_of(SCHEDULES)}",
            'with DualPipeV TorchTitan logs no loss; "ZBVZeroBubble" is nearest'
            if found.lower() == "dualpipev"
            else did_you_mean(found, SCHEDULES),
        )
        return
    per_stage = draft.get("parallelism", "pipeline_parallel_layers_per_stage")
    depth, first, last = _layers(draft)
    if per_stage is not None:
        stages = math.ceil((depth + first + last) / per_stage) if per_stage > 0 else 0
        expected = numbers_of_stages(schedule, degree, stages)
        if stages not in expected:
            fitting = sorted({math.ceil((depth + first + last) / n) for n in expected})
            yield draft.problem(
                "parallelism",
                "pipeline_parallel_layers_per_stage",
                f"found {per_stage}, which makes {stages} stages of {depth} layers (and {first} + {last} for the ends),"
                f" expected {' or '.join(map(str, expected))} with {schedule} over {degree} ranks",
                f"{' or '.join(map(str, fitting))} would be nearest",
            )
    elif draft.get("parallelism", PARTS) is None and not _fits(depth, degree, schedule, first, last):
        most = max((n for n in range(1, degree) if _fits(depth, n, schedule, first, last)), default=1)
        stages = degree * _stages_per_rank(schedule)
        yield draft.problem(
            "parallelism",
            "pipeline_parallel_degree",
            f"found {degree}, which makes {stages} stages with {schedule}: too many for {depth} layers "
            f"(and {first} + {last} for the ends)",
            f"the largest degree that fits is {most}",
        )


def check_blocks(draft: Draft) -> Iterator[Problem]:
    """Context parallelism wraps the attention of every stage, so that each needs a block."""
    degree = draft.get("parallelism", "pipeline_parallel_degree")
    schedule = schedule_of(draft)
    if degree <= 1 or draft.get("parallelism", "context_parallel_degree") <= 1 or schedule is None:
        return
    parts = draft.get("parallelism", PARTS)
    if parts is not None:
        if not all(any(name.startswith("layers.") for name in part) for part in parts):
            message = "a part has no block: context parallelism needs one in each"
            yield draft.problem("parallelism", PARTS, message)
        return
    if any(draft.get("parallelism", f"pipeline_parallel_{key}") for key in ("schedule_csv", "layers_per_stage")):
        return
    depth, first, last = _layers(draft)
    if not _fits(depth, degree, schedule, first, last):
        return
    if 0 in blocks_of_stages(depth, degree * _stages_per_rank(schedule), first, last):
        yield draft.problem(
            "parallelism",
            "pipeline_parallel_degree",
            f"found {degree}, which leaves a stage of {schedule} without blocks: context parallelism needs one in each",
            "set pipeline_parallel_first_stage_less_layers and pipeline_parallel_last_stage_less_layers to 0, "
            "or make fewer stages",
        )


def check_zero_bubble(draft: Draft) -> Iterator[Problem]:
    """Schedules that take a backward pass apart, or run it as a V, cannot do everything with it."""
    if draft.get("parallelism", "pipeline_parallel_degree") <= 1:
        return
    schedule = schedule_of(draft)
    if schedule in SPLIT_BACKWARD and draft.compiles_blocks():
        yield draft.problem(
            "parallelism",
            "pipeline_parallel_schedule",
            f"{schedule} takes the gradients of inputs and weights apart, which compiled blocks do not let it",
            'set pipeline_parallel_schedule = "Interleaved1F1B", or compile.enable = false',
        )
    if schedule in SPLIT_BACKWARD and draft.get("parallelism", "fsdp_reshard_after_forward") == "always":
        yield draft.problem(
            "parallelism",
            "fsdp_reshard_after_forward",
            f'found "always", expected "default" or "never" with {schedule}: it takes the gradients of inputs and '
            "weights apart, and those of weights that FSDP frees in between are lost",
        )
    if schedule in SPLIT_BACKWARD and draft.get("activation_checkpoint", "mode") == "selective":
        yield draft.problem(
            "activation_checkpoint",
            "mode",
            f'found "selective", expected "full" or "none" with {schedule}: it goes back through a block twice, and '
            "what is selected is kept for one time",
        )
    if schedule in V_SHAPED and draft.get("validator", "enable"):
        yield draft.problem(
            "validator",
            "enable",
            f"found true, expected false with {schedule}: torch cannot run it forward alone",
            'pipeline_parallel_schedule = "Interleaved1F1B" can validate',
        )


def check_micro_batches(draft: Draft) -> Iterator[Problem]:
    """A local batch is split into as many micro-batches as the schedule can order."""
    degree = draft.get("parallelism", "pipeline_parallel_degree")
    local = draft.get("training", "local_batch_size")
    size = draft.get("parallelism", "pipeline_parallel_microbatch_size")
    if degree <= 1 or size < 1 or local < 1:
        return
    if local % size:
        yield draft.problem(
            "parallelism",
            "pipeline_parallel_microbatch_size",
            f"found {size}, expected a divisor of training.local_batch_size {local}",
        )
        return
    schedule, number = schedule_of(draft), local // size
    if (
        draft.get("parallelism", "pipeline_parallel_schedule_csv")
        or schedule is None
        or _orders(schedule, number, degree)
    ):
        return
    fitting = [n for n in range(1, number + 2 * degree + 1) if _orders(schedule, n, degree)]
    nearest = sorted(sorted(fitting, key=lambda n: abs(n - number))[:2])
    at_least = schedule == "1F1B"
    yield draft.problem(
        "training",
        "local_batch_size",
        f"found {local}, which makes {number} micro-batches of {size}: {schedule} over {degree} ranks takes "
        + ("more" if at_least else "others"),
        f"expected at least {degree * size}"
        if at_least
        else f"the nearest: {' or '.join(str(n * size) for n in nearest)}",
    )


def schedule_of(draft: Draft) -> str | None:
    """Return the schedule's name as torch writes it; None for one that is not known."""
    found = draft.get("parallelism", "pipeline_parallel_schedule").lower()
    return next((name for name in SCHEDULES if name.lower() == found), None)


def _layers(draft: Draft) -> tuple[int, int, int]:
    """Return the model's depth, and how many layers the first and the last stage have less than others."""
    less = (draft.get("parallelism", f"pipeline_parallel_{end}_stage_less_layers") for end in ("first", "last"))
    return draft.facts().n_layers, *less


def _stages_per_rank(schedule: str) -> int:
    return 1 if schedule in SINGLE else 2


def numbers_of_stages(schedule: str, degree: int, most: int) -> list[int]:
    """Return how many stages a schedule can have: several a rank of a looped one, as far as ``most``."""
    if schedule in LOOPED:
        return [degree * n for n in range(2, max(3, most // degree + 2))]
    return [degree * _stages_per_rank(schedule)]


def _fits(depth: int, degree: int, schedule: str, first: int, last: int) -> bool:
    """Whether TorchTitan's split leaves no stage without layers (its ``_generate_llm_fqn_per_model_part``)."""
    stages = degree * _stages_per_rank(schedule)
    return stages == 1 or max(first, last, 1) <= (depth + first + last) // stages


def blocks_of_stages(depth: int, stages: int, first: int, last: int) -> list[int]:
    """Return how many blocks TorchTitan gives each stage (its ``_generate_llm_fqn_per_model_part``)."""
    each, extra = divmod(depth + first + last, stages)
    ends = {0: first, stages - 1: last}
    return [each + (stage < extra) - ends.get(stage, 0) for stage in range(stages)]


def _orders(schedule: str, number: int, degree: int) -> bool:
    """Whether the schedule takes this number of micro-batches (the constructors in torch's ``schedules.py``)."""
    if schedule == "1F1B":
        return number >= degree
    if schedule in ("Interleaved1F1B", "InterleavedZeroBubble"):
        return number % max(1, number // degree) == 0
    return True


CHECKS = (check_pipeline, check_schedule, check_blocks, check_zero_bubble, check_micro_batches)
