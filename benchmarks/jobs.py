"""A variant and a job file -> a checked job, and the configuration of the trainer that runs its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.variants import NEVER, Variant
from nitp_titan.job import Job, load_job
from nitp_titan.job.loss_name import loss_name
from nitp_titan.models.costs import flops, mtp_flops, nitp_flops
from nitp_titan.titan.retyped import retyped
from nitp_titan.tools.estimate.parts import parts_of_job

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer

# A benchmark times training steps alone: nothing is saved, validated, logged or measured on the side.
_STEPS_ALONE = (
    "--checkpoint.no-enable",
    "--validator.no-enable",
    "--metrics.no-enable_tensorboard",
    f"--metrics.log_freq={NEVER}",
    "--nitp.geometry_freq=0",
    "--debug.no-enable_structured_logging",
    # Python's collection walks over the models of all variants; it is done between turns.
    f"--training.gc_freq={NEVER}",
    # One micro-batch a step, unless the command line says otherwise: a paper's step of 512 sequences takes a minute.
    "--training.global_batch_size=-1",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """The batches of all variants; see :class:`benchmarks.batches.FixedBatches`."""

    mean_document: int = 1024
    batches: int = 4
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A variant in the job of a file."""

    name: str
    variant: Variant
    job: Job

    @property
    def layers(self) -> int:
        """Blocks of the model."""
        assert self.job.model is not None
        return self.job.model.n_layers

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step, of all ranks."""
        return self.job["training"]["global_batch_size"] * self.job["training"]["seq_len"]

    def loss(self) -> str:
        """Name the next-token loss."""
        if self.variant.trainer == "mtp":
            return "linear_cross_entropy"
        return loss_name(self.job["loss"]["name"], self.job.nitp.enable)

    def notes(self) -> list[str]:
        """Say what a reader of the result must know of this variant."""
        notes = []
        if self.variant.trainer != "mtp" and not self.job.nitp.enable and self.loss() == "cross_entropy":
            table = self.job["compile"]
            compiled = "compiled" if table["enable"] and "loss" in table["components"] else "not compiled"
            notes.append(
                f"the loss is TorchTitan's plain cross-entropy, {compiled}: its chunked one "
                + ("fails on this torch (< 2.13)" if self.job["loss"]["name"] == "auto" else "was not asked for")
            )
        wide = self.job["training"]["mixed_precision_param"] != "bfloat16"
        if self.variant.trainer == "torchtitan" and self.job.model and self.job.model.num_experts and wide:
            notes.append("TorchTitan's experts compute in bfloat16 all the same")
        if not self.job["training"]["disable_cuda_graphs"]:
            notes.append("with CUDA graphs")
        return notes

    def flops_per_token(self) -> int:
        """Return the training FLOPs of a token, attention included, of all that this variant computes.

        Recomputation does not count. NITP's and MTP's own products do, so that their MFU is that of their own work.
        """
        parts, context = parts_of_job(self.job), self.job["training"]["seq_len"]
        total = flops(parts, context)["with_attention"]
        assert total is not None
        if self.variant.trainer == "mtp":
            more = mtp_flops(parts, context)["with_attention"]
            assert more is not None
            return total + more
        nitp = self.job.nitp
        return total + (nitp_flops(parts.dim, nitp) if nitp.start_step < NEVER else 0)


def load_entry(
    file: str | Path | None,
    words: Sequence[str],
    variant: Variant,
    *,
    world_size: int,
    dump_folder: str | Path,
    name: str | None = None,
) -> Entry:
    """Load the job of a variant: the file, then the command line's words, then the variant's own.

    CUDA graphs are off unless file, command line or variant ask for them, as in every job that measures geometry.

    Raises:
        JobError: with every problem that was found.
    """
    words = [*_STEPS_ALONE, f"--job.dump_folder={dump_folder}", *words, *variant.overrides]
    job = load_job(file, words, world_size)
    if job.sources["training"]["disable_cuda_graphs"] not in ("file", "command line"):
        job = load_job(file, [*words, "--training.disable_cuda_graphs"], world_size)
    return Entry(name=name or variant.name, variant=variant, job=job)


def trainer_config(entry: Entry, data: Data) -> Trainer.Config:
    """Return the configuration of the trainer; torch is imported, made ready for this machine.

    Raises:
        JobError: TorchTitan refuses the job.
        ValueError: the variant does not go with the job.
    """
    from nitp_titan.train import build

    config = build(entry.job)
    from benchmarks.batches import FixedBatches, NoTokenizer

    assert config.model_spec is not None
    model: Any = config.model_spec.model
    config = dataclasses.replace(
        config,
        tokenizer=NoTokenizer.Config(vocab_size=model.vocab_size),
        dataloader=FixedBatches.Config(vocab_size=model.vocab_size, **dataclasses.asdict(data)),
    )
    if entry.variant.trainer == "torchtitan":
        from benchmarks.stock import stock_config

        return stock_config(config)
    if entry.variant.trainer == "mtp":
        from benchmarks.mtp import MTPTrainer

        return retyped(config, MTPTrainer.Config, chunk_tokens=entry.job["loss"]["chunk_tokens"])
    return config
