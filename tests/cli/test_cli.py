"""The ``nitp-titan`` command in a process of its own: exit codes, streams, and that torch stays out of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

from nitp_titan.job import load_job
from nitp_titan.job.backbone import model_spec
from nitp_titan.titan.spec import nitp_model_spec
from tests.helpers.commands import call, cli_main, debug_job
from tests.helpers.decoders import built
from tests.helpers.exports import check_same, loaded

ROOT = Path(__file__).resolve().parent.parent.parent
DEBUG = "train_configs/debug.toml"
# Runs the command, and adds a line on whether it imported torch.
_MAIN = """
import sys
from nitp_titan.cli.main import main
code = 1
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print("torch" in sys.modules, file=sys.stderr)
sys.exit(code)
"""


def run(*arguments: str, **variables: str):
    """Return (exit code, stdout, stderr, whether torch was imported)."""
    environment = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    process = subprocess.run(
        [sys.executable, "-c", _MAIN, *arguments],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    error, _, torch = process.stderr.rstrip("\n").rpartition("\n")
    assert "Traceback" not in process.stderr
    return process.returncode, process.stdout, error, torch == "True"


@pytest.mark.parametrize("name", ["debug", "debug_moe"])
def test_check_explains_a_job(name):
    code, out, error, torch = run("check", f"train_configs/{name}.toml")
    assert (code, error, torch) == (0, "", False)
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    expected = ["job", "model", "nitp", "data", "steps", "optimizer", "layout", "memory", "cost", "output"]
    assert list(rows)[:10] == expected
    assert len(out.splitlines()) <= 13
    depth = 6 if name == "debug" else 4
    assert rows["model"].startswith(
        f"nitp_titan {name}: {depth} blocks, width 128, vocabulary 320 (embeddings untied), "
        "4 heads (2 key-value, head dim 32), feed-forward 384, "
    )
    assert ("expert 128, 8 experts, top 2" in rows["model"]) == (name == "debug_moe")
    assert rows["nitp"].startswith(f"cosine to block 1 of {depth} (a fifth of the depth), next token, weight 1")
    assert rows["steps"] == "200 of 8 sequences x 256 = 2,048 tokens, 410k tokens in all"
    assert f"outputs/{name}, a checkpoint every 100 steps" in rows["output"]


def test_check_with_ranks_and_overrides():
    overrides = ["--training.steps", "50", "--training.global_batch_size=64", "--checkpoint.no-enable"]
    overrides += ["--model.module", "qwen3", "--model.flavor", "debugmodel_moe", "--nitp.weight", "0.25"]
    code, out, error, torch = run("check", DEBUG, "--ngpu", "4", *overrides)
    assert (code, error, torch) == (0, "", False)
    assert "50 of 64 sequences x 256 = 16,384 tokens (2 micro-batches of 8 a rank)" in out
    assert "4 ranks: sharded (FSDP) 4" in out
    assert "no checkpoints" in out
    assert "qwen3 debugmodel_moe: 8 blocks" in out
    assert "64 experts, top 8, 316M parameters" in out
    assert "weight 0.25" in out
    assert "warning   train_configs/debug.toml: [model] hf_assets_path" in out


def test_options_may_come_before_the_file():
    code, out, _, _ = run("check", "--checkpoint.no-enable", "--training.steps", "50", DEBUG)
    assert code == 0
    assert "50 of 8 sequences" in out


def test_world_size_of_the_environment():
    assert "2 ranks" in run("check", DEBUG, WORLD_SIZE="2")[1]
    assert "4 ranks" in run("check", DEBUG, "--ngpu", "4", WORLD_SIZE="2")[1]
    code, _, error, _ = run("check", DEBUG, WORLD_SIZE="two")
    assert (code, error) == (2, "WORLD_SIZE: found 'two', expected a whole number, 1..10000000")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--nitp.target_layer=3"], "cosine to block 3 of 6 (the command line's), "),
        (["--model.flavor=0.5B"], "cosine to block 5 of 24 (the flavor's), "),
        (["--nitp.target_layer=0"], "cosine to the embeddings (the command line's), "),
    ],
)
def test_check_says_whose_choice_the_target_layer_is(capsys, words, expected):
    assert expected in cli_main(capsys, "check", DEBUG, *words)[1]


def test_check_explains_the_device_that_a_job_is_meant_for(capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "float32 products" in cli_main(capsys, "check", DEBUG)[1]
    for words in ([DEBUG, "--device", "h100"], ["train_configs/nitp_0.5b.toml"]):
        out = cli_main(capsys, "check", *words)[1]
        assert "device    explained for an H100 (--device here or cpu for another)" in out
        assert "there is no CUDA device" not in out
    assert "bfloat16 products" in cli_main(capsys, "check", DEBUG, "--device=h100")[1]
    assert "there is no CUDA device" in cli_main(capsys, "check", "train_configs/nitp_0.5b.toml", "--device", "cpu")[1]
    code, _, error = cli_main(capsys, "check", DEBUG, "--device", "h100", "--model.attn_backend", "flex_flash")
    assert code == 2
    assert error.startswith('command line: --model.attn_backend: found "flex_flash", which on a Hopper GPU needs')
    assert cli_main(capsys, "check", DEBUG, "--device", "h200")[0] == 2
    monkeypatch.setenv("NITP_TITAN_DEVICE", "here")
    assert "there is no CUDA device" in cli_main(capsys, "check", "train_configs/nitp_0.5b.toml")[1]
    monkeypatch.setenv("NITP_TITAN_DEVICE", "gpu")
    code, _, error = cli_main(capsys, "check", DEBUG)
    assert (code, error) == (2, 'NITP_TITAN_DEVICE: found \'gpu\', expected one of "here", "h100", "cpu"\n')


def test_strict_ends_with_2_where_there_is_a_warning(capsys):
    ignored = [DEBUG, "--profiler.profiler_active=2"]
    for words in (ignored, [*ignored, "--strict"]):
        code, out, error = cli_main(capsys, "check", *words)
        assert "warning   profiler.profiler_active is ignored: profiler.enable_profiling is false" in out
        assert (code, error) == ((2, "--strict: 1 warning\n") if "--strict" in words else (0, ""))
    # What somebody has switched off is a note.
    code, out, _ = cli_main(capsys, "check", DEBUG, "--strict", "--nitp.no-enable", "--nitp.weight=0.5")
    assert code == 0
    assert "note      nitp.weight is ignored: nitp.enable is false" in out


def test_check_without_nitp():
    out = run("check", DEBUG, "--nitp.no-enable")[1]
    assert "nitp      off: stock TorchTitan" in out
    assert "loss chunked_cross_entropy" in out or "loss cross_entropy" in out


BAD = """\
[trainning]
steps = 3
[training]
stepss = 3
steps = "many"
seq_len = 100
local_batch_size = 3
global_batch_size = 8
[nitp]
weight = nan
target_layer = 7
loss = "cosin"
[dataloader]
dataset = "text"
dataset_path = "/no/such/place/*.txt"
[parallelism]
tensor_parallel_degree = 2
"""


def test_bad_file_and_command_line_are_reported_whole(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text('[model]\nflavor = "debug"\n' + BAD)
    code, out, error, torch = run("check", str(path), "--nitp.projektor", "none", "--optimizer.lr", "-1")
    assert (code, out, torch) == (2, "", False)
    assert [line.split(": ", 2)[:2] for line in error.splitlines()] == [
        [f"{path}:3", "[trainning]"],
        [f"{path}:6", "[training] stepss"],
        [f"{path}:7", "[training] steps"],
        [f"{path}:12", "[nitp] weight"],
        [f"{path}:13", "[nitp] target_layer"],
        [f"{path}:14", "[nitp] loss"],
        [f"{path}:17", "[dataloader] dataset_path"],
        [f"{path}:19", "[parallelism] tensor_parallel_degree"],
        ["command line", "--nitp.projektor"],
        ["command line", "--optimizer.lr"],
    ]
    assert 'did you mean "--nitp.projector"?' in error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[training\nsteps = 1", "bad.toml:1: TOML syntax error"),
        ("[trainning]\n", 'bad.toml:1: [trainning]: unknown table; did you mean "training"?'),
        ('[model]\nflavor = "debg"', 'bad.toml:2: [model] flavor: found "debg", expected one of "debug", "debug_moe"'),
        ('[model]\nmodule = "lama3"', 'bad.toml:2: [model] module: found "lama3", expected one of "nitp_titan"'),
        ("[nitp]\ntarget_layer = 7", "bad.toml:2: [nitp] target_layer: found 7, expected 0..6"),
        ("[nitp]\nweight = -inf", "bad.toml:2: [nitp] weight: found -inf, expected a finite number of at least 0"),
        ("[training]\nseq_len = 9000", "bad.toml:2: [training] seq_len: found 9000, expected at most the model's 8192"),
    ],
)
def test_bad_file(tmp_path, text, expected):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    code, out, error, torch = run("check", str(path))
    assert (code, out, torch) == (2, "", False)
    [line] = error.splitlines()
    assert line.startswith(f"{tmp_path}/{expected}")


def test_missing_file():
    code, _, error, torch = run("check", "train_configs/debgu.toml")
    assert (code, torch) == (2, False)
    assert error == 'train_configs/debgu.toml: no such file; did you mean "train_configs/debug.toml"?'


def test_training_refuses_a_bad_file_without_torch(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("[trainning]")
    code = _MAIN.replace("nitp_titan.cli.main", "nitp_titan.train")
    command = [sys.executable, "-c", code, "--job.config_file", str(path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 2
    assert process.stderr == f'{path}:1: [trainning]: unknown table; did you mean "training"?\nFalse\n'


def test_usage_errors(capsys):
    assert cli_main(capsys)[0] == 2
    assert cli_main(capsys, "frobnicate")[0] == 2
    code, _, error = cli_main(capsys, "check")
    assert (code, error) == (2, "nitp-titan check: expected a job file; see nitp-titan check --help\n")
    code, _, error = cli_main(capsys, "check", DEBUG, "--ngpu", "0")
    assert code == 2
    assert "--ngpu: found '0', expected a whole number, 1..10000000" in error
    assert "found '99999999999', expected" in cli_main(capsys, "check", DEBUG, "--ngpu", "99999999999")[2]
    assert "found '2.5', expected" in cli_main(capsys, "check", DEBUG, "--ngpu", "2.5")[2]
    code, _, error = cli_main(capsys, "check", DEBUG, "--steps", "5")
    assert code == 2
    assert 'did you mean "--training.steps"' in error
    code, _, error = cli_main(capsys, "env", "--nonsense")
    assert code == 2


def test_help(capsys):
    code, out, _ = cli_main(capsys, "--help")
    assert code == 0
    assert all(command in out for command in ("check", "plot", "env", "torchrun"))
    code, out, _ = cli_main(capsys, "check", "--help")
    assert code == 0
    assert "--training.steps 100" in out
    assert "--keys" in out
    assert cli_main(capsys, "--version")[1].startswith("nitp-titan ")


def test_keys(capsys):
    code, out, _ = cli_main(capsys, "check", "--keys")
    assert code == 0
    assert "[validator.dataloader]" in out
    code, out, _ = cli_main(capsys, "check", "--keys", "metrics")
    assert code == 0
    assert out.startswith("[metrics]\n  log_freq = 10    a whole number\n      How often to log metrics")
    assert "enable_tensorboard = true" in out
    for words, value, source in (
        ([], "lr = 0.002 ", "default of the flavor debug"),
        (["--model.flavor=2B"], "lr = 0.00042 ", "default of the flavor 2B"),
        (["--optimizer.lr=0.5"], "lr = 0.5 ", "set on the command line"),
        ([DEBUG], "lr = 0.002 ", f"set in {DEBUG}"),
    ):
        out = cli_main(capsys, "check", *words, "--keys", "optimizer")[1]
        of_lr = out.partition("  lr = ")[2].partition("\n  beta1")[0]
        assert f"lr = {of_lr}".startswith(value)
        assert of_lr.splitlines()[-1].strip() == source
    out = cli_main(capsys, "check", "--keys", "model.shape", "--model.flavor=0.5B")[1]
    assert '"none"    ' not in out
    assert "dim = 896    a whole number" in out
    assert "default of TorchTitan: training.steps, 200\n" in cli_main(capsys, "check", "--keys=lr_scheduler")[1]
    code, _, error = cli_main(capsys, "check", "--keys", "metric")
    assert (code, error) == (2, "--keys: unknown table 'metric'; did you mean \"metrics\"?\n")


def test_plot(capsys, tmp_path, monkeypatch):
    import nitp_titan.tools.plot

    calls = []
    monkeypatch.setattr(nitp_titan.tools.plot, "plot_runs", lambda runs, out: calls.append((runs, out)))
    assert cli_main(capsys, "plot", "a", "b", "--out", "c.png")[:2] == (0, "c.png\n")
    assert calls == [([Path("a"), Path("b")], Path("c.png"))]
    monkeypatch.undo()
    code, out, error = cli_main(capsys, "plot", str(tmp_path / "none"), "--out", str(tmp_path / "c.png"))
    assert (code, out) == (2, "")
    assert "none" in error


def test_env(capsys, monkeypatch):
    import nitp_titan.tools.env

    monkeypatch.setattr(nitp_titan.tools.env, "environment_report", lambda: "all of it")
    assert cli_main(capsys, "env") == (0, "all of it\n", "")


def test_interrupt_is_quiet(capsys, monkeypatch):
    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("nitp_titan.cli.check.load_job", interrupt)
    assert cli_main(capsys, "check", DEBUG) == (130, "", "")


def test_closed_pipe_is_quiet():
    # A reader that is gone before the first line: `nitp-titan check --keys | true`.
    process = subprocess.Popen(
        [sys.executable, "-m", "nitp_titan.cli", "check", "--keys"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGPIPE, signal.SIG_IGN),
    )
    process.stdout.close()
    error = process.stderr.read().decode()
    assert (process.wait(timeout=60), error) == (0, "")


def export(capsys, *words):
    return cli_main(capsys, "export", *map(str, words))


@pytest.mark.parametrize("name", ["debug", "debug_moe"])
def test_a_run_is_exported_by_the_command(name, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    words = debug_job(run, "--training.steps=2", "--checkpoint.interval=1")[1:]
    if name == "debug_moe":
        words += ("--checkpoint.last_save_in_hf",)
    done = call(f"--job.config_file=train_configs/{name}.toml", *words)
    assert done.returncode == 0, done.stderr
    # A job of two ranks, and data that this machine lacks: no matter.
    text = (run / "config.toml").read_text()
    text = text.replace("tensor_parallel_degree = 1", "tensor_parallel_degree = 2")
    (run / "config.toml").write_text(text.replace('dataset = "python_stdlib"', 'dataset = "text"'))
    assert export(capsys, run, out) == (0, f"{out}\n", "")
    code, _, problem = export(capsys, out, run)
    assert code == 2
    assert problem.count("\n") == 1

    job = load_job(f"train_configs/{name}.toml", [], 1)
    spec = model_spec("nitp_titan", name, "flex")
    model = built(nitp_model_spec(spec, job.nitp))
    weights = model.state_dict()
    # Of the last step the mixture of experts is in Hugging Face's format already.
    step = run / "checkpoint" / ("step-1" if name == "debug_moe" else "step-2")
    dcp.load(weights, checkpoint_id=step, no_dist=True)
    model.load_state_dict(weights)
    check_same(model.eval(), loaded(out), 320)
    if name == "debug_moe":
        assert type(loaded(run / "checkpoint" / "step-2")).__name__ == "Ernie4_5_MoeForCausalLM"


def test_bad_words_of_an_export_end_with_2_and_one_line_a_problem(tmp_path, capsys):
    job = tmp_path / "job.toml"
    job.write_text('[model]\nflavor = "debug"\n')
    code, _, errors = export(capsys, tmp_path / "run", tmp_path / "out", "--job.config_file", job)
    assert (code, errors) == (2, f"{tmp_path / 'run'} is not a folder\n")
    code, _, errors = export(capsys, tmp_path, tmp_path / "out", f"--job.config_file={job}", "--nitp.wieght=1")
    assert code == 2
    assert 'did you mean "--nitp.weight"?' in errors
    assert errors.count("\n") == 1
    code, _, errors = export(capsys, tmp_path, tmp_path / "out")
    assert code == 2
    assert "--job.config_file: expected the job's file" in errors
    assert export(capsys, tmp_path, tmp_path / "out", "--dtype", "int8")[0] == 2
