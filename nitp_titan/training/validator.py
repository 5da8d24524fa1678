"""Validation with the NITP loss beside the cross-entropy."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchtitan.components import validate as upstream
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from nitp_titan.data.errors import DataError
from nitp_titan.data.loader import TextDataLoader
from nitp_titan.runs.tags import VALIDATION_NITP, VALIDATION_NTP, VALIDATION_TOTAL
from nitp_titan.titan.context import loss_inputs
from nitp_titan.titan.twin import NITPDecoder
from nitp_titan.training.joint_loss import JointLoss


class Validator(upstream.Validator):
    """TorchTitan's validator; around an NITP decoder it also measures the NITP loss."""

    @dataclass(kw_only=True, slots=True)
    class Config(upstream.Validator.Config):
        pass

    def __init__(self, config: Config, **kwargs: Any):
        super().__init__(config, **kwargs)
        self._pairs: torch.Tensor | None = None
        self._active = False
        self._try_data()
        if isinstance(self.loss_fn, JointLoss):
            self.metrics_processor.validation_sources.append(self._losses)

    def _try_data(self) -> None:
        """Draw a batch, since TorchTitan opens the validation data when it first validates, hours into a run.

        Raises:
            DataError: the data cannot be opened, or hold nothing to validate on.
        """
        config = self.dl_config
        if isinstance(config, TextDataLoader.Config):
            # One batch is wanted, and no thread that prepares others.
            config = dataclasses.replace(config, prefetch=0)
        loader = config.build(
            dp_world_size=self.dp_world_size,
            dp_rank=self.dp_rank,
            tokenizer=self.tokenizer,
            seq_len=self.seq_len,
            local_batch_size=self.local_batch_size,
        )
        batches = iter(loader)
        if next(batches, None) is None:
            name = self.dl_config.dataset_path or self.dl_config.dataset
            raise DataError(f"validator.dataloader: {name} has no text of two tokens to validate on")

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Take the mean losses over the validation batches; of batches in which no label counts they are zero."""
        if isinstance(self.loss_fn, JointLoss):
            self._pairs = torch.zeros((), dtype=torch.int64, device=utils.device_type)
            self.loss_fn.begin_step(self._pairs)
        try:
            super().validate(model_parts, step)
        except ZeroDivisionError:
            # TorchTitan divides by the labels of all ranks, so that every rank comes here. What it has not done yet:
            logger.warning("No label of the validation batches counts: their loss is 0")
            self.metrics_processor.log_validation(loss=0.0, step=step)
            for model in model_parts:
                model.train()

    def post_dataloading_process(
        self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor, model_parts: list[nn.Module]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """As TorchTitan's; an NITP decoder also gets the labels, and where NITP counts."""
        whole_labels, positions = labels, input_dict.get("positions")
        inputs, labels, extra_kwargs = super().post_dataloading_process(input_dict, labels, model_parts)
        model = model_parts[0]
        if isinstance(model, NITPDecoder):
            nitp, dims = model.config.nitp, self.parallel_dims
            extra_kwargs |= loss_inputs(nitp, positions, whole_labels, labels, dims, self.parallelism)
            assert self._pairs is not None
            self._active = model.nitp_active
            self._pairs += extra_kwargs["pairs"].sum()
        return inputs, labels, extra_kwargs

    def _losses(self, ntp: float) -> dict[str, float]:
        """Complete a validation's NTP loss: total, NTP and, from ``nitp.start_step`` on, NITP."""
        if not self._active:
            return {VALIDATION_NTP: ntp}
        assert isinstance(self.loss_fn, JointLoss)
        assert self._pairs is not None
        mesh = self.parallel_dims.get_optional_mesh("loss")
        nitp_sum = dist_utils.dist_sum(self.loss_fn.parts[1], mesh)
        nitp = nitp_sum / max(dist_utils.dist_sum(self._pairs, mesh), 1)
        return {
            VALIDATION_TOTAL: ntp + self.loss_fn.weight * nitp,
            VALIDATION_NTP: ntp,
            VALIDATION_NITP: nitp,
        }
