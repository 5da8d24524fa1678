"""Layouts drawn at random against one process, and what they are drawn from."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from nitp_titan.job import load_job
from nitp_titan.job.checks.pipeline import SCHEDULES
from nitp_titan.nitp.config import LossKind
from tests.distributed.drawn import CHUNKS, DEGREES, MODELS, RANKS, RECOMPUTATION, accepted, drawn, words
from tests.distributed.layouts import SHORT, Layout, layout
from tests.distributed.parity import References, compare, config_of

# Of a hundred seeds the one whose twelve have most in them, tensor parallelism without expert parallelism around a
# mixture included. Not TorchTitan's mixtures: their experts in bfloat16 take minutes a layout on a CPU.
TRAINED = drawn(41, 12, ranks=(2, 4), models=("debug", "debug_moe", "llama3", "qwen3"))

SIXTY = drawn(8, 60)
"""Those of ``drawn_layouts.md``."""


@pytest.mark.parametrize("layout", TRAINED, ids=str)
def test_drawn_layout_trains_as_one_process_does(layout: Layout, references: References, tmp_path):
    assert not list(compare(layout, tmp_path, references).problems(layout))


def test_a_seed_has_its_layouts():
    assert drawn(3, 8) == drawn(3, 8)[:8] == drawn(3, 9)[:8]
    assert drawn(3, 8) != drawn(4, 8)
    assert len(set(map(str, SIXTY))) == 60
    assert {one.ranks for one in TRAINED} == {2, 4}


def test_everything_that_can_be_drawn_is():
    assert {one.model for one in SIXTY} == set(MODELS)
    assert {one.ranks for one in SIXTY} == set(RANKS)
    assert {one.ac for one in SIXTY} == set(RECOMPUTATION)
    assert {one.chunk for one in SIXTY} == set(CHUNKS)
    assert {one.implementation for one in SIXTY} == {None, "reference"}
    assert {one.compile for one in SIXTY} == {None, "aot_eager"}
    assert {one.batch for one in SIXTY} == {1, 2, 4, 8}
    for degree in (*DEGREES, "ep"):
        assert degree == "shard" or any(degree in one.parallelism for one in SIXTY)
    assert any(one.data_parallel_degree > one.parallelism.get("replicate", 1) for one in SIXTY)
    # The load balancer "ptrr" is drawn, too, and refused with NITP.
    for key, values in {"schedule": set(SCHEDULES), "balancer": {"headtail", None}}.items():
        assert {one.parallelism[key] for one in SIXTY if key in one.parallelism} == values
    nitp = [one.nitp for one in SIXTY]
    assert {options.get("loss", "cosine") for options in nitp} == set(get_args(LossKind))
    assert {options.get("shift", 1) for options in nitp} == {0, 1}
    assert {options.get("stop_gradient", True) for options in nitp} == {True, False}
    assert {options.get("projector", "swiglu") for options in nitp} == {"swiglu", "none"}
    assert len({options["target_layer"] for options in nitp}) == 7


@pytest.mark.parametrize(
    ("refused", "with_instead"),
    [
        (layout("debug", 2, cp=2, balancer="ptrr"), layout("debug", 2, cp=2)),
        (layout("debug", 2, cp=2, nitp={"loss": "generic_cosine"}), layout("debug", 2, tp=2)),
        (layout("debug", 4, tp=4), layout("debug", 4, tp=2)),
        (layout("debug", 4, tp=2, ac="selective", compile="aot_eager"), layout("debug", 4, tp=2, ac="selective")),
        # With all of qwen3_moe's blocks there would be enough.
        (
            layout("qwen3_moe", 4, pp=4, schedule="Interleaved1F1B", local_batch_size=4),
            layout("qwen3_moe", 2, pp=2, schedule="Interleaved1F1B", local_batch_size=4),
        ),
    ],
    ids=str,
)
def test_what_check_refuses_is_not_drawn(refused: Layout, with_instead: Layout):
    assert not accepted(refused)
    assert accepted(with_instead)


@pytest.mark.parametrize("layout", SIXTY, ids=str)
def test_what_is_checked_is_what_is_trained(layout: Layout, tmp_path: Path):
    job, config = load_job(None, words(layout), layout.ranks), config_of(tmp_path, layout)
    for key in SHORT.values():
        found, expected = job["parallelism"][key], getattr(config.parallelism, key)
        if key == "data_parallel_replicate_degree":
            assert found == expected == layout.parallelism.get("replicate", 1)
        assert found == expected, key
    for table, keys in {
        "training": ("seq_len", "global_batch_size", "local_batch_size"),
        "nitp": ("loss", "shift", "stop_gradient", "target_layer", "projector", "weight", "start_step"),
        "loss": ("chunk_tokens", "implementation"),
        "compile": ("enable", "backend", "components") if layout.compile else ("enable",),
        "validator": ("enable",),
    }.items():
        for key in keys:
            assert job[table][key] == getattr(getattr(config, table), key), f"{table}.{key}"
    assert job.model is not None
    assert job.model.n_layers == len(config.model_spec.model.layers)
    mode = job["activation_checkpoint"]["mode"]
    kind = type(config.activation_checkpoint)
    assert mode == ("none" if config.activation_checkpoint is None else kind._owner.__name__.removesuffix("AC").lower())
