"""The parts of a job's model and what a rank of it does, for estimates of FLOPs and memory."""

from __future__ import annotations

from typing import Any

from nitp_titan.job import Job, JobError, Problem
from nitp_titan.job.loss_name import loss_name
from nitp_titan.job.model_facts import head_dim_of
from nitp_titan.models.costs import Block, Parts, parts_of_shape
from nitp_titan.tools.estimate.memory import Run


def parts_of_job(job: Job) -> Parts:
    """Return the parts of a job's model; one that is not ours is imported.

    Raises:
        JobError: the model cannot be built here.
    """
    return parts_of_shape(job.shape) if job.shape is not None else _imported_parts(job)


def run_of_job(job: Job) -> Run:
    """Return what a rank of the job does at a time."""
    table, checkpointing, parallelism = job["training"], job["activation_checkpoint"], job["parallelism"]
    in_pipeline = job.layout.pipeline > 1
    sequences = parallelism["pipeline_parallel_microbatch_size"] if in_pipeline else table["local_batch_size"]
    seq_len = table["seq_len"]
    loss = loss_name(job["loss"]["name"], job.nitp.enable)
    tokens = sequences * seq_len // job.layout.context
    if loss == "linear_cross_entropy":
        tokens = job["loss"]["chunk_tokens"]
    elif loss == "chunked_cross_entropy":
        tokens = -(-tokens // job["loss"]["num_chunks"])
    # Without a GPU the default is float32. What is asked for here is the memory of one.
    chosen = job.sources["training"]["mixed_precision_param"] not in ("nitp_titan", "upstream")
    narrow = table["dtype"] == "bfloat16"
    fp32 = not narrow and chosen and table["mixed_precision_param"] == "float32"
    return Run(
        sequences=sequences,
        seq_len=seq_len,
        logits_tokens=tokens,
        eager_loss=loss == "linear_cross_entropy" and job["loss"]["implementation"] == "fast",
        checkpointing=checkpointing["mode"],
        memory_budget=checkpointing["memory_budget"],
        compute_bytes=4 if fp32 else 2,
        weight_bytes=2 if narrow else 4,
        state_bytes=2 if narrow or job["optimizer"]["implementation"] == "fused_opt_states_bf16" else 4,
        # A pipeline's micro-batches would gather a block's weights again and again.
        reshard=parallelism["fsdp_reshard_after_forward"] in (("always",) if in_pipeline else ("always", "default")),
        offload=table["enable_cpu_offload"],
    )


def _imported_parts(job: Job) -> Parts:
    from nitp_titan.job.backbone import model_spec

    table = job["model"]
    try:
        # Attention has the same parameters whatever computes it, and some of it is made only where its GPU is.
        return parts_of_config(model_spec(table["module"], table["flavor"], "flex").model)
    except Exception as error:  # somebody else's code, which may need what is not installed
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        message = f"{table['module']} {table['flavor']} cannot be built: {reason}"
        raise JobError([Problem(job.file, "[model] module", message)]) from error


def parts_of_config(config: Any) -> Parts:
    """Return the parts of any TorchTitan decoder, from the names and shapes of its parameters.

    A block's matrices outside feed-forward and experts are its attention's. What is not in a block (a vision tower)
    counts as a part of its own that no token passes; multi-token-prediction heads count as blocks.
    """
    import torch

    with torch.device("meta"):
        model = config.build()
    layers = [*config.layers, *(getattr(config, "mtp_layers", None) or [])]
    counts: list[dict[str, int]] = [{} for _ in layers]
    final_norm = other = 0
    for name, parameter in model.named_parameters():
        stack, _, rest = name.partition(".")
        index, _, inner = rest.partition(".")
        if stack in ("layers", "mtp_layers"):
            block = counts[int(index) + (len(config.layers) if stack == "mtp_layers" else 0)]
            part = _part_of(inner, parameter.ndim)
            block[part] = block.get(part, 0) + parameter.numel()
        elif stack == "norm":
            final_norm += parameter.numel()
        elif stack not in ("tok_embeddings", "lm_head"):
            other += parameter.numel()
    return Parts(
        dim=config.dim,
        vocab_size=config.vocab_size,
        tied=config.enable_weight_tying,
        blocks=tuple(
            Block(**{"attention": 0, **count}, **_widths(layer, config.dim))
            for layer, count in zip(layers, counts, strict=True)
        ),
        final_norm=final_norm,
        other=other,
    )


def _part_of(name: str, ndim: int) -> str:
    """The field of :class:`Block` that counts a parameter of a block."""
    # Matrices, or a stack of them; gpt_oss has a bias for each expert.
    if ndim < 2 or "bias" in name or "norm" in name.split(".")[0]:
        return "norms"
    for module, part in (
        ("routed_experts", "routed_experts"),
        ("shared_experts", "shared_experts"),
        ("router", "router"),
        ("feed_forward", "feed_forward"),
    ):
        if module in name:
            return part
    return "attention"


def _widths(layer: Any, dim: int) -> dict[str, int]:
    attention, moe = getattr(layer, "attention", None), getattr(layer, "moe", None)
    widths = {"num_experts": moe.num_experts, "top_k": moe.router.top_k} if moe is not None else {}
    if attention is None:
        return widths
    heads, key = attention.n_heads, head_dim_of(attention, dim)
    assert key is not None, "an attention with heads"
    if hasattr(attention, "kv_lora_rank"):  # multi-head latent attention
        value, kv_heads = attention.v_head_dim, heads
    else:
        value = key
        kv_heads = getattr(attention, "n_kv_heads", None) or heads
    return widths | {
        "heads": heads,
        "query": heads * key,
        "key": kv_heads * key,
        "value": kv_heads * value,
        "attended": heads * value,
    }
