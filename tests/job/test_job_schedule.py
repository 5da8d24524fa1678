"""Steps that contradict one another are refused or said, and so is a resume with another schedule."""

from __future__ import annotations

import pytest

from nitp_titan.job import Job, JobError, load_job
from nitp_titan.job.checks.schedule import Schedule
from nitp_titan.job.write import write_resolved
from nitp_titan.runtime import machine


@pytest.fixture(autouse=True)
def machine_of_the_tests(monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(machine, "torch_version", lambda: (2, 13))


def load(*overrides: str) -> Job:
    return load_job(None, list(overrides), 1)


def test_a_run_past_a_schedule_that_ends_at_zero_is_refused():
    with pytest.raises(JobError) as caught:
        load("--training.steps=14", "--lr_scheduler.total_steps=7", "--lr_scheduler.warmup_steps=2")
    assert str(caught.value) == (
        "command line: --lr_scheduler.total_steps: found 7, expected at least training.steps 14: the learning rate is "
        "0 from step 8 on; set total_steps = 14, or a min_lr_factor above 0, which later steps keep"
    )


BRIEF = ["--lr_scheduler.warmup_steps=5"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--lr_scheduler.min_lr_factor=0.1"], "later steps keep the last learning rate, 0.1 of the peak"),
        (["--lr_scheduler.decay_ratio=0.0"], "later steps keep the last learning rate, 1 of the peak"),
    ],
)
def test_a_run_past_its_schedule_is_said(overrides, expected):
    steps = ["--training.steps=14", "--lr_scheduler.total_steps=7", "--lr_scheduler.warmup_steps=2"]
    assert load(*steps, *overrides).doubts == (
        f"training.steps 14 is more than lr_scheduler.total_steps 7: {expected}",
    )
    assert load(*steps[1:], "--training.steps=7", *overrides).doubts == ()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--training.steps=9"], "warmup_steps 20 is more than the schedule's 9 steps: 9 are taken"),
        (["--training.steps=20", "--lr_scheduler.total_steps=90", "--lr_scheduler.decay_ratio=0"], "takes all of the "
         "run's 20 steps: the rate only"),
        ([*BRIEF, "--training.steps=20", "--lr_scheduler.total_steps=50"], "training.steps 20 ends a schedule of "
         "lr_scheduler.total_steps 50 early: its decay is not reached"),
        ([*BRIEF, "--training.steps=45", "--lr_scheduler.total_steps=50"], "early: 5 of its 10 steps of decay are "
         "reached"),
        ([*BRIEF, "--training.steps=20", "--lr_scheduler.decay_ratio=0.02"], "decay_ratio 0.02 of 20 steps is less "
         "than half a step: nothing decays"),
        (["--lr_scheduler.warmup_steps=150", "--lr_scheduler.decay_ratio=0.5"], "decay_ratio 0.5 of 200 steps does "
         "not fit behind 150 warm-up steps: 50 steps decay"),
        (["--profiler.enable_profiling", "--profiler.profile_freq=201"], "profiler.enable_profiling records from step "
         "201 on, after training.steps 200: no trace has a step"),
        (["--optimizer.lr=0"], "optimizer.lr is 0: nothing trains"),
        (["--training.seq_len=1"], "training.seq_len is 1: no token has a next one, and NITP trains nothing"),
        (["--comm.mode=fake_backend"], 'comm.mode is "fake_backend"'),
        (["--checkpoint.enable", "--checkpoint.create_seed_checkpoint"], "saves the model at step 0: nothing trains"),
        (["--nitp.start_step=201"], "nitp.start_step 201 is not before the run's end, training.steps 200: NITP trains "
         "never"),
        (["--nitp.start_step=200"], "NITP trains in its last step alone"),
        (["--nitp.weight=0"], "nitp.weight is 0: NITP is computed and logged, and trains nothing"),
    ],
)  # fmt: skip
def test_a_contradiction_of_a_job_that_can_run_is_said(overrides, expected):
    [doubt] = load(*overrides).doubts
    assert expected in doubt
    assert doubt in load(*overrides).notes


def test_what_agrees_is_not_doubted():
    assert load().doubts == ()
    assert load("--nitp.start_step=199").doubts == ()
    assert load("--lr_scheduler.warmup_steps=199", "--lr_scheduler.decay_ratio=0").doubts == ()


def test_a_schedule_that_fits_has_all_its_steps():
    values = {("training", "steps"): 100, ("lr_scheduler", "total_steps"): None, ("lr_scheduler", "warmup_steps"): 10}
    values["lr_scheduler", "decay_ratio"] = 0.2
    schedule = Schedule.of(lambda table, key: values[table, key])
    assert (schedule.warmup, schedule.stable, schedule.decay) == (10, 70, 20)
    values["lr_scheduler", "decay_ratio"] = None
    assert Schedule.of(lambda table, key: values[table, key]).decay == 90


@pytest.fixture
def run(tmp_path):
    """The folder of a run that has a checkpoint, and its job."""
    words = [f"--job.dump_folder={tmp_path}", "--checkpoint.enable"]
    write_resolved(load(*words), tmp_path / "config.toml")
    step = tmp_path / "checkpoint" / "step-100"
    step.mkdir(parents=True)
    (step / ".metadata").touch()
    return words


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("--optimizer.lr=0.001", "optimizer.lr 0.002 -> 0.001"),
        ("--lr_scheduler.warmup_steps=30", "lr_scheduler.warmup_steps 20 -> 30"),
        ("--lr_scheduler.decay_type=cosine", 'lr_scheduler.decay_type "linear" -> "cosine"'),
        ("--lr_scheduler.decay_ratio=none", 'lr_scheduler.decay_ratio 0.2 -> "none"'),
        ("--training.steps=300", "its length in steps 200 -> 300"),
        ("--lr_scheduler.total_steps=300", "its length in steps 200 -> 300"),
    ],
)
def test_a_resume_with_another_schedule_says_so(run, tmp_path, change, said):
    doubt = f"{tmp_path} goes on with another learning-rate schedule: {said}"
    assert [d for d in load(*run, change).doubts if str(tmp_path) in d] == [doubt]


def test_a_resume_keeps_the_optimizers_other_numbers_and_says_so(run, tmp_path):
    [doubt] = load(*run, "--optimizer.weight_decay=0.3", "--optimizer.beta2=0.9").doubts
    restored = f"{tmp_path} goes on with its checkpoint's 0.95, 0.1"
    assert doubt == f"optimizer.beta2 0.9, optimizer.weight_decay 0.3 is ignored: {restored}"
    assert load(*run, "--optimizer.weight_decay=0.3", "--checkpoint.exclude_from_loading=optimizer").doubts == ()


def test_the_same_job_and_a_fresh_folder_resume_nothing(run, tmp_path):
    assert load(*run).doubts == ()
    assert load(*run, "--lr_scheduler.total_steps=200").doubts == ()
    assert load_job(tmp_path / "config.toml", [], 1).doubts == ()
    changed = [*run, "--optimizer.lr=0.001"]
    assert load(*changed, "--checkpoint.no-enable").doubts == ()
    (tmp_path / "checkpoint" / "step-100" / ".metadata").unlink()
    assert load(*changed).doubts == ()
