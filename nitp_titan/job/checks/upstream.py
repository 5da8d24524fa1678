"""Values that TorchTitan refuses in a ``__post_init__``, or fails on later; said here without importing it.

A test builds TorchTitan's configurations with the same values and sees it refuse them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem, did_you_mean, one_of, quote
from nitp_titan.runtime import machine

_INF = math.inf
_BELOW_ONE = math.nextafter(1, 0)
_MOST_STREAMS = 2**20
"""More are refused: each is a place in memory and in every checkpoint."""

# table.key -> (lowest, highest) value
RANGES: dict[str, tuple[float, float]] = {
    "training.local_batch_size": (1, _INF),
    "training.seq_len": (1, _INF),
    "training.steps": (1, _INF),
    "training.max_norm": (0, _INF),
    "training.gc_freq": (1, _INF),
    "optimizer.lr": (0, _INF),
    "optimizer.beta1": (0, _BELOW_ONE),
    "optimizer.beta2": (0, _BELOW_ONE),
    "optimizer.eps": (0, _INF),
    "optimizer.weight_decay": (0, _INF),
    "lr_scheduler.warmup_steps": (0, _INF),
    "lr_scheduler.total_steps": (1, _INF),
    "lr_scheduler.decay_ratio": (0, 1),
    "lr_scheduler.min_lr_factor": (0, 1),
    "loss.chunk_tokens": (1, _INF),
    "loss.num_chunks": (1, _INF),
    "activation_checkpoint.memory_budget": (0, 1),
    "metrics.log_freq": (1, _INF),
    "validator.freq": (1, _INF),
    "checkpoint.interval": (1, _INF),
    "checkpoint.keep_latest_k": (0, _INF),
    "checkpoint.keep_every": (0, _INF),
    "checkpoint.load_step": (-1, _INF),
    "parallelism.pipeline_parallel_microbatch_size": (1, _INF),
    "profiler.profile_freq": (1, _INF),
    "profiler.profiler_active": (1, _INF),
    "profiler.profiler_warmup": (0, _INF),
    "profiler.profiler_repeat": (0, _INF),
    "profiler.profiler_skip_first": (0, _INF),
    "profiler.profiler_skip_first_wait": (0, _INF),
    "debug.seed": (-(2**63), 2**64 - 1),
    "comm.init_timeout_seconds": (1, _INF),
    "comm.trace_buf_size": (0, _INF),
    "comm.train_timeout_seconds": (1, _INF),
    **{
        f"{table}.{key}": bounds
        for table in ("dataloader", "validator.dataloader")
        for key, bounds in (
            ("seed", (0, _INF)),
            ("num_streams", (1, _MOST_STREAMS)),
            ("shuffle_buffer", (0, _INF)),
            ("prefetch", (0, _INF)),
        )
    },
}


_RANGED_ELSEWHERE = ("nitp", "model.shape", "model.flex_kernel_options")


def check_ranges(draft: Draft) -> Iterator[Problem]:
    """Numbers that somebody has set are finite and within their range."""
    for table, key in draft.settings:
        lowest, highest = RANGES.get(f"{table}.{key}", (-_INF, _INF))
        if (table, key) in draft.bad or draft.is_default(table, key) or table in _RANGED_ELSEWHERE:
            continue
        value = draft.settings[table, key].value
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value) or not lowest <= value <= highest:
            expected = _bounds(lowest, highest) if lowest > -_INF and math.isfinite(value) else "a finite number"
            yield draft.problem(table, key, f"found {value}, expected {expected}")


def _bounds(lowest: float, highest: float) -> str:
    if highest == _INF:
        return f"at least {lowest:g}"
    if highest == _BELOW_ONE:
        return f"at least {lowest:g} and less than 1"
    return f"{lowest}..{highest}"


def check_training(draft: Draft) -> Iterator[Problem]:
    """Rules of Trainer.Config on ``[training]`` and ``[debug]``."""
    total = draft.get("training", "global_batch_size")
    if total < -1 or total == 0:
        expected = "at least 1, or -1 (local_batch_size x data-parallel degree)"
        yield draft.problem("training", "global_batch_size", f"found {total}, expected {expected}")
    if draft.get("training", "max_norm") == 0:
        hint = "a number that no gradient reaches, such as 1e9, clips nothing"
        yield draft.problem("training", "max_norm", "found 0.0, which would clip every gradient to nothing", hint)
    if draft.get("debug", "batch_invariant"):
        yield draft.problem("debug", "batch_invariant", "found true, expected false: not supported in pre-training")
    if draft.get("debug", "spmd_typechecking") and draft.get("parallelism", "spmd_backend") == "spmd_types":
        if draft.get("parallelism", "pipeline_parallel_degree") > 1:
            yield draft.problem("debug", "spmd_typechecking", "type checking does not go with pipeline parallelism")
        flex = draft.get("model", "attn_backend").startswith("flex")
        if flex and draft.get("activation_checkpoint", "mode") == "selective":
            yield draft.problem(
                "debug",
                "spmd_typechecking",
                "type checking does not go with selective activation checkpointing and flex attention",
                'set activation_checkpoint.mode = "full" or "none"',
            )


def check_overrides(draft: Draft) -> Iterator[Problem]:
    """The modules of ``override.imports`` exist; which functions they have is seen when they are imported."""
    for target in draft.get("override", "imports"):
        name = target if isinstance(target, str) else target[0]
        module, _, function = name.rpartition(".")
        if not module or not function:
            yield draft.problem("override", "imports", f'found {quote(name)}, expected "module.function"')
        elif not machine.has_module(module):
            message = f"found {quote(name)}, whose module {quote(module)} cannot be found"
            yield draft.problem("override", "imports", message)


def check_lr_scheduler(draft: Draft) -> Iterator[Problem]:
    """An exponential decay never reaches 0."""
    if draft.get("lr_scheduler", "decay_type") == "exponential" and draft.get("lr_scheduler", "min_lr_factor") == 0:
        yield draft.problem(
            "lr_scheduler",
            ("min_lr_factor", "decay_type"),
            'found min_lr_factor 0 with decay_type "exponential", expected a number above 0, at most 1',
            "set min_lr_factor = 0.1, say",
        )


BALANCERS = ("headtail", "ptrr")


def check_parallelism(draft: Draft) -> Iterator[Problem]:
    """Rules of ParallelismConfig, and what TorchTitan notices when it cuts the first batch."""
    found = draft.get("parallelism", "context_parallel_load_balancer")
    if found is not None and found not in BALANCERS:
        yield draft.problem(
            "parallelism",
            "context_parallel_load_balancer",
            f'found {quote(found)}, expected "headtail", "ptrr" or "none"',
            did_you_mean(found, BALANCERS),
        )


FLEX_COMPILERS = ("inductor", "aot_eager")


def check_compile(draft: Draft) -> Iterator[Problem]:
    """Parts and backend have names that TorchTitan takes, and what needs a compiled model has one."""
    for part in draft.get("compile", "components"):
        if part not in ("model", "loss"):
            hint = did_you_mean(part, ("model", "loss"))
            yield draft.problem("compile", "components", f'found {quote(part)}, expected "model" or "loss"', hint)
    compiled = draft.compiles_blocks()
    backend = draft.get("compile", "backend")
    # Whether somebody else's model has flex attention is not known.
    flex = draft.get("model", "attn_backend").startswith("flex") and "." not in draft.get("model", "module")
    if compiled and flex and backend not in FLEX_COMPILERS:
        expected = one_of(FLEX_COMPILERS) + ", the two that TorchTitan compiles flex attention with"
        hint = did_you_mean(backend, FLEX_COMPILERS)
        yield draft.problem("compile", "backend", f"found {quote(backend)}, expected {expected}", hint)
    needs = 'which needs compile.enable = true and "model" in compile.components'
    if draft.get("compile", "enable_async_tensor_parallel") and not compiled:
        yield draft.problem("compile", "enable_async_tensor_parallel", f"found true, {needs}")
    if draft.get("activation_checkpoint", "mode") == "memory_budget" and not compiled:
        yield draft.problem("activation_checkpoint", "mode", f'found "memory_budget", {needs}')


def check_cuda_graphs(draft: Draft) -> Iterator[Problem]:
    """A recorded step repeats itself: what changes or looks into it does not go with CUDA graphs."""
    if draft.get("training", "disable_cuda_graphs"):
        return
    if not machine.records_attention():
        yield draft.problem(
            "training",
            "disable_cuda_graphs",
            "found false, expected true: with torch < 2.13 a CUDA graph does not take another step's attention masks, "
            f"this is torch {'.'.join(map(str, machine.torch_version()))}",
        )
    for key in ("start_step", "geometry_freq"):
        value = draft.get("nitp", key)
        if value > 0 and (key == "geometry_freq" or draft.get("nitp", "enable")):
            yield draft.problem(
                "nitp",
                key,
                f"found {value}, expected 0 with training.disable_cuda_graphs = false",
                f"set {key} = 0 or disable_cuda_graphs = true",
            )


_EXCLUDABLE = ("optimizer", "lr_scheduler", "dataloader", "random_state", "train_state")
"""What a checkpoint holds beside the model."""


def check_checkpoint(draft: Draft) -> Iterator[Problem]:
    """Rules of CheckpointManager.Config."""

    def value(key: str):
        return draft.get("checkpoint", key)

    if not value("folder").strip():
        yield draft.problem("checkpoint", "folder", f'found "{value("folder")}", expected a folder name')
    if value("keep_latest_k") == 1:
        expected = "0 (all) or at least 2: the latest may be half written"
        yield draft.problem("checkpoint", "keep_latest_k", f"found 1, expected {expected}")
    for name in value("exclude_from_loading"):
        if name == "model":
            yield draft.problem("checkpoint", "exclude_from_loading", 'found "model", which is always loaded')
        elif name not in _EXCLUDABLE:
            hint = did_you_mean(name, _EXCLUDABLE)
            message = f"found {quote(name)}, expected some of {', '.join(_EXCLUDABLE)}"
            yield draft.problem("checkpoint", "exclude_from_loading", message, hint)
    if value("load_only") and value("create_seed_checkpoint"):
        yield draft.problem(
            "checkpoint", "create_seed_checkpoint", "found true with load_only = true, which saves none"
        )
    if value("enable") and value("create_seed_checkpoint") and draft.world_size > 1:
        message = f"found true on {draft.world_size} ranks, expected 1: a seed checkpoint is saved by one"
        yield draft.problem("checkpoint", "create_seed_checkpoint", message)
    path = (value("initial_load_path") or "").strip()
    for key, needed in (("initial_load_in_hf", "initial_load_model_only"), ("last_save_in_hf", "last_save_model_only")):
        if value(key) and not value(needed):
            yield draft.problem("checkpoint", key, f"found true, which needs {needed} = true")
    if value("initial_load_in_hf_quantized") and not (value("initial_load_in_hf") and path):
        yield draft.problem(
            "checkpoint", "initial_load_in_hf_quantized", "needs initial_load_in_hf = true and an initial_load_path"
        )
    for key, location in (
        ("last_save_in_hf", value("folder")),
        ("initial_load_in_hf", path),
        # There TorchTitan removes what is not of the latest.
        ("keep_every", value("folder")),
    ):
        if value(key) and "://" in location:
            found = quote(value(key))
            yield draft.problem("checkpoint", key, f"found {found}, which does not go with the remote path {location}")


def check_validator(draft: Draft) -> Iterator[Problem]:
    """Rules of Validator.Config."""
    steps = draft.get("validator", "steps")
    if steps != -1 and steps < 1:
        yield draft.problem("validator", "steps", f"found {steps}, expected at least 1, or -1 (all data)")


def check_profiler(draft: Draft) -> Iterator[Problem]:
    """A cycle of the profiler has room for its parts."""
    freq, snapshots = (draft.get("profiler", key) for key in ("profile_freq", "memory_snapshot_freq"))
    parts = {key: draft.get("profiler", key) for key in ("profiler_warmup", "profiler_active")}
    if draft.get("profiler", "enable_profiling") and freq < sum(parts.values()):
        named = " + ".join(f"{key} {value}" for key, value in parts.items())
        message = f"found {freq}, expected at least {named} = {sum(parts.values())}"
        yield draft.problem("profiler", ("profile_freq", *parts), message)
    if draft.get("profiler", "enable_memory_snapshot") and snapshots is not None and snapshots < 1:
        yield draft.problem("profiler", "memory_snapshot_freq", f'found {snapshots}, expected at least 1, or "none"')


CHECKS = (
    check_ranges,
    check_training,
    check_overrides,
    check_lr_scheduler,
    check_parallelism,
    check_compile,
    check_cuda_graphs,
    check_checkpoint,
    check_validator,
    check_profiler,
)
