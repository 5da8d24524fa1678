"""``[model.shape]``: what it changes, and contradictions at the key that somebody has set."""

from __future__ import annotations

import dataclasses

import pytest

from nitp_titan.job import JobError, load_job
from nitp_titan.job.build import build_trainer_config
from nitp_titan.job.model_facts import facts_of
from nitp_titan.job.write import resolved_toml
from nitp_titan.models.flavors import FLAVORS, Shape
from nitp_titan.runtime import machine
from nitp_titan.tools.explain import explain

CHANGES = {"n_layers": 3, "dim": 64, "head_dim": 16, "vocab_size": 512, "tie_embeddings": True, "rope_theta": 5e5}


@pytest.fixture(autouse=True)
def machine_of_the_tests(monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: False)


def words(**changes) -> list[str]:
    return [f"--model.shape.{key}={value}" for key, value in changes.items()]


def problems(*overrides: str) -> list[str]:
    with pytest.raises(JobError) as caught:
        load_job(None, list(overrides), 1)
    return [str(problem).removeprefix("command line: ") for problem in caught.value.problems]


def test_unset_is_the_flavors():
    job = load_job(None, [], 1)
    assert set(job["model.shape"]) == {field.name for field in dataclasses.fields(Shape)}
    assert set(job["model.shape"].values()) == {None}
    assert job.shape == FLAVORS["debug"].shape
    upstream = ["--model.module=llama3", "--model.flavor=debugmodel", "--dataloader.dataset=c4"]
    assert load_job(None, upstream, 1).shape is None


def test_file_and_command_line_change_the_shape(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('[model]\nflavor = "debug"\n[model.shape]\nn_layers = 12\ndim = 256\ntie_embeddings = true\n')
    of_file = dataclasses.replace(FLAVORS["debug"].shape, n_layers=12, dim=256, tie_embeddings=True)
    assert load_job(path, [], 1).shape == of_file
    overrides = ["--model.shape.n_layers", "10", "--model.shape.dim", "none", "--model.shape.no-tie_embeddings"]
    assert load_job(path, overrides, 1).shape == dataclasses.replace(FLAVORS["debug"].shape, n_layers=10)
    unset = ["--model.shape.tie_embeddings", "none"]
    assert load_job(path, unset, 1).shape == dataclasses.replace(of_file, tie_embeddings=False)
    assert load_job(path, ["--model.shape.tie_embeddings", "--model.shape.dim=64"], 1).shape.tie_embeddings


@pytest.mark.parametrize("flavor", ["debug", "debug_moe"])
def test_facts_and_model_have_the_shape(flavor):
    overrides = ["--model.flavor", flavor, *words(**CHANGES)]
    job = load_job(None, overrides, 1)
    config = build_trainer_config(job)
    model = config.model_spec.model
    assert (len(model.layers), model.dim, model.vocab_size, model.enable_weight_tying) == (3, 64, 512, True)
    assert model.first_attention.rope.theta == 5e5
    # The formula of costs.parts_of_shape against a count on the meta device.
    assert facts_of(model) == job.model
    assert f"nitp_titan {flavor} with dim = 64, n_layers = 3, head_dim = 16, vocab_size = 512" in explain(job)
    assert (
        "tie_embeddings = true (changed): 3 blocks, width 64, vocabulary 512 (embeddings tied), 4 heads ("
        in explain(job)
    )


def test_resolved_file_has_the_same_shape(tmp_path):
    job = load_job(None, words(**CHANGES), 1)
    path = tmp_path / "resolved.toml"
    path.write_text(resolved_toml(job))
    assert "[model.shape]" in path.read_text()
    assert load_job(path, [], 1).tables == job.tables
    assert load_job(path, [], 1).shape == job.shape


def test_depth_vocabulary_and_length_of_the_shape_are_checked():
    assert problems("--model.shape.n_layers=3", "--nitp.target_layer=5") == [
        "--nitp.target_layer: found 5, expected 0..3 (0 = the embeddings, 3 = the last block); "
        '"none" is a fifth of the depth, 1'
    ]
    assert load_job(None, ["--model.shape.n_layers=12", "--nitp.target_layer=12"], 1)
    [problem] = problems("--model.shape.vocab_size=257")
    assert "the byte tokenizer has ids up to 257, expected less than the model's vocabulary of 257" in problem
    [problem] = problems("--model.shape.max_seq_len=128")
    assert problem.endswith("[training] seq_len (default of flavor): found 256, expected at most the model's 128")


MOE = "--model.flavor=debug_moe"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # The contradicting key itself
        (["--model.shape.n_kv_heads=3"], ["n_kv_heads: found 3, expected a divisor of n_heads 4"]),
        (["--model.shape.head_dim=33"], ["head_dim: found 33, expected an even number: rotary positions turn pairs"]),
        (["--model.shape.dim=0"], ["dim: found 0, expected at least 1"]),
        (["--model.shape.rope_theta=-1"], ["rope_theta: found -1.0, expected a positive number"]),
        (["--model.shape.rope_theta=inf"], ["rope_theta: found inf, expected a finite number"]),
        (["--model.shape.norm_eps=nan"], ["norm_eps: found nan, expected a finite number"]),
        ([MOE, "--model.shape.top_k=9"], ["top_k: found 9, expected at most num_experts 8"]),
        ([MOE, "--model.shape.head_dim=16"], ["head_dim: found 16 x n_heads 4 = 64, expected dim 128 in a mixture of "
         "experts"]),
        ([MOE, "--model.shape.n_dense_layers=4"], ["n_dense_layers: found 4, expected fewer than n_layers 4"]),
        (["--model.shape.top_k=2"], ["top_k: found 2, expected 0 without routed experts (num_experts = 0)"]),
        # The key that contradicts one of the flavor's
        (["--model.shape.n_heads=3"], ["n_heads: found 3, with which the flavor's n_kv_heads is wrong: found 2, "
         "expected a divisor of n_heads 3"]),
        ([MOE, "--model.shape.num_experts=1", "--model.shape.vocab_size=640"], ["num_experts: found 1, with which the "
         "flavor's top_k is wrong: found 2, expected at most num_experts 1"]),
        ([MOE, "--model.shape.n_layers=1"], ["n_layers: found 1, with which the flavor's n_dense_layers is wrong: "
         "found 1, expected fewer than n_layers 1"]),
        ([MOE, "--model.shape.vocab_size=640", "--model.shape.dim=64"], ["dim: found 64, with which the flavor's "
         "head_dim is wrong: found 32 x n_heads 4 = 128, expected dim 64 in a mixture of experts"]),
        # Types
        (["--model.shape.n_layers=many"], ['n_layers: found "many", expected a whole number or "none"']),
        (["--model.shape.router_score_func=softmx"], ['router_score_func: found "softmx", expected one of "softmax", '
         '"sigmoid" or "none"; did you mean "softmax"?']),
        (["--model.shape.layers=3"], ['layers: unknown key of [model.shape]; did you mean "--model.shape.n_layers"?']),
    ],
)  # fmt: skip
def test_contradictions_are_at_the_key_that_somebody_set(overrides, expected):
    assert problems(*overrides) == [f"--model.shape.{problem}" for problem in expected]


def test_a_dense_model_of_a_moe_flavor_unsets_all_of_it():
    overrides = words(num_experts=0, top_k=0, expert_hidden_dim=0, num_shared_experts=0, n_dense_layers=0)
    assert not load_job(None, [MOE, *overrides], 1).model.num_experts
    assert len(problems(MOE, "--model.shape.num_experts=0")) == 4


def test_place_is_the_key_in_the_file(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('[model]\nflavor = "debug_moe"\n[model.shape]\ndim = 128\n\ntop_k = 9\n[nitp]\ntarget_layer = 9\n')
    with pytest.raises(JobError) as caught:
        load_job(path, [], 1)
    # Of a shape that contradicts itself nothing else is said.
    assert [(problem.line, problem.key) for problem in caught.value.problems] == [(6, "[model.shape] top_k")]


def test_other_modules_have_their_own_shapes():
    assert problems("--model.module=llama3", "--model.flavor=8B", "--dataloader.dataset=c4", *words(dim=64)) == [
        '--model.shape.dim: found 64, which is for module "nitp_titan", not "llama3"; remove it, or set it to "none"'
    ]
    [problem] = problems("--model.module=no.such.module", "--dataloader.dataset=c4", *words(dim=64))
    assert problem.startswith('--model.module: found "no.such.module", a module that cannot be found')
    [problem] = problems("--model.flavor=nope", *words(dim=0))
    assert problem.startswith("--model.flavor")
