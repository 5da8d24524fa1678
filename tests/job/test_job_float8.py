"""``[float8]``: what is refused, what is told, and that a plan is the run's."""

from __future__ import annotations

import logging

import pytest

from nitp_titan.float8.config import AUTO_FILTER
from nitp_titan.job import JobError, load_job
from nitp_titan.job.build import build_trainer_config
from nitp_titan.runtime import machine
from nitp_titan.titan.spec import nitp_model_spec
from nitp_titan.tools import float8_summary
from nitp_titan.tools.explain import explain
from nitp_titan.training.trainer import with_float8

UPSTREAM = ["--model.module=llama3", "--model.flavor=debugmodel", "--dataloader.dataset=c4"]
MOE = ["--model.flavor=debug_moe"]


@pytest.fixture(autouse=True)
def machine_of_the_tests(monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(machine, "torch_version", lambda: (2, 13))


def problems(*overrides: str, ranks: int = 1, for_training: bool = False) -> list[str]:
    try:
        load_job(None, list(overrides), ranks, for_training=for_training)
    except JobError as error:
        return [str(problem) for problem in error.problems]
    return []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--float8.recipe=rowise"], '--float8.recipe: found "rowise", expected one of "none", "rowwise"'),
        (["--float8.recipe=rowise"], '; did you mean "rowwise"?'),
        (["--float8.recipe=rowwise", "--float8.experts"], "--float8.experts: found true, expected false: the model has "
         "no routed experts"),
        ([*UPSTREAM, "--float8.recipe=rowwise", "--float8.experts"], "the model has no routed experts"),
        ([*MOE, "--float8.recipe=rowwise", "--float8.experts", "--model.shape.expert_hidden_dim=100"],
         "--float8.experts: found true, expected false: the experts' 100 should be a multiple of 16"),
        (["--float8.recipe=rowwise", "--float8.filter_fqns=atention"], '--float8.filter_fqns: found "atention", '
         "which is in no linear layer's name; did you mean \"attention\"?"),
        (["--float8.recipe=rowwise", '--float8.filter_fqns=[""]'], 'found "", which is in every name'),
        (["--float8.recipe=rowwise", "--float8.filter_fqns=moe.router"], 'found "moe.router", which'),
        (["--float8.recipe=rowwise", "--training.seq_len=100", "--training.local_batch_size=1"],
         "--training.seq_len: a rank has 100 tokens at a time, expected a multiple of 16 with float8"),
    ],
)  # fmt: skip
def test_refused(overrides, expected):
    found = problems(*overrides)
    assert any(expected in problem for problem in found), found
    assert all(problem.startswith("command line: --") for problem in found), found


@pytest.mark.parametrize(
    "overrides",
    [
        ["--float8.recipe=rowwise", "--float8.filter_fqns", "projector", "layers.3.attention", AUTO_FILTER],
        ["--float8.recipe=rowwise", "--float8.filter_fqns=projector", "--nitp.no-enable"],
        ["--float8.recipe=rowwise", "--training.seq_len=100", "--training.local_batch_size=1", "--float8.emulate"],
        [*MOE, "--float8.recipe=tensorwise", "--float8.experts", "--float8.filter_fqns=moe.shared_experts"],
        # Of a model that is not ours, names are checked when the run starts.
        [*UPSTREAM, "--float8.recipe=rowwise", "--float8.filter_fqns=atention"],
    ],
)
def test_accepted(overrides):
    assert [problem for problem in problems(*overrides) if "float8" in problem or "tokens" in problem] == []


def test_off_by_one_key_whatever_the_others_say():
    job = load_job(None, ["--float8.recipe=none", "--float8.experts", "--float8.filter_fqns=nonsense"], 1)
    assert "float8.experts is ignored: float8.recipe is none" in job.notes
    assert "\nfloat8 " not in explain(job)


def test_without_a_gpu_a_run_is_refused_and_a_check_warned():
    overrides = ["--float8.recipe=tensorwise"]
    [problem] = problems(*overrides, for_training=True)
    assert problem == (
        'command line: --float8.recipe: found "tensorwise" and no GPU, which float8 products need, expected '
        "emulate = true"
    )
    assert [str(warning) for warning in load_job(None, overrides, 1).warnings] == [problem]
    assert problems(*overrides, "--float8.emulate", for_training=True) == []


def test_a_gpu_is_enough_for_the_check(monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    overrides = ["--float8.recipe=tensorwise"]
    assert problems(*overrides, for_training=True) == []
    assert "float8 gains nothing without torch.compile" in explain(load_job(None, overrides, 1))
    compiled = explain(load_job(None, [*overrides, "--compile.enable"], 1))
    assert "without torch.compile" not in compiled
    emulated = explain(load_job(None, [*overrides, "--float8.emulate"], 1))
    assert "float8.emulate is on" in emulated


def test_check_says_what_a_run_would_convert():
    overrides = ["--model.flavor=0.5B", "--float8.recipe=tensorwise", "--compile.enable"]
    text = explain(load_job(None, overrides, 1))
    assert "float8    tensorwise: 123 of 124 linear layers converted" in text
    assert "warning   float8 tensorwise: no gain expected on 49 of 123 converted layers" in text
    text = explain(load_job(None, [*overrides, "--float8.filter_fqns", AUTO_FILTER], 1))
    assert "float8    tensorwise: 74 of 124 linear layers converted" in text
    assert "no gain expected" not in text
    text = explain(load_job(None, ["--float8.recipe=rowwise", "--float8.filter_fqns", AUTO_FILTER], 1))
    assert "warning   float8 rowwise converts nothing: no gain expected on any layer that could be" in text


def test_check_of_another_module_refers_to_the_log():
    data = ["--dataloader.dataset=python_stdlib", "--tokenizer.name=byte"]
    text = explain(load_job(None, [*UPSTREAM[:2], *data, "--float8.recipe=rowwise"], 1))
    assert "float8    rowwise: the run's log says which layers are converted" in text


@pytest.mark.parametrize(
    ("flavor", "ranks", "overrides"),
    [
        ("debug", 1, ["--float8.filter_fqns", "projector"]),
        ("debug_moe", 4, ["--parallelism.tensor_parallel_degree=2", "--float8.experts"]),
        ("9B-A1B", 8, ["--float8.filter_fqns", AUTO_FILTER, "--training.local_batch_size=2"]),
        # A projector that gains with all of a rank's tokens, and not with those of a chunk.
        (
            "debug",
            1,
            [
                "--float8.filter_fqns",
                AUTO_FILTER,
                "--model.shape.dim=4096",
                "--model.shape.head_dim=1024",
                "--training.local_batch_size=32",
                "--training.seq_len=1024",
                "--loss.chunk_tokens=1024",
            ],
        ),
        # So wide that an expert's line says its gain by the roofline, which takes the experts of each token.
        (
            "debug_moe",
            2,
            [
                "--float8.experts",
                "--parallelism.expert_parallel_degree=2",
                "--model.shape.dim=4096",
                "--model.shape.head_dim=1024",
                "--model.shape.expert_hidden_dim=6144",
            ],
        ),
    ],
)
def test_the_plan_of_a_check_is_the_runs(flavor, ranks, overrides, caplog):
    arguments = [f"--model.flavor={flavor}", "--float8.recipe=tensorwise", "--float8.emulate", *overrides]
    job = load_job(None, arguments, ranks)
    lines, _ = float8_summary.explain(job)
    config = build_trainer_config(job)
    config.model_spec = nitp_model_spec(config.model_spec, config.nitp, chunk_tokens=config.loss.chunk_tokens)
    with caplog.at_level(logging.INFO):
        with_float8(config)
    said = [record.message.removeprefix("float8 ") for record in caplog.records if record.message.startswith("float8")]
    assert sorted(said[: len(lines)]) == sorted(lines)
