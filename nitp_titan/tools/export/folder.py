"""``nitp-titan export``: a training checkpoint as a Hugging Face folder, without the projector.

The tensors go through memory one output file at a time, on the CPU and without a process group, whatever layout wrote
the checkpoint. The folder appears under its name when it is complete.

Call ``nitp_titan.runtime.prepare()`` before importing this.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.models.common.decoder import Decoder

from nitp_titan.checkpoints.fit import a_few
from nitp_titan.checkpoints.stored import Checkpoint, ExportError, find_checkpoint
from nitp_titan.data.errors import DataError
from nitp_titan.job import Job
from nitp_titan.job.backbone import model_spec
from nitp_titan.job.build import tokenizer_config
from nitp_titan.job.shape import changes_of
from nitp_titan.models.hf.architectures import Architecture, architecture_of, hf_config, obstacles
from nitp_titan.runs.steps import HF_INDEX
from nitp_titan.tools.export.tokenizer import TokenizerError, write_tokenizer

SHARD_SIZE = "5GB"

logger = logging.getLogger(__name__)


def export(checkpoint: Path, out: Path, job: Job, dtype: str | None = None) -> None:
    """Write the backbone of a training checkpoint as a Hugging Face folder.

    Args:
        checkpoint: a ``step-N`` folder, or the folder of a run or of its checkpoints, whose latest complete step is
            taken.
        out: the folder to write; it must be empty or not exist.
        job: the job that trained the model.
        dtype: "float32", "bfloat16" or "float16"; None keeps the checkpoint's. What transformers keeps in fp32 at any
            dtype (routers, selection biases) is written in it.

    Raises:
        ExportError: no stock architecture fits the model, the checkpoint is not one of it or cannot be read, there
            is no tokenizer, or the folder cannot be written.
    """
    out = Path(out).absolute()
    changes = changes_of(job["model.shape"])
    spec = model_spec(job["model"]["module"], job["model"]["flavor"], job["model"]["attn_backend"], **changes)
    problems = obstacles(spec.model)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        problems.append(f"{out} exists already")
    tokenizer, source = None, None
    try:
        tokenizer = _tokenizer(job)
    except ExportError as error:
        problems += error.problems
    try:
        source = Checkpoint(find_checkpoint(Path(checkpoint), job["checkpoint"]["folder"]))
    except ExportError as error:
        problems += error.problems
    if problems:
        raise ExportError(*problems)
    assert tokenizer is not None
    assert source is not None
    plan = Plan.of(spec.model, source, TORCH_DTYPE_MAP[dtype] if dtype else None)
    if plan.architecture.remark:
        logger.warning(f"{plan.architecture.name}: {plan.architecture.remark}")

    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        pad = write_tokenizer(tokenizer, Path(job["model"]["hf_assets_path"]), part)
        specials = {"bos_token_id": getattr(tokenizer, "bos_id", None), "eos_token_id": tokenizer.eos_id}
        name = str(plan.dtype).removeprefix("torch.")
        _write_json(part / "config.json", hf_config(spec.model) | specials | {"pad_token_id": None, "dtype": name})
        # Not in config.json: transformers would keep an EOS that pads from being trained further as an input.
        _write_json(part / "generation_config.json", specials | {"pad_token_id": pad})
        plan.write(part)
        part.rename(out)
    except (TokenizerError, DataError) as error:
        raise ExportError(f"model.hf_assets_path: {error}") from error
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which tensor of the checkpoint each tensor of the export is made of, and the files that they go to."""

    architecture: Architecture
    adapter: Any
    source: Checkpoint
    dtype: torch.dtype
    """Of most tensors."""
    origins: dict[str, str]
    tensors: dict[str, torch.Tensor]
    """Name -> size and dtype, on the meta device."""

    @classmethod
    def of(cls, config: Decoder.Config, source: Checkpoint, dtype: torch.dtype | None) -> Plan:
        """Match a checkpoint with a decoder's configuration.

        Raises:
            ExportError: it is another model's checkpoint, or has values that the architecture has no place for.
        """
        architecture = architecture_of(config)
        assert architecture is not None
        with torch.device("meta"):
            model = config.build().state_dict()
        if problems := source.problems(model):
            raise ExportError(*problems)
        adapter = architecture.adapter(config, None)
        origins: dict[str, str] = {}
        tensors: dict[str, torch.Tensor] = {}
        homeless = []
        for origin, tensor in model.items():
            try:
                renamed = adapter.to_hf({origin: tensor})
            except KeyError:
                renamed = {}
            for name, part in renamed.items():
                kept = torch.float32 if name.endswith(architecture.keep_fp32) else None
                origins[name] = origin
                # A tensor of its own: one expert has its share of the experts' bytes.
                tensors[name] = torch.empty_like(part, dtype=kept or dtype or source.dtype(origin))
            if not renamed and not (config.enable_weight_tying and origin == "lm_head.weight"):
                homeless.append(origin)
        # Of upstream's Qwen3 MoE that is the selection bias; all zeros, it does nothing.
        if lost := [name for name in homeless if source.load([name])[name].any()]:
            raise ExportError(f"{architecture.name} has no place for what is not zero: {a_few(lost)}")
        return cls(
            architecture=architecture,
            adapter=adapter,
            source=source,
            dtype=dtype or source.dtype("tok_embeddings.weight"),
            origins=origins,
            tensors=tensors,
        )

    def write(self, folder: Path) -> None:
        """Write the tensors as safetensors, with an index where they are several files.

        Raises:
            ExportError: the checkpoint cannot be read, or a value is not finite in the dtype of the export.
        """
        files = split_torch_state_dict_into_shards(self.tensors, max_shard_size=SHARD_SIZE)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(
                f"{self.source.folder.name} -> {self.architecture.name}", total=files.metadata["total_size"]
            )
            for filename, names in files.filename_to_tensors.items():
                save_file(self._file(names), folder / filename, metadata={"format": "pt"})
                # safetensors writes for the owner alone.
                shutil.copymode(folder / "config.json", folder / filename)
                progress.advance(task, sum(self.tensors[name].nbytes for name in names))
        if files.is_sharded:
            index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
            _write_json(folder / HF_INDEX, index)

    def _file(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Return the tensors of one file. A function, so that the next file's do not meet them in memory."""
        renamed = self.adapter.to_hf(self.source.load(dict.fromkeys(self.origins[name] for name in names)))
        tensors = {name: renamed[name].to(self.tensors[name].dtype).contiguous() for name in names}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ExportError(f"{self.origins[name]} of {self.source.folder} is not finite in {tensor.dtype}")
        return tensors


def _tokenizer(job: Job) -> BaseTokenizer:
    try:
        return tokenizer_config(job).build(tokenizer_path=job["model"]["hf_assets_path"])
    except ValueError as error:
        raise ExportError(f"model.hf_assets_path: no tokenizer to copy: {error}") from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
