"""Every kind of wrong value is refused, in our words and with its place."""

from __future__ import annotations

import pytest

from nitp_titan.job import JobError, load_job
from nitp_titan.job.checks.data import DATASETS
from nitp_titan.job.checks.tokenizer import BYTE_VOCABULARY
from nitp_titan.runtime import machine

UPSTREAM = ["--model.module=llama3", "--model.flavor=debugmodel", "--dataloader.dataset=c4"]
RECOMPUTES = ["--activation_checkpoint.mode=selective", "--activation_checkpoint.force_recompute_mm_shapes_by_fqns"]
STOCK = ["--nitp.no-enable"]


@pytest.fixture(autouse=True)
def machine_of_the_tests(monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(machine, "torch_version", lambda: (2, 13))


def problems(tmp_path, *overrides: str, text: str = "", ranks: int = 1, for_training: bool = False) -> list[str]:
    path = tmp_path / "job.toml"
    path.write_text('[model]\nflavor = "debug"\n' + text)
    try:
        load_job(path, list(overrides), ranks, for_training=for_training)
    except JobError as error:
        return [str(problem).replace(f"{tmp_path}/", "") for problem in error.problems]
    return []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--nitp.target_layer", "7"], "--nitp.target_layer: found 7, expected 0..6"),
        (["--nitp.target_layer", "-1"], "--nitp.target_layer: found -1, expected 0 (the embeddings)"),
        (["--nitp.weight", "-0.5"], "--nitp.weight: found -0.5, expected a finite number of at least 0"),
        (["--nitp.weight", "nan"], "--nitp.weight: found nan, expected a finite number"),
        (["--nitp.weight", "inf"], "--nitp.weight: found inf, expected a finite number"),
        (["--nitp.start_step=5", "--training.no-disable_cuda_graphs"], "--nitp.start_step: found 5, expected 0 with "
         "training.disable_cuda_graphs = false"),
        (["--nitp.geometry_freq=5", "--training.no-disable_cuda_graphs"], "--nitp.geometry_freq: found 5, expected 0"),
        (["--compile.components", "modle,loss"], 'found "modle", expected "model" or "loss"; did you mean "model"?'),
        (["--compile.enable", "--compile.backend=inducter"], '--compile.backend: found "inducter", expected one of '
         '"inductor", "aot_eager", the two that TorchTitan compiles flex attention with; did you mean "inductor"?'),
        (["--parallelism.spmd_backend=full_dtensor"], 'found "full_dtensor", expected "partial_dtensor" with NITP'),
        (["--dataloader.dataset", "hub:name"], '--dataloader.dataset: found "hub:name", expected "hub:owner/name"'),
        (["--model.module", "no.such.module"], '--model.module: found "no.such.module", a module that cannot be found'),
        (["--nitp.projector_ratio", "0"], "--nitp.projector_ratio: found 0, expected at least 1"),
        ([*UPSTREAM, "--nitp.target_layer", "7"], "--nitp.target_layer: found 7, expected 0..6"),
        (["--model.flavor", "debgu"], '--model.flavor: found "debgu", expected one of "debug", "debug_moe"'),
        (["--model.flavor", "debgu"], '; did you mean "debug"?'),
        (["--model.module", "lama3"], '--model.module: found "lama3", expected one of "nitp_titan", "deepseek_v3"'),
        (["--model.module", "lama3"], '; did you mean "llama3"?'),
        (["--model.module", "flux"], '--model.module: found "flux", an image model'),
        ([*UPSTREAM, "--model.flavor=9B"], '--model.flavor: found "9B", expected one of "debugmodel", "1B"'),
        (["--loss.name", "cross_entropy"], '--loss.name: found "cross_entropy", expected "auto" or "linear_cross'),
        ([*STOCK, "--loss.name", "linear_cross_entropy"], "--loss.name: found \"linear_cross_entropy\", which is for "
         "nitp.enable = true"),
        ([*STOCK, "--training.seq_len", "100"], "--training.seq_len: found 100, expected a multiple of "
         "loss.num_chunks 8"),
        ([*STOCK, "--training.seq_len", "8", "--parallelism.context_parallel_degree=2"], "expected a multiple of "
         "loss.num_chunks 8 x context_parallel_degree 2"),
        (["--dataloader.dataset", "tekst"], '--dataloader.dataset: found "tekst", expected one of "text"'),
        (["--dataloader.dataset", "owner/name"], 'did you mean "hub:owner/name"'),
        (["--dataloader.dataset", "hub:"], '--dataloader.dataset: found "hub:", expected "hub:owner/name"'),
        (["--dataloader.dataset", "text"], "--dataloader.dataset: expected a file, folder or glob of text files"),
        (["--dataloader.dataset=text", "--dataloader.dataset_path=/no/where/*.txt"],
         "--dataloader.dataset_path: no text files match dataset_path '/no/where/*.txt'"),
        (["--dataloader.dataset_path", "x"], '--dataloader.dataset_path: found "x", which "python_stdlib" does not '
         'read; did you mean dataset = "text"?'),
        (["--validator.dataloader.dataset=text", "--validator.dataloader.dataset_path=/no/*.txt"],
         "--validator.dataloader.dataset_path: no text files match"),
        (["--training.seq_len", "8200"], "--training.seq_len: found 8200, expected at most the model's 8192"),
        ([*UPSTREAM, "--training.seq_len", "131080"], "found 131080, expected at most the model's 131072"),
        (["--training.seq_len", "0"], "--training.seq_len: found 0, expected at least 1"),
        (["--training.local_batch_size", "0"], "--training.local_batch_size: found 0, expected at least 1"),
        (["--training.global_batch_size", "12", "--training.local_batch_size=8"], "--training.global_batch_size: found "
         "a global_batch_size of 12, expected a multiple of local_batch_size 8 x data-parallel degree 1 = 8; the "
         "nearest are 8 and 16"),
        (["--lr_scheduler.decay_type=exponentail"], '--lr_scheduler.decay_type: found "exponentail", expected one of '
         '"linear", "sqrt", "cosine", "exponential"; did you mean "exponential"?'),
        (["--lr_scheduler.decay_type=exponential"], "--lr_scheduler.decay_type: found min_lr_factor 0 with decay_type "
         '"exponential", expected a number above 0, at most 1; set min_lr_factor = 0.1, say'),
        (["--lr_scheduler.decay_type=exponential", "--lr_scheduler.min_lr_factor=0"], "--lr_scheduler.min_lr_factor: "
         'found min_lr_factor 0 with decay_type "exponential"'),
        (["--lr_scheduler.decay_type=exponential", "--lr_scheduler.min_lr_factor=1.5"], "--lr_scheduler.min_lr_factor: "
         "found 1.5, expected 0..1"),
        (["--training.global_batch_size", "0"], "--training.global_batch_size: found 0, expected at least 1, or -1"),
        (["--optimizer.lr", "nan"], "--optimizer.lr: found nan, expected a finite number"),
        (["--optimizer.beta1", "1.5"], "--optimizer.beta1: found 1.5, expected at least 0 and less than 1"),
        (["--metrics.log_freq", "0"], "--metrics.log_freq: found 0, expected at least 1"),
        (["--dataloader.num_streams", "0"], "--dataloader.num_streams: found 0, expected 1..1048576"),
        (["--debug.seed", str(2**64)], "--debug.seed: found 18446744073709551616, expected"),
        (["--dataloader.seed", "-1"], "--dataloader.seed: found -1, expected at least 0"),
        (["--parallelism.tensor_parallel_degree", "0"], "--parallelism.tensor_parallel_degree: found 0, expected at "
         "least 1"),
        (["--parallelism.data_parallel_shard_degree", "0"], "found 0, expected at least 1 (or -1: all ranks that are"),
        (["--parallelism.tensor_parallel_degree", "2"], "--parallelism.tensor_parallel_degree: found 2, expected a "
         "divisor of the world size 1"),
        (["--parallelism.expert_parallel_degree", "2"], "--parallelism.expert_parallel_degree: found 2, expected a "
         "divisor of data_parallel_shard x context x tensor = 1"),
        (["--parallelism.spmd_backend", "spmd_types"], '--parallelism.spmd_backend: "spmd_types" needs torch >= 2.14'),
        (["--dataloader.num_streams", str(2**40)], "expected 1..1048576"),
        (["--optimizer.beta1", "1"], "--optimizer.beta1: found 1.0, expected at least 0 and less than 1"),
        (["--optimizer.beta2", "1.0"], "--optimizer.beta2: found 1.0, expected at least 0 and less than 1"),
        (["--profiler.profiler_repeat", "-1"], "--profiler.profiler_repeat: found -1, expected at least 0"),
        (["--comm.trace_buf_size", "-1"], "--comm.trace_buf_size: found -1, expected at least 0"),
        (["--checkpoint.enable", "--checkpoint.exclude_from_loading=optimiser"], '--checkpoint.exclude_from_loading: '
         'found "optimiser", expected some of optimizer, lr_scheduler, dataloader, random_state, train_state; '
         'did you mean "optimizer"?'),
        (["--checkpoint.enable", "--checkpoint.load_only", "--checkpoint.create_seed_checkpoint"],
         "--checkpoint.create_seed_checkpoint: found true with load_only = true, which saves none"),
        (["--model.hf_assets_path", "a" * 5000, "--tokenizer.name=huggingface"], "aaa...\": File name too long"),
        (["--activation_checkpoint.determinism_check=nothing"], '--activation_checkpoint.determinism_check: found '
         '"nothing", expected "default" or "none"'),
        (["--override.imports=no_such.module.function"], '--override.imports: found "no_such.module.function", whose '
         'module "no_such.module" cannot be found'),
        ([*RECOMPUTES, "nothing.here"], 'found "nothing.here", which is in no linear layer\'s name of a block'),
        ([*RECOMPUTES, "projector.w1"], 'found "projector.w1", which is in no linear layer\'s name of a block'),
        ([*RECOMPUTES, "attention"], 'by_fqns: found "attention", which names other modules than linear layers too'),
        (["--override.imports=function"], '--override.imports: found "function", expected "module.function"'),
        (["--training.max_norm=0"], "--training.max_norm: found 0.0, which would clip every gradient to nothing; a "
         "number that no gradient reaches, such as 1e9, clips nothing"),
        (["--checkpoint.keep_latest_k", "1"], "--checkpoint.keep_latest_k: found 1, expected 0 (all) or at least 2"),
        (["--profiler.enable_profiling", "--profiler.profile_freq=3"], "--profiler.profile_freq: found 3, expected at "
         "least profiler_warmup 3 + profiler_active 1 = 4"),
        (["--profiler.enable_memory_snapshot", "--profiler.memory_snapshot_freq=0"], "--profiler.memory_snapshot_freq: "
         'found 0, expected at least 1, or "none"'),
        (["--activation_checkpoint.mode", "memory_budget"], 'found "memory_budget", which needs compile.enable = true'),
    ],
)  # fmt: skip
def test_refused(tmp_path, overrides, expected):
    found = problems(tmp_path, *overrides)
    assert any(expected in problem for problem in found), found
    assert all(problem.startswith("command line: --") for problem in found), found


@pytest.mark.parametrize(
    ("overrides", "ranks", "expected"),
    [
        (["--parallelism.tensor_parallel_degree=4"], 4, "found 4, expected a divisor of the model's 4 heads "
         "and 2 key-value heads; the largest below it is 2"),
        (["--parallelism.tensor_parallel_degree=2", "--training.seq_len=33"], 2, "--training.seq_len: found 33, "
         "expected a multiple of 2 (tensor 2, context 1); the nearest are 32 and 34"),
        ([*STOCK, "--parallelism.context_parallel_degree=2", "--loss.name=cross_entropy", "--training.seq_len=34"], 2,
         "--training.seq_len: found 34, expected a multiple of 4 (tensor 1, context 2)"),
        (["--parallelism.tensor_parallel_degree=2", "--parallelism.data_parallel_shard_degree=4"], 4,
         "found data_parallel_shard_degree 4 x tensor_parallel_degree 2 = 8, expected the world size 4; "
         "data_parallel_shard_degree = 2 would fit"),
        (["--parallelism.data_parallel_shard_degree=1"], 2, "found 1, expected the world size 2"),
        (["--dataloader.num_streams=3"], 2, "--dataloader.num_streams: found 3, expected a multiple of the "
         "data-parallel degree 2"),
        (["--validator.enable", "--validator.steps=5", "--validator.dataloader.num_streams=3"], 2,
         "--validator.dataloader.num_streams: found 3, expected a multiple of the data-parallel degree 2"),
        (["--training.global_batch_size=8", "--training.local_batch_size=8"], 2, "expected a multiple of "
         "local_batch_size 8 x data-parallel degree 2"),
        (["--training.global_batch_size=7"], 2, "--training.global_batch_size: found 7, expected a multiple of the "
         "data-parallel degree 2; the nearest are 6 and 8"),
        (["--parallelism.context_parallel_degree=2", "--parallelism.context_parallel_load_balancer=ptrr"], 2,
         'context_parallel_load_balancer: found "ptrr", expected "headtail" or "none" with NITP'),
        (["--parallelism.context_parallel_degree=2", "--parallelism.context_parallel_load_balancer=head_tail"], 2,
         'found "head_tail", expected "headtail", "ptrr" or "none"; did you mean "headtail"?'),
        (["--parallelism.context_parallel_degree=2", "--nitp.loss=generic_cosine"], 2,
         'found 2, expected 1 with nitp.loss = "generic_cosine"'),
        (["--parallelism.context_parallel_degree=2", "--model.attn_backend=varlen"], 2,
         'attn_backend: found "varlen", expected "flex" with context_parallel_degree 2'),
        (["--model.flavor=debug_moe", "--parallelism.expert_parallel_degree=3", "--training.local_batch_size=1",
          "--dataloader.num_streams=3"], 3, "found 3, expected a divisor of the model's 8 experts"),
    ],
)  # fmt: skip
def test_refused_on_several_ranks(tmp_path, overrides, ranks, expected):
    found = problems(tmp_path, *overrides, ranks=ranks)
    assert any(expected in problem for problem in found), found


def test_the_compiler_of_flex_attention_alone_is_one_of_two(tmp_path):
    eager = ["--compile.enable", "--compile.backend=eager"]
    assert len(problems(tmp_path, *eager)) == 1
    assert problems(tmp_path, "--compile.backend=eager") == []
    assert problems(tmp_path, *eager, "--compile.components=loss") == []
    assert problems(tmp_path, *eager, "--model.attn_backend=varlen") == []
    somebodys = ["--model.module=torchtitan.models.llama3", "--model.flavor=debugmodel"]
    assert not any("compile.backend" in problem for problem in problems(tmp_path, *eager, *somebodys))
    assert problems(tmp_path, "--compile.enable", "--compile.backend=aot_eager") == []


def test_sequence_parallelism_off_frees_the_sequence_length(tmp_path):
    overrides = ["--parallelism.tensor_parallel_degree=2", "--training.seq_len=33"]
    assert problems(tmp_path, *overrides, "--parallelism.no-enable_sequence_parallel", ranks=2) == []


def test_one_pass_needs_no_streams(tmp_path):
    assert problems(tmp_path, "--dataloader.num_streams=3", "--dataloader.no-infinite", ranks=2) == []


def test_expert_parallelism_on_old_torch_is_one_sentence(tmp_path, monkeypatch):
    overrides = ["--model.flavor=debug_moe", "--parallelism.expert_parallel_degree=2"]
    assert problems(tmp_path, *overrides, ranks=2) == []
    monkeypatch.setattr(machine, "torch_version", lambda: (2, 11))
    assert problems(tmp_path, *overrides, ranks=2) == [
        "command line: --parallelism.expert_parallel_degree: expert parallelism needs torch >= 2.13, found torch 2.11; "
        "install a newer torch, or set expert_parallel_degree = 1"
    ]


def test_cuda_graphs_of_attention_need_a_torch_that_can_record_it(tmp_path, monkeypatch):
    graphs = ["--training.no-disable_cuda_graphs"]
    assert problems(tmp_path, *graphs) == []
    monkeypatch.setattr(machine, "torch_version", lambda: (2, 11))
    assert problems(tmp_path, *graphs) == [
        "command line: --training.disable_cuda_graphs: found false, expected true: with torch < 2.13 a CUDA graph does "
        "not take another step's attention masks, this is torch 2.11"
    ]


def test_exchange_that_gloo_lacks_is_an_error_of_training_alone(tmp_path, monkeypatch):
    job = ["--model.flavor=debug_moe", "--parallelism.expert_parallel_degree=2"]
    monkeypatch.setattr(machine, "torch_version", lambda: (2, 15))
    assert problems(tmp_path, *job, ranks=2) == []
    assert problems(tmp_path, *job, ranks=2, for_training=True) == [
        "command line: --parallelism.expert_parallel_degree: found no GPU and torch >= 2.15, with which gloo's "
        "all-to-all fails, expected 1; torch 2.13 and 2.14 can on a CPU"
    ]
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    assert problems(tmp_path, *job, ranks=2, for_training=True) == []


def test_chunked_loss_on_old_torch(tmp_path, monkeypatch):
    chunked = [*STOCK, "--loss.name", "chunked_cross_entropy"]
    assert problems(tmp_path, *chunked) == []
    monkeypatch.setattr(machine, "torch_version", lambda: (2, 11))
    [problem] = problems(tmp_path, *chunked)
    assert '"chunked_cross_entropy" needs torch >= 2.13, found torch 2.11' in problem
    # "auto" is then the plain loss, which splits any length.
    assert problems(tmp_path, *STOCK, "--training.seq_len=100") == []


def test_place_is_the_key_in_the_file(tmp_path):
    text = "[nitp]\nweight = -1\n\ntarget_layer = 9\n[training]\nlocal_batch_size = 3\nglobal_batch_size = 8\n"
    assert [problem.split(": found")[0] for problem in problems(tmp_path, text=text)] == [
        "job.toml:4: [nitp] weight",
        "job.toml:6: [nitp] target_layer",
        "job.toml:9: [training] global_batch_size",
    ]


def test_place_of_a_default_says_so(tmp_path):
    [problem] = problems(tmp_path, "--model.module=llama3", "--model.flavor=debugmodel")
    assert problem.startswith("job.toml: [dataloader] dataset_path (default of nitp_titan): expected a file")


def test_data_paths_that_match(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for path in (tmp_path, tmp_path / "a.txt", tmp_path / "*.txt"):
        assert problems(tmp_path, "--dataloader.dataset=text", f"--dataloader.dataset_path={path}") == []
    for name in ("hub:owner/name", "hub:owner/name:config"):
        assert problems(tmp_path, "--dataloader.dataset", name) == []


def tokenizer_folder(tmp_path, size: int) -> str:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(WordLevel({f"word{i}": i for i in range(size - 1)}, unk_token="word0"))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path)


def test_tokenizer_larger_than_the_vocabulary(tmp_path, monkeypatch):
    arguments = ["--tokenizer.name=huggingface", f"--model.hf_assets_path={tokenizer_folder(tmp_path, 320)}"]
    assert problems(tmp_path, *arguments, for_training=True) == []
    tokenizer_folder(tmp_path, 321)  # one more than the debug model's 320, and that one an added token
    [problem] = problems(tmp_path, *arguments)
    assert "has ids up to 320, expected less than the model's vocabulary of 320" in problem
    (tmp_path / "tokenizer.json").write_text("{}")
    [problem] = problems(tmp_path, *arguments)
    assert "is not a tokenizer" in problem


def test_byte_tokenizer_and_a_small_vocabulary(tmp_path):
    [problem] = problems(tmp_path, "--model.shape.vocab_size=257")
    assert problem == (
        "job.toml: [tokenizer] name (default of flavor): the byte tokenizer has ids up to 257, expected less than the "
        "model's vocabulary of 257"
    )


def test_missing_assets_are_an_error_of_training_alone(tmp_path):
    arguments = ["--tokenizer.name=huggingface", "--model.hf_assets_path=/no/where"]
    job = load_job(None, arguments, 1)
    assert [str(warning) for warning in job.warnings] == [
        'command line: --model.hf_assets_path: found "/no/where", which does not exist'
    ]
    assert problems(tmp_path, *arguments, for_training=True) == [str(warning) for warning in job.warnings]
    [problem] = problems(tmp_path, "--tokenizer.name=huggingface", for_training=True)
    assert "expected the folder of a tokenizer.json" in problem


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--training.no-disable_cuda_graphs"], "found no GPU, expected true: CUDA graphs need a GPU"),
        (["--model.attn_backend=varlen"], 'found no GPU, expected "flex": varlen needs a GPU'),
        (["--model.attn_backend=flex_flash"], 'found no GPU, expected "flex": flex_flash needs a GPU'),
        (["--training.enable_cpu_offload"], "found no GPU, expected false: parameters are offloaded from a GPU"),
        (["--profiler.enable_memory_snapshot"], "found no GPU, expected false: torch records a GPU's memory alone"),
        (["--optimizer.implementation=fused_opt_states_bf16"], "bf16 optimizer states need a GPU"),
        (["--job.dump_folder=s3://bucket/run"], 'found "s3://bucket/run", expected a folder of this machine'),
        (["--job.dump_folder="], 'found "", expected a folder\'s name'),
        (["--job.dump_folder=pyproject.toml"], 'found "pyproject.toml", which is a file'),
        (["--job.dump_folder=pyproject.toml/run"], "pyproject.toml is a file; expected a folder's name"),
        (["--job.dump_folder=~/run"], '"~" is not expanded'),
    ],
)
def test_what_this_machine_lacks_is_an_error_of_training_alone(tmp_path, arguments, expected):
    [problem] = problems(tmp_path, *arguments, for_training=True)
    assert expected in problem
    [warning] = load_job(None, arguments, 1).warnings
    assert str(warning) == problem


def test_weights_and_biases_that_are_not_installed_are_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "has_module", lambda name: name != "wandb")
    [problem] = problems(tmp_path, "--metrics.enable_wandb", for_training=True)
    assert problem == (
        "command line: --metrics.enable_wandb: found true, and no package wandb in this environment; pip install wandb"
    )
    assert problems(tmp_path, for_training=True) == []


def test_wrong_training_data_is_not_reported_of_the_validation_data_too(tmp_path):
    [problem] = problems(tmp_path, "--validator.enable", text="[dataloader]\ndataset = 3\n")
    assert problem == "job.toml:4: [dataloader] dataset: found 3, expected a string"
    # 3 ranks do not share out the default 64 streams, which this job does not have either.
    wrong = ["--dataloader.num_streams=x", "--validator.enable", "--validator.steps=2"]
    [problem] = problems(tmp_path, *wrong, ranks=3)
    assert problem == 'command line: --dataloader.num_streams: found "x", expected a whole number'


def test_unknown_flavor_brings_no_other_problem(tmp_path):
    [problem] = problems(tmp_path, "--model.flavor=nope", for_training=True)
    assert "--model.flavor" in problem


def test_constants_are_the_data_packages():
    from nitp_titan.data.corpus import dataset_names
    from nitp_titan.data.tokenizer import ByteTokenizer

    assert ByteTokenizer().get_vocab_size() == BYTE_VOCABULARY
    assert tuple(dataset_names()) == DATASETS


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_compiled_blocks_under_tensor_parallelism_are_not_checkpointed_by_torch_2_13(tmp_path, monkeypatch, mode):
    layout = ["--parallelism.tensor_parallel_degree=2", "--compile.enable", "--training.local_batch_size=1"]
    checkpointed = [*layout, f"--activation_checkpoint.mode={mode}"]
    [problem] = problems(tmp_path, *checkpointed, ranks=2, for_training=True)
    assert f'mode: found "{mode}", expected "none" for compiled blocks under tensor' in problem
    assert problems(tmp_path, *checkpointed, ranks=2) == []  # a warning there
    assert problems(tmp_path, *layout, "--activation_checkpoint.mode=none", ranks=2, for_training=True) == []
    monkeypatch.setattr(machine, "torch_version", lambda: (2, 15))
    assert problems(tmp_path, *checkpointed, ranks=2, for_training=True) == []
