"""Small training runs for tests, in this process or on gloo ranks."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.config.configs import CommConfig, DebugConfig

from nitp_titan.data.loader import TextDataLoader
from nitp_titan.data.tokenizer import ByteTokenizer
from nitp_titan.nitp.config import NITPConfig
from nitp_titan.training.joint_loss import JointLoss
from nitp_titan.training.metrics import MetricsProcessor
from nitp_titan.training.trainer import NITPTrainer
from tests.helpers.decoders import backbone


def write_corpus(folder: Path, documents: int = 40) -> Path:
    """Documents of words with a pattern to learn, of 1 to 60 words."""
    generator = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        start = generator.randrange(5)
        text = " ".join(words[(start + j) % 5] for j in range(generator.randint(1, 60)))
        (folder / f"{i:03}.txt").write_text(text)
    return folder


def trainer_config(dump_folder: Path, corpus: Path, **changes: Any) -> NITPTrainer.Config:
    """A run of the debug model on a corpus, in fp32. ``changes`` are fields of ``NITPTrainer.Config``."""
    config = NITPTrainer.Config(
        model_spec=backbone("nitp_titan", changes.pop("flavor", "debug")),
        nitp=NITPConfig(geometry_freq=0),
        loss=JointLoss.Config(chunk_tokens=100),
        tokenizer=ByteTokenizer.Config(),
        dataloader=TextDataLoader.Config(dataset="text", dataset_path=str(corpus), num_streams=8, prefetch=0),
        optimizer=default_adamw(lr=1e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        training=TrainingConfig(
            local_batch_size=4,
            global_batch_size=8,
            seq_len=64,
            steps=4,
            disable_cuda_graphs=True,
            mixed_precision_param="float32",
        ),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        metrics=MetricsProcessor.Config(log_freq=1, enable_tensorboard=True, disable_color_printing=True),
        checkpoint=CheckpointManager.Config(),
        activation_checkpoint=None,
        comm=CommConfig(trace_buf_size=0),
        debug=DebugConfig(seed=0, enable_structured_logging=False),
        dump_folder=str(dump_folder),
    )
    config.optimizer.implementation = "foreach"
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def metric_lines(run: Path) -> list[dict[str, Any]]:
    """The objects of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def running(config: Any) -> Iterator[Any]:
    """The trainer of a configuration, in a process group that ends with the context (or the rank's own)."""
    alone = not torch.distributed.is_initialized()
    if alone:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    trainer = None
    try:
        # TorchTitan waits two seconds at the end of a run for other ranks: minutes, over all tests.
        clock = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: None)
        with mock.patch("torchtitan.trainer.time", clock):
            trainer = config.build()
            yield trainer
    finally:
        if trainer is not None:
            trainer.close()
        # A trainer that is refused may have got as far as this.
        if alone and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
