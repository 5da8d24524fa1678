"""What ``nitp-titan check`` prints: a job in a few lines."""

from __future__ import annotations

from collections.abc import Iterator

from nitp_titan.job.checks.schedule import Schedule
from nitp_titan.job.checks.tokenizer import tokenizer_notes
from nitp_titan.job.errors import quote
from nitp_titan.job.job import Job
from nitp_titan.job.keys.schema import all_tables
from nitp_titan.job.keys.types import describe
from nitp_titan.job.loss_name import loss_name
from nitp_titan.job.shape import TABLE as SHAPE
from nitp_titan.job.write import meanings
from nitp_titan.nitp.config import projector_params
from nitp_titan.runtime import machine
from nitp_titan.tools import float8_summary
from nitp_titan.tools.describe import flavor_name, target_of
from nitp_titan.tools.report import summary

_ASSUMED = {
    "h100": "explained for an H100 (--device here or cpu for another)",
    "cpu": "explained for a CPU (--device here or h100 for another)",
}
_SAVES_MEMORY = 'more ranks, a smaller training.local_batch_size or activation_checkpoint.mode = "full" take less'


def explain(job: Job) -> str:
    """Return :func:`explanation`'s text."""
    return explanation(job)[0]


def explanation(job: Job) -> tuple[str, list[str]]:
    """Return the job as a dozen lines of text, and the warnings among them.

    They say what is trained, on what, how, where to, at what cost, and what to know before it is.
    """
    memory, cost, fits = summary(job)
    float8_lines, of_float8 = float8_summary.explain(job)
    misfit = [f"the memory does not fit: {_SAVES_MEMORY}"] if fits is False else []
    warnings = [*misfit, *of_float8, *job.doubts, *map(str, job.warnings)]
    rows = [
        *([("job", job["job"]["description"])] if job["job"]["description"] else []),
        ("model", _model(job)),
        ("nitp", _nitp(job)),
        ("data", _data(job)),
        ("steps", _steps(job)),
        ("optimizer", _optimizer(job)),
        ("layout", _layout(job)),
        *([("memory", memory)] if memory else []),
        *([("cost", f"NITP: {cost}")] if cost else []),
        *zip(["float8", *[""] * len(float8_lines)], float8_lines, strict=False),
        ("output", _output(job)),
        *([("device", _ASSUMED[machine.device()])] if machine.device() in _ASSUMED else []),
        *[("note", note) for note in job.notes if note not in job.doubts],
        *[("note", note) for note in tokenizer_notes(job["model"]["hf_assets_path"], dict(job["tokenizer"]))],
        *[("warning", warning) for warning in warnings],
    ]
    return "\n".join(f"{name:<10}{text}" for name, text in rows), warnings


def _model(job: Job) -> str:
    table, model = job["model"], job.model
    name = f"{table['module']} {flavor_name(job)}"
    if model is None:
        return name
    parts = [f"{model.n_layers} blocks", f"width {model.dim:,}", f"vocabulary {model.vocab_size:,}"]
    parts[-1] += " (embeddings tied)" if model.tied else " (embeddings untied)"
    if model.n_heads:
        key_value = f"{model.n_kv_heads} key-value, " if model.n_kv_heads else ""
        parts.append(f"{model.n_heads} heads" + (f" ({key_value}head dim {model.head_dim})" if model.head_dim else ""))
    if model.hidden_dim:
        parts.append(f"feed-forward {model.hidden_dim:,}")
    if model.num_experts:
        parts.append(f"expert {model.expert_hidden_dim:,}")
        parts.append(f"{model.num_experts} experts, top {model.top_k}")
    if model.params:
        parts.append(f"{_short(model.params)} parameters")
    return f"{name}: {', '.join(parts)}"


def _nitp(job: Job) -> str:
    nitp = job.nitp
    if not nitp.enable:
        return "off: stock TorchTitan"
    if not nitp.has_target:
        return f"generic cosine regulariser, weight {nitp.weight:g} (no target, no projector)"
    target = target_of(job)
    which = "next token" if nitp.shift else "same position"
    projector = "no projector"
    if job.model and (size := projector_params(job.model.dim, nitp)):
        projector = f"SwiGLU projector of {_short(size)} parameters (training only)"
    extras = ["" if nitp.stop_gradient else "gradient into the target", f"from step {nitp.start_step}"]
    shown = [extra for extra in extras if extra and extra != "from step 0"]
    return ", ".join([f"{nitp.loss} to {target}", which, f"weight {nitp.weight:g}", projector, *shown])


def _data(job: Job) -> str:
    table = job["dataloader"]
    source = f"{table['dataset']} {table['dataset_path'] or ''}".rstrip()
    tokenizer = {"byte": "byte tokenizer", "huggingface": f"tokenizer of {job['model']['hf_assets_path'] or '(unset)'}"}
    parts = [source, tokenizer[job["tokenizer"]["name"]]]
    if job["validator"]["enable"]:
        parts.append(f"validated on {job['validator.dataloader']['dataset']} every {job['validator']['freq']} steps")
    return ", ".join(parts)


def _steps(job: Job) -> str:
    table = job["training"]
    batch, steps = table["global_batch_size"], table["steps"]
    micro = batch // (table["local_batch_size"] * job.layout.data_parallel)
    tokens = batch * table["seq_len"]
    accumulated = f" ({micro} micro-batches of {table['local_batch_size']} a rank)" if micro > 1 else ""
    return (
        f"{steps:,} of {batch:,} sequences x {table['seq_len']:,} = {tokens:,} tokens{accumulated}, "
        f"{_short(tokens * steps)} tokens in all"
    )


def _optimizer(job: Job) -> str:
    table, schedule = job["optimizer"], job["lr_scheduler"]
    parts = Schedule.of(lambda table, key: job[table][key])
    loss = loss_name(job["loss"]["name"], job["nitp"]["enable"])
    return (
        f"{table['name']}, learning rate {table['lr']:g}: {parts.warmup:,} steps up, {parts.stable:,} stable, "
        f"{parts.decay:,} down ({schedule['decay_type']}); loss {loss}"
    )


def _layout(job: Job) -> str:
    parts = [str(job.layout), f"{job['training']['mixed_precision_param']} products"]
    parts.append(f"activation checkpointing {job['activation_checkpoint']['mode']}")
    if job["compile"]["enable"] and job["compile"]["components"]:
        parts.append("compiled")
    if not job["training"]["disable_cuda_graphs"]:
        parts.append("CUDA graphs")
    return ", ".join(parts)


def _output(job: Job) -> str:
    table, folder = job["checkpoint"], job["job"]["dump_folder"]
    if not table["enable"]:
        return f"{folder}, no checkpoints (checkpoint.enable)"
    kept = f"the last {table['keep_latest_k']} kept" if table["keep_latest_k"] else "all kept"
    return f"{folder}, a checkpoint every {table['interval']:,} steps, {kept}"


def _short(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,}"


def explain_keys(job: Job, table: str | None = None) -> Iterator[str]:
    """Yield the lines of ``nitp-titan check --keys``: every key of a table, or of all, with its value in a job.

    Raises:
        KeyError: no such table.
    """
    stands_for = meanings(job)
    for name in [table] if table else all_tables():
        yield f"[{name}]"
        for key in all_tables()[name].values():
            value, source = job[name][key.name], job.sources[name][key.name]
            if name == SHAPE and value is None and job.shape is not None:
                value, source = getattr(job.shape, key.name), "flavor"
            yield f"  {key.name} = {quote(value)}    {describe(key.type)}"
            if key.doc:
                yield f"      {key.doc}"
            whose = _SOURCES[source].format(flavor=job["model"]["flavor"], file=job.file)
            meaning = stands_for.get((name, key.name))
            yield f"      {whose}" + (f": {meaning}" if meaning else "")
        yield ""


_SOURCES = {
    "command line": "set on the command line",
    "file": "set in {file}",
    "flavor": "default of the flavor {flavor}",
    "nitp_titan": "default of nitp_titan",
    "upstream": "default of TorchTitan",
}
