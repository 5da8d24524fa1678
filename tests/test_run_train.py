"""run_train.sh and slurm/pretrain.sbatch: what they launch, what they refuse, and runs of two nodes on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from nitp_titan.launch import Launch
from tests.helpers.commands import ROOT, debug_job, losses
from tests.helpers.trainers import metric_lines

RUN, SLURM = "./run_train.sh", "./slurm/pretrain.sbatch"
TWO_NODES = ("slurm-a", "slurm-b")
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK", "NGPU", "LOG_RANK",
            "RDZV_ENDPOINT", "RDZV_ID", "CONFIG_FILE")  # fmt: skip


def call_all(entry: str, words: list[str], number: int, **environment: str) -> list[tuple[int, str]]:
    """Run it so many times at once; return each one's exit code and what it said on either stream."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER and not name.startswith("SLURM")}
    env = {"PYTHON": sys.executable} | kept | environment
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(number)]
        processes = [
            subprocess.Popen([entry, *words], cwd=ROOT, env=env, stdout=output, stderr=output) for output in outputs
        ]
        try:
            codes = [process.wait(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.terminate()
        for output in outputs:
            output.seek(0)
        return list(zip(codes, (output.read() for output in outputs), strict=True))


def call(entry: str, *words: str, **environment: str) -> tuple[int, str]:
    [end] = call_all(entry, list(words), 1, **environment)
    return end


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


# --- what is launched


@pytest.fixture
def recorder(tmp_path):
    """An interpreter that says what it was to run."""
    return str(program(tmp_path, "python", 'echo "$@"'))


@pytest.fixture
def on_nodes(tmp_path):
    """One that says where, too."""
    where = "NNODES=$NNODES NGPU=$NGPU NODE_RANK=$NODE_RANK RDZV_ENDPOINT=$RDZV_ENDPOINT RDZV_ID=$RDZV_ID"
    return str(program(tmp_path, "python", f'echo "$@" {where}'))


def test_the_launcher_has_file_and_options(recorder):
    entry = "-m nitp_titan.launch"
    assert call(RUN, PYTHON=recorder) == (0, f"{entry} train_configs/debug.toml\n")
    given = ("--training.steps", "3", "--nitp.no-enable")
    assert call(RUN, *given, PYTHON=recorder, CONFIG_FILE="a.toml") == (0, f"{entry} a.toml {' '.join(given)}\n")


def torchrun(options: tuple[str, ...] = (), **environment: str) -> tuple[int, str]:
    """How many ranks there are, and torchrun's words on this node."""
    plan = Launch.read(environment)
    return plan.ranks, " ".join(plan.torchrun("a.toml", options))


TRAIN = "-m nitp_titan.train --job.config_file a.toml"
FILTER = "--local-ranks-filter {} --role rank --tee 3"


def test_one_node():
    rendezvous = "--nnodes 1 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint localhost:0"
    expected = f"{rendezvous} {FILTER.format('0,3')} {TRAIN} --nitp.no-enable"
    assert torchrun(("--nitp.no-enable",), NGPU="4", LOG_RANK="0,3") == (4, expected)
    assert Launch.read({}).ranks == 1
    assert Launch.read({"NGPU": "2", "NNODES": "1"}, ranks_here=3).ranks == 3


def test_several_nodes():
    nodes = {"NNODES": "32", "NGPU": "8", "RDZV_ENDPOINT": "head"}
    ranks, run = torchrun(**nodes)
    assert ranks == 256
    rendezvous = "--nnodes 32 --nproc-per-node 8 --rdzv-backend {} --rdzv-endpoint {} --rdzv-id {}"
    end = f"{FILTER.format(0)} {TRAIN}"
    assert run == f"{rendezvous.format('c10d', 'head:29500', 'nitp_titan')} {end}"
    _, run = torchrun(**nodes | {"RDZV_ENDPOINT": "10.0.0.1:4000", "RDZV_ID": "mine", "NODE_RANK": "31"})
    assert run == f"{rendezvous.format('static', '10.0.0.1:4000', 'mine')} --node-rank 31 {end}"
    # Of one process each, several nodes are several processes.
    assert "--nnodes 2 --nproc-per-node 1" in torchrun(NNODES="2", RDZV_ENDPOINT="head")[1]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NNODES": "2"}, "NNODES=2 needs RDZV_ENDPOINT=HOST[:PORT], the same on every node"),
        ({"NNODES": "0"}, 'NNODES: found "0", expected a whole number of at least 1'),
        ({"NNODES": "1:4", "RDZV_ENDPOINT": "head"}, 'NNODES: found "1:4", expected a whole number of at least 1'),
        ({"NGPU": "all"}, 'NGPU: found "all", expected a whole number of at least 1'),
        (
            {"RDZV_ENDPOINT": "head"},
            "RDZV_ENDPOINT or NODE_RANK is set without NNODES; set NNODES to the number of nodes",
        ),
        ({"NODE_RANK": "1"}, "RDZV_ENDPOINT or NODE_RANK is set without NNODES; set NNODES to the number of nodes"),
        (
            {"NNODES": "2", "RDZV_ENDPOINT": "head", "NODE_RANK": "2"},
            'NODE_RANK: found "2", expected 0 to 1 for NNODES=2',
        ),
        (
            {"NNODES": "2", "RDZV_ENDPOINT": "head", "NODE_RANK": "-1"},
            'NODE_RANK: found "-1", expected 0 to 1 for NNODES=2',
        ),
    ],
)
def test_contradictions_are_refused_before_anything_starts(environment, message):
    code, said = call(RUN, **environment)
    assert code == 2
    [line] = said.splitlines()
    assert line.startswith(f"run_train.sh: {message}")


def test_a_bad_job_ends_every_node_before_it_waits_for_the_others():
    nodes = {"NNODES": "3", "NGPU": "2", "RDZV_ENDPOINT": "no-such-host:1", "NODE_RANK": "1"}
    code, said = call(RUN, "--parallelism.tensor_parallel_degree", "4", **nodes)
    assert code == 2
    assert "--parallelism.tensor_parallel_degree: found 4, expected a divisor of the world size 6" in said
    assert "Traceback" not in said


# --- Slurm


@pytest.fixture
def slurm(tmp_path):
    """Environment of a batch script of two nodes, with a srun that runs both nodes' tasks here."""
    tools = tmp_path / "slurm"
    tools.mkdir()
    program(
        tools,
        "scontrol",
        f"""
        case "$1 $2" in
            "show hostnames") [ "$3" = "slurm-[a-b]" ] && printf "%s\\n" {" ".join(TWO_NODES)} ;;
            "requeue $SLURM_JOB_ID") touch {tmp_path}/requeued ;;
            *) exit 1 ;;
        esac""",
    )
    program(
        tools,
        "srun",
        f"""
        echo "$@" > {tmp_path}/srun
        while [[ $1 == --* ]]; do case $1 in *=*) shift ;; *) shift 2 ;; esac; done
        # Both names are this machine's here.
        export RDZV_ENDPOINT=${{RDZV_ENDPOINT/slurm-a/localhost}}
        SLURM_NODEID=0 "$@" & first=$!
        SLURM_NODEID=1 "$@" & second=$!
        trap "kill -USR1 $first $second" USR1
        while kill -0 $first || kill -0 $second; do sleep 0.05; done 2> /dev/null
        wait $first && wait $second""",
    )
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    return {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "slurm-[a-b]",
        "SLURM_JOB_ID": str(20_000 + port),
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_ON_NODE": "96",
    }


def test_slurm_script_launches_a_task_a_node(slurm, on_nodes, tmp_path):
    assert subprocess.run(["bash", "-n", SLURM], cwd=ROOT, check=False).returncode == 0
    code, said = call(SLURM, "--job.description", "two words", PYTHON=on_nodes, CONFIG_FILE="a.toml", **slurm)
    assert code == 0, said
    srun = (tmp_path / "srun").read_text()
    assert srun.startswith("--ntasks-per-node 1 --cpus-per-task 96 --kill-on-bad-exit=1 bash -c ")
    port = 20_000 + int(slurm["SLURM_JOB_ID"]) % 20_000
    runs = sorted(line for line in said.splitlines() if "nitp_titan.launch" in line)
    for rank, run in enumerate(runs):
        assert run.startswith("-m nitp_titan.launch a.toml --job.description two words NNODES=2 NGPU=8 ")
        assert f"NODE_RANK={rank} RDZV_ENDPOINT=localhost:{port} RDZV_ID={slurm['SLURM_JOB_ID']}" in run
    assert len(runs) == 2


@pytest.mark.parametrize(("code", "requeued"), [(0, True), (1, False)])
def test_slurm_script_passes_the_notice_on_and_queues_again_what_has_saved(slurm, tmp_path, code, requeued):
    # A rank that ends when it has the notice, as ours do.
    waits = f"trap 'exit {code}' USR1; echo began; for _ in $(seq 200); do sleep 0.05; done; exit 9"
    log, python = tmp_path / "log", str(program(tmp_path, "python", waits))
    env = os.environ | slurm | {"PYTHON": python, "CONFIG_FILE": "a.toml"}
    with log.open("w") as output:
        batch = subprocess.Popen([SLURM], cwd=ROOT, env=env, stdout=output, stderr=output)
    try:
        while log.read_text().count("began") < 2:
            assert batch.poll() is None, log.read_text()
            time.sleep(0.02)
        # As --signal=B:USR1@300 does: to the batch script alone.
        batch.send_signal(signal.SIGUSR1)
        assert batch.wait(timeout=30) == code, log.read_text()
    finally:
        batch.kill()
    assert (tmp_path / "requeued").exists() == requeued


def test_slurm_options_are_one_task_and_all_gpus_a_node():
    options = [line.split()[1] for line in (ROOT / SLURM).read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--ntasks-per-node=1", "--gpus-per-node=8", "--exclusive"} <= set(options)
    assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append"} <= set(options)


# --- two nodes on this machine


def job(folder: Path, corpus: Path) -> list[str]:
    words = ["--training.steps=3", "--training.local_batch_size=4", "--dataloader.dataset=text"]
    words += [f"--dataloader.dataset_path={corpus}", "--checkpoint.interval=3", "--debug.deterministic"]
    return [*debug_job(folder)[1:], *words]


@pytest.fixture(scope="module")
def one_node(tmp_path_factory, corpus) -> dict[int, float]:
    """Losses of two ranks of one node."""
    folder = tmp_path_factory.mktemp("one_node") / "run"
    code, said = call(RUN, *job(folder, corpus), NGPU="2")
    assert code == 0, said
    return losses(folder)


def check_run(folder: Path, expected: dict[int, float]) -> None:
    """The run of two nodes is the one of two ranks, and its folder has been written by one of them."""
    assert losses(folder) == expected
    assert [line["step"] for line in metric_lines(folder)] == [1, 2, 3]
    assert {"config.toml", "metrics.jsonl", "tb", "checkpoint"} <= {path.name for path in folder.iterdir()}
    assert len(list((folder / "tb").rglob("events.out.*"))) == 1
    # Each rank its own shards.
    assert len(list((folder / "checkpoint" / "step-3").glob("*.distcp"))) == 2


@pytest.mark.slow
def test_two_nodes_that_meet_by_themselves_train_as_one(one_node, corpus, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        nodes = {"NNODES": "2", "NGPU": "1", "RDZV_ENDPOINT": f"localhost:{probe.getsockname()[1]}"}
    nodes["RDZV_ID"] = "test"
    ends = call_all(RUN, job(tmp_path / "run", corpus), 2, **nodes)
    assert [code for code, _ in ends] == [0, 0], ends
    check_run(tmp_path / "run", one_node)
    # Each shows the console of its first local rank.
    assert all("step:  3" in said for _, said in ends)


@pytest.mark.slow
def test_two_nodes_of_slurm_train_as_one(one_node, corpus, slurm, tmp_path):
    code, said = call(SLURM, *job(tmp_path / "run", corpus), NGPU="1", CONFIG_FILE="train_configs/debug.toml", **slurm)
    assert code == 0, said
    check_run(tmp_path / "run", one_node)
