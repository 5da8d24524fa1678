"""nitp_titan's own defaults, where they differ from TorchTitan's or depend on the rest of the job."""

from __future__ import annotations

from typing import Any

from nitp_titan.job.draft import Draft, Unknown
from nitp_titan.job.keys.schema import all_tables
from nitp_titan.job.layout import DEGREES, Layout, expert_degree, shard_degree
from nitp_titan.nitp.config import REGULARISER, NITPConfig
from nitp_titan.runtime import machine

STATIC: dict[str, dict[str, Any]] = {
    # Upstream's default, spmd_types, needs torch >= 2.14.
    "parallelism": {"spmd_backend": "partial_dtensor"},
    "metrics": {"enable_tensorboard": True, "log_freq": 10},
    # A run can be repeated; upstream draws another seed each time.
    "debug": {"seed": 42},
}
"""Table -> key -> default."""


def derive(draft: Draft) -> None:
    """Fill in the defaults that depend on the machine, the model or other keys."""
    draft.restore()
    for rule in RULES:
        try:
            rule(draft)
        except Unknown:
            continue


def _layout(draft: Draft) -> None:
    degrees = {key: draft.get("parallelism", key) for key in DEGREES}
    world = draft.world_size
    if world == 1 or not all(draft.is_default("parallelism", key) for key in degrees):
        return
    # TorchTitan's own default shards over all ranks. It stays -1, so that the resolved file fits other worlds too.
    experts = expert_degree(world, draft.facts().num_experts)
    shard = shard_degree(draft.facts(), world, expert=experts)
    text = f"layout: FSDP over {shard} ranks"
    if shard < world:
        draft.derive("parallelism", "data_parallel_replicate_degree", world // shard)
        text += f", {world // shard} replicas"
    if experts > 1:
        draft.derive("parallelism", "expert_parallel_degree", experts)
        text += f", experts over {experts}"
    draft.notes.append(f"{text} (chosen for {world} ranks; set parallelism.* to choose)")


def _device(draft: Draft) -> None:
    gpu = machine.has_gpu()
    draft.derive("optimizer", "implementation", "fused" if gpu else "foreach")
    draft.derive("training", "mixed_precision_param", "bfloat16" if gpu else "float32")


def _recomputation(draft: Draft) -> None:
    small = machine.is_small(draft.get("model", "flavor"))
    draft.derive("activation_checkpoint", "mode", "none" if small else "selective")


def _geometry(draft: Draft) -> None:
    # The baseline without NITP is measured too, to be compared with. CUDA graphs do not go with it: whoever wants both
    # is told so.
    asked_for_graphs = not draft.is_default("training", "disable_cuda_graphs")
    if asked_for_graphs and not draft.get("training", "disable_cuda_graphs"):
        draft.derive("nitp", "geometry_freq", 0)


def _target_layer(draft: Draft) -> None:
    # Written out, so that the resolved file says which layer it was; "none" asks for the same choice.
    chosen = draft.get("nitp", "enable") and draft.get("nitp", "loss") != REGULARISER
    if chosen and draft.get("nitp", "target_layer") is None:
        draft.replace("nitp", "target_layer", NITPConfig().target_layer_of(draft.facts().n_layers))


def _cuda_graphs(draft: Draft) -> None:
    if not draft.is_default("training", "disable_cuda_graphs"):
        return
    reason = _why_no_cuda_graphs(draft)
    draft.derive("training", "disable_cuda_graphs", bool(reason))
    if reason:
        draft.notes.append(f"CUDA graphs are off: {reason}")


def _why_no_cuda_graphs(draft: Draft) -> str:
    if not machine.has_gpu():
        return "there is no CUDA device"
    if not machine.records_attention():
        return "a recorded step does not take the next one's attention masks with torch < 2.13"
    if draft.get("parallelism", "pipeline_parallel_degree") > 1:
        return "they do not go with pipeline parallelism"
    if draft.get("parallelism", "expert_parallel_degree") > 1 or (draft.model and draft.model.num_experts):
        return "routing tokens to experts synchronises with the CPU"
    if draft.get("nitp", "enable") and draft.get("nitp", "start_step") > 0:
        return "a recorded step cannot change at nitp.start_step"
    if draft.get("nitp", "geometry_freq") > 0:
        return "geometry metrics read hidden states, which a recorded step does not show (nitp.geometry_freq = 0)"
    if draft.get("model", "attn_backend") == "varlen":
        return "varlen attention has shapes that depend on the documents"
    return ""


def _reference_loss(draft: Draft) -> None:
    fast = draft.is_written("loss", "implementation") and draft.get("loss", "implementation") == "fast"
    if fast and draft.get("nitp", "enable") and not draft.get("nitp", "stop_gradient"):
        draft.notes.append('loss.implementation is "reference" for the NITP loss: nitp.stop_gradient is off')


def _last_checkpoint(draft: Draft) -> None:
    # A model-only checkpoint, upstream's default for the last one, cannot be resumed; Hugging Face's format is one.
    draft.derive("checkpoint", "last_save_model_only", draft.get("checkpoint", "last_save_in_hf"))


def _validation_data(draft: Draft) -> None:
    table = "validator.dataloader"
    if not draft.is_default(table, "dataset"):
        return
    for key in all_tables()[table]:
        if ("dataloader", key) not in draft.bad:
            draft.derive(table, key, draft.get("dataloader", key))
    if draft.get("dataloader", "dataset") == "c4":
        draft.derive(table, "dataset", "c4_validation")
    elif draft.get("validator", "enable"):
        draft.notes.append("validation reads the training data: set [validator.dataloader] for other")


def _local_batch(draft: Draft) -> None:
    local, total = draft.get("training", "local_batch_size"), draft.get("training", "global_batch_size")
    ranks = Layout.of(draft).data_parallel
    if draft.is_written("training", "local_batch_size") or local < 1 or total < 1 or total % ranks:
        return
    share = total // ranks
    fitting = max(size for size in range(1, min(local, share) + 1) if share % size == 0)
    if fitting < local:
        draft.replace("training", "local_batch_size", fitting)
        each = f"{total} sequences over {ranks} rank" + "s" * (ranks > 1)
        draft.notes.append(f"training.local_batch_size is {fitting}, not {local}: {each} are {share} each")


def _global_batch(draft: Draft) -> None:
    # Written out, so that the resolved file gives the same batches on another number of ranks.
    if draft.get("training", "global_batch_size") == -1:
        dp = Layout.of(draft).data_parallel
        value = draft.get("training", "local_batch_size") * dp
        if value > 0:
            draft.replace("training", "global_batch_size", value)


RULES = (
    _layout,
    _device,
    _recomputation,
    _geometry,
    _target_layer,
    _cuda_graphs,
    _reference_loss,
    _last_checkpoint,
    _validation_data,
    _local_batch,
    _global_batch,
)
"""In this order: CUDA graphs depend on layout and geometry."""
