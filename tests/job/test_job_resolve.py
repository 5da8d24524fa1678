"""The layers: precedence, defaults that depend on other keys, and the resolved file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nitp_titan.job import JobError, load_job
from nitp_titan.job.keys.schema import all_tables
from nitp_titan.job.write import resolved_toml, write_resolved
from nitp_titan.models.flavors import FLAVORS
from nitp_titan.runtime import machine

MINIMAL = '[model]\nflavor = "debug"\n'


@pytest.fixture
def job_file(tmp_path):
    def write(text: str = MINIMAL, name: str = "job.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    monkeypatch.setattr(machine, "torch_version", lambda: (2, 13))


def test_precedence_of_all_five_layers(job_file):
    text = '[model]\nflavor = "debug"\n[training]\nsteps = 11\nseq_len = 128\n'
    job = load_job(job_file(text), ["--training.steps", "12"], 1)
    training = job["training"]
    assert (training["steps"], job.sources["training"]["steps"]) == (12, "command line")
    assert (training["seq_len"], job.sources["training"]["seq_len"]) == (128, "file")
    of_flavor = FLAVORS["debug"].job_defaults["optimizer"]["lr"]
    assert (job["optimizer"]["lr"], job.sources["optimizer"]["lr"]) == (of_flavor, "flavor")
    assert (job["parallelism"]["spmd_backend"], job.sources["parallelism"]["spmd_backend"]) == (
        "partial_dtensor",
        "nitp_titan",
    )
    assert (training["gc_freq"], job.sources["training"]["gc_freq"]) == (50, "upstream")


@pytest.mark.parametrize("key", ["steps", "local_batch_size", "seq_len"])
def test_file_and_command_line_override_the_flavor(job_file, key):
    assert load_job(job_file(), [], 1)["training"][key] == FLAVORS["debug"].job_defaults["training"][key]
    file = job_file(f"{MINIMAL}[training]\n{key} = 64\n")
    assert load_job(file, [], 1)["training"][key] == 64
    assert load_job(file, [f"--training.{key}", "32"], 1)["training"][key] == 32


def test_flavor_of_the_command_line_brings_its_defaults(job_file):
    file = job_file('[model]\nmodule = "llama3"\nflavor = "debugmodel"\n[dataloader]\ndataset = "c4"\n')
    assert load_job(file, [], 1)["tokenizer"]["name"] == "huggingface"
    assert load_job(file, ["--model.module", "nitp_titan", "--model.flavor", "debug"], 1)["tokenizer"]["name"] == "byte"


def test_no_file_is_the_defaults():
    assert load_job(None, [], 1)["model"]["flavor"] == "debug"


def test_every_key_of_every_table_is_there(job_file):
    job = load_job(job_file(), [], 1)
    assert {table: list(values) for table, values in job.tables.items()} == {
        table: list(keys) for table, keys in all_tables().items()
    }
    with pytest.raises(TypeError):
        job["training"]["steps"] = 1


def test_defaults_without_a_gpu(job_file, monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    job = load_job(job_file(), [], 1)
    assert job["training"]["mixed_precision_param"] == "float32"
    assert job["optimizer"]["implementation"] == "foreach"
    assert job["training"]["disable_cuda_graphs"] is True
    assert job.notes == ("CUDA graphs are off: there is no CUDA device",)


def test_defaults_with_a_gpu(job_file, gpu):
    job = load_job(job_file(), [], 1)
    assert job["training"]["mixed_precision_param"] == "bfloat16"
    assert job["optimizer"]["implementation"] == "fused"
    assert job["training"]["disable_cuda_graphs"] is True
    [note] = job.notes
    assert "geometry metrics" in note


@pytest.mark.parametrize("overrides", [["--nitp.geometry_freq=0"], ["--training.no-disable_cuda_graphs"]])
def test_cuda_graphs_are_on_without_geometry(job_file, gpu, overrides):
    job = load_job(job_file(), overrides, 1)
    assert job["training"]["disable_cuda_graphs"] is False
    assert job["nitp"]["geometry_freq"] == 0
    assert job.notes == ()


@pytest.mark.parametrize("enable", [[], ["--nitp.no-enable"]])
@pytest.mark.parametrize(("overrides", "expected"), [([], 100), (["--nitp.geometry_freq=7"], 7)])
def test_geometry_is_measured_with_nitp_and_without(job_file, gpu, enable, overrides, expected):
    job = load_job(job_file(), [*enable, *overrides], 1)
    assert (job["nitp"]["geometry_freq"], job["training"]["disable_cuda_graphs"]) == (expected, True)
    graphs = ["--training.no-disable_cuda_graphs"]
    assert load_job(job_file(), [*enable, *graphs], 1)["nitp"]["geometry_freq"] == 0


def test_the_chosen_target_layer_is_written_out(job_file, tmp_path):
    deep = ["--model.shape.n_layers=12"]
    for overrides, expected in ((deep, 2), ([*deep, "--nitp.target_layer=none"], 2), (["--nitp.target_layer=4"], 4)):
        job = load_job(job_file(), overrides, 1)
        assert job["nitp"]["target_layer"] == expected
        write_resolved(job, tmp_path / "config.toml")
        assert tomli.loads((tmp_path / "config.toml").read_text())["nitp"]["target_layer"] == expected
    assert load_job(job_file(), ["--nitp.no-enable"], 1)["nitp"]["target_layer"] is None
    assert load_job(job_file(), ["--nitp.loss=generic_cosine"], 1)["nitp"]["target_layer"] is None


def test_the_resolved_file_has_the_shape_and_says_what_unset_stands_for(job_file, tmp_path):
    overrides = ["--model.shape.dim=64", "--model.shape.head_dim=16", "--lr_scheduler.decay_ratio=none"]
    job = load_job(job_file(), overrides, 2)
    text = resolved_toml(job)
    for line in (
        "dim = 64  # command line",
        "n_layers = 6  # flavor",
        'total_steps = "none"  # training.steps, 200',
        'decay_ratio = "none"  # command line: all steps after the warm-up, 180',
        'name = "auto"  # nitp_titan: linear_cross_entropy',
        "data_parallel_shard_degree = -1  # all ranks that are left, 2",
    ):
        assert line in text.splitlines()
    shape = tomli.loads(text)["model"]["shape"]
    assert shape == dataclasses.asdict(job.shape)
    again = load_job(job_file(text, "resolved.toml"), [], 2)
    # What is the flavor's own is no change of it.
    assert again["model.shape"] == job["model.shape"]
    assert again.doubts == ()


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["--model.flavor", "debug_moe"], "experts"),
        (["--model.attn_backend", "varlen", "--nitp.geometry_freq=0"], "varlen"),
        (["--model.module=qwen3", "--model.flavor=debugmodel_moe", "--dataloader.dataset=c4"], "experts"),
    ],
)
def test_cuda_graphs_are_off_where_they_cannot_work(job_file, gpu, overrides, reason):
    job = load_job(job_file(), overrides, 1)
    assert job["training"]["disable_cuda_graphs"] is True
    [note] = job.notes
    assert reason in note
    # What the user says stands, without a note.
    job = load_job(job_file(), [*overrides, "--training.no-disable_cuda_graphs"], 1)
    assert job["training"]["disable_cuda_graphs"] is False
    assert job.notes == ()


def test_cuda_graphs_are_off_with_a_torch_that_cannot_record_attention(job_file, gpu, monkeypatch):
    monkeypatch.setattr(machine, "torch_version", lambda: (2, 12))
    job = load_job(job_file(), ["--nitp.geometry_freq=0"], 1)
    assert job["training"]["disable_cuda_graphs"] is True
    [note] = job.notes
    assert "torch < 2.13" in note


def test_cuda_graphs_are_off_before_a_start_step(job_file, gpu):
    [note] = load_job(job_file(), ["--nitp.start_step=5", "--nitp.geometry_freq=0"], 1).notes
    assert "nitp.start_step" in note


def test_ignored_expert_parallelism_is_noted(job_file):
    overrides = ["--parallelism.expert_parallel_degree=2"]
    note = "parallelism.expert_parallel_degree is ignored: the model has no experts"
    assert note in load_job(job_file(), overrides, 2).notes
    assert note not in load_job(job_file(), [*overrides, "--model.flavor=debug_moe"], 2).notes


def test_activation_checkpointing_by_flavor(job_file):
    upstream = ["--model.module=llama3", "--model.flavor=8B", "--dataloader.dataset=c4"]
    assert load_job(job_file(), [], 1)["activation_checkpoint"]["mode"] == "none"
    assert load_job(job_file(), upstream, 1)["activation_checkpoint"]["mode"] == "selective"
    job = load_job(job_file(), ["--activation_checkpoint.mode", "full"], 1)
    assert job["activation_checkpoint"]["mode"] == "full"


def test_last_checkpoint_can_be_resumed_unless_it_is_hugging_faces(job_file):
    assert load_job(job_file(), [], 1)["checkpoint"]["last_save_model_only"] is False
    assert load_job(job_file(), ["--checkpoint.last_save_in_hf"], 1)["checkpoint"]["last_save_model_only"] is True


def test_global_batch_is_written_out(job_file):
    def batch(*overrides, ranks=1):
        return load_job(job_file(), list(overrides), ranks)["training"]["global_batch_size"]

    assert batch() == 8
    assert batch(ranks=4) == 32
    assert batch("--training.local_batch_size", "2", "--training.global_batch_size", "-1", ranks=4) == 8
    assert batch("--parallelism.tensor_parallel_degree", "2", ranks=4) == 16
    assert batch("--training.global_batch_size", "64", ranks=4) == 64


def test_validation_data_is_the_training_data_unless_given(job_file):
    job = load_job(job_file(), ["--dataloader.seed", "7"], 1)
    assert job["validator.dataloader"] == job["dataloader"]
    job = load_job(job_file(), ["--validator.dataloader.seed", "9"], 1)
    assert job["validator.dataloader"]["dataset"] == "python_stdlib"
    assert job["validator.dataloader"]["seed"] == 9
    job = load_job(job_file(), ["--validator.dataloader.dataset", "c4", "--dataloader.seed", "7"], 1)
    assert job["validator.dataloader"]["seed"] == 0


def test_resolved_file_says_where_values_come_from(job_file):
    file = job_file('[model]\nflavor = "debug"\n[training]\nsteps = 5\n')
    text = resolved_toml(load_job(file, ["--training.seq_len", "64"], 2))
    assert f"# from {file} with --training.seq_len 64" in text
    assert "; 2 rank(s)" in text
    for line in (
        "steps = 5  # file",
        "seq_len = 64  # command line",
        "local_batch_size = 8  # flavor",
        'spmd_backend = "partial_dtensor"  # nitp_titan',
        "gc_freq = 50",
        "target_layer = 1  # nitp_titan",
    ):
        assert line in text.splitlines()


def test_write_resolved_makes_the_folder(job_file, tmp_path):
    job = load_job(job_file(), [], 1)
    write_resolved(job, tmp_path / "a" / "b" / "config.toml")
    assert load_job(tmp_path / "a" / "b" / "config.toml", [], 1).tables == job.tables


def test_resolved_file_keeps_its_batches_on_other_ranks(job_file):
    file = job_file(resolved_toml(load_job(job_file(), ["--training.local_batch_size", "4"], 2)), "resolved.toml")
    assert load_job(file, [], 1)["training"]["global_batch_size"] == 8
    assert load_job(file, [], 1)["training"]["local_batch_size"] == 4


def test_resolved_file_with_odd_command_line_is_toml(job_file):
    job = load_job(job_file(), ["--job.description", "a\nb\x00[x]"], 1)
    assert tomli.loads(resolved_toml(job))["job"]["description"] == "a\nb\x00[x]"


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
optional_text = st.none() | texts.filter(lambda text: text != "none")
names = st.text("abc._*", min_size=1, max_size=6)
functions = names.map(lambda name: "torchtitan.overrides.fused_swiglu." + name.replace(".", "_"))
OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        ("job", "description"): texts,
        ("nitp", "enable"): st.booleans(),
        ("nitp", "weight"): st.floats(0, 1e30),
        ("nitp", "target_layer"): st.none() | st.integers(0, 6),
        ("nitp", "shift"): st.sampled_from([0, 1]),
        ("float8", "filter_fqns"): st.lists(texts, max_size=3),
        ("training", "max_norm"): st.integers(1, 10) | st.floats(1e-6, 1e30),
        ("training", "seq_len"): st.sampled_from([64, 128, 512]),
        ("optimizer", "lr"): st.floats(0, 1),
        ("optimizer", "eps"): st.floats(0, 1e-3),
        ("lr_scheduler", "decay_ratio"): st.none() | st.floats(0, 1),
        ("parallelism", "module_fqns_per_model_part"): st.none() | st.lists(st.lists(texts, max_size=2), max_size=2),
        ("activation_checkpoint", "determinism_check"): st.sampled_from(["default", "none"]),
        ("compile", "enable"): st.booleans(),
        ("comm", "save_traces_folder"): texts,
        ("debug", "seed"): st.none() | st.integers(-(2**62), 2**62),
        ("debug", "save_config_file"): optional_text,
        ("override", "imports"): st.lists(
            functions | st.tuples(functions, st.dictionaries(names, st.integers() | texts | st.booleans(), max_size=2)),
            max_size=3,
        ),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(overrides=OVERRIDES)
def test_resolved_file_gives_the_same_values(overrides, tmp_path):
    def toml(value):
        return "none" if value is None else [toml(v) for v in value] if isinstance(value, list | tuple) else value

    # A TOML integer has 64 bits.
    document: dict = {"model": {"flavor": "debug"}}
    for (table, key), value in overrides.items():
        document.setdefault(table, {})[key] = toml(value)
    path = tmp_path / "job.toml"
    path.write_text(tomli_w.dumps(document), encoding="utf-8")
    job = load_job(path, [], 1)
    for (table, key), value in overrides.items():
        if (table, key) != ("nitp", "target_layer") or value is not None:
            assert job[table][key] == value, (table, key)
    write_resolved(job, tmp_path / "resolved.toml")
    again = load_job(tmp_path / "resolved.toml", [], 1)
    assert again.tables == job.tables
    assert resolved_toml(again).splitlines()[3:] != []


def test_problems_of_file_and_command_line_come_together(job_file):
    file = job_file('[model]\nflavor = "debug"\n[training]\nsteps = "x"\n[foo]\n')
    with pytest.raises(JobError) as caught:
        load_job(file, ["--training.bar", "1", "--nitp.weight", "-1"], 1)
    assert [(problem.line, problem.key) for problem in caught.value.problems] == [
        (4, "[training] steps"),
        (5, "[foo]"),
        (None, "--training.bar"),
        (None, "--nitp.weight"),
    ]
    assert str(caught.value).splitlines() == [str(problem) for problem in caught.value.problems]


def test_a_wrong_value_hides_no_other_problem_and_makes_none(job_file):
    # With seq_len unknown nothing is said of how it splits; with steps wrong, weight is still judged.
    file = job_file(f'{MINIMAL}[training]\nseq_len = "x"\n[nitp]\nweight = -1.0\ntarget_layer = 7\n')
    with pytest.raises(JobError) as caught:
        load_job(file, [], 1)
    keys = [problem.key for problem in caught.value.problems]
    assert keys == ["[training] seq_len", "[nitp] weight", "[nitp] target_layer"]


def test_gpu_is_found_without_torch(monkeypatch):
    def found(*, nodes=(), version="2.13.0+cu130", **variables):
        for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(machine.importlib.metadata, "version", lambda _: version)
        glob = SimpleNamespace(glob=lambda pattern: iter([n for n in nodes if pattern.startswith(n[1:5])]))
        monkeypatch.setattr(machine, "Path", lambda _: glob)
        return machine.has_gpu()

    node = ("/dev/nvidia0",)
    assert found(nodes=node)
    assert not found(nodes=())
    assert not found(nodes=node, version="2.13.0+cpu")
    assert not found(nodes=node, CUDA_VISIBLE_DEVICES="")
    assert not found(nodes=node, CUDA_VISIBLE_DEVICES="-1")
    assert found(nodes=node, CUDA_VISIBLE_DEVICES="3")


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (["--nitp.no-enable", "--loss.implementation=reference"], "loss.implementation is ignored: NITP is off"),
        (["--nitp.no-enable", "--loss.chunk_tokens=64"], "loss.chunk_tokens is ignored: NITP is off"),
        (["--loss.num_chunks=4"], "loss.num_chunks is ignored: NITP is on"),
        (
            ["--loss.implementation=fast", "--nitp.no-stop_gradient"],
            'loss.implementation is "reference" for the NITP loss: nitp.stop_gradient is off',
        ),
        (["--compile.enable", "--compile.components=[]"], "compile.enable is ignored: compile.components is empty"),
        (
            ["--compile.enable", "--compile.enable_async_tensor_parallel"],
            "compile.enable_async_tensor_parallel is ignored: tensor_parallel_degree is 1",
        ),
    ],
)
def test_what_is_set_and_not_read_is_said(job_file, overrides, note):
    quiet = ["--nitp.geometry_freq=0"]
    assert note in load_job(job_file(), [*quiet, *overrides], 1).notes
    assert note not in load_job(job_file(), quiet, 1).notes
