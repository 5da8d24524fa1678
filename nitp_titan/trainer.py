"""TorchTitan's trainer with NITP: its pair counts, its metrics and the geometry of the last hidden states."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.distributed import utils as dist_utils
from torchtitan.trainer import Trainer

from nitp_titan.decoder import nitp_model_spec, nitp_shift, positions_or_default
from nitp_titan.loss import JointLoss
from nitp_titan.lr_scheduler import LRSchedulersContainer
from nitp_titan.metrics import NITP, NTP, MetricsProcessor
from nitp_titan.nitp_config import NITPConfig
from nitp_titan.objective import pair_mask
from nitp_titan.observers import ExpertLoad, HiddenStateGeometry
from nitp_titan.validate import Validator

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


class NITPTrainer(Trainer):
    """TorchTitan's trainer; ``config.nitp`` turns its decoder into the NITP twin.

    With ``nitp.enable`` off, model, loss and step are TorchTitan's own.

    Raises:
        ValueError: ``config.loss`` is not the joint loss although NITP is on, or is although it is off.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        nitp: NITPConfig = field(default_factory=NITPConfig)
        """Next Implicit Token Prediction."""

        metrics: MetricsProcessor.Config = field(default_factory=MetricsProcessor.Config)
        validator: Validator.Config = field(default_factory=Validator.Config)
        lr_scheduler: LRSchedulersContainer.Config = field(default_factory=LRSchedulersContainer.Config)

    def __init__(self, config: Config):
        super().__init__(_with_nitp(config))
        self.nitp = config.nitp
        self.geometry = HiddenStateGeometry(self.parallel_dims, self.device)
        self.expert_load = ExpertLoad(self.parallel_dims, self.model_parts)
        assert isinstance(self.metrics_processor, MetricsProcessor)
        self.metrics_processor.sources += [self._loss_parts, self.geometry.take, self.expert_load.take]

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        """Run TorchTitan's step on micro-batches that are fetched here, since NITP counts its pairs before them."""
        num_batches = self.gradient_accumulation_steps * self.num_pipeline_parallel_microbatches
        batches = [next(data_iterator) for _ in range(num_batches)]
        if isinstance(self.loss_fn, JointLoss):
            self._begin_nitp_step(batches)
        if self.metrics_processor.should_log(self.step):
            self.expert_load.begin_step()
        observe_geometry = bool(self.nitp.geometry_freq) and self.step % self.nitp.geometry_freq == 0
        with self.geometry.observing(self.model_parts if observe_geometry else []):
            super().train_step(iter(batches))
        if geometry := self.geometry.take():
            # A step that TorchTitan did not log.
            self.metrics_processor.log_values(self.step, geometry)

    def _begin_nitp_step(self, batches: list[Batch]) -> None:
        active = self.step >= self.nitp.start_step
        for part in self.model_parts:
            part.nitp_active = active  # pyrefly: ignore [bad-assignment]
        shift = nitp_shift(self.nitp)
        pairs = torch.zeros((), dtype=torch.float32)
        for input_dict, labels in batches if active else []:
            positions = positions_or_default(input_dict.get("positions"), input_dict["input"])
            pairs += pair_mask(positions, labels, shift=shift, ignore_index=IGNORE_INDEX).sum()
        mesh = self.parallel_dims.get_optional_mesh("batch")
        self.loss_fn.begin_step(dist_utils.dist_sum_tensor(pairs.to(self.device), mesh))

    def post_dataloading_process(
        self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """As TorchTitan's; an NITP decoder also gets the labels, since it returns its losses."""
        inputs, labels, extra_kwargs = super().post_dataloading_process(input_dict, labels)
        if isinstance(self.loss_fn, JointLoss):
            extra_kwargs["labels"] = labels
        self.geometry.expect(labels != IGNORE_INDEX)
        return inputs, labels, extra_kwargs

    def forward_backward_step(self, **kwargs: Any) -> torch.Tensor:
        """As TorchTitan's; the experts' loads are read before the optimizer step clears them."""
        loss = super().forward_backward_step(**kwargs)
        self.expert_load.end_micro_batch()
        return loss

    def _loss_parts(self) -> dict[str, float]:
        if not isinstance(self.loss_fn, JointLoss):
            return {}
        mesh = self.parallel_dims.get_optional_mesh("loss")
        ntp, nitp = dist_utils.dist_sum_tensor(self.loss_fn.parts, mesh).tolist()
        return {NTP: ntp, NITP: nitp} if self.step >= self.nitp.start_step else {NTP: ntp}


def _with_nitp(config: NITPTrainer.Config) -> NITPTrainer.Config:
    """Return the configuration that TorchTitan's trainer is to see."""
    if not config.nitp.enable:
        if isinstance(config.loss, JointLoss.Config):
            raise ValueError("nitp.enable is off, which is stock TorchTitan: JointLoss does not go with it")
        return config
    if not isinstance(config.loss, JointLoss.Config):
        raise ValueError(f"NITP needs loss JointLoss, found {config.loss}")
    return dataclasses.replace(
        config,
        model_spec=nitp_model_spec(config.model_spec, config.nitp, chunk_tokens=config.loss.chunk_tokens),
        loss=dataclasses.replace(config.loss, weight=config.nitp.weight),
    )
