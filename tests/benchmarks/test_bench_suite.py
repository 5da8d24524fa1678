"""gpu_suite.sh: its commands are ones that the programs take, with jobs that are valid on one GPU."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from benchmarks import loss, throughput
from nitp_titan.job import load_job
from nitp_titan.job.read import split_command_line
from nitp_titan.train import split_config_file

ROOT = Path(__file__).parent.parent.parent
SUITE = ROOT / "benchmarks" / "gpu_suite.sh"


def dry_run() -> dict[str, list[str]]:
    """Step -> its module and arguments."""
    env = os.environ | {"DRY_RUN": "1"}
    done = subprocess.run(["bash", str(SUITE), "out"], env=env, capture_output=True, text=True, check=True, cwd=ROOT)
    lines = dict(line.split(": -m ", 1) for line in done.stdout.splitlines())
    return {name: shlex.split(words) for name, words in lines.items()}


STEPS = dry_run()


def test_the_most_important_comes_first():
    assert list(STEPS)[:5] == ["smoke", "throughput-0.5b", "loss", "throughput-9b-a1b", "throughput-0.5b-float8"]


@pytest.mark.parametrize("name", [name for name in STEPS if name.startswith("throughput")])
def test_jobs_of_throughput_are_valid(name, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "1")
    module, *words = STEPS[name]
    assert module == "benchmarks.throughput"
    options, job_words = throughput.parse(words)
    entries, _ = throughput.load_entries(options, job_words, str(tmp_path))
    assert str(options.out) == f"out/{name}.json"
    for entry in entries:
        assert entry.job["training"]["seq_len"] == 8192
        assert entry.job["compile"]["enable"]
        assert entry.job["training"]["mixed_precision_param"] == "bfloat16"


def test_bars_have_their_steps():
    assert "ntp,nitp,stock,mtp,ntp_joint" in STEPS["throughput-0.5b"]
    assert "4,2" in STEPS["throughput-9b-a1b"]
    assert "nitp_float8:float8.recipe=tensorwise" in STEPS["throughput-0.5b-float8"]
    own = {name: {word.partition(":")[0] for word in words if ":" in word} for name, words in STEPS.items()}
    assert own["throughput-0.5b-graphs"] == {"ntp_graphs", "nitp_graphs"}
    assert own["throughput-0.5b-foreach"] == {"nitp_foreach"}
    assert "8192" in STEPS["loss"][STEPS["loss"].index("--tokens") + 1].split(",")


def test_other_steps_are_valid():
    for name in ("loss", "loss-32k"):
        module, *words = STEPS[name]
        assert module == "benchmarks.loss"
        assert loss.parse(words).out == Path(f"out/{name}.json")
    for name in ("evidence-nitp", "evidence-ntp"):
        module, *words = STEPS[name]
        file, rest = split_config_file(words)
        assert split_command_line(rest)[1] == []
        assert load_job(file, rest, 1).nitp.enable == (name == "evidence-nitp")


def run_suite(folder: Path, python: str, seconds: int) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHON": python, "SECONDS_LEFT": str(seconds)}
    command = ["bash", str(SUITE), str(folder)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=ROOT)


def test_gpu_tests_are_all_that_there_are():
    """Every file with a test that needs a GPU is named, and is there."""
    module, *words = STEPS["gpu-tests"]
    assert module == "pytest"
    named = {word for word in words if word.startswith("tests/")}
    marked = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py") if "mark.gpu" in path.read_text()}
    assert named == marked - {str(Path(__file__).relative_to(ROOT))}


def test_a_failing_step_stops_nothing_and_is_noted(tmp_path):
    """Every step fails here: the interpreter is a command that does, but for saying that nothing is missing."""
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text('#!/bin/sh\n[ "$*" = "-m benchmarks.needs" ]\n')
    python.chmod(0o755)
    assert run_suite(out, str(python), 60).returncode == 1
    lines = (out / "suite.jsonl").read_text().splitlines()
    assert [f'"step": "{name}", "exit": 1' in line for name, line in zip(STEPS, lines, strict=True)] == [True] * len(
        STEPS
    )
    assert run_suite(out, str(python), 0).returncode == 1
    assert (out / "suite.jsonl").read_text().count('"exit": null') == len(STEPS)


def test_some_steps_alone_go_on_with_what_others_wrote(tmp_path):
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    for pattern in ("^smoke|graphs", "float8"):
        env = os.environ | {"PYTHON": str(python), "ONLY": pattern}
        done = subprocess.run(["bash", str(SUITE), str(out)], env=env, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0
    lines = [json.loads(line) for line in (out / "suite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == ["smoke", "throughput-0.5b-graphs", "throughput-0.5b-float8"]


def test_nothing_is_run_where_something_is_missing(tmp_path):
    done = run_suite(tmp_path, "false", 60)
    assert done.returncode == 1
    assert done.stdout == "Nothing was run: false lacks the above\n"
    assert (tmp_path / "suite.jsonl").read_text() == ""
