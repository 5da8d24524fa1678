"""Every key of every table, set to a value other than its default: it acts, is refused, or is said to be ignored."""

from __future__ import annotations

import re

import pytest

from nitp_titan.job import Job, JobError, load_job
from nitp_titan.job.build import build_trainer_config
from nitp_titan.job.keys.schema import all_tables
from nitp_titan.job.write import resolved_toml
from nitp_titan.runtime import machine

MOE = ["--model.flavor=debug_moe"]
SAVES = ["--checkpoint.enable"]
TENSOR = ["--parallelism.tensor_parallel_degree=2"]
CONTEXT = ["--parallelism.context_parallel_degree=2"]
PIPELINE = ["--parallelism.pipeline_parallel_degree=2"]
STOCK = ["--nitp.no-enable"]
FILES = ["--dataloader.dataset=text", "--dataloader.dataset_path=constraints.txt"]
HUB = ["--dataloader.dataset=hub:owner/name"]
VALIDATES = ["--validator.enable"]
VALIDATES_SOME = [*VALIDATES, "--validator.steps=3"]  # batches drawn from the data, not all of them once
VALIDATES_FILES = [*VALIDATES, *(word.replace("--", "--validator.") for word in FILES)]
VALIDATES_HUB = [*VALIDATES, "--validator.dataloader.dataset=hub:owner/name"]
PROFILES = ["--profiler.enable_profiling"]
SNAPSHOTS = ["--profiler.enable_memory_snapshot"]

# The debug model's first block on the first of two stages, the others on the second.
HALVES = str([["tok_embeddings", "layers.0"], [*(f"layers.{i}" for i in range(1, 6)), "norm", "lm_head"]])
HALVES = HALVES.replace(" ", "")

# The words that set each key. A key that acts at once:
ACTS = """
job: description=x dump_folder=x
model: module=qwen3,flavor=debugmodel,dataloader.dataset=c4 flavor=debug_moe attn_backend=varlen
model.shape: dim=64,head_dim=16 n_layers=3 n_heads=8 n_kv_heads=1 head_dim=16 hidden_dim=64 vocab_size=512
model.shape: max_seq_len=512 rope_theta=5e5 norm_eps=1e-5 init_std=0.1 tie_embeddings=true
model.shape: num_experts=4,top_k=2,expert_hidden_dim=64
model.flex_kernel_options: fwd_BLOCK_M=64 fwd_BLOCK_N=64 fwd_num_warps=4 fwd_num_stages=2
model.flex_kernel_options: bwd_BLOCK_M1=64 bwd_BLOCK_N1=64 bwd_BLOCK_M2=64 bwd_BLOCK_N2=64
model.flex_kernel_options: bwd_num_warps=4 bwd_num_stages=2
tokenizer: add_bos=false add_eos=false
nitp: enable=false weight=0.5 target_layer=3 projector=none projector_ratio=2 loss=mse shift=0 stop_gradient=false
nitp: start_step=7 geometry_freq=7
float8: recipe=rowwise,emulate=true
faults: on_nonfinite=skip loss_spike_sigma=6.0 grad_norm_spike_sigma=6.0
dataloader: dataset=c4_test seed=7 num_streams=8 infinite=false prefetch=0 on_bad_text=skip
training: local_batch_size=4 global_batch_size=16 seq_len=128 max_norm=2.0 steps=150 enable_cpu_offload=true
training: disable_cuda_graphs=false dtype=bfloat16 mixed_precision_param=bfloat16 gc_freq=7 gc_debug=true
optimizer: name=Adam lr=0.1 beta1=0.5 beta2=0.5 eps=0.1 weight_decay=0.2 implementation=for-loop
lr_scheduler: warmup_steps=7 total_steps=150,training.steps=150 decay_ratio=0.5 decay_type=cosine min_lr_factor=0.1
loss: chunk_tokens=64 implementation=reference
activation_checkpoint: mode=full
compile: enable=true
checkpoint: enable=true
metrics: log_freq=7 enable_tensorboard=false disable_color_printing=true save_tb_folder=x save_for_all_ranks=true
metrics: enable_wandb=true
validator: enable=true
profiler: enable_profiling=true enable_memory_snapshot=true
comm: init_timeout_seconds=7 train_timeout_seconds=7 trace_buf_size=7 save_traces_folder=x save_traces_file_prefix=x
debug: seed=7 deterministic=true detect_anomaly=true print_config=true save_config_file=x
debug: enable_structured_logging=false
override: imports=torchtitan.overrides.fused_swiglu.fused_swiglu
"""

# A key that acts only together with others: the words with which it does.
NEEDS: dict[str, list[str]] = {
    "model: hf_assets_path=x": ["--tokenizer.name=huggingface"],
    "tokenizer: eos_token=x bos_token=x allow_special_in_text=true": [
        "--tokenizer.name=huggingface", "--model.hf_assets_path=x",
    ],
    "validator.dataloader: on_bad_text=skip": VALIDATES,
    "model.shape: top_k=1 expert_hidden_dim=64 num_shared_experts=2 n_dense_layers=2": MOE,
    "model.shape: router_score_func=sigmoid router_norm=false load_balance_coeff=0.1": MOE,
    "float8: experts=true": [*MOE, "--float8.recipe=rowwise", "--float8.emulate"],
    "float8: filter_fqns=attention emulate=true": ["--float8.recipe=rowwise"],
    "faults: max_skips_in_a_row=7": ["--faults.on_nonfinite=skip"],
    "faults: spike_window=64": ["--faults.loss_spike_sigma=6.0"],
    "dataloader: text_field=x streaming=true": FILES,
    "dataloader: shuffle_buffer=7": [*FILES, "--dataloader.streaming"],
    "dataloader: split=x": HUB,
    "dataloader: dataset_path=constraints.txt": ["--dataloader.dataset=text"],
    "loss: name=cross_entropy num_chunks=4": STOCK,
    "parallelism: fsdp_reshard_after_forward=always": ["--training.global_batch_size=16"],
    "parallelism: enable_sequence_parallel=false": TENSOR,
    "parallelism: context_parallel_load_balancer=none": CONTEXT,
    "parallelism: context_parallel_ptrr_mask_key=x": [
        *CONTEXT, *STOCK, "--parallelism.context_parallel_load_balancer=ptrr",
    ],
    "parallelism: pipeline_parallel_first_stage_less_layers=2 pipeline_parallel_last_stage_less_layers=2": PIPELINE,
    "parallelism: pipeline_parallel_layers_per_stage=4 pipeline_parallel_schedule=GPipe": PIPELINE,
    "parallelism: pipeline_parallel_schedule_csv=pyproject.toml pipeline_parallel_microbatch_size=2": PIPELINE,
    f"parallelism: module_fqns_per_model_part={HALVES}": PIPELINE,
    "parallelism: expert_parallel_degree=2": [*MOE, "--parallelism.data_parallel_shard_degree=2"],
    "activation_checkpoint: preserve_rng_state=false determinism_check=none debug=true": [
        "--activation_checkpoint.mode=full",
    ],
    "activation_checkpoint: force_recompute_mm_shapes_by_fqns=attention.wo": ["--activation_checkpoint.mode=selective"],
    "activation_checkpoint: memory_budget=0.25 visualize_memory_budget_pareto=true": [
        "--activation_checkpoint.mode=memory_budget", "--compile.enable",
    ],
    "compile: components=model backend=aot_eager": ["--compile.enable"],
    "compile: enable_async_tensor_parallel=true": ["--compile.enable", *TENSOR],
    "checkpoint: folder=x interval=7 keep_latest_k=7 load_step=7 exclude_from_loading=optimizer": SAVES,
    "checkpoint: enable_first_step_checkpoint=true load_only=true": SAVES,
    "checkpoint: keep_every=500 verify_checksums=false branch_from=/x allow_changes=data": SAVES,
    "checkpoint: async_mode=async initial_load_in_hf=true last_save_in_hf=true last_save_model_only=true": SAVES,
    "checkpoint: initial_load_path=/x": SAVES,
    "checkpoint: initial_load_model_only=false": [*SAVES, "--checkpoint.initial_load_path=/x"],
    "checkpoint: export_dtype=bfloat16": [*SAVES, "--checkpoint.last_save_model_only"],
    "checkpoint: initial_load_in_hf_quantized=true": [
        *SAVES, "--checkpoint.initial_load_path=/x", "--checkpoint.initial_load_in_hf",
    ],
    "validator: freq=7 steps=7": VALIDATES,
    "validator.dataloader: dataset=c4_test infinite=false prefetch=0": VALIDATES,
    "validator.dataloader: seed=7 num_streams=8": VALIDATES_SOME,
    "validator.dataloader: text_field=x streaming=true": VALIDATES_FILES,
    "validator.dataloader: shuffle_buffer=7": [
        *VALIDATES_SOME, *VALIDATES_FILES, "--validator.dataloader.streaming",
    ],
    "validator.dataloader: split=x": VALIDATES_HUB,
    "validator.dataloader: dataset_path=constraints.txt": [*VALIDATES, "--validator.dataloader.dataset=text"],
    "profiler: save_traces_folder=x profile_freq=8 profiler_repeat=1 profiler_skip_first=1": PROFILES,
    "profiler: profiler_skip_first_wait=1 profiler_active=2 profiler_warmup=2": PROFILES,
    "profiler: memory_snapshot_freq=7 save_memory_snapshot_folder=x memory_snapshot_max_entries=7": SNAPSHOTS,
    "debug: deterministic_warn_only=true": ["--debug.deterministic"],
    "debug: moe_force_load_balance=true": MOE,
}  # fmt: skip

# A key that is refused at any other value, or needs what no test machine has.
REFUSED = """
tokenizer: name=huggingfaces
parallelism: data_parallel_replicate_degree=3 data_parallel_shard_degree=3 tensor_parallel_degree=3
parallelism: context_parallel_degree=3 pipeline_parallel_degree=3 spmd_backend=full_dtensor
debug: batch_invariant=true
training: mixed_precision_reduce=bfloat16
"""

# What says itself elsewhere which of its values act.
ELSEWHERE = {
    "comm.mode": "of any other value it is said that nothing trains, or which package lacks",
    "checkpoint.create_seed_checkpoint": "of a run that saves one it is said that nothing trains",
    "parallelism.enable_fsdp_symm_mem": "refused without a GPU; one rank is said",
    "debug.spmd_typechecking": "acts with spmd_backend = spmd_types, which needs torch >= 2.14",
}


def parsed(text: str) -> dict[str, list[str]]:
    """``table: key=value,other=value key=value`` lines as "table.key" -> words; commas add what must go with it."""
    found = {}
    for line in text.strip().splitlines():
        table, _, rest = line.partition(": ")
        for item in rest.split(" "):
            parts = [item] if "[" in item else item.split(",")
            names = [part if "." in part.partition("=")[0] else f"{table}.{part}" for part in parts]
            found[names[0].partition("=")[0]] = [f"--{name}" for name in names]
    return found


ACTING, REFUSING = parsed(ACTS), parsed(REFUSED)
NEEDING = {key: (words, with_) for line, with_ in NEEDS.items() for key, words in parsed(line).items()}


@pytest.fixture(autouse=True)
def machine_of_the_tests(monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(machine, "torch_version", lambda: (2, 13))


def load(words: list[str], ranks: int) -> Job:
    # On two ranks every parallelism has a place.
    return load_job(None, ["--training.local_batch_size=8", *words], ranks)


def built(job: Job) -> str:
    """What a run would be built of, as text."""
    text = repr(build_trainer_config(job).to_dict())
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def said_of(words: list[str], key: str, ranks: int) -> list[str]:
    """What is said of a key, or what refuses it."""
    try:
        job = load(words, ranks)
    except JobError as error:
        return [str(problem) for problem in error.problems if key in problem.key]
    return [note for note in (*job.notes, *map(str, job.warnings)) if key in note]


def test_every_key_has_its_fate():
    keys = {f"{table}.{key}" for table, keys in all_tables().items() for key in keys}
    fates = [*ACTING, *NEEDING, *REFUSING, *ELSEWHERE]
    assert len(fates) == len(set(fates))
    missing = sorted(keys.difference(fates))
    assert not missing, f"say in {__file__} what becomes of {missing}, and in job/checks/unread.py what they need"
    assert set(fates) == keys


@pytest.mark.parametrize("key", ACTING)
def test_a_key_that_acts_changes_what_is_built(key):
    base, job = load([], 1), load(ACTING[key], 1)
    assert not [note for note in job.doubts if key in note]
    if key == "job.description":
        assert 'description = "x"' in resolved_toml(job)
    else:
        assert built(job) != built(base)


@pytest.mark.parametrize("key", NEEDING)
def test_a_key_that_needs_another_acts_with_it_and_is_said_without_it(key):
    words, with_ = NEEDING[key]
    ranks = 2 if key.startswith(("parallelism", "compile.enable_async")) else 1
    assert said_of(words, key, 1 if key.startswith("parallelism.fsdp") else ranks), "it is ignored without a word"
    job = load([*with_, *words], ranks)
    assert not [note for note in job.notes if key in note]
    if key.endswith("dataset_path"):  # what needs it cannot do without it
        return
    assert built(job) != built(load(with_, ranks))


@pytest.mark.parametrize("key", REFUSING)
def test_a_key_with_no_other_value_is_refused(key):
    with pytest.raises(JobError) as caught:
        load(REFUSING[key], 2)
    assert key.rpartition(".")[2] in str(caught.value)


def test_what_is_said_elsewhere():
    for key in ELSEWHERE:
        assert said_of([f"--{key}"], key, 1)


def test_a_value_that_is_there_anyway_is_not_said(tmp_path):
    seeded, streams = [*VALIDATES, "--dataloader.seed=9"], ["--dataloader.num_streams=8"]
    for words in ([], STOCK, seeded, VALIDATES_SOME, streams, MOE, SAVES):
        path = tmp_path / "config.toml"
        path.write_text(resolved_toml(load(words, 1)))
        assert load_job(path, [], 1).doubts == (), words
    assert load(["--checkpoint.interval=500", "--profiler.profiler_active=1"], 1).doubts == ()


@pytest.mark.parametrize(
    ("steps", "infinite", "said"),
    [
        (3, "no-infinite", "validator.steps is 3: batches are drawn"),
        (-1, "infinite", ""),  # the value that is there anyway
        (3, "infinite", ""),
        (-1, "no-infinite", ""),
    ],
)
def test_what_validation_reads_is_its_steps_to_say(steps, infinite, said):
    job = load([*VALIDATES, f"--validator.steps={steps}", f"--validator.dataloader.{infinite}"], 1)
    assert job.doubts == ((f"validator.dataloader.infinite is ignored: {said}",) if said else ())


def test_what_is_ignored_is_said_with_its_place(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text("[checkpoint]\n\ninterval = 7\n")
    said = f"checkpoint.interval is ignored: checkpoint.enable is false ({path}:3)"
    assert load_job(path, [], 1).doubts == (said,)


def test_what_was_switched_off_is_a_note_and_what_was_never_on_a_doubt():
    said = "checkpoint.interval is ignored: checkpoint.enable is false"
    never, off = load(["--checkpoint.interval=7"], 1), load(["--checkpoint.interval=7", "--checkpoint.no-enable"], 1)
    assert never.doubts == (said,)
    assert said in off.notes
    assert off.doubts == ()
