"""The model of a training job as one of its ranks has it, sharded but never allocated.

One process plays the rank in a process group of the "fake" backend: the trainer's own constructor builds the model on
the meta device, divides it into pipeline stages and shards it, and is left where it would allocate the weights. What
TorchTitan refuses there, it refuses here. From the placements of the rank's parameters follow every other rank's.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import logging
import math
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import init_fake_mode

from nitp_titan.nitp.dtensors import local
from nitp_titan.training.trainer import NITPTrainer


@dataclass(frozen=True, slots=True)
class Split:
    """An axis of a device mesh that shards a parameter."""

    dim: int
    """Of the parameter."""
    size: int
    """Ranks along the axis."""
    stride: int
    """From a rank to the next one along the axis."""
    pads: bool
    """Whether every rank allocates as much as the first one has: FSDP's does."""


@dataclass(frozen=True, slots=True)
class ShardedParameter:
    """A parameter, and how the ranks share it."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    splits: tuple[Split, ...]
    """In the order in which they are applied: what FSDP shards has been sharded by tensor parallelism before."""
    gradients: int = 1
    """Shards of memory that its gradient takes."""

    def held(self, rank: int) -> int:
        """Return how many numbers a rank has of it."""
        return self._local_size(rank, padded=False)

    def allocated(self, rank: int) -> int:
        """Return how many numbers the rank's storage has, with FSDP's padding to equal shards."""
        return self._local_size(rank, padded=True)

    def _local_size(self, rank: int, *, padded: bool) -> int:
        shape = list(self.shape)
        for split in self.splits:
            coordinate = 0 if padded and split.pads else rank // split.stride % split.size
            # As torch.chunk: equal shards, until the rest is a smaller one or nothing.
            rows, shard = shape[split.dim], -(-shape[split.dim] // split.size)
            shape[split.dim] = min(max(rows - coordinate * shard, 0), shard)
        return math.prod(shape)


@dataclass(frozen=True, slots=True)
class ModelPart:
    """What a rank has of the model: all of it, or a stage of the pipeline."""

    blocks: tuple[int, ...]
    """Counted from 0."""
    first: bool
    """Whether it has the embedding."""
    last: bool
    """Whether it has the unembedding."""
    in_flight: int
    """Micro-batches whose activations it keeps where the rank keeps most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankModel:
    """The model of a rank, and of the others of its place in the pipeline."""

    ranks: range
    parts: tuple[ModelPart, ...]
    """Several where the pipeline's schedule interleaves stages."""
    parameters: tuple[ShardedParameter, ...]
    """Each once, a tied one too."""
    buffer_bytes: int
    micro_batches: int
    """Of the pipeline; 1 without one."""


class LayoutError(ValueError):
    """A layout that TorchTitan or torch refuses, in its words."""


def rank_model(config: NITPTrainer.Config, world_size: int, rank: int) -> RankModel:
    """Build and shard the model of a rank of a job; ``nitp_titan.runtime.prepare()`` is called first.

    Takes neither a GPU nor the memory of the weights. The process must not be in a process group.

    Raises:
        LayoutError: TorchTitan, torch or NITP refuses the layout.
    """
    assert not torch.distributed.is_initialized(), "a process that trains cannot play another rank"
    config = dataclasses.replace(
        config,
        # TorchTitan writes sequence length and sharding into the configuration of the model that it builds.
        model_spec=copy.deepcopy(config.model_spec),
        metrics=dataclasses.replace(config.metrics, enable_tensorboard=False, enable_wandb=False),
    )
    with _quietly(), tempfile.TemporaryDirectory() as folder:
        try:
            try:
                trainer = _FakeRankTrainer(dataclasses.replace(config, dump_folder=folder), world_size, rank)
            except (ValueError, AssertionError, RuntimeError, OSError) as error:
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                raise LayoutError(reason) from error
            return _described(trainer, rank)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


class _Parallelized(BaseException):
    """Leaves the trainer's constructor. It is no error, and nothing on the way takes it for one."""


class _FakeRankTrainer(NITPTrainer):
    """The trainer up to where it would allocate its weights; it has ``model_parts`` and ``pp_schedule``."""

    pp_schedule: Any = None

    def __init__(self, config: NITPTrainer.Config, world_size: int, rank: int):
        self._world_size, self._rank = world_size, rank
        with contextlib.suppress(_Parallelized):
            super().__init__(config)

    def init_distributed(self) -> ParallelDims:
        """Join a fake process group, and have the constructor left when the model is sharded."""
        init_fake_mode(self._world_size, rank=self._rank)
        dims = ParallelDims.from_config(self.config.parallelism, self._world_size)
        spec = self.config.model_spec
        assert spec is not None
        parallelize, pipeline = spec.parallelize_fn, spec.pipelining_fn

        def parallelize_and_leave(model: nn.Module, **kwargs: Any) -> None:
            self.model_parts = [parallelize(model, **kwargs)]
            raise _Parallelized

        def pipeline_and_leave(model: nn.Module, **kwargs: Any) -> None:
            assert pipeline is not None
            self.pp_schedule, self.model_parts, *_ = pipeline(model, **kwargs)
            raise _Parallelized

        if not dims.pp_enabled:
            spec.parallelize_fn = parallelize_and_leave
        elif pipeline is not None:
            spec.pipelining_fn = pipeline_and_leave
        return dims


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence what the trainer says of a run that does not take place, and undo what it sets in this process."""
    level, collecting, environment = logging.root.manager.disable, gc.isenabled(), dict(os.environ)
    os.environ["LOCAL_RANK"] = "0"
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if collecting:
            gc.enable()
        os.environ.clear()
        os.environ.update(environment)


def _described(trainer: _FakeRankTrainer, rank: int) -> RankModel:
    degree = trainer.config.parallelism.pipeline_parallel_degree
    stage_size = trainer._world_size // degree
    place = rank // stage_size
    modules: list[Any] = trainer.model_parts
    twice = [_tied_again(module) for module in modules if module.enable_weight_tying]
    in_flight = _in_flight(trainer.pp_schedule, place, modules) if degree > 1 else [1]
    buffers = [buffer for module in modules for buffer in module.buffers()]
    return RankModel(
        ranks=range(place * stage_size, (place + 1) * stage_size),
        parts=tuple(_part(module, number) for module, number in zip(modules, in_flight, strict=True)),
        parameters=tuple(
            _parameter(name, parameter, rank, gradients=1 + any(parameter is one for one in twice))
            for module in modules
            for name, parameter in module.named_parameters()
        ),
        buffer_bytes=sum(local(buffer).nbytes for buffer in buffers),
        micro_batches=trainer.num_pipeline_parallel_microbatches,
    )


def _part(module: Any, in_flight: int) -> ModelPart:
    blocks = tuple(int(name) for name in module.layers)
    return ModelPart(blocks, module.tok_embeddings is not None, module.lm_head is not None, in_flight)


def _tied_again(module: Any) -> torch.Tensor | None:
    """Tie embedding and unembedding as the model's ``init_states`` does; return the weight if they were two.

    Tensor parallelism makes two parameters of the one, and FSDP goes on reducing a gradient for each into its buffer.
    """
    apart = module.tok_embeddings.weight is not module.lm_head.weight
    module.tok_embeddings.weight = module.lm_head.weight
    return module.lm_head.weight if apart else None


def _parameter(name: str, parameter: torch.Tensor, rank: int, *, gradients: int) -> ShardedParameter:
    splits = []
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for axis, placement in enumerate(parameter.placements):
            if not placement.is_shard() and not isinstance(placement, _StridedShard):
                continue
            ranks = mesh.mesh.movedim(axis, 0).reshape(mesh.size(axis), -1)[:, 0].tolist()
            stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
            pads = (mesh.mesh_dim_names or ())[axis] not in ("tp", "ep")
            splits.append(Split(placement.dim, len(ranks), stride, pads))
    splits.sort(key=lambda split: split.pads)
    shape = tuple(parameter.shape)
    sharded = ShardedParameter(canonical_fqn(name), shape, parameter.itemsize, tuple(splits), gradients)
    part = local(parameter)
    assert sharded.held(rank) == part.numel(), f"{name}: {sharded} on rank {rank}, found {tuple(part.shape)}"
    assert sharded.allocated(rank) * part.itemsize == part.untyped_storage().nbytes(), f"{name}: {sharded}"
    return sharded


def _in_flight(schedule: Any, place: int, modules: list[Any]) -> list[int]:
    """Return, for each part of the model, the micro-batches that it has forward and not yet backward.

    Where the rank has several parts, at the moment at which those of all its blocks are most; the last part may have
    the unembedding alone.
    """
    if not schedule.pipeline_order:
        return [schedule._n_microbatches] * len(modules)
    actions = [step for action in schedule.pipeline_order[place] if action for step in action.sub_actions or [action]]
    stages = sorted({action.stage_index for action in actions})
    sizes = {stage: len(module.layers) or 1 for stage, module in zip(stages, modules, strict=True)}
    now: Counter[int] = Counter()
    most, peak = -1, now
    for action in actions:
        # A weight's gradient ("W") takes the activations once more, after those of the input ("I").
        now[action.stage_index] += {"F": 1, "B": -1, "W": -1}.get(action.computation_type.value, 0)
        size = sum(sizes[stage] * number for stage, number in now.items())
        if size > most:
            most, peak = size, now.copy()
    return [peak[stage] for stage in stages]
