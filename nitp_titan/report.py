"""What ``nitp-titan report`` says of a model and its job, and the two lines of it that ``nitp-titan check`` has.

The arithmetic, and what each figure means, is in :mod:`nitp_titan.costs`. Nothing is allocated and, for our own
models, torch is not imported; any other decoder is built on the meta device and its parameters counted by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nitp_titan.costs import WAYS, Block, Parts, flops, mtp_flops, nitp_flops, parts_of_shape, projector_params
from nitp_titan.describe import model_rows, named
from nitp_titan.job import Job, JobError, Problem, load_job
from nitp_titan.job.check import loss_name
from nitp_titan.job.errors import nearest
from nitp_titan.job.models import head_dim_of
from nitp_titan.job.shape import changes_of
from nitp_titan.memory import CAPACITY, GIB, Run, fits, memory
from nitp_titan.models.flavors import FLAVORS


def report(flavor_or_file: str, overrides: list[str], ngpu: int) -> dict[str, Any]:
    """Return the costs of a flavor in its own job, or of the job of a file, as what ``--json`` prints.

    Args:
        flavor_or_file: a name of ``FLAVORS``, or the path of a job file.
        overrides: ``--table.key value`` words.
        ngpu: ranks of the run.

    Returns:
        ``flavor``, the ``changes`` of its shape, ``model`` in words (widths, heads, tying, target layer), ``ngpu``;
        ``total_params``, ``active_params`` and ``params`` by part, of the model that leaves;
        ``projector_params``; ``flops_per_token``, ``nitp_overhead_percent`` and ``mtp_overhead_percent``, each with
        the keys "paper" (None for a model that is not ours), "exact" and "with_attention"; ``nitp_flops_per_token``;
        ``memory_gib`` by part with their "total", and ``fits_80gb`` (both None under pipeline parallelism).

    Raises:
        JobError: no such flavor or file, or a job with problems.
    """
    job = _job(flavor_or_file, overrides, ngpu)
    return _costs(job, parts_of_job(job))


def summary(job: Job) -> tuple[str, str]:
    """Return a line on the memory of a job and one on what NITP costs in it; "" where there is nothing to say.

    Both are empty for a model that is not ours: only an import, which takes seconds, can tell.
    """
    if job.shape is None:
        return "", ""
    costs = _costs(job, parts_of_shape(job.shape))
    size, percent, mtp = costs["memory_gib"], costs["nitp_overhead_percent"], costs["mtp_overhead_percent"]
    memory_line = ""
    if size is not None:
        verdict = "fits" if costs["fits_80gb"] else "does not fit"
        memory_line = f"about {size['total']:.1f} GiB a rank: {verdict} a GPU of 80 GB ({CAPACITY / GIB:.1f} GiB)"
    if not job.nitp.enable:
        return memory_line, ""
    return memory_line, (
        f"+{_flops(costs['nitp_flops_per_token'])} a token, {percent['paper']:.1f} % (the paper's formula), "
        f"{percent['with_attention']:.1f} % with attention; MTP-1 would be {mtp['with_attention']:.1f} %"
    )


def render(costs: dict[str, Any]) -> str:
    """Return a report as text for people."""
    lines = [f"{named(costs['flavor'], costs['changes'])} on {costs['ngpu']} rank" + "s" * (costs["ngpu"] > 1), ""]
    lines += [f"{name:<26}{text}" for name, text in costs["model"].items()] + [""]
    lines += [_row("parameters", "all", "share")]
    for name, count in costs["params"].items():
        if count:
            lines.append(_row(f"  {_words(name)}", _count(count), f"{100 * count / costs['total_params']:.1f} %"))
    lines += [
        _row("  total", _count(costs["total_params"])),
        _row("  active on a token", _count(costs["active_params"])),
    ]
    if costs["projector_params"]:
        lines.append(_row("  NITP's projector", _count(costs["projector_params"]), "", "in training only"))
    lines += ["", _row("training FLOPs a token", "paper", "exact", "with attention")]
    lines.append(_row("  model", *(_flops(costs["flops_per_token"][way]) for way in WAYS)))
    if costs["nitp_flops_per_token"]:
        lines.append(_row("  NITP adds", *[_flops(costs["nitp_flops_per_token"])] * 3))
    percents = (("  NITP adds", "nitp_overhead_percent"), ("  MTP-1 would add", "mtp_overhead_percent"))
    lines += [_row(name, *(_percent(costs[key][way]) for way in WAYS)) for name, key in percents]
    lines.append("")
    if costs["memory_gib"] is None:
        return "\n".join([*lines, "memory of a rank: not estimated under pipeline parallelism (see check --dry-run)"])
    lines.append(_row("memory of a rank", "GiB", "", "an estimate"))
    lines += [_row(f"  {_words(name)}", f"{size:.2f}") for name, size in costs["memory_gib"].items()]
    verdict = "fits" if costs["fits_80gb"] else "does not fit"
    return "\n".join([*lines, f"  {verdict} a GPU of 80 GB ({CAPACITY / GIB:.1f} GiB)"])


def _job(flavor_or_file: str, overrides: list[str], ngpu: int) -> Job:
    if flavor_or_file in FLAVORS:
        return load_job(None, ["--model.flavor", flavor_or_file, *overrides], ngpu)
    path = Path(flavor_or_file)
    if path.name == flavor_or_file and not path.exists():
        raise JobError([Problem(flavor_or_file, "", "no such flavor or file", _nearest(flavor_or_file))])
    return load_job(flavor_or_file, overrides, ngpu)


def _nearest(name: str) -> str:
    meant = {flavor: flavor for flavor in FLAVORS}
    for file in [*Path().glob("*.toml"), *Path("train_configs").glob("*.toml")]:
        meant.setdefault(file.name, str(file))
        meant.setdefault(file.stem, str(file))
    match = nearest(name, meant)
    return f'did you mean "{meant[match]}"?' if match else f"the flavors are {', '.join(FLAVORS)}"


def _costs(job: Job, parts: Parts) -> dict[str, Any]:
    nitp, context = job.nitp, job["training"]["seq_len"]
    base, added, mtp = flops(parts, context), nitp_flops(parts.dim, nitp), mtp_flops(parts, context)
    memory_gib = memory(parts, nitp, job.layout, run_of_job(job))
    return {
        "flavor": job["model"]["flavor"],
        "changes": changes_of(job["model.shape"]),
        "model": model_rows(job),
        "ngpu": job.world_size,
        "total_params": parts.total(),
        "active_params": parts.active(),
        "params": parts.by_part(),
        "projector_params": projector_params(parts.dim, nitp),
        "flops_per_token": base,
        "nitp_flops_per_token": added,
        "nitp_overhead_percent": {way: _of(added, base[way]) for way in WAYS},
        "mtp_overhead_percent": {way: _of(mtp[way], base[way]) for way in WAYS},
        "memory_gib": memory_gib,
        "fits_80gb": fits(memory_gib),
    }


def _of(added: int | None, base: int | None) -> float | None:
    return None if added is None or base is None else 100 * added / base


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
    from nitp_titan.job.build import model_spec

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


def _row(name: str, *columns: str) -> str:
    return (f"{name:<26}" + "".join(f"{column:>18}" for column in columns)).rstrip()


def _words(name: str) -> str:
    return name.replace("_", " ")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"


def _count(number: float) -> str:
    """As three digits: 8.75B."""
    return _scaled(number, ("", "k", "M", "B", "T"))


def _flops(number: float | None) -> str:
    """As three digits: 5.06 GFLOPs."""
    return "-" if number is None else _scaled(number, (" ", " k", " M", " G", " T")) + "FLOPs"


def _scaled(number: float, units: tuple[str, ...]) -> str:
    power = 0
    # 999.5 has a fourth digit once it is rounded.
    while number >= 999.5 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    decimals = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:.{decimals}f}{units[power]}" if power else f"{number:,}{units[0]}"
