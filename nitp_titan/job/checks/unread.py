"""Keys that act only together with another one, and what is said where that other is unset.

A new key that needs another is a row of :func:`gates`. A test goes through every key of every table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from nitp_titan.job.draft import Draft, Setting, Unknown
from nitp_titan.job.errors import quote
from nitp_titan.job.keys.schema import all_tables
from nitp_titan.job.loss_name import loss_name
from nitp_titan.job.shape import shape_of_draft
from nitp_titan.nitp.config import REGULARISER

_PIPELINE = "parallelism.pipeline_parallel_degree"
_SPLIT = ("pipeline_parallel_first_stage_less_layers", "pipeline_parallel_last_stage_less_layers")
_CHECKPOINTED = ("preserve_rng_state", "determinism_check", "debug")


@dataclass(frozen=True, slots=True)
class Gate:
    """Keys of a table, and the key (``table.key``) with which they act."""

    table: str
    keys: tuple[str, ...]
    key: str
    opens: Callable[[Any], bool] = bool
    """Whether that key's value lets them act."""

    def closed(self, draft: Draft) -> str:
        """Return why the keys do nothing; empty where they act."""
        value = draft.get(*self.key.rsplit(".", 1))
        return "" if self.opens(value) else f"{self.key.removeprefix('parallelism.')} is {_said(value)}"


@dataclass(frozen=True, slots=True)
class Rule:
    """Keys of a table that act unless a function says why not."""

    table: str
    keys: tuple[str, ...]
    key: str
    """What switches them off on purpose; empty where that is nothing that one would set for it."""
    closed: Callable[[Draft], str]


def _said(value: Any) -> str:
    # "float8.recipe is none", "checkpoint.enable is false", "checkpoint.initial_load_path is unset"
    if value is None or value == "":
        return "unset"
    return "empty" if value == [] else value if value == "none" else quote(value)


def _above_one(degree: int) -> bool:
    return degree > 1


def gates() -> Iterator[Gate | Rule]:
    """Yield every dependence; of two for one key the first that holds it back is told."""
    yield Rule("model", ("hf_assets_path",), "tokenizer.name", _no_assets)
    yield Rule("model.shape", ("router_score_func", "router_norm", "load_balance_coeff"), "", _no_experts)
    yield Rule("model.shape", ("hidden_dim",), "model.shape.n_dense_layers", _no_dense_block)
    yield Gate("nitp", tuple(key for key in _keys("nitp") if key not in ("enable", "geometry_freq")), "nitp.enable")
    compared = ("target_layer", "projector", "projector_ratio", "shift", "stop_gradient")
    yield Gate("nitp", compared, "nitp.loss", lambda loss: loss != REGULARISER)
    yield Gate("nitp", ("projector_ratio",), "nitp.projector", lambda projector: projector != "none")
    yield Gate("float8", ("filter_fqns", "experts", "emulate"), "float8.recipe", lambda recipe: recipe != "none")
    yield Rule("faults", ("max_skips_in_a_row",), "faults.on_nonfinite", _no_skips)
    yield Rule("faults", ("spike_window",), "", _no_spikes)
    yield from _data_gates("dataloader")
    yield Gate("validator", ("freq", "steps"), "validator.enable")
    yield Gate("validator.dataloader", _keys("validator.dataloader"), "validator.enable")
    yield from _data_gates("validator.dataloader")
    yield Rule("lr_scheduler", ("decay_type", "min_lr_factor"), "lr_scheduler.decay_ratio", _no_decay)
    yield Rule("loss", ("implementation", "chunk_tokens"), "nitp.enable", _not_our_loss)
    yield Rule("loss", ("num_chunks",), "nitp.enable", _not_chunked)
    yield from _parallelism_gates()
    yield from _recomputation_gates()
    yield Gate("compile", ("components", "backend"), "compile.enable")
    yield Gate("compile", ("enable", "backend"), "compile.components", bool)
    yield Gate("compile", ("enable_async_tensor_parallel",), "parallelism.tensor_parallel_degree", _above_one)
    yield from _checkpoint_gates()
    logged = ("save_tb_folder", "save_for_all_ranks")
    yield Rule("metrics", logged, "metrics.enable_tensorboard", _no_events)
    yield from _profiler_gates()
    yield Gate("comm", ("save_traces_folder", "save_traces_file_prefix"), "comm.trace_buf_size", lambda size: size > 0)
    yield Gate("debug", ("spmd_typechecking",), "parallelism.spmd_backend", lambda backend: backend == "spmd_types")
    yield Gate("debug", ("deterministic_warn_only",), "debug.deterministic")
    yield Rule("debug", ("moe_force_load_balance",), "", _no_experts)


def _keys(table: str) -> tuple[str, ...]:
    return tuple(all_tables()[table])


def _data_gates(table: str) -> Iterator[Gate | Rule]:
    dataset = f"{table}.dataset"
    yield Gate(table, ("split",), dataset, lambda name: name.startswith("hub:"))
    yield Gate(table, ("text_field",), dataset, lambda name: name == "text" or name.startswith("hub:"))
    yield Gate(table, ("streaming",), dataset, lambda name: name == "text" or name.startswith("hub:"))
    drawn = ("seed", "num_streams", "shuffle_buffer")
    if table == "dataloader":
        yield Gate(table, drawn, f"{table}.infinite")
    else:
        # TorchTitan's validator decides by its steps: all of the data once, in order, or batches drawn from it.
        yield Gate(table, drawn, "validator.steps", lambda steps: steps != -1)
        yield Rule(table, ("infinite",), "", _validated_otherwise)
    yield Rule(table, ("shuffle_buffer",), f"{table}.streaming", lambda draft: _in_memory(draft, table))


def _validated_otherwise(draft: Draft) -> str:
    steps, endless = draft.get("validator", "steps"), draft.get("validator.dataloader", "infinite")
    if endless == (steps != -1):
        return ""
    return f"validator.steps is {steps}: " + (
        "batches are drawn" if steps != -1 else "all data are read once, in order"
    )


def _in_memory(draft: Draft, table: str) -> str:
    # TorchTitan's c4 is read in order whatever is asked for.
    dataset = draft.get(table, "dataset")
    if dataset == "python_stdlib":
        return f"{table}.dataset is {quote(dataset)}, all of whose documents are shuffled"
    memory = not dataset.startswith("c4") and not draft.get(table, "streaming")
    return f"{table}.streaming is false, and all documents are shuffled" if memory else ""


def _parallelism_gates() -> Iterator[Gate | Rule]:
    table = "parallelism"
    yield Gate(table, ("enable_sequence_parallel",), "parallelism.tensor_parallel_degree", _above_one)
    of_context = ("context_parallel_load_balancer", "context_parallel_ptrr_mask_key")
    yield Gate(table, of_context, "parallelism.context_parallel_degree", _above_one)
    balancer = "parallelism.context_parallel_load_balancer"
    yield Gate(table, ("context_parallel_ptrr_mask_key",), balancer, lambda name: name == "ptrr")
    of_pipeline = tuple(k for k in _keys(table) if k.startswith("pipeline_parallel_") and not k.endswith("_degree"))
    yield Gate(table, (*of_pipeline, "module_fqns_per_model_part"), _PIPELINE, _above_one)
    schedule_csv = "parallelism.pipeline_parallel_schedule_csv"
    yield Gate(table, ("pipeline_parallel_schedule",), schedule_csv, lambda file: not file)
    parts = "parallelism.module_fqns_per_model_part"
    yield Gate(table, (*_SPLIT, "pipeline_parallel_layers_per_stage"), parts, lambda names: names is None)
    yield Rule(table, ("expert_parallel_degree",), "", _no_experts)
    sharded = ("fsdp_reshard_after_forward", "enable_fsdp_symm_mem")
    yield Rule(table, sharded, "", _one_rank)


def _recomputation_gates() -> Iterator[Gate | Rule]:
    table, key = "activation_checkpoint", "activation_checkpoint.mode"
    yield Gate(table, _CHECKPOINTED, key, lambda mode: mode in ("full", "selective"))
    yield Gate(table, ("force_recompute_mm_shapes_by_fqns",), key, lambda mode: mode == "selective")
    yield Gate(table, ("memory_budget", "visualize_memory_budget_pareto"), key, lambda mode: mode == "memory_budget")


def _checkpoint_gates() -> Iterator[Gate | Rule]:
    table = "checkpoint"
    yield Gate(table, tuple(key for key in _keys(table) if key != "enable"), "checkpoint.enable")
    saving = ("interval", "keep_latest_k", "last_save_model_only", "last_save_in_hf", "export_dtype", "async_mode")
    saving += ("enable_first_step_checkpoint", "keep_every")
    yield Gate(table, saving, "checkpoint.load_only", lambda load_only: not load_only)
    yield Gate(table, ("export_dtype",), "checkpoint.last_save_model_only")
    yield Gate(table, ("keep_every",), "checkpoint.keep_latest_k", bool)
    yield Rule(table, ("initial_load_model_only",), "checkpoint.initial_load_path", _no_initial_load)


def _profiler_gates() -> Iterator[Gate | Rule]:
    table = "profiler"
    tracing = ("save_traces_folder", *(key for key in _keys(table) if key.startswith("profiler_")))
    yield Gate(table, tracing, "profiler.enable_profiling")
    yield Rule(table, ("profile_freq",), "profiler.enable_profiling", _no_profile)
    snapshots = ("memory_snapshot_freq", "save_memory_snapshot_folder", "memory_snapshot_max_entries")
    yield Gate(table, snapshots, "profiler.enable_memory_snapshot")


def _no_assets(draft: Draft) -> str:
    hf_weights = draft.get("checkpoint", "initial_load_in_hf") and not draft.get("checkpoint", "initial_load_path")
    written_by = draft.get("checkpoint", "enable") and draft.get("checkpoint", "last_save_in_hf")
    if draft.get("tokenizer", "name") == "huggingface" or hf_weights or written_by:
        return ""
    return f'tokenizer.name is {quote(draft.get("tokenizer", "name"))} (set it to "huggingface")'


def _no_skips(draft: Draft) -> str:
    stops = draft.get("faults", "on_nonfinite") == "stop" and _no_spikes(draft)
    return "faults.on_nonfinite is stop, and no spikes are skipped" if stops else ""


def _no_spikes(draft: Draft) -> str:
    judged = any(draft.get("faults", key) for key in ("loss_spike_sigma", "grad_norm_spike_sigma"))
    return "" if judged else "faults.loss_spike_sigma and faults.grad_norm_spike_sigma are 0"


def _no_experts(draft: Draft) -> str:
    return "" if draft.facts().num_experts else "the model has no experts"


def _no_dense_block(draft: Draft) -> str:
    shape = shape_of_draft(draft)
    all_experts = shape is not None and shape.num_experts and not shape.n_dense_layers
    return "every block has experts (model.shape.n_dense_layers is 0)" if all_experts else ""


def _no_decay(draft: Draft) -> str:
    return "lr_scheduler.decay_ratio is 0" if draft.get("lr_scheduler", "decay_ratio") == 0 else ""


def _not_our_loss(draft: Draft) -> str:
    return "" if draft.get("nitp", "enable") else "NITP is off"


def _not_chunked(draft: Draft) -> str:
    name = loss_name(draft.get("loss", "name"), draft.get("nitp", "enable"))
    if name == "linear_cross_entropy":
        return "NITP is on"
    return "" if name == "chunked_cross_entropy" else f"the loss is {name}"


def _one_rank(draft: Draft) -> str:
    # Two ranks that only replicate do not shard; what FSDP makes of weights on one rank is nothing.
    return "there is one rank" if draft.world_size == 1 else ""


def _no_events(draft: Draft) -> str:
    if draft.get("metrics", "enable_tensorboard") or draft.get("metrics", "enable_wandb"):
        return ""
    return "metrics.enable_tensorboard and metrics.enable_wandb are false"


def _no_initial_load(draft: Draft) -> str:
    if draft.get("checkpoint", "initial_load_path") or draft.get("checkpoint", "initial_load_in_hf"):
        return ""
    return "checkpoint.initial_load_path is unset"


def _no_profile(draft: Draft) -> str:
    if draft.get("profiler", "enable_profiling"):
        return ""
    by_snapshots = draft.get("profiler", "enable_memory_snapshot")
    if by_snapshots and draft.get("profiler", "memory_snapshot_freq") is None:
        return ""
    return "profiler.enable_profiling is false"


def unread(draft: Draft, derive: Callable[[Draft], None]) -> tuple[list[str], list[str]]:
    """Return what somebody has set and nothing reads, a line each.

    Args:
        draft: a job whose defaults are filled in.
        derive: what fills them in, to tell a value that was set from one that would be there anyway.

    Returns:
        What somebody has switched off, and what nobody has switched on.
    """
    lines: tuple[list[str], list[str]] = ([], [])
    told: set[tuple[str, str]] = set()
    for gate in gates():
        for key in gate.keys:
            place = gate.table, key
            try:
                reason = gate.closed(draft) if place not in told and draft.is_written(*place) else ""
                ignored = bool(reason) and _is_set(draft, place, derive)
            except Unknown:
                continue
            if ignored:
                told.add(place)
                switched_off = bool(gate.key) and draft.is_written(*gate.key.rsplit(".", 1))
                lines[0 if switched_off else 1].append(
                    f"{gate.table}.{key} is ignored: {reason}{_place(draft.settings[place])}"
                )
    return lines


def _place(setting: Setting) -> str:
    return f" ({setting.where}:{setting.line})" if setting.line else ""


def _is_set(draft: Draft, place: tuple[str, str], derive: Callable[[Draft], None]) -> bool:
    """Whether a value that is written is another than would be there anyway, as a resolved file's are."""
    value = draft.get(*place)
    table, key = place
    if table == "validator.dataloader" and value == draft.get("dataloader", key):
        return False
    without = replace(draft, settings={**draft.settings, place: draft.base[place]}, notes=[], replaced={})
    derive(without)
    return value != without.settings[place].value
