"""A layout's run against one process's: same seed checkpoint, same global batches.

Losses, geometry and every gradient of the first step, then five further steps and a validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from nitp_titan.nitp.config import NITPConfig
from nitp_titan.runs.tags import VALIDATION_NITP, VALIDATION_NTP
from nitp_titan.training.validator import Validator
from tests.distributed.batches import ROWS, SEQ_LEN, StraddlingBatches
from tests.distributed.layouts import SHORT, Layout
from tests.distributed.models import model_registry
from tests.helpers.ranks import run_on_ranks
from tests.helpers.trainers import metric_lines, running, trainer_config

LOSSES = ("loss_metrics/global_avg_loss", "loss_metrics/ntp_loss", "loss_metrics/nitp_loss")
GEOMETRY = ("geometry/effective_rank", "geometry/mean_cosine_similarity")
VALIDATION = ("validation_metrics/loss", VALIDATION_NTP, VALIDATION_NITP)
STEPS = 6


class Tolerances(NamedTuple):
    """Relative differences from one process that rounding explains, of a step's values."""

    losses: float
    geometry: float
    grad_norm: float
    """One fp32 sum of squares over a tensor of half a million, or several over its shards."""


FIRST = Tolerances(1e-5, 1e-5, 3e-4)
# Of the geometry up to 6e-5 were seen, with AVX2 kernels.
LATER = Tolerances(1e-4, 3e-4, 3e-4)
# A token whose scores for two experts are equal but for their last bits goes to one or the other, as the CPU rounds:
# about one token in a run. Seed checkpoints perturbed by 4e-6 sent up to 13 of a step's tokens elsewhere, which moved
# the losses by up to 4e-5, the geometry by 1.2e-3 and the gradient's norm by 7e-4 (20 of them, in one process).
LATER_EXPERTS = Tolerances(1e-4, 2e-3, 1e-3)
BF16_EXPERTS = Tolerances(1e-3, 2e-2, 5e-2), Tolerances(5e-3, 5e-2, 5e-2), 0.1
TOLERANCES = {
    "debug": (FIRST, LATER, 1e-4),
    "debug_moe": (FIRST, LATER_EXPERTS, 1e-4),
    "llama3": (FIRST, LATER, 1e-4),
    "qwen3": (FIRST, LATER, 1e-4),
    "qwen3_moe": BF16_EXPERTS,
    "deepseek_v3": BF16_EXPERTS,
}
"""Of the first step, of those after it, and of the norm of the error of a gradient in the first."""

KL_LOSSES = 1e-4
"""At first two distributions over features are all but equal, and their divergence, 2e-4, is what is left of products
of 2e-2 each: in one process fp32 was up to 6e-5 off float64 (cosine, mse and smooth_l1 up to 8e-8)."""


def tolerances(layout: Layout) -> tuple[Tolerances, Tolerances, float]:
    """Return those of the layout's model, as in :data:`TOLERANCES`, and loss."""
    first, later, of_gradients = TOLERANCES[layout.model]
    if layout.nitp.get("loss") == "kl":
        first = first._replace(losses=max(first.losses, KL_LOSSES))
    return first, later, of_gradients


def config_of(folder: Path, layout: Layout) -> Any:
    spec = model_registry(layout.model)
    config = trainer_config(folder, folder, nitp=NITPConfig(geometry_freq=1, **layout.nitp), model_spec=spec)
    config.dataloader = StraddlingBatches.Config(vocab_size=min(spec.model.vocab_size, 300))
    # All rows, and not with V-shaped schedules, which cannot run forward alone.
    rows = layout.local_batch_size * layout.data_parallel_degree
    config.validator = Validator.Config(
        enable=layout.validates, freq=STEPS, steps=ROWS // rows, dataloader=config.dataloader
    )
    config.training.seq_len, config.training.global_batch_size, config.training.steps = SEQ_LEN, ROWS, STEPS
    config.training.local_batch_size = layout.local_batch_size
    config.loss.chunk_tokens = layout.chunk_tokens
    config.loss.implementation = layout.implementation or "fast"
    for name, value in layout.parallelism.items():
        setattr(config.parallelism, SHORT[name], value)
    if layout.compile:
        config.compile.enable, config.compile.backend = True, layout.compile
    if layout.ac:
        config.activation_checkpoint = {"full": FullAC, "selective": SelectiveAC}[layout.ac].Config()
    return config


Change = Callable[[Any], None]
"""Alters a run's configuration; importable, since ranks get its name."""


def train(folder: Path, seed_checkpoint: Path, layout: Layout, change: Change | None = None) -> None:
    """Train; a rank of each pipeline stage leaves the first step's gradients."""
    config = config_of(folder, layout)
    if change is not None:
        change(config)
    config.checkpoint.enable = config.checkpoint.load_only = True
    config.checkpoint.initial_load_path = str(seed_checkpoint)
    with running(config) as trainer:
        update = trainer.optimizers.step

        def step(*args: Any, **kwargs: Any) -> None:
            if trainer.step == 1:
                _save_gradients(trainer, folder)
            update(*args, **kwargs)

        trainer.optimizers.step = step
        trainer.train()


def _save_gradients(trainer: Any, folder: Path) -> None:
    gradients = {}
    for part in trainer.model_parts:
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, f"no gradient of {name}"
            grad = parameter.grad
            # Wrappers put a word into a block's name.
            clean = name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
            gradients[clean] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    rank = torch.distributed.get_rank()
    if rank % (trainer.parallel_dims.world_size // trainer.parallel_dims.pp) == 0:
        torch.save(gradients, folder / f"gradients-{rank}.pt")


def gradients(folder: Path) -> dict[str, torch.Tensor]:
    """What the stages of a run have left: name -> the first step's gradient."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("gradients-*.pt")):
        part = torch.load(file)
        assert not found.keys() & part.keys()
        found |= part
    return found


class References:
    """The runs of one process, each made when it is asked for: one for each model and NITP options."""

    def __init__(self, folder: Path, change: Change | None = None):
        self._folder = folder
        self.change = change
        self._made: dict[tuple, tuple[Path, Path]] = {}

    def of(self, layout: Layout) -> tuple[Path, Path]:
        """Return the seed checkpoint and the folder of the run."""
        key = layout.model, *sorted(layout.nitp.items())
        if key not in self._made:
            folder = self._folder / f"{len(self._made)}-{layout.model}"
            # Not in this process: a trainer's memory stays with it, since TorchTitan turns Python's collector off.
            run_on_ranks(1, _train_alone, folder, Layout(layout.model, 1, nitp=layout.nitp), self.change)
            self._made[key] = folder / "seed" / "checkpoint" / "step-0", folder / "one"
        return self._made[key]


def _train_alone(folder: Path, alone: Layout, change: Change | None) -> None:
    """Save a seed checkpoint and train from it: in ``folder``, ``seed/checkpoint/step-0`` and ``one``."""
    config = config_of(folder / "seed", alone)
    if change is not None:
        change(config)
    config.checkpoint.enable = config.checkpoint.create_seed_checkpoint = True
    with running(config) as trainer:
        trainer.checkpointer.save(0, last_step=True)
    (folder / "one").mkdir()
    train(folder / "one", folder / "seed" / "checkpoint" / "step-0", alone, change)


class Differences(NamedTuple):
    """A layout's largest relative differences from one process; infinite where something is not finite."""

    first: Tolerances
    later: Tolerances
    validation: float
    """Zero where there is none."""

    gradient: float
    """Of the first step's gradients: the error's norm over the gradient's, the worst parameter's."""

    parameter: str
    """Which that is."""

    def problems(self, layout: Layout) -> Iterator[str]:
        """Yield what is beyond the layout's tolerances."""
        first, later, of_gradients = tolerances(layout)
        for when, found, allowed in (("first step", self.first, first), ("later steps", self.later, later)):
            for name, value, most in zip(Tolerances._fields, found, allowed, strict=True):
                if not value <= most:
                    yield f"{name} of the {when}: {value:.1e}, allowed are {most:.0e}"
        if not self.validation <= later.losses:
            yield f"validation: {self.validation:.1e}, allowed are {later.losses:.0e}"
        if not self.gradient < of_gradients:
            yield f"gradient of {self.parameter}: {self.gradient:.1e}, allowed are {of_gradients:.0e}"


def ratio(error: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Return error / size, element by element: zero where there is no error, infinite where either is not a number."""
    return torch.where(error == 0, 0.0, (error / size).nan_to_num(nan=torch.inf, posinf=torch.inf))


def differences(layout: Layout, folder: Path, one: Path) -> Differences:
    """Compare a layout's run folder with one process's."""
    of_losses, of_geometry, of_norm = (_differences(folder, one, tags) for tags in (LOSSES, GEOMETRY, ("grad_norm",)))
    validation = 0.0
    if layout.validates:
        found, expected = (values(run, VALIDATION)[-1] for run in (folder, one))
        validation = ratio((found - expected).abs(), expected.abs()).max().item()
    found, expected = gradients(folder), gradients(one)
    assert found.keys() == expected.keys()
    projected = layout.nitp.get("projector") != "none" and layout.nitp.get("loss") != "generic_cosine"
    assert ("projector.w1.weight" in found) == projected
    norm = torch.linalg.vector_norm
    errors = {name: ratio(norm(found[name] - grad), norm(grad)).item() for name, grad in expected.items()}
    worst = max(errors, key=errors.__getitem__)
    return Differences(
        first=Tolerances(of_losses[0], of_geometry[0], of_norm[0]),
        later=Tolerances(of_losses[1], of_geometry[1], of_norm[1]),
        validation=validation,
        gradient=errors[worst],
        parameter=worst,
    )


def run_layout(layout: Layout, folder: Path, references: References) -> Path:
    """Train a layout on gloo ranks in ``folder``; return the folder of the run of one process."""
    seed_checkpoint, one = references.of(layout)
    run_on_ranks(layout.ranks, train, folder, seed_checkpoint, layout, references.change)
    return one


def compare(layout: Layout, folder: Path, references: References) -> Differences:
    """Train a layout on gloo ranks in ``folder`` and compare it with one process."""
    return differences(layout, folder, run_layout(layout, folder, references))


def values(folder: Path, tags: tuple[str, ...]) -> torch.Tensor:
    """Return the logged values, (steps, tags); NaN for what was not finite."""
    rows = [[line.get(tag, torch.nan) for tag in tags] for line in metric_lines(folder)]
    rows = [[torch.nan if value is None else value for value in row] for row in rows]
    return torch.tensor(rows, dtype=torch.float64)


def _differences(folder: Path, one: Path, tags: tuple[str, ...]) -> tuple[float, float]:
    """Return the largest relative difference in the first step, and in the later ones."""
    found, expected = values(folder, tags), values(one, tags)
    assert found.shape == expected.shape == (STEPS, len(tags))
    errors = ratio((found - expected).abs(), expected.abs())
    return errors[0].max().item(), errors[1:].max().item()
