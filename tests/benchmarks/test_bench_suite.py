"""gpu_suite.sh: its commands are ones that the programs take, with jobs that are valid on one GPU."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import attention, experts, loss, throughput
from benchmarks.heads import IMPLEMENTATIONS

ROOT = Path(__file__).parent.parent.parent
SUITE = ROOT / "benchmarks" / "gpu_suite.sh"


def dry_run() -> dict[str, tuple[int, list[str]]]:
    """Step -> its limit in seconds; its module and arguments."""
    env = os.environ | {"DRY_RUN": "1"}
    done = subprocess.run(["bash", str(SUITE), "out"], env=env, capture_output=True, text=True, check=True, cwd=ROOT)
    lines = (line.split(": ", 2) for line in done.stdout.splitlines())
    return {name: (int(limit), shlex.split(words)[1:]) for name, limit, words in lines}


LIMITS = {name: limit for name, (limit, _) in dry_run().items()}
STEPS = {name: words for name, (_, words) in dry_run().items()}
LATER = ("second-", "third-", "more-")
FIRST_CALL = [name for name in STEPS if not name.startswith(LATER)]


def test_the_most_important_comes_first():
    sizes = ["throughput-0.5b-none", "throughput-0.5b", "loss", "throughput-1.9b-a0.3b"]
    assert ["attention", *sizes] == FIRST_CALL
    assert list(STEPS)[: len(FIRST_CALL)] == FIRST_CALL


@pytest.mark.parametrize(("call", "budget"), [("", 530), ("second-", 270), ("third-", 270)])
def test_limits_add_up_to_less_than_a_calls_budget(call, budget):
    names = [name for name in STEPS if name.startswith(call)] if call else FIRST_CALL
    assert names
    assert sum(LIMITS[name] for name in names) <= budget


@pytest.mark.parametrize("name", [name for name in STEPS if "throughput" in name])
def test_jobs_of_throughput_are_valid(name, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "1")
    module, *words = STEPS[name]
    assert module == "benchmarks.throughput"
    options, job_words = throughput.parse(words)
    entries, _ = throughput.load_entries(options, job_words, str(tmp_path))
    assert f"out/{name}.json".endswith(options.out.name)
    assert set(filter(None, options.profile.split(","))) <= {entry.name for entry in entries}
    for entry in entries:
        assert entry.job["training"]["seq_len"] == 8192
        assert entry.job["compile"]["enable"]
        assert entry.job["training"]["mixed_precision_param"] == "bfloat16"


def test_bars_have_their_steps():
    assert "ntp,nitp,stock" in STEPS["throughput-0.5b"]
    assert "ntp_joint,nitp,mtp" in STEPS["throughput-0.5b-none"]
    assert "4,2" in STEPS["second-throughput-9b-a1b"]
    assert "nitp_float8:float8.recipe=tensorwise" in STEPS["third-throughput-0.5b-float8"]
    own = {name: {word.partition(":")[0] for word in words if ":" in word} for name, words in STEPS.items()}
    assert own["more-throughput-0.5b-graphs"] == {"ntp_graphs", "nitp_graphs"}
    assert own["more-throughput-0.5b-switches"] == {"nitp_foreach"}
    assert own["throughput-0.5b-none"] == {"nitp_kept"}
    assert "8192" in STEPS["loss"][STEPS["loss"].index("--tokens") + 1].split(",")


def test_other_steps_are_valid():
    module, *words = STEPS["loss"]
    assert module == "benchmarks.loss"
    options = loss.parse(words)
    assert options.out == Path("out/loss.json")
    assert set(options.implementations.split(",")) <= set(IMPLEMENTATIONS)
    module, *words = STEPS["second-experts"]
    assert module == "benchmarks.experts"
    assert experts.parse(words).out == Path("out/experts.json")
    module, *words = STEPS["attention"]
    assert module == "benchmarks.attention"
    assert attention.parse(words).out == Path("out/attention.json")


def run_suite(folder: Path, python: str, seconds: int) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHON": python, "SECONDS_LEFT": str(seconds)}
    command = ["bash", str(SUITE), str(folder)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=ROOT)


def test_gpu_tests_are_all_that_there_are():
    """Every file with a test that needs a GPU is named, and is there."""
    module, *words = STEPS["third-gpu-tests"]
    assert module == "pytest"
    named = {word for word in words if word.startswith("tests/")}
    marked = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py") if "mark.gpu" in path.read_text()}
    assert named == marked - {str(Path(__file__).relative_to(ROOT))}


def test_a_failing_step_stops_nothing_and_is_noted(tmp_path):
    """Every step fails here: the interpreter is a command that does, but for saying that nothing is missing."""
    python, out = tmp_path / "python", tmp_path / "out"
    said = 'a "word", a \\ and\na second line é\n'
    (tmp_path / "said").write_text(said)
    fails = f"cat {tmp_path}/said; exit 1"
    python.write_text(f'#!/bin/sh\n[ "$*" = "-m benchmarks.needs" ] || {{ {fails}; }}\n')
    python.chmod(0o755)
    assert run_suite(out, str(python), 60).returncode == 1
    lines = [json.loads(line) for line in (out / "suite.jsonl").read_text().splitlines()]
    assert [(line["step"], line["exit"]) for line in lines] == [(name, 1) for name in FIRST_CALL]
    # The end of each log, whatever it holds.
    assert all(line["log_end"] == said for line in lines)
    assert run_suite(out, str(python), 0).returncode == 1
    assert (out / "suite.jsonl").read_text().count('"exit": null') == len(FIRST_CALL)


def test_some_steps_alone_go_on_with_what_others_wrote(tmp_path):
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    for pattern in ("^attention|graphs", "float8"):
        env = os.environ | {"PYTHON": str(python), "ONLY": pattern}
        done = subprocess.run(["bash", str(SUITE), str(out)], env=env, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0
    lines = [json.loads(line) for line in (out / "suite.jsonl").read_text().splitlines()]
    steps = ["attention", "more-throughput-0.5b-graphs", "third-throughput-0.5b-float8"]
    assert [line["step"] for line in lines] == steps


def test_measured_tiles_are_a_variant_of_what_follows(tmp_path):
    python, out = tmp_path / "python", tmp_path / "out"
    out.mkdir()
    fastest = {"bwd_num_warps": 4, "bwd_BLOCK_M1": 32}
    (out / "attention.json").write_text(json.dumps({"attention": [{"flavor": "0.5B", "fastest": fastest}]}))
    python.write_text(f'#!/bin/sh\ncase "$*" in *--fastest*) exec {sys.executable} "$@";; esac\necho "$@"\n')
    python.chmod(0o755)
    env = os.environ | {"PYTHON": str(python), "ONLY": "^throughput-0.5b-none|9b"}
    subprocess.run(["bash", str(SUITE), str(out)], env=env, capture_output=True, text=True, cwd=ROOT, check=True)
    words = (out / "throughput-0.5b-none.log").read_text().split()
    tiles = "nitp_tiles:model.flex_kernel_options.bwd_num_warps=4,model.flex_kernel_options.bwd_BLOCK_M1=32"
    assert f"--variant={tiles}" in words
    assert "nitp_tiles" not in (out / "second-throughput-9b-a1b.log").read_text()  # not measured


def test_nothing_is_run_where_something_is_missing(tmp_path):
    done = run_suite(tmp_path, "false", 60)
    assert done.returncode == 1
    assert done.stdout == "Nothing was run: false lacks the above\n"
    assert (tmp_path / "suite.jsonl").read_text() == ""
