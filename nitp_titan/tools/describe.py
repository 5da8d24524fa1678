"""A job's model and NITP's target in words, as ``nitp-titan check`` and ``nitp-titan report`` have them."""

from __future__ import annotations

from typing import Any

from nitp_titan.job import Job
from nitp_titan.job.errors import quote
from nitp_titan.job.shape import changes_of


def flavor_name(job: Job) -> str:
    """Return the flavor's name and what the job changes in its shape: "0.5B with dim = 512 (changed)"."""
    return named(job["model"]["flavor"], changes_of(job["model.shape"]))


def named(flavor: str, changes: dict[str, Any]) -> str:
    """Return a flavor's name with the changes of its shape."""
    said = [f"{key} = {quote(value)}" for key, value in changes.items()]
    return flavor + (f" with {', '.join(said)} (changed)" if said else "")


def target_of(job: Job) -> str:
    """Return NITP's target layer and whose choice it is: "block 5 of 24 (the flavor's)". It needs one."""
    layer, source = job["nitp"]["target_layer"], job.sources["nitp"]["target_layer"]
    depth = job.model.n_layers if job.model else 0
    whose = {"flavor": "the flavor's", "nitp_titan": "a fifth of the depth", "file": "the file's"}
    whose["command line"] = "the command line's"
    where = "the embeddings" if layer == 0 else f"block {layer} of {depth}"
    return f"{where} ({whose[source]})"


def model_rows(job: Job) -> dict[str, str]:
    """Return what a reader checks a model by, as rows of text."""
    model, nitp = job.model, job.nitp
    assert model is not None, "a job whose costs are counted has a model"
    widths = {"model": model.dim, "feed-forward": model.hidden_dim, "an expert": model.expert_hidden_dim}
    heads = f"{model.n_heads}" + (f", {model.n_kv_heads} key-value" if model.n_kv_heads else "")
    targeted = nitp.enable and nitp.has_target
    return {
        "blocks": f"{model.n_layers}",
        "widths": ", ".join(f"{name} {width:,}" for name, width in widths.items() if width),
        "heads": f"{heads}, head dim {model.head_dim}" if model.n_heads else "-",
        "embeddings": f"{model.vocab_size:,} x {model.dim:,}, {'tied' if model.tied else 'untied'}",
        "NITP's target": target_of(job) if targeted else "-",
    }
