"""The layout and the local batch that are chosen where nobody says, and what the resolved file makes of them."""

from __future__ import annotations

import pytest

from nitp_titan.job import Job, JobError, load_job
from nitp_titan.job.layout import DEGREES
from nitp_titan.job.write import resolved_toml
from nitp_titan.runtime import machine

FREE = ["--dataloader.num_streams=7680"]  # for any world of these tests
UPSTREAM_MOE = ["--model.module=qwen3", "--model.flavor=debugmodel_moe", "--dataloader.dataset=c4"]


@pytest.fixture(autouse=True)
def machine_of_the_tests(monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    monkeypatch.setattr(machine, "torch_version", lambda: (2, 13))


def load(*overrides: str, ranks: int, flavor: str = "9B-A1B") -> Job:
    return load_job(None, ["--model.flavor", flavor, *FREE, *overrides], ranks)


def layout_notes(job: Job) -> list[str]:
    return [note for note in job.notes if note.startswith("layout")]


@pytest.mark.parametrize(
    ("ranks", "experts"), [(1, 1), (2, 2), (4, 4), (8, 8), (16, 8), (64, 8), (512, 8), (5, 1), (6, 6), (12, 6), (20, 4)]
)
def test_experts_are_spread_over_a_divisor_of_world_and_experts_within_a_node(ranks, experts):
    # 144 experts; a batch that any of these worlds shares.
    job = load("--training.global_batch_size=15360", ranks=ranks)
    assert (job.layout.shard, job.layout.replicate, job.layout.expert) == (ranks, 1, experts)
    assert job["parallelism"]["expert_parallel_degree"] == experts
    assert job["parallelism"]["data_parallel_shard_degree"] == -1
    spread = f", experts over {experts}" if experts > 1 else ""
    expected = f"layout: FSDP over {ranks} ranks{spread} (chosen for {ranks} ranks; set parallelism.* to choose)"
    assert layout_notes(job) == ([expected] if ranks > 1 else [])


def test_the_number_of_experts_counts():
    assert load("--model.shape.num_experts=12", ranks=8).layout.expert == 4
    assert load("--model.shape.num_experts=13", ranks=8).layout.expert == 1
    assert load_job(None, UPSTREAM_MOE, 8).layout.expert == 8


def test_dense_models_are_sharded_alone():
    job = load(ranks=16, flavor="3B")
    assert (job.layout.shard, job.layout.expert) == (16, 1)
    assert layout_notes(job) == ["layout: FSDP over 16 ranks (chosen for 16 ranks; set parallelism.* to choose)"]


@pytest.mark.parametrize(
    ("torch", "gpu", "expected"), [((2, 12), True, 1), ((2, 13), False, 8), ((2, 15), False, 1), ((2, 15), True, 8)]
)
def test_no_expert_parallelism_where_torch_cannot(monkeypatch, torch, gpu, expected):
    monkeypatch.setattr(machine, "torch_version", lambda: torch)
    monkeypatch.setattr(machine, "has_gpu", lambda: gpu)
    job = load(ranks=8)
    assert job.layout.expert == expected
    assert ("experts over" in layout_notes(job)[0]) == (expected > 1)


@pytest.mark.parametrize("degree", DEGREES)
def test_whoever_sets_a_degree_sets_them_all(degree):
    value = -1 if degree == "data_parallel_shard_degree" else 1
    job = load(f"--parallelism.{degree}={value}", ranks=8)
    assert (job.layout.shard, job.layout.expert) == (8, 1)
    assert layout_notes(job) == []


def test_a_wrong_degree_brings_no_layout_and_no_other_problem():
    with pytest.raises(JobError) as caught:
        load("--parallelism.tensor_parallel_degree=x", ranks=8)
    [problem] = caught.value.problems
    assert problem.key == "--parallelism.tensor_parallel_degree"


SPREAD = [f"--parallelism.{name}_parallel_degree=2" for name in ("tensor", "expert")]


def test_experts_over_tensor_parallel_ranks_need_sequence_parallelism():
    off = "--parallelism.no-enable_sequence_parallel"
    with pytest.raises(JobError) as caught:
        load(*SPREAD, off, ranks=2)
    [problem] = caught.value.problems
    assert "found false, expected true with expert_parallel_degree 2 and tensor_parallel_degree 2" in str(problem)
    load(*SPREAD, ranks=2)
    load(SPREAD[0], off, ranks=2)
    load(SPREAD[1], off, ranks=2)
    # Of a dense model the degree is ignored.
    load(*SPREAD, off, ranks=2, flavor="0.5B")


def test_a_resolved_file_fits_a_larger_world(tmp_path):
    job = load(ranks=8)
    path = tmp_path / "resolved.toml"
    path.write_text(resolved_toml(job))
    again = load_job(path, [], 8)
    assert again.tables == job.tables
    assert layout_notes(again) == []
    larger = load_job(path, [], 16)
    assert (larger.layout.shard, larger.layout.expert) == (16, 8)
    assert larger["training"]["global_batch_size"] == job["training"]["global_batch_size"]


def test_the_layout_comes_before_what_depends_on_it():
    # Expert parallelism, and so no CUDA graphs.
    assert load_job(None, UPSTREAM_MOE, 8)["training"]["disable_cuda_graphs"] is True


# 1.9B-A0.3B: 256 sequences a step, 8 of them at a time.
SMALL = "1.9B-A0.3B"


@pytest.mark.parametrize(
    ("overrides", "ranks", "expected"),
    [
        ([], 8, 8),
        ([], 32, 8),
        ([], 64, 4),
        ([], 256, 1),
        (["--training.global_batch_size=12"], 2, 6),
        (["--training.global_batch_size=14"], 2, 7),
        (["--training.global_batch_size=22"], 2, 1),
        (["--training.global_batch_size=96"], 2, 8),
        (["--parallelism.tensor_parallel_degree=4"], 256, 4),
        (["--training.local_batch_size=2"], 64, 2),
        (["--training.global_batch_size=-1"], 64, 8),
    ],
)
def test_a_default_local_batch_gives_way_to_the_global_batch(overrides, ranks, expected):
    job = load(*overrides, ranks=ranks, flavor=SMALL)
    assert job["training"]["local_batch_size"] == expected
    notes = [note for note in job.notes if "local_batch_size" in note]
    lowered = expected != 8 and "--training.local_batch_size=2" not in overrides
    assert len(notes) == lowered
    if lowered:
        assert notes[0].startswith(f"training.local_batch_size is {expected}, not 8: ")
        assert job.sources["training"]["local_batch_size"] == "nitp_titan"


def test_the_note_says_why():
    notes = load(ranks=64, flavor=SMALL).notes
    assert "training.local_batch_size is 4, not 8: 256 sequences over 64 ranks are 4 each" in notes


def refusal(*overrides: str, ranks: int) -> str:
    with pytest.raises(JobError) as caught:
        load(*overrides, ranks=ranks, flavor=SMALL)
    [problem] = caught.value.problems
    return str(problem)


def test_ranks_that_do_not_share_the_global_batch():
    assert refusal(ranks=10) == (
        "defaults: [training] global_batch_size (default of flavor): found 256, expected a multiple of the "
        "data-parallel degree 10; the nearest are 250 and 260"
    )
    assert refusal("--training.global_batch_size=7", ranks=8).endswith(
        "found 7, expected a multiple of the data-parallel degree 8; the smallest is 8"
    )


def test_a_local_batch_that_somebody_wrote_stands():
    assert refusal("--training.local_batch_size=3", ranks=8) == (
        "command line: --training.local_batch_size: found a global_batch_size of 256, expected a multiple of "
        "local_batch_size 3 x data-parallel degree 8 = 24; the nearest are 240 and 264"
    )


def test_a_written_local_batch_decides_what_is_nearest():
    words = ("--training.local_batch_size=4", "--training.global_batch_size=30")
    assert refusal(*words, ranks=4).endswith("data-parallel degree 4 = 16; the nearest are 16 and 32")


def test_defaults_derived_twice_are_those_derived_once():
    # As for a model that is imported between the two.
    from nitp_titan.job import defaults
    from nitp_titan.job.resolve import resolve

    draft, problems = resolve(None, ["--model.flavor", SMALL], 64)
    assert problems == []
    settings, notes = dict(draft.settings), list(draft.notes)
    defaults.derive(draft)
    assert (draft.settings, draft.notes) == (settings, notes)
    assert len(notes) == 3
