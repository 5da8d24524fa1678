"""From a job to TorchTitan's configuration, and TorchTitan's own word on what our rules refuse."""

from __future__ import annotations

import dataclasses
import sys
import textwrap

import pytest
import torch
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC
from torchtitan.models.common.attention import FlexAttention

from nitp_titan.data.loader import TextDataLoader
from nitp_titan.data.tokenizer import ByteTokenizer
from nitp_titan.job import JobError, load_job
from nitp_titan.job.backbone import model_spec
from nitp_titan.job.build import build_trainer_config
from nitp_titan.job.checks.all import CHECKS
from nitp_titan.job.checks.pipeline import CHECKS as PIPELINE_RULES
from nitp_titan.job.checks.upstream import CHECKS as RULES
from nitp_titan.job.draft import run_checks
from nitp_titan.job.keys.schema import OUR_TABLES, all_tables
from nitp_titan.job.model_facts import facts_of
from nitp_titan.job.resolve import resolve
from nitp_titan.models.flavors import FLAVORS
from nitp_titan.nitp.config import NITPConfig
from nitp_titan.runtime import machine
from nitp_titan.training.joint_loss import JointLoss
from nitp_titan.training.lr_scheduler import LRSchedulersContainer
from nitp_titan.training.trainer import NITPTrainer

TYPES = ["--debug.spmd_typechecking", "--parallelism.spmd_backend=spmd_types"]
UPSTREAM = ["--model.module=llama3", "--model.flavor=debugmodel", "--dataloader.dataset=c4"]


def build(*overrides: str, ranks: int = 1) -> NITPTrainer.Config:
    return build_trainer_config(load_job(None, list(overrides), ranks))


def test_debug_job():
    config = build("--job.dump_folder=here", "--nitp.weight=0.5", "--training.steps=7", "--loss.chunk_tokens=64")
    assert type(config) is NITPTrainer.Config
    assert config.dump_folder == "here"
    assert config.nitp == NITPConfig(weight=0.5, target_layer=1)
    assert config.training.steps == 7
    assert config.loss == JointLoss.Config(chunk_tokens=64)
    assert isinstance(config.tokenizer, ByteTokenizer.Config)
    assert config.dataloader == TextDataLoader.Config(dataset="python_stdlib")
    assert config.validator.dataloader == config.dataloader
    assert isinstance(config.checkpoint, CheckpointManager.Config)
    assert config.activation_checkpoint is None
    assert (config.model_spec.name, config.model_spec.flavor) == ("nitp_titan", "debug")


def test_a_relative_path_of_the_first_weights_is_from_where_the_run_is_started(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    loading = ["--checkpoint.enable", "--checkpoint.initial_load_path"]
    assert build(*loading, "a/../step-1").checkpoint.initial_load_path == str(tmp_path / "step-1")
    assert build(*loading, "/b/step-1").checkpoint.initial_load_path == "/b/step-1"
    assert build(*loading, "gs://c/step-1").checkpoint.initial_load_path == "gs://c/step-1"
    assert build().checkpoint.initial_load_path is None


def test_exponential_decay_is_our_schedulers():
    config = build("--lr_scheduler.decay_type=exponential", "--lr_scheduler.min_lr_factor=0.1")
    assert type(config.lr_scheduler) is LRSchedulersContainer.Config
    assert (config.lr_scheduler.decay_type, config.lr_scheduler.min_lr_factor) == ("exponential", 0.1)


def test_every_upstream_key_reaches_the_configuration():
    overrides = ["--validator.enable", "--validator.freq=3", "--comm.mode=fake_backend", "--checkpoint.interval=9"]
    overrides += ["--validator.dataloader.seed=5", "--dataloader.seed=6"]
    overrides += ["--profiler.profiler_repeat=4", "--compile.components=loss", "--override.imports=json.loads"]
    job = load_job(None, overrides, 1)
    config = build_trainer_config(job)
    tables = [table for table in all_tables() if table not in OUR_TABLES]
    assert len(tables) > 8
    for table in tables:
        for key, value in job[table].items():
            assert getattr(getattr(config, table), key) == value, (table, key)
    assert (config.dataloader.seed, config.validator.dataloader.seed) == (6, 5)
    assert config.dataloader == TextDataLoader.Config(**job["dataloader"])
    assert config.validator.dataloader == TextDataLoader.Config(**job["validator.dataloader"])


def test_flat_optimizer_is_one_parameter_group():
    options = ["--optimizer.name=Adam", "--optimizer.lr=0.5", "--optimizer.beta1=0.1", "--optimizer.beta2=0.2"]
    config = build(*options, "--optimizer.eps=0.3", "--optimizer.weight_decay=0.4", "--optimizer.implementation=fused")
    [group] = config.optimizer.param_groups
    assert (group.pattern, group.optimizer_name) == (".*", "Adam")
    assert group.optimizer_kwargs == {"lr": 0.5, "betas": (0.1, 0.2), "eps": 0.3, "weight_decay": 0.4}
    assert config.optimizer.implementation == "fused"


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("none", None),
        ("full", FullAC.Config(preserve_rng_state=False)),
        ("selective", SelectiveAC.Config(preserve_rng_state=False, force_recompute_mm_shapes_by_fqns=["wqkv"])),
        ("memory_budget", MemoryBudgetAC.Config(preserve_rng_state=False, memory_budget=0.25)),
    ],
)
def test_flat_activation_checkpointing(mode, expected):
    table = "--activation_checkpoint"
    options = [f"{table}.mode={mode}", f"{table}.no-preserve_rng_state", f"{table}.memory_budget=0.25"]
    options += [f"{table}.force_recompute_mm_shapes_by_fqns=wqkv", "--compile.enable"]
    assert build(*options).activation_checkpoint == expected


def test_tiles_of_a_model_without_flex_attention_are_refused():
    with pytest.raises(ValueError, match=r"model\.flex_kernel_options: the model has no flex attention"):
        model_spec("nitp_titan", "debug", "varlen", flex_options={"fwd_BLOCK_M": 64})
    spec = model_spec("nitp_titan", "debug", "flex", flex_options={"fwd_BLOCK_M": 64})
    found = [config.kernel_options["fwd_BLOCK_M"] for _, config, _, _ in spec.traverse(FlexAttention.Config)]
    assert found == [64] * 6


def test_flat_loss(monkeypatch):
    plain = CrossEntropyLoss.Config(global_vocab_size=320)
    chunked = ChunkedLossWrapper.Config(num_chunks=4, loss_fn=plain)
    stock = ["--nitp.no-enable", "--loss.num_chunks=4"]
    assert build(*stock, "--loss.name=cross_entropy").loss == plain
    assert build(*stock, "--loss.name=chunked_cross_entropy").loss == chunked
    monkeypatch.setattr(machine, "torch_version", lambda: (2, 13))
    assert build(*stock).loss == chunked
    monkeypatch.setattr(machine, "torch_version", lambda: (2, 11))
    assert build(*stock).loss == plain
    assert isinstance(build("--loss.name=linear_cross_entropy").loss, JointLoss.Config)


@pytest.mark.parametrize(("module", "vocabulary"), [("llama3", 2048), ("qwen3", 2048)])
def test_upstream_models(module, vocabulary):
    options = [f"--model.module={module}", "--model.flavor=debugmodel", "--dataloader.dataset=c4"]
    config = build(*options, "--model.hf_assets_path=assets", "--nitp.no-enable")
    assert config.model_spec.name == module
    assert config.loss.loss_fn.global_vocab_size == vocabulary
    assert config.hf_assets_path == "assets"
    assert isinstance(config.tokenizer, HuggingFaceTokenizer.Config)


def test_attention_backend_reaches_the_model():
    from torchtitan.models.common.attention import VarlenAttention

    for options in ([], UPSTREAM):
        spec = build(*options, "--model.attn_backend=varlen").model_spec
        assert any(spec.model.traverse(VarlenAttention.Config))


@pytest.mark.parametrize("flavor", FLAVORS)
def test_facts_of_our_flavors_are_the_models(flavor):
    # The formula of costs.parts_of_shape against a count on the meta device.
    config = build(f"--model.flavor={flavor}")
    assert facts_of(config.model_spec.model) == load_job(None, [f"--model.flavor={flavor}"], 1).model


@pytest.fixture
def foreign_module(tmp_path, monkeypatch):
    package = tmp_path / "somebodys"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "model.py").write_text(
        textwrap.dedent("""
            from torchtitan.models.llama3 import model_registry as llama
            my_configs = {"small": "debugmodel"}
            def model_registry(flavor, **options):
                return llama(my_configs[flavor], **options)
        """)
    )
    (package / "empty.py").touch()
    (package / "bare.py").write_text(
        "from torchtitan.models.llama3 import model_registry as llama\n"
        'model_registry = lambda flavor: llama(flavor, attn_backend="flex")\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("somebodys")]:
        del sys.modules[name]


def test_foreign_module(foreign_module):
    data = "--dataloader.dataset=c4"
    job = load_job(None, ["--model.module=somebodys.model", "--model.flavor=small", data, "--nitp.target_layer=6"], 1)
    assert job.model.n_layers == 6
    assert build_trainer_config(job).model_spec.name == "llama3"

    assert load_job(None, [*job.overrides, "--model.attn_backend=flex"], 1).doubts == ()
    bare = ["--model.module=somebodys.bare", "--model.flavor=debugmodel", data]
    assert load_job(None, bare, 1).doubts == ()
    [doubt] = load_job(None, [*bare, "--model.attn_backend=varlen"], 1).doubts
    assert doubt == "model.attn_backend is ignored: the module's model_registry does not take it"

    def refusal(*options):
        with pytest.raises(JobError) as caught:
            load_job(None, [*options, data], 1)
        return str(caught.value)

    here = "--model.module=somebodys.model"
    assert "--nitp.target_layer: found 7, expected 0..6" in refusal(
        here, "--model.flavor=small", "--nitp.target_layer=7"
    )
    assert '--model.flavor: found "large", expected one of "small"' in refusal(here, "--model.flavor=large")
    assert "has no function model_registry" in refusal("--model.module=somebodys.empty")
    assert '--model.module: found "somebodys.other", a module that cannot be found' in refusal(
        "--model.module=somebodys.other"
    )


def refused_by_upstream(overrides: list[str]) -> bool:
    """Build what ``overrides`` say without our checks, and return whether TorchTitan refuses it."""
    from nitp_titan.job.job import Job
    from nitp_titan.job.resolve import _by_table

    draft, _ = resolve(None, overrides, 1)
    tables = _by_table(draft, "value")
    job = Job(
        file="test", tables=tables, sources={}, overrides=(), layout=None, model=None, notes=(), warnings=()
    )  # fmt: skip
    try:
        build_trainer_config(job)
    except JobError:
        return True
    return False


@pytest.mark.parametrize(
    "overrides",
    [
        ["--checkpoint.folder= "],
        ["--checkpoint.interval=0"],
        ["--checkpoint.keep_latest_k=-1"],
        ["--checkpoint.keep_latest_k=1"],
        ["--checkpoint.exclude_from_loading=model"],
        ["--checkpoint.initial_load_in_hf", "--checkpoint.no-initial_load_model_only"],
        ["--checkpoint.initial_load_in_hf_quantized"],
        ["--checkpoint.last_save_in_hf", "--checkpoint.no-last_save_model_only"],
        ["--checkpoint.last_save_in_hf", "--checkpoint.folder=gs://x"],
        ["--checkpoint.keep_every=7", "--checkpoint.folder=gs://x"],
        ["--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_path=gs://x"],
        ["--compile.enable_async_tensor_parallel"],
        ["--compile.enable_async_tensor_parallel", "--compile.enable", "--compile.components=loss"],
        ["--activation_checkpoint.mode=memory_budget"],
        ["--activation_checkpoint.mode=memory_budget", "--compile.enable", "--compile.components=loss"],
        ["--parallelism.context_parallel_load_balancer="],
        ["--parallelism.pipeline_parallel_microbatch_size=0"],
        ["--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_microbatch_size=3"],
        ["--parallelism.pipeline_parallel_degree=2", "--training.no-disable_cuda_graphs"],
        ["--debug.batch_invariant"],
        [*TYPES, "--activation_checkpoint.mode=selective"],
        [*TYPES, "--parallelism.pipeline_parallel_degree=2"],
        ["--lr_scheduler.decay_type=exponential"],
        ["--validator.steps=0"],
        ["--validator.steps=-2"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_rules_are_torchtitans(overrides):
    draft, _ = resolve(None, overrides, 1)
    assert list(run_checks(draft, [*RULES, *PIPELINE_RULES])) != []
    assert refused_by_upstream(overrides)


def test_torchtitan_accepts_the_defaults():
    assert not refused_by_upstream([])
    draft, problems = resolve(None, [], 1)
    assert (problems, list(run_checks(draft, CHECKS))) == ([], [])


def test_what_only_torchtitan_knows_is_a_problem_of_its_table(monkeypatch):
    from nitp_titan.job import build as module

    def refuse(job, field):
        if field.name in ("comm", "metrics"):
            raise ValueError(f"not like this: {field.name}")
        return field.default_factory()

    monkeypatch.setattr(module, "_upstream", refuse)
    with pytest.raises(JobError) as caught:
        build()
    assert str(caught.value).splitlines() == [
        "defaults: [metrics]: not like this: metrics",
        "defaults: [comm]: not like this: comm",
    ]


def test_configuration_is_buildable_parts():
    config = build()
    assert dataclasses.is_dataclass(config)
    tokenizer = config.tokenizer.build(tokenizer_path="")
    loader = config.dataloader.build(
        dp_world_size=1, dp_rank=0, tokenizer=tokenizer, seq_len=config.training.seq_len, local_batch_size=2
    )
    inputs, labels = next(iter(loader))
    assert inputs["input"].shape == labels.shape == (2, config.training.seq_len)
    assert int(torch.as_tensor(labels).max()) < config.model_spec.model.vocab_size
