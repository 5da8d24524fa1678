"""A model that is split by hand: TorchTitan's own splits pass, and what it would lose a module of does not."""

from __future__ import annotations

import importlib
import json

import pytest

from nitp_titan.job import JobError, load_job
from nitp_titan.job.checks.pipeline import SINGLE, V_SHAPED
from nitp_titan.runtime import machine

LAYERS = [f"layers.{i}" for i in range(6)]
ENDS = (["tok_embeddings"], ["norm", "lm_head"])
HALVES = [[*ENDS[0], *LAYERS[:3]], [*LAYERS[3:], *ENDS[1]]]


@pytest.fixture(autouse=True)
def machine_of_the_tests(monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(machine, "torch_version", lambda: (2, 13))


def problems(
    parts: list[list[str]], schedule: str = "1F1B", module: str = "", *others: str, ranks: int = 2
) -> list[str]:
    words = [
        *others,
        "--training.local_batch_size=4",
        "--parallelism.pipeline_parallel_degree=2",
        f"--parallelism.pipeline_parallel_schedule={schedule}",
        f"--parallelism.module_fqns_per_model_part={json.dumps(parts)}",
        *([f"--model.module={module}", "--model.flavor=debugmodel", "--dataloader.dataset=c4"] if module else []),
    ]
    try:
        load_job(None, words, ranks)
    except JobError as error:
        key = "command line: --parallelism.module_fqns_per_model_part: "
        return [str(problem).removeprefix(key) for problem in error.problems]
    return []


@pytest.mark.parametrize("schedule", ["1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS", "ZBVZeroBubble"])
@pytest.mark.parametrize("stages", [2, 3, 4, 5, 6])
def test_torchtitans_own_splits_pass_where_their_number_does(schedule, stages):
    split = importlib.import_module("torchtitan.distributed.pipeline_parallel")._generate_llm_fqn_per_model_part
    single, v_shaped = schedule in SINGLE, schedule in V_SHAPED
    fits = stages == 2 if single else stages == 4 if v_shaped else stages in (4, 6)
    expected = "2" if single else "4" if v_shaped else "4 or another multiple of 2"
    message = f"found {stages} parts, expected {expected} with {schedule} over 2 ranks"
    assert problems(split(stages, 6, 1, 1), schedule) == ([] if fits else [message])


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([["tok_embedings", *LAYERS[:3]], HALVES[1]], ['found "tok_embedings", no module of the model; did you mean '
         '"tok_embeddings"?', '"tok_embeddings" is in no part']),
        ([HALVES[0], [*LAYERS[3:], "layers.6", *ENDS[1]]], ['found "layers.6", no module of the model; did you mean '
         '"layers.5"?']),
        ([HALVES[0], [*LAYERS[4:], *ENDS[1]]], ['"layers.3" is in no part']),
        ([HALVES[0], ["lm_head"]], ['"layers.3" is in no part; so are 3 others']),
        ([HALVES[0], [*LAYERS[2:], *ENDS[1]]], ['"layers.2" is in more than one part']),
        ([[*ENDS[0], *LAYERS[:2], "layers.3"], ["layers.2", *LAYERS[4:], *ENDS[1]]], ["parts are not in the model's "
         "order, in which their stages run"]),
        (HALVES[::-1], ["parts are not in the model's order, in which their stages run"]),
        ([[*ENDS[0], *LAYERS, *ENDS[1]], []], ["a part has no module, expected at least one in each"]),
        ([[*ENDS[0], *LAYERS, *ENDS[1]]], ["found 1 parts, expected 2 with 1F1B over 2 ranks"]),
    ],
)  # fmt: skip
def test_a_split_that_loses_or_moves_a_module_is_refused(parts, expected):
    assert problems(parts) == expected


@pytest.mark.parametrize("module", ["llama3", "qwen3"])
def test_torchtitans_models_are_split_by_the_same_names(module):
    layers = LAYERS if module == "llama3" else [*LAYERS, "layers.6", "layers.7"]

    def of_the_split(parts):
        # qwen3's debug model cannot be pipelined for another reason.
        return [text for text in problems(parts, module=module) if "tied embeddings" not in text]

    assert of_the_split([[*ENDS[0], layers[0]], [*layers[1:], *ENDS[1]]]) == []
    assert of_the_split([[*ENDS[0], layers[0]], [*layers[2:], *ENDS[1]]]) == ['"layers.1" is in no part']


def test_the_order_of_names_within_a_part_does_not_matter():
    assert problems([HALVES[0][::-1], HALVES[1][::-1]]) == []


def test_context_parallelism_asks_for_a_block_in_each_part_that_is_there():
    # The split that TorchTitan would make of four blocks, of which the ends count as two more, leaves a stage without.
    words = ("--model.shape.n_layers=4", "--parallelism.context_parallel_degree=2")
    good = [["tok_embeddings", "layers.0"], ["layers.1"], ["layers.2"], ["layers.3", "norm", "lm_head"]]
    assert problems(good, "Interleaved1F1B", "", *words, ranks=4) == []
    bad = [["tok_embeddings"], ["layers.0", "layers.1"], ["layers.2"], ["layers.3", "norm", "lm_head"]]
    said = ["a part has no block: context parallelism needs one in each"]
    assert problems(bad, "Interleaved1F1B", "", *words, ranks=4) == said
    less = [f"--parallelism.pipeline_parallel_{end}_stage_less_layers=0" for end in ("first", "last")]
    assert problems(bad, "Interleaved1F1B", "", *words, *less, ranks=4) == said
    assert problems(bad, "Interleaved1F1B", "", words[0]) == []


def test_a_split_that_torchtitan_would_not_make_is_the_users_to_make():
    parts = [["tok_embeddings"], ["layers.0"], ["layers.1"], ["norm", "lm_head"]]
    assert problems(parts, "Interleaved1F1B", "", "--model.shape.n_layers=2") == []
