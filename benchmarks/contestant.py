"""A trainer that runs some steps when it is its turn."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torchtitan.components.metrics import BaseLogger
from torchtitan.trainer import Trainer

from nitp_titan.nitp.dtensors import local
from nitp_titan.runs.tags import TOTAL


class _Kept(BaseLogger):
    """Keeps what a trainer logged last."""

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.metrics = metrics


class Contestant:
    """A trainer whose steps are run as TorchTitan's training loop runs them, a few at a time.

    The loop around the steps (checkpoints, validation, profiling) is off in a benchmark's job.
    """

    def __init__(self, config: Trainer.Config):
        self.trainer: Trainer = config.build()
        self._kept = _Kept()
        self.trainer.metrics_processor.logger.close()
        self.trainer.metrics_processor.logger = self._kept
        self._batches = self.trainer.batch_generator(self.trainer.dataloader)
        self._keeps_gradients = not config.training.disable_cuda_graphs

    def run(self, steps: int) -> None:
        """Run complete steps: forward, backward, clipping, optimizer, schedule."""
        for _ in range(steps):
            self.trainer.step += 1
            self.trainer.gc_handler.run(self.trainer.step)
            self.trainer.train_step(self._batches)

    def release(self) -> None:
        """Drop the gradients, which stay until the next step's begin, so that they are not in others' way; collect.

        A recorded CUDA graph writes to the addresses of its gradients: there they stay.
        """
        if not self._keeps_gradients:
            self.trainer.optimizers.zero_grad(set_to_none=True)
        gc.collect()

    def logged_loss(self) -> float:
        """Run one more step that is logged, and return its loss: the mean that is trained on, of all ranks."""
        metrics: Any = self.trainer.metrics_processor.config
        usual, metrics.log_freq = metrics.log_freq, 1
        try:
            self.run(1)
        finally:
            metrics.log_freq = usual
        return float(self._kept.metrics[TOTAL])

    def parameters(self) -> int:
        """Count the parameters, those of all ranks together."""
        found = {id(p): p.numel() for part in self.trainer.model_parts for p in part.parameters()}
        return sum(found.values())

    def state_bytes(self) -> int:
        """Return the bytes of this rank's parameters, buffers and optimizer states."""
        tensors = [t for part in self.trainer.model_parts for t in (*part.parameters(), *part.buffers())]
        for optimizer in self.trainer.optimizers.optimizers:
            tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        storages = [local(tensor).untyped_storage() for tensor in tensors]
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    def close(self) -> None:
        """End the trainer."""
        self.trainer.close()
