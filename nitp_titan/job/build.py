"""From a checked job to TorchTitan's configuration: from here on torch is imported, inside functions."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nitp_titan.job.backbone import _prepare, model_spec
from nitp_titan.job.checks import flex
from nitp_titan.job.checks.attention import missing_kernel
from nitp_titan.job.checks.initial import branch_checkpoint
from nitp_titan.job.errors import JobError, Problem
from nitp_titan.job.job import Job
from nitp_titan.job.keys.schema import OUR_TABLES
from nitp_titan.job.loss_name import loss_name
from nitp_titan.job.shape import changes_of
from nitp_titan.runtime import machine
from nitp_titan.training.faults_config import FaultsConfig

if TYPE_CHECKING:
    from torchtitan.protocols.model_spec import ModelSpec

    from nitp_titan.training.trainer import NITPTrainer

# What a Config says about values that it refuses.
_REFUSALS = (ValueError, AssertionError, NotImplementedError)


def build_trainer_config(job: Job) -> NITPTrainer.Config:
    """Return the trainer's configuration; ``nitp_titan.runtime.prepare()`` is called first.

    Raises:
        JobError: TorchTitan refuses what the checks here let pass.
    """
    _prepare()
    from nitp_titan.training.trainer import NITPTrainer

    problems: list[Problem] = []
    parts: dict[str, Any] = {
        "model_spec": _model_spec(job),
        "dump_folder": job["job"]["dump_folder"],
        "hf_assets_path": job["model"]["hf_assets_path"],
    }
    builders = {
        "nitp": lambda: job.nitp,
        "float8": lambda: job.float8,
        "faults": lambda: FaultsConfig(**job["faults"]),
        "tokenizer": lambda: tokenizer_config(job),
        "dataloader": lambda: _dataloader(job, "dataloader"),
        "optimizer": lambda: _optimizer(job),
        "activation_checkpoint": lambda: _activation_checkpoint(job),
        "loss": lambda: _loss(job, parts["model_spec"]),
        "checkpoint": lambda: _checkpoint(job),
    }
    with _without_warnings():
        for field in dataclasses.fields(NITPTrainer.Config):
            if field.name in parts:
                continue
            build = builders.get(field.name) or (lambda field=field: _upstream(job, field))
            try:
                parts[field.name] = build()
            except _REFUSALS as error:
                problems.append(Problem(job.file, f"[{field.name}]", str(error)))
        if not problems:
            try:
                return NITPTrainer.Config(**parts)
            except _REFUSALS as error:
                problems.append(Problem(job.file, "", str(error)))
    raise JobError(problems)


def _model_spec(job: Job) -> ModelSpec:
    import torch

    table = job["model"]
    backend, key = table["attn_backend"], "[model] attn_backend"
    on_cuda = torch.cuda.is_available() and not torch.version.hip
    if on_cuda and (message := missing_kernel(backend, torch.cuda.get_device_capability())):
        raise JobError([Problem(job.file, key, message)])
    if backend == "flex_flash" and machine.device() == "h100" and not on_cuda:
        # TorchTitan makes it only where such a GPU is; what a dry run counts is flex attention's.
        backend = "flex"
    try:
        options, shape = changes_of(job[flex.TABLE]), changes_of(job["model.shape"])
        return model_spec(table["module"], table["flavor"], backend, flex_options=options, **shape)
    except _REFUSALS as error:
        raise JobError([Problem(job.file, key if backend != "flex" else "[model]", str(error))]) from error


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence what a Config warns of; its ``build()`` makes a copy, which warns again, then in the run's log."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _upstream(job: Job, field: dataclasses.Field) -> Any:
    """Build a table that has upstream's own keys."""
    assert callable(field.default_factory), f"Trainer.Config.{field.name} is not a table"
    cls = type(field.default_factory())
    values = dict(job[field.name])
    if f"{field.name}.dataloader" in OUR_TABLES:
        values["dataloader"] = _dataloader(job, f"{field.name}.dataloader")
    return cls(**values)


def _checkpoint(job: Job) -> Any:
    from nitp_titan.checkpoints.manager import CheckpointManager

    table = dict(job["checkpoint"])
    path = (table["initial_load_path"] or "").strip()
    if path and "://" not in path:
        # As the other paths of a job, from where the run is started; TorchTitan takes absolute ones alone.
        table["initial_load_path"] = os.path.abspath(path)
    if table["branch_from"] and "://" not in table["branch_from"]:
        table["branch_from"] = str(branch_checkpoint(table["branch_from"]))
    return CheckpointManager.Config(**table)


def tokenizer_config(job: Job) -> Any:
    """Return the configuration of the job's tokenizer."""
    from nitp_titan.data.hf_tokenizer import TextTokenizer
    from nitp_titan.data.tokenizer import ByteTokenizer

    cls = {"huggingface": TextTokenizer, "byte": ByteTokenizer}[job["tokenizer"]["name"]].Config
    return cls(**{field.name: job["tokenizer"][field.name] for field in dataclasses.fields(cls)})


def _dataloader(job: Job, table: str) -> Any:
    from nitp_titan.data.loader import TextDataLoader

    return TextDataLoader.Config(**job[table])


def _optimizer(job: Job) -> Any:
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

    table = job["optimizer"]
    group = ParamGroupConfig(
        pattern=r".*",
        optimizer_name=table["name"],
        optimizer_kwargs={
            "lr": table["lr"],
            "betas": (table["beta1"], table["beta2"]),
            "eps": table["eps"],
            "weight_decay": table["weight_decay"],
        },
    )
    return OptimizersContainer.Config(param_groups=[group], implementation=table["implementation"])


def _activation_checkpoint(job: Job) -> Any:
    from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC

    table = job["activation_checkpoint"]
    if table["mode"] == "none":
        return None
    cls = {"selective": SelectiveAC, "full": FullAC, "memory_budget": MemoryBudgetAC}[table["mode"]].Config
    return cls(**{field.name: table[field.name] for field in dataclasses.fields(cls)})


def _loss(job: Job, spec: ModelSpec) -> Any:
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss

    from nitp_titan.training.joint_loss import JointLoss

    table = job["loss"]
    name = loss_name(table["name"], job["nitp"]["enable"])
    if name == "linear_cross_entropy":
        return JointLoss.Config(chunk_tokens=table["chunk_tokens"], implementation=table["implementation"])
    plain = CrossEntropyLoss.Config(global_vocab_size=spec.model.vocab_size)
    return ChunkedLossWrapper.Config(num_chunks=table["num_chunks"], loss_fn=plain) if "chunked" in name else plain
