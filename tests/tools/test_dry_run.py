"""``nitp-titan check --dry-run``: groups of ranks and their bytes, against closed forms and a run on real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.live_bytes import LiveBytes
from nitp_titan.job import JobError, load_job
from nitp_titan.models.costs import parts_of_shape
from nitp_titan.models.flavors import FLAVORS
from nitp_titan.nitp.dtensors import local
from nitp_titan.runtime import machine
from nitp_titan.tools.estimate.dry_run import COUNTED, RankGroup, _stage, dry_run, render
from nitp_titan.tools.estimate.fake_ranks import ModelPart, RankModel
from nitp_titan.tools.estimate.memory import GIB, memory
from nitp_titan.tools.estimate.parts import run_of_job
from tests.helpers.commands import ROOT, cli_main
from tests.helpers.ranks import run_on_ranks
from tests.helpers.trainers import running

EP = pytest.mark.skipif(machine.torch_version() < (2, 13), reason="expert parallelism needs torch >= 2.13")
PP = pytest.mark.skipif(machine.torch_version() < (2, 13), reason="torchtitan's pipelines need torch >= 2.13")
SHARD, REPLICAS = "--parallelism.data_parallel_shard_degree", "--parallelism.data_parallel_replicate_degree"
TENSOR, EXPERT = "--parallelism.tensor_parallel_degree", "--parallelism.expert_parallel_degree"
PIPELINE = "--parallelism.pipeline_parallel_degree"


def groups(flavor: str, world: int, *overrides: str) -> list[RankGroup]:
    return dry_run(load_job(None, ["--model.flavor", flavor, *overrides], world))


def rows(number: int, world: int, rank: int) -> int:
    """Rows of a rank, where ``world`` ranks share so many."""
    chunks = torch.arange(number).chunk(world)
    return len(chunks[rank]) if rank < len(chunks) else 0


# --- parameters


@EP
def test_9b_on_256_ranks():
    found = groups("9B-A1B", 256, EXPERT, "8")
    parts = parts_of_shape(FLAVORS["9B-A1B"].shape)
    routed = parts.by_part()["routed_experts"]
    assert sorted(rank for group in found for rank in group.ranks) == list(range(256))
    for group in found:
        # A rank's 18 experts are shared by 32, row by row; the projector's 12 d^2 by all.
        assert group.experts == routed / 256 == 23 * 18 * 3 * 1280 * 640 / 32
        assert group.projector == 12 * 1280**2 / 256
        for rank in {group.ranks[0], group.ranks[-1]}:
            d, share = 1280, lambda number, rank=rank: rows(number, 256, rank)
            attention = share(2560) * d + share(d) * d + 2 * share(d)
            dense = 2 * share(10944) * d + share(d) * 10944
            shared = 2 * share(640) * d + share(d) * 640
            expected = 2 * share(152_064) * d + 24 * attention + dense + 23 * (shared + share(144) * d) + share(d)
            assert group.backbone == expected, rank
    assert sum(group.backbone * len(group.ranks) for group in found) == parts.total() - routed
    # The router has a row for each of 144 experts.
    assert found[0].ranks == tuple(range(144))


@pytest.mark.parametrize(
    ("flavor", "world", "overrides", "sharded", "tensor", "experts"),
    [
        ("2B", 8, [], 8, 1, 0),
        ("2B", 32, [REPLICAS, "4"], 8, 1, 0),
        ("2B", 8, [TENSOR, "2"], 4, 2, 0),
        ("2B", 16, [TENSOR, "2", REPLICAS, "2"], 4, 2, 0),
        ("9B-A1B", 16, [EXPERT, "1"], 16, 1, 16),
        ("9B-A1B", 8, [EXPERT, "1", TENSOR, "2"], 4, 2, 8),
        pytest.param("9B-A1B", 16, [EXPERT, "8"], 16, 1, 16, marks=EP),
        pytest.param("9B-A1B", 256, [EXPERT, "8", REPLICAS, "16"], 16, 1, 16, marks=EP),
        pytest.param("9B-A1B", 16, [EXPERT, "4", TENSOR, "4"], 4, 4, 16, marks=EP),
        pytest.param("45B-A5.5B", 512, [EXPERT, "8", TENSOR, "4", REPLICAS, "32"], 4, 4, 16, marks=EP),
    ],
)
def test_even_shards_are_the_whole_over_the_ranks_that_share_it(flavor, world, overrides, sharded, tensor, experts):
    job = load_job(None, ["--model.flavor", flavor, *overrides], world)
    [group] = dry_run(job)
    assert group.ranks == tuple(range(world))
    parts, shape = parts_of_shape(FLAVORS[flavor].shape), FLAVORS[flavor].shape
    by_part = parts.by_part()
    routed, repeated = by_part["routed_experts"], by_part["norms"] + by_part["router"]
    assert group.experts == (routed / experts if routed else 0)
    assert group.projector == 12 * shape.dim**2 / (sharded * tensor)
    assert group.backbone == (parts.total() - routed - repeated) / (sharded * tensor) + repeated / sharded
    # Even shards are what the estimate of nitp-titan report takes all shards for. It does not know that FSDP reduces
    # two gradients of a tied embedding under tensor parallelism.
    estimate = memory(parts, job.nitp, job.layout, run_of_job(job))
    second = 4 * 152_064 * shape.dim / (sharded * tensor) / GIB if shape.tie_embeddings and tensor > 1 else 0
    estimate["gradients"] += second
    estimate["total"] += second
    for name, size in estimate.items():
        if name != "total":
            assert group.memory_gib[name] == pytest.approx(size, rel=1e-9), name
    assert group.memory_gib["total"] == pytest.approx(estimate["total"] + group.memory_gib["buffers"])


def test_ranks_are_grouped_by_what_they_hold():
    # 60 numbers over 9 ranks: 7 each, the last one 4; a vocabulary of 331: 37 each, the last one 35.
    shape = {"dim": 60, "n_layers": 1, "n_heads": 6, "n_kv_heads": 6, "head_dim": 10, "hidden_dim": 135}
    words = [f"--model.shape.{key}={value}" for key, value in (shape | {"vocab_size": 331}).items()]
    found = groups("debug", 9, *words, "--dataloader.num_streams=9", "--model.shape.no-tie_embeddings")
    assert [group.ranks for group in found] == [tuple(range(8)), (8,)]
    first, last = found
    assert first.backbone == 2 * 37 * 60 + 7 + (20 * 60 + 7 * 60 + 2 * 7) + (2 * 15 * 60 + 7 * 135)
    assert last.backbone == 2 * 35 * 60 + 4 + (20 * 60 + 4 * 60 + 2 * 4) + (2 * 15 * 60 + 4 * 135)
    assert (first.projector, last.projector) == (2 * 27 * 60 + 7 * 240, 2 * 24 * 60 + 4 * 240)
    # All allocate alike; the moments alone are as uneven as the parameters.
    for name in ("weights", "gradients"):
        assert first.memory_gib[name] == last.memory_gib[name] == pytest.approx(4 * first.backbone / GIB)
    assert last.memory_gib["optimizer_states"] == pytest.approx(8 * last.backbone / GIB)
    assert last.memory_gib["projector"] == pytest.approx(8 * (first.projector + last.projector) / GIB)


def test_memory_follows_precision_and_offload():
    usual = groups("debug", 4)[0].memory_gib
    half = groups("debug", 4, "--training.dtype", "bfloat16")[0].memory_gib
    assert [half[name] / usual[name] for name in ("weights", "gradients", "optimizer_states")] == [0.5] * 3
    states = groups("debug", 4, "--optimizer.implementation", "fused_opt_states_bf16")[0].memory_gib
    assert states["optimizer_states"] * 2 == usual["optimizer_states"]
    offloaded = groups("debug", 4, "--training.enable_cpu_offload")[0]
    assert [offloaded.memory_gib[name] for name in COUNTED if name != "buffers"] == [0, 0, 0, 0]
    assert offloaded.parameters == groups("debug", 4)[0].parameters


# --- the bytes of a real run

ODD = [
    "--model.shape.dim=60", "--model.shape.n_heads=6", "--model.shape.n_kv_heads=6", "--model.shape.head_dim=10",
    "--model.shape.vocab_size=331", "--training.seq_len=64",
    "--training.local_batch_size=1", "--training.steps=1", "--compile.no-enable", "--metrics.no-enable_tensorboard",
    "--nitp.geometry_freq=0", "--dataloader.dataset=text", "--comm.trace_buf_size=0",
]  # fmt: skip
RUNS = {
    "dense": ["--model.flavor=debug", "--model.shape.hidden_dim=135"],
    "tensor": ["--model.flavor=debug", "--model.shape.hidden_dim=134", TENSOR, "2"],
    "tensor, tied": ["--model.flavor=debug", "--model.shape.hidden_dim=134", TENSOR, "2"],
    "experts": ["--model.flavor=debug_moe", "--model.shape.num_experts=6", EXPERT, "1"],
    "expert parallel": ["--model.flavor=debug_moe", "--model.shape.num_experts=6", EXPERT, "2"],
}


def words_of(name: str, folder: str, corpus: str) -> list[str]:
    tied = f"--model.shape.tie_embeddings={str('tied' in name).lower()}"
    return [*RUNS[name], tied, *ODD, f"--job.dump_folder={folder}", f"--dataloader.dataset_path={corpus}"]


def live_bytes(names: list[str], folder: str, corpus: str) -> list[dict[str, int]]:
    """Train each of ``RUNS`` for a step on this rank; return what is there after it."""
    from nitp_titan.job.build import build_trainer_config

    return [live_bytes_of(build_trainer_config(load_job(None, words_of(n, folder, corpus), 2))) for n in names]


def live_bytes_of(config: Any) -> dict[str, int]:
    def storages(tensors: Any) -> int:
        held = [local(tensor).untyped_storage() for tensor in tensors]
        by_address = {storage.data_ptr(): storage.nbytes() for storage in held}
        return sum(by_address.values())

    with running(config) as trainer:
        trainer.train()
        [model] = trainer.model_parts
        [optimizer] = trainer.optimizers.optimizers
        backbone = [p for name, p in model.named_parameters() if not name.startswith("projector.")]
        projector = list(model.projector.parameters())

        def moments(parameters: Any) -> Any:
            return [s for p in parameters for name, s in optimizer.state[p].items() if name != "step"]

        return {
            "parameters": sum(p.to_local().numel() for p in (*backbone, *projector)),
            "weights": storages(backbone),
            "gradients": storages(p.grad for p in backbone),
            "optimizer_states": storages(moments(backbone)),
            "projector": storages(projector) + storages(p.grad for p in projector) + storages(moments(projector)),
            "buffers": storages(model.buffers()),
        }


@pytest.mark.slow
def test_counts_are_the_bytes_of_a_real_run(corpus, tmp_path):
    names = [name for name in RUNS if name != "expert parallel" or machine.torch_version() == (2, 13)]
    ranks = run_on_ranks(2, live_bytes, names, str(tmp_path), str(corpus))
    for i, name in enumerate(names):
        found = dry_run(load_job(None, words_of(name, str(tmp_path), str(corpus)), 2))
        for rank, live in enumerate(ranks):
            [group] = [group for group in found if rank in group.ranks]
            expected = {"parameters": group.parameters, **{part: group.memory_gib[part] * GIB for part in COUNTED}}
            assert live[i] == expected, f"{name}, rank {rank}"


# --- pipelines


@PP
def test_stages_of_a_pipeline(monkeypatch):
    # What this torch cannot run it can still divide.
    monkeypatch.setattr(machine, "torch_version", lambda: (2, 14))
    overrides = [
        "--nitp.no-enable",
        PIPELINE,
        "4",
        "--training.local_batch_size=8",
        "--model.flavor=9B-A1B",
        EXPERT,
        "8",
    ]
    job = load_job(None, overrides, 64)
    found = dry_run(job)
    parts = parts_of_shape(FLAVORS["9B-A1B"].shape)
    assert sum(group.parameters * len(group.ranks) for group in found) == parts.total()
    places = {group.ranks[0] // 16: group for group in reversed(found)}
    assert sorted(places) == [0, 1, 2, 3]
    assert [places[i].holds for i in range(4)] == [
        "blocks 0-5, embedding", "blocks 6-12", "blocks 13-18", "blocks 19-23, unembedding",
    ]  # fmt: skip
    # Two ranks share the 18 experts of an expert-parallel one.
    expert = 3 * 1280 * 640
    assert [places[i].experts for i in range(4)] == [9 * moe_blocks * expert for moe_blocks in (5, 7, 6, 5)]
    estimates = [places[i].memory_gib for i in range(4)]
    assert [estimate["cross_entropy"] > 0 for estimate in estimates] == [False, False, False, True]
    # An input and an output's gradient a micro-batch; the ends have one of the two.
    sequence = 8 * 8192 * 1280 * 2 / GIB
    assert [e["pipeline_buffers"] for e in estimates] == pytest.approx([sequence, 2 * sequence, 2 * sequence, sequence])
    assert estimates[1]["activations"] / estimates[2]["activations"] == pytest.approx(3 / 2 * 7 / 6)


def test_the_target_travels_to_the_last_stage():
    parts = [ModelPart(blocks, first, last, 1) for blocks, first, last in
             [((0, 1), True, False), ((2, 3), False, False), ((4, 5), False, True)]]  # fmt: skip

    def received(target_layer: int | None, *places: int) -> int:
        model = RankModel(ranks=range(1), parts=tuple(parts[place] for place in places), parameters=(), buffer_bytes=0,
                          micro_batches=2)  # fmt: skip
        return _stage(model, target_layer).received

    plain = [received(None, place) for place in range(3)]
    assert plain == [1, 2, 1]
    assert [received(0, place) for place in range(3)] == [1, 3, 2]
    assert [received(1, place) for place in range(3)] == [1, 3, 2]
    # What stage 1 gets is the residual stream after block 2 itself.
    assert [received(2, place) for place in range(3)] == [1, 2, 2]
    assert [received(3, place) for place in range(3)] == [1, 2, 2]
    assert [received(5, place) for place in range(3)] == plain
    assert received(1, 0, 2) == 3


WORDS = [
    "--model.flavor=debug", "--model.shape.dim=256", "--model.shape.hidden_dim=1024", "--model.shape.n_layers=6",
    "--nitp.no-enable", f"{PIPELINE}=2", "--parallelism.data_parallel_shard_degree=1", "--dataloader.dataset=text",
    "--training.mixed_precision_param=float32", "--metrics.no-enable_tensorboard", "--comm.trace_buf_size=0",
    # Short sequences, since a CPU's attention keeps the products of tokens with tokens, and enough of them to outweigh
    # the gradients of the weights.
    "--training.seq_len=32", "--parallelism.pipeline_parallel_microbatch_size=16", "--dataloader.num_streams=16",
]  # fmt: skip


def peaks(runs: list[list[str]]) -> list[int]:
    """Train each for two steps on this rank; return the bytes that live at most in the second, less those that stay."""
    return [peak_of_a_step(words) for words in runs]


def peak_of_a_step(words: list[str]) -> int:
    from nitp_titan.job.build import build_trainer_config

    with running(build_trainer_config(load_job(None, words, 2))) as trainer:
        batches = trainer.batch_generator(trainer.dataloader)
        trainer.step = 1
        trainer.train_step(batches)
        trainer.optimizers.zero_grad()
        states = [state for optimizer in trainer.optimizers.optimizers for state in optimizer.state.values()]
        known = [tensor for part in trainer.model_parts for tensor in (*part.parameters(), *part.buffers())]
        known += [tensor for state in states for tensor in state.values()]
        tracker = LiveBytes([local(tensor) for tensor in known])
        trainer.step = 2
        with tracker:
            trainer.train_step(batches)
        return tracker.peak


@pytest.mark.slow
def test_micro_batches_take_what_they_take_in_a_real_pipeline(corpus, tmp_path):
    places = [f"--job.dump_folder={tmp_path}", f"--dataloader.dataset_path={corpus}"]
    runs = [
        [*WORDS, *places, f"--parallelism.pipeline_parallel_schedule={schedule}",
         f"--training.local_batch_size={16 * number}", f"--training.global_batch_size={16 * number}"]
        for schedule in ("GPipe", "1F1B") for number in (4, 8)
    ]  # fmt: skip
    try:
        jobs = [load_job(None, words, 2) for words in runs]
    except JobError as error:
        if "needs torch" not in str(error):
            raise
        pytest.skip(str(error))
    estimates = [dry_run(job) for job in jobs]
    for rank, live in enumerate(run_on_ranks(2, peaks, runs)):
        memories = [groups_of_run[rank].memory_gib for groups_of_run in estimates]
        # What is received has its place since the first step.
        totals = [(gib["total"] - gib["pipeline_buffers"]) * GIB for gib in memories]
        # Four more micro-batches are four more in flight for GPipe, and none for 1F1B. A CPU's norms keep copies.
        assert 0.95 < (live[1] - live[0]) / (totals[1] - totals[0]) < 1.15
        assert totals[3] == totals[2]
        assert live[3] == pytest.approx(live[2], rel=0.05)
        assert live[0] < totals[0]


# --- the command


@pytest.fixture
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_command(capsys, in_the_root):
    code, plain, _ = cli_main(capsys, "check", "train_configs/debug_moe.toml", "--ngpu", "4", EXPERT, "1")
    assert code == 0
    code, out, error = cli_main(
        capsys, "check", "train_configs/debug_moe.toml", "--ngpu", "4", "--dry-run", EXPERT, "1"
    )
    assert (code, error) == (0, "")
    assert out.startswith(plain)
    said = out.removeprefix(plain).splitlines()
    assert said[1].startswith("dry run   4 ranks on a fake process group, nothing allocated")
    [group] = groups("debug_moe", 4, EXPERT, "1")
    [row] = [line for line in said if line.startswith("0-3 ")]
    numbers = [group.parameters, group.backbone, group.experts, group.projector]
    assert row.split()[1:5] == [f"{number:,}" for number in numbers]
    # What is counted and what is estimated.
    marked = {line.split(" ~ ")[0].strip() for line in said if line.startswith("  ") and " ~ " in line}
    assert marked == {"gathered parameters", "gradient reduction", "activations", "block backward", "saved target",
                      "nitp loss", "cross entropy", "total"}  # fmt: skip


def test_command_refuses_what_torch_refuses(capsys, in_the_root, monkeypatch):
    # 640 rows of an expert for 24 ranks, which the job's own checks would tell.
    for place in ("layout", "checks.experts"):
        monkeypatch.setattr(f"nitp_titan.job.{place}.experts_divide", lambda *args, **kwargs: True)
    words = ["--ngpu", "192", EXPERT, "8", "--training.local_batch_size=1", "--training.global_batch_size=192"]
    words += ["--dataloader.num_streams=192"]
    if machine.torch_version() < (2, 13):
        pytest.skip("expert parallelism needs torch >= 2.13")
    code, out, error = cli_main(capsys, "check", "train_configs/nitp_9b-a1b.toml", "--dry-run", *words)
    assert code == 2
    assert "dry run" not in out
    [line] = error.splitlines()
    assert line == (
        "train_configs/nitp_9b-a1b.toml: [parallelism]: 192 ranks: sharded (FSDP) 192, expert 8: "
        "FSDP does not support uneven sharding on dim 1: torch.Size([18, 640, 1280]) (world size: 24)"
    )


def test_table_fits_a_terminal():
    group = RankGroup(
        ranks=(*range(3), 5, 7, 9, 11, 13), holds="blocks 0-3, embedding", backbone=123_456_789, experts=2_345_678_901,
        projector=113_246_208, memory_gib=dict.fromkeys(COUNTED, 12.345) | {"total": 66.6},
    )  # fmt: skip
    lines = render([group]).splitlines()
    assert "blocks 0-3, embedding" in lines
    [row] = [line for line in lines if line.startswith("0-2, 5, 7, 9, 2 more")]
    assert row.split()[-7:-3] == ["2,582,381,898", "123,456,789", "2,345,678,901", "113,246,208"]
    assert row.split()[-3:] == ["61.73", "~", "66.6"]
    assert max(map(len, lines)) <= 120
    assert lines[-1] == "  fits a GPU of 80 GB (74.5 GiB)"
