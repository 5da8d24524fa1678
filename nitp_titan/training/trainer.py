"""TorchTitan's trainer with NITP: its pair counts, its metrics and the geometry of the last hidden states."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torchtitan.components.checkpointer import BaseCheckpointManager
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools import utils as tools
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from nitp_titan.checkpoints.manager import CheckpointManager
from nitp_titan.checkpoints.random_state import RANDOM_STATE, RandomState, layout_of
from nitp_titan.checkpoints.tokens_seen import TOKENS_SEEN, TokensSeen
from nitp_titan.data.errors import DataError
from nitp_titan.float8.config import Float8Config
from nitp_titan.float8.converter import Float8Converter
from nitp_titan.float8.layers import (
    tokens_at_a_time,
)
from nitp_titan.nitp.config import NITPConfig
from nitp_titan.nitp.pairs import counted
from nitp_titan.runs.steps import complete_steps
from nitp_titan.runs.tags import NITP, NTP
from nitp_titan.titan.context import loss_inputs
from nitp_titan.titan.rehearsal import isolate_rehearsal
from nitp_titan.titan.spec import nitp_model_spec
from nitp_titan.training import hooks, resumption
from nitp_titan.training.copies import CopiesWithoutWaiting
from nitp_titan.training.faults import StepGuard
from nitp_titan.training.faults_config import FaultsConfig
from nitp_titan.training.hooks import Hook
from nitp_titan.training.interrupt import Interruption, end_interrupted
from nitp_titan.training.joint_loss import JointLoss
from nitp_titan.training.lr_scheduler import LRSchedulersContainer
from nitp_titan.training.metrics import MetricsProcessor
from nitp_titan.training.observers import ExpertLoad, HiddenStateGeometry
from nitp_titan.training.validator import Validator

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


class NITPTrainer(Trainer):
    """TorchTitan's trainer; ``config.nitp`` turns its decoder into the NITP twin.

    With ``nitp.enable`` off, model, loss and step are TorchTitan's own. ``hooks`` are told of the run's moments; one is
    added before the first step. ``steps_run`` counts this process's steps;
    ``out_of_data`` tells that the data of one pass (``dataloader.infinite`` off) ended the run before its last step,
    ``interruption`` whether a signal did. ``changes``, set before training, are the settings that differ from those of
    the run's earlier start, in words.

    Raises:
        ValueError: the configuration asks for what does not go with NITP; the message says what.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        nitp: NITPConfig = field(default_factory=NITPConfig)
        """Next Implicit Token Prediction."""

        float8: Float8Config = field(default_factory=Float8Config)
        """Matrix products in float8."""

        faults: FaultsConfig = field(default_factory=FaultsConfig)
        """Steps whose numbers are not finite, or far off."""

        metrics: MetricsProcessor.Config = field(default_factory=MetricsProcessor.Config)
        validator: Validator.Config = field(default_factory=Validator.Config)
        lr_scheduler: LRSchedulersContainer.Config = field(default_factory=LRSchedulersContainer.Config)
        checkpoint: BaseCheckpointManager.Config = field(default_factory=CheckpointManager.Config)

    def __init__(self, config: Config, *, when_connected: Callable[[], None] = lambda: None):
        """Build the model and all that trains it.

        Args:
            when_connected: called once the ranks can communicate, before anything is written or takes memory.
        """
        self._when_connected = when_connected
        self.interruption = Interruption()
        super().__init__(with_float8(_with_nitp(config)))
        self.nitp = config.nitp
        self.steps_run = 0
        self._copies = CopiesWithoutWaiting()
        self.out_of_data = False
        self.changes: Sequence[str] = ()
        self.tokens_remark = ""
        self._tokens_seen = TokensSeen(self.parallel_dims)
        _check_vocabulary(self.tokenizer, self.model_config)
        assert isinstance(self.metrics_processor, MetricsProcessor)
        log = self.metrics_processor.log_values
        self.geometry = HiddenStateGeometry(self.parallel_dims, config.nitp.geometry_freq, log)
        self.expert_load = ExpertLoad(self.parallel_dims, self.model_parts)
        self.faults = StepGuard(
            config.faults,
            device=self.device,
            parallel_dims=self.parallel_dims,
            model_parts=self.model_parts,
            optimizers=self.optimizers,
            has_loss=not self.parallel_dims.pp_enabled or self.pp_has_last_stage,
            windows_end_at=config.nitp.start_step if config.nitp.enable else 0,
            last_checkpoint=self._last_checkpoint,
        )
        self.hooks: list[Hook] = [self.faults, self.expert_load, self.geometry]
        self.optimizers.register_step_pre_hook(lambda *args, **kwargs: self._tell("before_optimizer"))
        if isinstance(self.checkpointer, CheckpointManager):
            self.checkpointer.last_step = config.training.steps
            self.checkpointer.before_save = self.faults.before_save
            self.checkpointer.after_save = lambda: self._tell("saved")
            self.checkpointer.after_load = self._say_what_is_resumed
            if self.checkpointer.enable:
                layout = layout_of(self.parallel_dims, self.device)
                self.checkpointer.states[RANDOM_STATE] = RandomState(layout, self.device)
        self.metrics_processor.as_computed = self.faults.as_computed
        self.metrics_processor.sources += [self._loss_parts, self.geometry.take, self.expert_load.take]
        self.metrics_processor.sources.append(self.faults.metrics)
        if self.parallel_dims.pp_enabled:
            isolate_rehearsal(self.pp_schedule, self._rehearsing)

    def init_distributed(self) -> ParallelDims:
        """Connect the ranks, as TorchTitan does."""
        dims = super().init_distributed()
        self._when_connected()
        return dims

    def train(self) -> None:
        """Train as TorchTitan does; where the data end before ``training.steps``, the step before is the last one.

        Where a signal ends the run, all of its last step's state is saved.

        Raises:
            NotFinite: the run ends since its numbers are bad; ``config.faults`` says when.
        """
        super().train()
        self.faults.look()
        if self.interruption.signal is not None:
            self.interruption.outcome = end_interrupted(self)
        if not self.out_of_data:
            return
        if not self.step:
            raise DataError("dataloader.infinite: found false, and the data have not enough text for one step")
        saved = self.steps_run > 0 and self.checkpointer.save(self.step, last_step=True)
        logger.info(
            f"The data have ended (dataloader.infinite = false): step {self.step} of {self.config.training.steps} "
            f"was the run's last one{', and its checkpoint is saved' if saved else ''}"
        )

    def should_continue_training(self) -> bool:
        """Whether a further step is to come. Asked before each, of every rank."""
        if not super().should_continue_training():
            return False
        if not self.steps_run and isinstance(self.checkpointer, CheckpointManager):
            self.checkpointer.require_space(self.step, self.config.training.steps)
        return not self.interruption.stops(self.step)

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        """Run TorchTitan's step on micro-batches that are fetched here, since NITP counts its pairs before them."""
        batches = self._batches_of_step(data_iterator)
        if not self.steps_run:
            self._take_scheduled_rates()
            saves = self.checkpointer.enable and not getattr(self.checkpointer, "load_only", False)
            self.metrics_processor.go_on_from(self.step - 1, saves=saves)
        self.steps_run += 1
        if isinstance(self.loss_fn, JointLoss):
            self._begin_nitp_step(batches)
        self._tell("begin_step")
        with self._copies, self.faults.watching():
            super().train_step(iter(batches))
        if not isinstance(self.checkpointer, CheckpointManager) and self.checkpointer.enable:
            self.faults.before_save()  # another manager does not say when it saves
        self._tell("end_step")

    @property
    def tokens_seen(self) -> int:
        """Tokens that all ranks together have trained on, over all starts of the run."""
        return self._tokens_seen.of_all(self.ntokens_seen)

    def state_dict(self) -> dict[str, Any]:
        """As TorchTitan's, whose count of tokens is one rank's, and the count of all ranks."""
        return {**super().state_dict(), TOKENS_SEEN: self.tokens_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of any number of ranks; TorchTitan's own, and an older one, has one rank's count."""
        super().load_state_dict(state_dict)
        if TOKENS_SEEN in state_dict:
            self.ntokens_seen = self._tokens_seen.share(state_dict[TOKENS_SEEN])
            return
        # The loader is restored before this: torch's distributed checkpoints load in the order of the names.
        sequences = int(self.dataloader.state_dict().get("sequences", 0))
        drawn = sequences * self.config.training.seq_len
        self.ntokens_seen, self.tokens_remark = self._tokens_seen.share_of_one(self.ntokens_seen, drawn)

    def _say_what_is_resumed(self) -> None:
        if self.step and torch.distributed.get_rank() == 0:
            logger.info(resumption.block(self, self.changes))

    def close(self) -> None:
        """End the run, as TorchTitan does."""
        if hasattr(self, "hooks"):  # a configuration that was refused has none yet
            self._tell("close")
        super().close()

    def _tell(self, name: hooks.Name) -> None:
        logged = self.metrics_processor.should_log(self.step)
        hooks.tell(self.hooks, name, hooks.Moment(step=self.step, logged=logged, model_parts=self.model_parts))

    def _take_scheduled_rates(self) -> None:
        """Give the optimizer this job's learning rates, which a checkpoint of another schedule has replaced by its own.

        TorchTitan's schedulers log these, and set them from the second step on.
        """
        for scheduler in self.lr_schedulers:
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = rate

    def _batches_of_step(self, data_iterator: Iterator[Batch]) -> list[Batch]:
        num_batches = self.gradient_accumulation_steps * self.num_pipeline_parallel_microbatches
        one_pass = not getattr(self.config.dataloader, "infinite", True)
        before = self.dataloader.state_dict() if one_pass else {}
        batches = []
        try:
            for _ in range(num_batches):
                batches.append(next(data_iterator))
        except DataloaderExhaustedError:
            # TorchTitan has counted this step, and does not take it. What was drawn for it has not been trained on.
            self.step -= 1
            self.out_of_data = True
            if one_pass:
                self.dataloader.load_state_dict(before)
            if batches:
                logger.warning(f"{len(batches)} of {num_batches} micro-batches were left over, too few for a step")
            raise
        return batches

    def _begin_nitp_step(self, batches: list[Batch]) -> None:
        active = self.step >= self.nitp.start_step
        for part in self.model_parts:
            part.nitp_active = active
        pairs = 0
        for input_dict, labels in batches if active else []:
            pairs += int(counted(self.nitp, input_dict.get("positions"), labels).sum())
        mesh = self.parallel_dims.get_optional_mesh("batch")
        # Filled in there: a copy would wait for the last step.
        on_device = torch.full((), pairs, dtype=torch.int64, device=self.device)
        self.loss_fn.begin_step(dist_utils.dist_sum_tensor(on_device, mesh))

    def post_dataloading_process(
        self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """As TorchTitan's; an NITP decoder also gets the labels, since it returns its losses, and where NITP counts."""
        whole_labels, positions = labels, input_dict.get("positions")
        inputs, labels, extra_kwargs = super().post_dataloading_process(input_dict, labels)
        if isinstance(self.loss_fn, JointLoss):
            dims, parallelism = self.parallel_dims, self.config.parallelism
            extra_kwargs |= loss_inputs(self.nitp, positions, whole_labels, labels, dims, parallelism)
        self.geometry.expect(labels)
        return inputs, labels, extra_kwargs

    def forward_backward_step(self, *, global_valid_tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """As TorchTitan's; the experts' loads are read before the optimizer step clears them.

        Where no label of a step counts its loss is zero and so are its gradients, whatever the loss: TorchTitan's own
        divides by the number of labels, 0 / 0. All other steps have a number of at least 1, which stays what it is.
        """
        with self._copies.paused():
            loss = super().forward_backward_step(global_valid_tokens=global_valid_tokens.clamp(min=1), **kwargs)
        self._tell("end_micro_batch")
        return self.faults.take_loss(loss, self.metrics_processor.should_log(self.step))

    @contextlib.contextmanager
    def _rehearsing(self) -> Iterator[None]:
        """What is inside leaves no trace: neither in our sums nor, with NITP, in the model's counters."""
        kept: list[torch.Tensor] = []
        if isinstance(self.loss_fn, JointLoss):
            kept = [self.loss_fn.parts, *(buffer for part in self.model_parts for buffer in part.buffers())]
        values = [tensor.clone() for tensor in kept]
        with self.geometry.paused():
            yield
        for tensor, value in zip(kept, values, strict=True):
            tensor.copy_(value)

    def _last_checkpoint(self, before: int) -> str:
        """Return the newest complete checkpoint of a step before one, the background's included; "" for none."""
        self.checkpointer.maybe_wait_for_saving()
        config = self.config.checkpoint
        folder = Path(self.config.dump_folder) / config.folder
        steps = [step for step in complete_steps(folder) if step < before] if config.enable else []
        return str(folder / f"step-{steps[-1]}") if steps else ""

    def _loss_parts(self) -> dict[str, float]:
        if not isinstance(self.loss_fn, JointLoss):
            return {}
        mesh = self.parallel_dims.get_optional_mesh("loss")
        ntp, nitp = dist_utils.dist_sum_tensor(self.loss_fn.parts, mesh).tolist()
        return {NTP: ntp, NITP: nitp} if self.step >= self.nitp.start_step else {NTP: ntp}


def _with_nitp(config: NITPTrainer.Config) -> NITPTrainer.Config:
    """Return the configuration that TorchTitan's trainer is to see."""
    if problems := list(_problems(config)):
        raise ValueError("; ".join(problems))
    if not config.nitp.enable:
        return config
    assert isinstance(config.loss, JointLoss.Config)
    return dataclasses.replace(
        config,
        model_spec=nitp_model_spec(
            config.model_spec,
            config.nitp,
            chunk_tokens=config.loss.chunk_tokens,
            implementation=config.loss.implementation,
        ),
        loss=dataclasses.replace(config.loss, weight=config.nitp.weight),
    )


def _check_vocabulary(tokenizer: Any, model_config: Any) -> None:
    """Refuse a tokenizer whose ids the embedding does not have, before an index error in the first step does."""
    largest = getattr(tokenizer, "largest_id", None)
    if largest is None:
        # A tokenizer of somebody else's.
        vocabulary = tokenizer.get_vocab().values() if hasattr(tokenizer, "get_vocab") else ()
        largest = max(vocabulary, default=tokenizer.get_vocab_size() - 1)
    if largest >= model_config.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {largest:,}, expected less than the model's vocabulary of "
            f"{model_config.vocab_size:,}"
        )


def _problems(config: NITPTrainer.Config) -> Iterator[str]:
    """Yield what does not go together. The job layer says the same with file and line; this is for other ways here."""
    nitp, parallelism = config.nitp, config.parallelism
    for name, part, ours in (("metrics", config.metrics, MetricsProcessor), ("validator", config.validator, Validator)):
        if not isinstance(part, ours.Config):
            yield f"{name}: found {type(part).__module__}'s Config, expected {ours.__module__}'s"
    # Elsewhere TorchTitan says that there are none, and goes on.
    if not config.training.disable_cuda_graphs and tools.device_type == "cuda":
        for key in ("geometry_freq", "start_step"):
            if getattr(nitp, key) > 0 and (nitp.enable or key == "geometry_freq"):
                found = getattr(nitp, key)
                yield f"nitp.{key}: found {found}, expected 0 with CUDA graphs: a recorded step repeats itself"
    if not nitp.enable:
        if isinstance(config.loss, JointLoss.Config):
            yield "nitp.enable is off, which is stock TorchTitan: JointLoss does not go with it"
        return
    if not isinstance(config.loss, JointLoss.Config):
        yield f"NITP needs loss JointLoss, found {config.loss}"
    if parallelism.spmd_backend != "partial_dtensor":
        yield f'parallelism.spmd_backend: found {parallelism.spmd_backend!r}, expected "partial_dtensor" with NITP'
    if parallelism.context_parallel_degree > 1:
        if parallelism.context_parallel_load_balancer == "ptrr":
            yield 'parallelism.context_parallel_load_balancer: found "ptrr", expected "headtail" or "none" with NITP'
        if not nitp.has_target:
            found = parallelism.context_parallel_degree
            yield f'parallelism.context_parallel_degree: found {found}, expected 1 with nitp.loss = "generic_cosine"'


def with_float8(config: NITPTrainer.Config) -> NITPTrainer.Config:
    """Return the trainer's configuration with its model converted; the same object where ``float8.recipe`` is "none".

    Raises:
        ValueError: the conversion does not go; the message names the key.
    """
    if config.float8.recipe == "none":
        return config
    training, parallelism, compile_config = config.training, config.parallelism, config.compile
    tokens = tokens_at_a_time(
        training.local_batch_size,
        training.seq_len,
        context=parallelism.context_parallel_degree,
        pipeline=parallelism.pipeline_parallel_degree,
        microbatch=parallelism.pipeline_parallel_microbatch_size,
    )
    converter = Float8Converter.Config(
        float8=config.float8,
        tokens=tokens,
        tensor_parallel=parallelism.tensor_parallel_degree,
        expert_parallel=parallelism.expert_parallel_degree,
        model_compile_enabled=compile_config.enable and "model" in compile_config.components,
    ).build()
    # A copy: the caller's specification stays as it was.
    model = converter.convert(copy.deepcopy(config.model_spec.model))
    return dataclasses.replace(config, model_spec=dataclasses.replace(config.model_spec, model=model))
