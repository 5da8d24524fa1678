"""What ``nitp-titan report`` says of a model and its job, and the two lines of it that ``nitp-titan check`` has.

The arithmetic, and what each figure means, is in :mod:`nitp_titan.models.costs`. Nothing is allocated and, for our own
models, torch is not imported; any other decoder is built on the meta device and its parameters counted by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from nitp_titan.job import Job, JobError, Problem, load_job
from nitp_titan.job.errors import nearest
from nitp_titan.job.shape import changes_of
from nitp_titan.models.costs import WAYS, Parts, flops, mtp_flops, nitp_flops, parts_of_shape
from nitp_titan.models.flavors import FLAVORS
from nitp_titan.nitp.config import projector_params
from nitp_titan.tools.describe import model_rows, named
from nitp_titan.tools.estimate.memory import fits, memory, verdict
from nitp_titan.tools.estimate.parts import parts_of_job, run_of_job


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


class Summary(NamedTuple):
    """What a job takes, in two lines; "" where there is nothing to say."""

    memory: str
    cost: str
    """What NITP adds."""
    fits: bool | None
    """Whether the memory of a rank fits an 80 GB GPU; None where that is not known."""


def summary(job: Job) -> Summary:
    """Return what a job takes; nothing of a model that is not ours: only an import, which takes seconds, can tell."""
    if job.shape is None:
        return Summary("", "", None)
    costs = _costs(job, parts_of_shape(job.shape))
    size, percent, mtp = costs["memory_gib"], costs["nitp_overhead_percent"], costs["mtp_overhead_percent"]
    memory_line = ""
    if size is not None:
        memory_line = f"about {size['total']:.1f} GiB a rank: {verdict(size)}"
    if not job.nitp.enable:
        return Summary(memory_line, "", costs["fits_80gb"])
    cost_line = (
        f"+{_flops(costs['nitp_flops_per_token'])} a token, {percent['paper']:.1f} % (the paper's formula), "
        f"{percent['with_attention']:.1f} % with attention; MTP-1 would be {mtp['with_attention']:.1f} %"
    )
    return Summary(memory_line, cost_line, costs["fits_80gb"])


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
    return "\n".join([*lines, f"  {verdict(costs['memory_gib'])}"])


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
