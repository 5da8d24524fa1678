"""``nitp-titan check --dry-run``: what each rank of a job holds, without a GPU and without allocating it.

One rank of each place in the pipeline is built (:mod:`nitp_titan.tools.estimate.fake_ranks`); the parameters that every
other one has, its gradients and its optimizer's moments follow from the placements, number by number. What comes and
goes during a step is the estimate of :mod:`nitp_titan.tools.estimate.memory`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nitp_titan.job import Job, JobError, Problem
from nitp_titan.job.build import build_trainer_config
from nitp_titan.models.costs import Parts
from nitp_titan.nitp.config import PROJECTOR_PREFIX
from nitp_titan.tools.estimate.fake_ranks import LayoutError, RankModel, ShardedParameter, rank_model
from nitp_titan.tools.estimate.memory import GIB, Run, Stage, memory, verdict
from nitp_titan.tools.estimate.parts import parts_of_job, run_of_job

COUNTED = ("weights", "gradients", "optimizer_states", "projector", "buffers")
"""The parts of a rank's memory that are counted; the others are estimates."""

_PARTS = ("backbone", "experts", "projector")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankGroup:
    """Ranks that hold the same numbers of parameters."""

    ranks: tuple[int, ...]
    holds: str
    """Its place in the pipeline: "blocks 0-5, embedding". Empty without a pipeline."""
    backbone: int
    """Parameters of a rank besides routed experts and projector."""
    experts: int
    projector: int
    memory_gib: dict[str, float]
    """By part, with their sum as "total"; those of ``COUNTED`` are exact."""

    @property
    def parameters(self) -> int:
        """Parameters of a rank."""
        return self.backbone + self.experts + self.projector

    @property
    def held_gib(self) -> float:
        """What the rank holds all the time."""
        return sum(self.memory_gib[name] for name in COUNTED)


def dry_run(job: Job) -> list[RankGroup]:
    """Build the job's model as its ranks would, and return what they hold, by groups of equal ranks.

    ``nitp_titan.runtime.prepare()`` is called first.

    Raises:
        JobError: TorchTitan or torch refuses the layout; the message is theirs.
    """
    config = build_trainer_config(job)
    parts, run = parts_of_job(job), run_of_job(job)
    stage_size = job.world_size // job.layout.pipeline
    groups: list[RankGroup] = []
    for place in range(job.layout.pipeline):
        try:
            # The last rank has what is left over where shards are uneven.
            model = rank_model(config, job.world_size, (place + 1) * stage_size - 1)
        except LayoutError as error:
            raise JobError([Problem(job.file, "[parallelism]", f"{job.layout}: {error}")]) from error
        groups += _groups(model, job, parts, run)
    return groups


def _groups(model: RankModel, job: Job, parts: Parts, run: Run) -> Iterator[RankGroup]:
    stage = None
    if job.layout.pipeline > 1:
        target = job.nitp.target_layer_of(len(parts.blocks)) if job.nitp.enable else None
        stage = _stage(model, target if job.nitp.has_target else None)
    estimate = memory(parts, job.nitp, job.layout, run, stage)
    assert estimate is not None, "a rank of a pipeline has a stage"
    # The parameters of most blocks are of the same kinds.
    kinds = Counter(dataclasses.replace(p, name=_part(p)) for p in model.parameters)
    ranks: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for rank in model.ranks:
        held, weights, gradients = Counter[str](), Counter[str](), Counter[str]()
        for parameter, number in kinds.items():
            size = number * parameter.itemsize * parameter.allocated(rank)
            held[parameter.name] += number * parameter.held(rank)
            weights[parameter.name] += size
            gradients[parameter.name] += size * parameter.gradients
        key = tuple(tuple(counts[part] for part in _PARTS) for counts in (held, weights, gradients))
        ranks.setdefault(key, []).append(rank)
    for (held, weights, gradients), members in ranks.items():
        counted = _counted(held, weights, gradients, run) | {"buffers": model.buffer_bytes}
        gib = {name: counted[name] / GIB for name in COUNTED}
        gib |= {name: size for name, size in estimate.items() if name not in (*COUNTED, "total")}
        yield RankGroup(
            ranks=tuple(members),
            holds=_holds(model) if stage else "",
            **dict(zip(_PARTS, held, strict=True)),
            memory_gib=gib | {"total": sum(gib.values())},
        )


def _part(parameter: ShardedParameter) -> str:
    if parameter.name.startswith(PROJECTOR_PREFIX):
        return "projector"
    return "experts" if ".routed_experts." in parameter.name else "backbone"


def _counted(held: tuple[int, ...], weights: tuple[int, ...], gradients: tuple[int, ...], run: Run) -> dict[str, float]:
    """Return the bytes on the device of what each of ``_PARTS`` takes: two moments of the numbers that are held."""
    moments = [2 * run.state_bytes * number for number in held]
    counted = {
        "weights": sum(weights[:2]),
        "gradients": sum(gradients[:2]),
        "optimizer_states": sum(moments[:2]),
        "projector": weights[2] + gradients[2] + moments[2],
    }
    return {name: 0 if run.offload else size for name, size in counted.items()}


def _stage(model: RankModel, target_layer: int | None) -> Stage:
    received = sum((not part.first) + (not part.last) for part in model.parts)
    if target_layer is not None:
        # z comes with the input of every stage after its block, but for the one whose input it is.
        received += sum(not part.first and min(part.blocks, default=target_layer + 1) > target_layer
                        for part in model.parts)  # fmt: skip
    return Stage(
        in_flight={block: part.in_flight for part in model.parts for block in part.blocks},
        first=any(part.first for part in model.parts),
        last=any(part.last for part in model.parts),
        micro_batches=model.micro_batches,
        received=received,
    )


def _holds(model: RankModel) -> str:
    names = [f"blocks {_spans(block for part in model.parts for block in part.blocks)}"]
    names += ["embedding"] if any(part.first for part in model.parts) else []
    names += ["unembedding"] if any(part.last for part in model.parts) else []
    return ", ".join(names)


def _spans(numbers: Iterable[int], most: int = 4) -> str:
    """Return sorted numbers as "0-3, 8-11"; of many spans the first ones and how many more there are."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    words = [f"{first}-{last}" if last > first else f"{first}" for first, last in spans]
    return ", ".join(words[:most]) + (f", {len(words) - most} more spans" if len(words) > most else "")


def render(groups: list[RankGroup]) -> str:
    """Return the groups as a table for people, and the memory of the fullest rank by part."""
    world = sum(len(group.ranks) for group in groups)
    lines = [
        f"dry run   {world:,} rank{'s' * (world > 1)} on a fake process group, nothing allocated; ~ is an estimate",
        "",
        _row("ranks", "parameters", "backbone", "experts", "projector", "GiB held", "~ GiB in all"),
    ]
    place = ""
    for group in groups:
        if group.holds != place:
            lines.append(group.holds)
            place = group.holds
        numbers = [group.parameters, group.backbone, group.experts, group.projector]
        sizes = [f"{group.held_gib:.2f}", f"~ {group.memory_gib['total']:.1f}"]
        lines.append(_row(_spans(group.ranks), *(f"{number:,}" for number in numbers), *sizes))
    fullest = max(groups, key=lambda group: group.memory_gib["total"])
    lines += ["", f"memory of rank {fullest.ranks[0]}, the fullest, GiB"]
    for name, size in fullest.memory_gib.items():
        lines.append(f"  {name.replace('_', ' '):<24}{'' if name in COUNTED else '~':>2}{size:>9.2f}")
    return "\n".join([*lines, f"  {verdict(fullest.memory_gib)}"])


def _row(name: str, *columns: str) -> str:
    return f"{name:<20}" + "".join(f"{column:>15}" for column in columns)
