"""The files of train_configs/: valid on any usual world, the paper's numbers, and ablations that do what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nitp_titan.cli import main as cli
from nitp_titan.job import Job, load_job
from nitp_titan.job.build import build_trainer_config
from nitp_titan.models.flavors import FLAVORS
from nitp_titan.models.registry import model_registry
from nitp_titan.nitp.objective import Projector
from nitp_titan.runtime import machine
from tests.helpers.decoders import built
from tests.helpers.trainers import running

FOLDER = Path(__file__).parent.parent / "train_configs"
FILES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.toml"))
PAPER_FLAVORS = [flavor for flavor in FLAVORS if not flavor.startswith("debug")]
# Two experiments of the same family always differ in these.
NAMES = {"job.description", "job.dump_folder"}


@pytest.fixture(autouse=True)
def torch_of_the_tests(monkeypatch):
    monkeypatch.setattr(machine, "torch_version", lambda: (2, 13))


def job_of(name: str, *overrides: str, ranks: int = 8) -> Job:
    return load_job(FOLDER / name, list(overrides), ranks)


def differences(job: Job, other: Job) -> dict[str, tuple[Any, Any]]:
    """``table.key`` -> the two values, where they differ."""
    return {
        f"{table}.{key}": (value, other[table][key])
        for table, values in job.tables.items()
        for key, value in values.items()
        if value != other[table][key]
    }


@pytest.mark.parametrize("ranks", [1, 8, 64])
@pytest.mark.parametrize("name", FILES)
def test_file_checks_clean(name, ranks, capsys):
    assert cli.main(["check", str(FOLDER / name), "--ngpu", str(ranks)]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    warnings = [line for line in out.splitlines() if line.startswith("warning")]
    # A tokenizer may be still to be downloaded, a small world too small.
    assert [line for line in warnings if "hf_assets_path" not in line and "memory does not fit" not in line] == []
    rows = [line.split()[0] for line in out.splitlines()]
    assert rows.count("memory") == 1
    assert rows.count("cost") == (0 if "ntp" in Path(name).stem.split("_") else 1)
    if not name.startswith("debug"):
        assert ("layout: FSDP over" in out) == (ranks > 1)


@pytest.mark.parametrize(("ranks", "fits"), [(1, False), (64, True)])
def test_memory_that_does_not_fit_is_a_warning(ranks, fits, capsys):
    assert cli.main(["check", str(FOLDER / "pretrain.toml"), "--ngpu", str(ranks)]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert any("memory does not fit" in line for line in warnings) != fits


def test_checks_need_no_torch():
    code = (
        "import sys\n"
        "from nitp_titan.cli.main import main\n"
        f"codes = [main(['check', path, '--ngpu', '8']) for path in {[str(FOLDER / name) for name in FILES]}]\n"
        "assert set(codes) == {0}, codes\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


# The paper's table 4, by hand. Steps are tokens / (global batch x 8192), rounded.
PAPER = {
    #              layer, lambda, peak lr, sequences, steps, decay, lowest learning rate over the peak's
    "0.5B": (5, 1.0, 4.2e-4, 512, 47_684, "linear", 0.0),
    "2B": (6, 1.0, 4.2e-4, 1024, 39_339, "linear", 0.0),
    "3B": (6, 0.8, 4.2e-4, 1024, 39_339, "linear", 0.0),
    "1.9B-A0.3B": (3, 1.0, 6.0e-4, 256, 50_068, "linear", 0.0),
    "3B-A0.5B": (4, 1.0, 8.7e-4, 512, 47_684, "linear", 0.0),
    "9B-A1B": (5, 0.8, 4.2e-4, 1024, 39_339, "linear", 0.0),
    "45B-A5.5B": (5, 0.6, 2.8e-4, 768, 38_147, "exponential", 0.1),
}


@pytest.mark.parametrize("flavor", PAPER)
def test_pretrain_with_a_flavor_is_the_papers_job(flavor):
    job = job_of("pretrain.toml", "--model.flavor", flavor)
    nitp, training, optimizer, schedule = (job[t] for t in ("nitp", "training", "optimizer", "lr_scheduler"))
    assert (
        nitp["target_layer"],
        nitp["weight"],
        optimizer["lr"],
        training["global_batch_size"],
        training["steps"],
        schedule["decay_type"],
        schedule["min_lr_factor"],
    ) == PAPER[flavor]
    assert (schedule["warmup_steps"], schedule["decay_ratio"], schedule["total_steps"]) == (2000, 0.2, None)
    assert (optimizer["name"], optimizer["beta1"], optimizer["beta2"]) == ("AdamW", 0.9, 0.95)
    assert (optimizer["weight_decay"], training["max_norm"], training["seq_len"]) == (0.1, 1.0, 8192)
    assert (nitp["enable"], nitp["loss"], nitp["shift"], nitp["stop_gradient"]) == (True, "cosine", 1, True)
    assert (nitp["projector"], nitp["projector_ratio"], nitp["start_step"]) == ("swiglu", 4, 0)
    assert (job["tokenizer"]["name"], job["dataloader"]["dataset"]) == ("huggingface", "c4")
    assert (training["mixed_precision_param"], job["activation_checkpoint"]["mode"]) == ("bfloat16", "selective")
    assert job["compile"]["enable"]
    assert job["checkpoint"]["enable"]
    assert job["metrics"]["enable_tensorboard"]


def test_every_paper_flavor_is_in_the_table():
    assert set(PAPER) == set(PAPER_FLAVORS)


@pytest.mark.parametrize("flavor", PAPER_FLAVORS)
def test_thin_file_is_pretrain_with_its_flavor(flavor):
    thin = job_of(f"nitp_{flavor.lower()}.toml")
    assert differences(thin, job_of("pretrain.toml", "--model.flavor", flavor)).keys() == NAMES
    assert thin["job"]["dump_folder"] == f"outputs/nitp_{flavor.lower()}"


@dataclass(frozen=True)
class Objective:
    """What an ablation is to train, in the words of this test."""

    enable: bool = True
    layer: int = 3  # a fifth of the small model's 16 blocks
    shift: int = 1
    loss: str = "cosine"
    stop_gradient: bool = True
    projector: bool = True
    weight: float = 1.0
    start: int = 0


# File -> the one key of [nitp] that it sets, and what that means.
ABLATIONS: dict[str, tuple[str, Any, Objective]] = {
    **{f"target_layer_{k}": ("target_layer", k, Objective(layer=k)) for k in (0, 2, 4, 6, 8, 14)},
    **{f"9b_target_layer_{k}": ("target_layer", k, Objective(layer=k)) for k in (4, 5, 6)},
    "same_position": ("shift", 0, Objective(shift=0)),
    **{f"loss_{kind}": ("loss", kind, Objective(loss=kind)) for kind in ("mse", "smooth_l1", "kl")},
    "no_stop_gradient": ("stop_gradient", False, Objective(stop_gradient=False)),
    **{f"start_step_{k}": ("start_step", k, Objective(start=k)) for k in (1000, 2000, 3000)},
    "no_projector": ("projector", "none", Objective(projector=False)),
    "generic_cosine": ("loss", "generic_cosine", Objective(loss="generic_cosine", projector=False)),
    "lambda_0.5": ("weight", 0.5, Objective(weight=0.5)),
    "lambda_2.0": ("weight", 2.0, Objective(weight=2.0)),
    "ntp": ("enable", False, Objective(enable=False, projector=False)),
    "9b_ntp": ("enable", False, Objective(enable=False, projector=False)),
}
# The paper's own choice among others.
SAME_AS_PARENT = ("target_layer_4", "9b_target_layer_5")


def test_every_ablation_is_in_the_table():
    assert {f"ablations/{name}.toml" for name in ABLATIONS} == {name for name in FILES if "/" in name}


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_differs_from_its_parent_in_its_key(name, gpu, monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: gpu)
    key, value, _ = ABLATIONS[name]
    parent = job_of("nitp_9b-a1b.toml" if name.startswith("9b_") else "nitp_3b-a0.5b.toml")
    ablation = job_of(f"ablations/{name}.toml")
    found = differences(ablation, parent)
    assert found.keys() == NAMES | (set() if name in SAME_AS_PARENT else {f"nitp.{key}"})
    assert ablation["nitp"][key] == value
    assert ablation["job"]["dump_folder"] == f"outputs/ablations/{name}"


def test_descriptions_and_folders_are_the_files_own():
    jobs = [job_of(name) for name in FILES]
    assert len({job["job"]["description"] for job in jobs}) == len(FILES)
    assert len({job["job"]["dump_folder"] for job in jobs}) == len(FILES)


# A model of 16 blocks, deep enough for every target layer, whose blocks write a lot to the residual stream.
SHAPE = {
    "n_layers": 16,
    "dim": 32,
    "n_heads": 2,
    "n_kv_heads": 1,
    "head_dim": 16,
    "hidden_dim": 48,
    "init_std": 0.2,
}
SMALL = [
    "--model.flavor=debug",
    *(f"--model.shape.{key}={value}" for key, value in SHAPE.items()),
    "--tokenizer.name=byte",
    "--dataloader.dataset=python_stdlib",
    "--dataloader.prefetch=0",
    "--training.local_batch_size=2",
    "--training.global_batch_size=2",
    "--training.seq_len=64",
    "--training.mixed_precision_param=float32",
    "--training.max_norm=1e9",
    "--lr_scheduler.warmup_steps=0",
    "--compile.no-enable",
    "--checkpoint.no-enable",
    "--metrics.log_freq=1",
    "--metrics.no-enable_tensorboard",
    "--comm.trace_buf_size=0",
    "--debug.no-enable_structured_logging",
]


TOTAL, NTP, NITP = "loss_metrics/global_avg_loss", "loss_metrics/ntp_loss", "loss_metrics/nitp_loss"


@dataclass
class Step:
    """A logged step: weights before it, its batch, its gradients and its line of metrics.jsonl."""

    weights: dict[str, torch.Tensor]
    batch: tuple[dict[str, torch.Tensor], torch.Tensor]
    gradients: dict[str, torch.Tensor]
    line: dict[str, float]


def train(name: str, folder: Path, first_step: int = 1) -> list[Step]:
    """Train the small model for three steps, which count from ``first_step``."""
    job = job_of(f"ablations/{name}.toml", *SMALL, f"--job.dump_folder={folder}", f"--training.steps={first_step + 2}",
                 ranks=1)  # fmt: skip
    steps: list[Step] = []
    with running(build_trainer_config(job)) as trainer:
        [model] = trainer.model_parts
        optimizer_step = trainer.optimizers.step

        def keep_gradients_and_step() -> None:
            named = model.named_parameters()
            steps[-1].gradients = {name: p.grad.full_tensor().clone() for name, p in named if p.grad is not None}
            optimizer_step()

        trainer.optimizers.step = keep_gradients_and_step
        trainer.step = first_step - 1
        batches = trainer.batch_generator(trainer.dataloader)
        while trainer.should_continue_training():
            trainer.step += 1
            batch = next(batches)
            weights = {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}
            steps.append(Step(weights, batch, {}, {}))
            trainer.train_step(iter([batch]))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [first_step, first_step + 1, first_step + 2]
    for step, line in zip(steps, lines, strict=True):
        step.line = line
    return steps


def expected(objective: Objective, step: Step) -> tuple[dict[str, float | None], dict[str, torch.Tensor]]:
    """Losses and gradients of a step by a computation of its own, around the stock model."""
    model = built(model_registry("debug", **SHAPE))
    backbone = {name: value for name, value in step.weights.items() if not name.startswith("projector.")}
    assert len(step.weights) == len(backbone) + 3 * objective.projector
    model.load_state_dict(backbone)
    projector = Projector(SHAPE["dim"]) if objective.projector else torch.nn.Identity()
    projector.load_state_dict({n.removeprefix("projector."): step.weights[n] for n in step.weights.keys() - backbone})
    (tokens, positions), labels = (step.batch[0][name] for name in ("input", "positions")), step.batch[1]

    states = {}
    keep = lambda name: lambda module, args, out: states.__setitem__(name, out)  # noqa: E731
    [model.tok_embeddings, *model.layers.values()][objective.layer].register_forward_hook(keep("z"))
    model.norm.register_forward_hook(keep("h"))
    logits = model(tokens, positions=positions, attention_masks=model.get_attention_masks(positions=positions))
    h, z = states["h"], states["z"]
    total = ntp = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    nitp = None
    if objective.enable:
        nitp = _nitp(objective, projector(h), z.detach() if objective.stop_gradient else z, positions, labels)
        total = ntp + objective.weight * nitp
    total.backward()
    gradients = dict(model.named_parameters()) | {f"projector.{n}": p for n, p in projector.named_parameters()}
    losses = {TOTAL: total.item(), NTP: ntp.item(), NITP: None if nitp is None else nitp.item()}
    return losses, {name: p.grad for name, p in gradients.items() if p.grad is not None}


def _nitp(objective: Objective, p: torch.Tensor, z: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor):
    valid = labels != -100
    if objective.loss == "generic_cosine":
        per_sequence = []
        for row, counts in zip(p, valid, strict=True):
            u = F.normalize(row[counts], dim=-1)
            cosines = u @ u.T
            per_sequence.append((cosines.sum() - cosines.trace()) / (len(u) - 1))
        return torch.stack(per_sequence).sum() / valid.sum()
    if objective.shift:
        valid = valid[:, :-1] & (positions[:, 1:] == positions[:, :-1] + 1)
        p, z = p[:, :-1], z[:, 1:]
    p, z = p[valid], z[valid]
    distance = {
        "cosine": lambda: 1 - F.cosine_similarity(p, z, dim=-1),
        "mse": lambda: (p - z).square().mean(-1),
        "smooth_l1": lambda: torch.where((p - z).abs() < 1, (p - z) ** 2 / 2, (p - z).abs() - 0.5).mean(-1),
        "kl": lambda: (z.softmax(-1) * (z.log_softmax(-1) - p.log_softmax(-1))).sum(-1),
    }
    return distance[objective.loss]().mean()


def agrees(step: Step, losses: dict[str, float | None], gradients: dict[str, torch.Tensor]) -> bool:
    """Whether a step has these losses and gradients, to 1e-4 of their scale; None is a loss that is not logged."""
    logged = {tag: step.line[tag] for tag in losses if tag in step.line}
    if logged != pytest.approx({tag: value for tag, value in losses.items() if value is not None}, rel=1e-4):
        return False
    return step.gradients.keys() == gradients.keys() and all(
        (found - gradients[name]).abs().max() <= 1e-4 * gradients[name].abs().max().clamp(min=1e-8)
        for name, found in step.gradients.items()
    )


@pytest.mark.parametrize("name", [name for name, (key, *_) in ABLATIONS.items() if key != "start_step"])
def test_ablation_trains_what_it_says(name, tmp_path):
    objective = ABLATIONS[name][2]
    steps = train(name, tmp_path)
    for step in steps:
        assert agrees(step, *expected(objective, step))
    # The comparison sees the switch: the objective without it is another.
    plain = replace(Objective(), projector=objective.projector)
    if objective != plain:
        assert not agrees(steps[0], *expected(plain, steps[0]))
    assert (NITP in steps[0].line) == objective.enable


@pytest.mark.parametrize("start", [1000, 2000, 3000])
def test_start_step_ablation_starts_there(start, tmp_path):
    name, projector = f"start_step_{start}", "projector.w1.weight"
    early = train(name, tmp_path / "early")
    assert [(NTP in step.line, NITP in step.line) for step in early] == [(True, False)] * 3
    assert torch.equal(early[2].weights[projector], early[0].weights[projector])

    before, first, second = train(name, tmp_path / "late", first_step=start - 1)
    without = Objective(enable=False)
    losses, gradients = expected(without, before)
    assert agrees(before, losses, gradients)
    assert torch.equal(first.weights[projector], before.weights[projector])
    assert not torch.equal(second.weights[projector], first.weights[projector])
    for step in (first, second):
        assert agrees(step, *expected(Objective(), step))
        assert not agrees(step, *expected(without, step))
