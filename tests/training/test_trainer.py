"""Training runs: stock TorchTitan without NITP, and NITP's counts, switches, metrics and validation with it."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.components.metrics import MetricsProcessor as StockMetricsProcessor
from torchtitan.components.validate import Validator as StockValidator
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.trainer import Trainer

from nitp_titan.models.registry import model_registry
from nitp_titan.nitp.chunked_sum import ChunkedSum
from nitp_titan.nitp.config import NITPConfig
from nitp_titan.titan.twin import NITPDecoder
from nitp_titan.training.joint_loss import JointLoss
from nitp_titan.training.trainer import NITPTrainer
from nitp_titan.training.validator import Validator
from tests.helpers.trainers import metric_lines, running, trainer_config


def stock_loss() -> ChunkedLossWrapper.Config:
    return ChunkedLossWrapper.Config(num_chunks=4)


def trained(config) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Train; return each step's gradients and the final weights."""
    gradients = []
    with running(config) as trainer:
        step = trainer.optimizers.step

        def keep_gradients_and_step() -> None:
            parameters = trainer.model_parts[0].named_parameters()
            gradients.append({name: p.grad.full_tensor().clone() for name, p in parameters if p.grad is not None})
            step()

        trainer.optimizers.step = keep_gradients_and_step
        trainer.train()
        return gradients, {name: p.full_tensor().clone() for name, p in trainer.model_parts[0].named_parameters()}


def test_nitp_off_is_stock_torchtitan_bit_for_bit(tmp_path, corpus):
    ours = trainer_config(tmp_path / "ours", corpus, nitp=NITPConfig(enable=False), loss=stock_loss())
    values = {f.name: getattr(ours, f.name) for f in dataclasses.fields(Trainer.Config)}
    values |= {
        "metrics": StockMetricsProcessor.Config(),
        "validator": StockValidator.Config(),
        "dump_folder": str(tmp_path),
    }
    stock = Trainer.Config(**values | {"model_spec": trainer_config(tmp_path, corpus).model_spec})
    (our_gradients, our_weights), (stock_gradients, stock_weights) = trained(ours), trained(stock)
    assert our_weights.keys() == stock_weights.keys()
    assert all(torch.equal(our_weights[name], value) for name, value in stock_weights.items())
    for our_step, stock_step in zip(our_gradients, stock_gradients, strict=True):
        assert all(torch.equal(our_step[name], value) for name, value in stock_step.items())
    assert "loss_metrics/nitp_loss" not in metric_lines(tmp_path / "ours")[-1]


def losses(config, tags=("loss_metrics/global_avg_loss", "loss_metrics/ntp_loss", "loss_metrics/nitp_loss")):
    with running(config) as trainer:
        trainer.train()
    return [[line[tag] for tag in tags] for line in metric_lines(Path(config.dump_folder))]


@pytest.mark.parametrize("flavor", ["debug", "debug_moe"])
def test_accumulation_gives_the_losses_of_one_batch(tmp_path, corpus, flavor):
    whole, parts = (trainer_config(tmp_path / str(size), corpus, flavor=flavor) for size in (8, 2))
    whole.training.local_batch_size, parts.training.local_batch_size = 8, 2
    torch.testing.assert_close(torch.tensor(losses(parts)), torch.tensor(losses(whole)), rtol=1e-5, atol=0)


def test_the_losss_settings_reach_the_model(tmp_path, corpus):
    loss = JointLoss.Config(chunk_tokens=48, implementation="reference")
    with running(trainer_config(tmp_path, corpus, loss=loss)) as trainer:
        assert trainer.model_parts[0].lm_head.chunked_sum == ChunkedSum(48, "reference")


def test_total_is_ntp_plus_weight_times_nitp(tmp_path, corpus):
    for total, ntp, nitp in losses(trainer_config(tmp_path, corpus, nitp=NITPConfig(weight=0.3))):
        assert total == pytest.approx(ntp + 0.3 * nitp, rel=1e-6)


@pytest.mark.parametrize(("nitp", "shift"), [({}, 1), ({"shift": 0}, 0), ({"loss": "generic_cosine"}, 0)])
def test_nitp_is_divided_by_the_pairs_of_all_micro_batches(tmp_path, corpus, nitp, shift):
    config = trainer_config(tmp_path, corpus, nitp=NITPConfig(geometry_freq=0, **nitp))
    config.training.steps = 1
    seen: list[float] = []
    with running(config) as trainer:
        # Every seventh label is ignored, as in a masked prompt.
        batches = list(itertools.islice(trainer.dataloader, 2))
        for _, labels in batches:
            labels.flatten()[::7] = -100
        trainer.dataloader = batches
        begin_step = trainer.loss_fn.begin_step
        trainer.loss_fn.begin_step = lambda pairs: seen.append(pairs.item()) or begin_step(pairs)
        trainer.train()
    expected = 0
    for inputs, labels in batches:
        for positions, row in zip(inputs["positions"].tolist(), labels.tolist(), strict=True):
            for t, label in enumerate(row):
                follows = t + 1 < len(row) and positions[t + 1] == positions[t] + 1
                expected += label != -100 and (follows or shift == 0)
    assert seen == [expected]


def test_before_the_start_step_the_projector_does_not_change_and_ntp_is_as_without_it(tmp_path, corpus):
    config = trainer_config(tmp_path / "late", corpus, nitp=NITPConfig(start_step=3, geometry_freq=0))
    projector: list[torch.Tensor] = []
    with running(config) as trainer:
        weight = trainer.model_parts[0].projector.w1.weight
        step = trainer.train_step
        projector.append(weight.full_tensor().clone())

        def keep_projector_and_step(iterator):
            step(iterator)
            projector.append(weight.full_tensor().clone())

        trainer.train_step = keep_projector_and_step
        trainer.train()
    assert torch.equal(projector[0], projector[1])
    assert torch.equal(projector[0], projector[2])
    assert not torch.equal(projector[2], projector[3])
    lines = metric_lines(tmp_path / "late")
    assert ["loss_metrics/nitp_loss" in line for line in lines] == [False, False, True, True]
    assert lines[1]["loss_metrics/global_avg_loss"] == lines[1]["loss_metrics/ntp_loss"]

    plain = trainer_config(tmp_path / "off", corpus, nitp=NITPConfig(enable=False), loss=stock_loss())
    off = losses(plain, tags=["loss_metrics/global_avg_loss"])
    assert lines[1]["loss_metrics/ntp_loss"] == pytest.approx(off[1][0], rel=1e-4)


def test_every_tag_is_in_tensorboard_and_in_the_file(tmp_path, corpus):
    config = trainer_config(tmp_path, corpus, flavor="debug_moe", nitp=NITPConfig(geometry_freq=2))
    config.metrics.log_freq = 3
    with running(config) as trainer:
        trainer.train()
    (events,) = (tmp_path / "tb").rglob("events*")
    scalars = EventAccumulator(str(events))
    scalars.Reload()
    lines = {line.pop("step"): line for line in metric_lines(tmp_path)}
    losses_and_load = {
        "loss_metrics/global_avg_loss",
        "loss_metrics/ntp_loss",
        "loss_metrics/nitp_loss",
        "moe/max_load",
        "throughput(tps)",
        "time_metrics/end_to_end(s)",
    }
    geometry = {"geometry/effective_rank", "geometry/mean_cosine_similarity"}
    # Logged on step 1 and every third; geometry on every second, also where nothing else is logged.
    assert losses_and_load < lines[1].keys()
    assert not geometry & lines[1].keys()
    assert lines[2].keys() == lines[4].keys() == geometry
    assert losses_and_load < lines[3].keys()
    for step, line in lines.items():
        for tag, value in line.items():
            assert [e.value for e in scalars.Scalars(tag) if e.step == step] == [pytest.approx(value, rel=1e-5)], tag
    assert 1 <= lines[2]["geometry/effective_rank"] <= 128
    assert 1 <= lines[1]["moe/max_load"] <= 4


def test_geometry_joins_the_line_of_a_logged_step(tmp_path, corpus):
    config = trainer_config(tmp_path, corpus, nitp=NITPConfig(geometry_freq=2))
    with running(config) as trainer:
        trainer.train()
    lines = metric_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert ["geometry/effective_rank" in line for line in lines] == [False, True, False, True]


@pytest.mark.parametrize("flavor", ["debug", "debug_moe"])
def test_compiled_blocks_projector_and_losses_are_the_eager_ones(tmp_path, corpus, flavor):
    eager, compiled = (trainer_config(tmp_path / name, corpus, flavor=flavor) for name in ("eager", "compiled"))
    # The backend that only traces: what a graph break or a wrong argument would stop, without a compiler.
    compiled.compile = CompileConfig(enable=True, backend="aot_eager")
    compiled.activation_checkpoint = SelectiveAC.Config()
    for config in (eager, compiled):
        config.training.steps = 2
    found, expected = torch.tensor(losses(compiled)), torch.tensor(losses(eager))
    # Tracing rounds otherwise, which the optimizer's first step enlarges.
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=0)


def test_bf16_run_follows_the_fp32_one(tmp_path, corpus):
    exact, rounded = (trainer_config(tmp_path / name, corpus) for name in ("exact", "rounded"))
    rounded.training.mixed_precision_param = "bfloat16"
    torch.testing.assert_close(torch.tensor(losses(rounded)), torch.tensor(losses(exact)), rtol=2e-2, atol=0)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path, corpus):
    config = trainer_config(tmp_path, corpus)
    config.model_spec = model_registry("debug", vocab_size=256)
    with (
        pytest.raises(ValueError, match="ids up to 257, expected less than the model's vocabulary of 256"),
        running(config),
    ):
        pass


PTRR = ParallelismConfig(
    spmd_backend="partial_dtensor", context_parallel_degree=2, context_parallel_load_balancer="ptrr"
)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("parallelism", ParallelismConfig(spmd_backend="full_dtensor"), 'expected "partial_dtensor" with NITP'),
        ("parallelism", PTRR, 'context_parallel_load_balancer: found "ptrr", expected "headtail" or "none" with NITP'),
        ("nitp", NITPConfig(loss="generic_cosine"), "context_parallel_degree: found 2, expected 1 with nitp.loss"),
        ("training", TrainingConfig(), "geometry_freq: found 5, expected 0 with CUDA graphs"),
        ("metrics", StockMetricsProcessor.Config(), "metrics: found torchtitan.components.metrics"),
        ("validator", StockValidator.Config(), "validator: found torchtitan.components.validate"),
    ],
)
def test_what_does_not_go_with_nitp_is_refused_from_python_too(monkeypatch, tmp_path, corpus, key, value, message):
    monkeypatch.setattr("torchtitan.tools.utils.device_type", "cuda")
    config = trainer_config(tmp_path, corpus, nitp=NITPConfig(geometry_freq=5))
    if key == "nitp":
        config.parallelism.context_parallel_degree = 2
    setattr(config, key, value)
    with pytest.raises(ValueError, match=message):
        NITPTrainer(config)


def test_loss_and_switch_must_agree(tmp_path, corpus):
    with pytest.raises(ValueError, match="NITP needs loss JointLoss"):
        NITPTrainer(trainer_config(tmp_path, corpus, loss=stock_loss()))
    with pytest.raises(ValueError, match="stock TorchTitan"):
        NITPTrainer(trainer_config(tmp_path, corpus, nitp=NITPConfig(enable=False), loss=JointLoss.Config()))


@pytest.fixture
def graphs_compiled(tmp_path, corpus, monkeypatch):
    """A function that trains some steps of a compiled run.

    It returns how many graphs were compiled by the end of each step, and the number of graph breaks. Backward graphs
    count, too: AOTAutograd compiles one when it first runs, and dynamo does not see that.
    """
    backward_graphs = []

    def compile_forward(graph: torch.fx.GraphModule, _):
        return make_boxed_func(graph.forward)

    def compile_backward(graph: torch.fx.GraphModule, _):
        backward_graphs.append(graph)
        return make_boxed_func(graph.forward)

    counting = aot_autograd(fw_compiler=compile_forward, bw_compiler=compile_backward)
    torch._dynamo.lookup_backend("aot_eager")
    # TorchTitan takes no name but this and inductor's, and blocks with flex attention in a way of its own.
    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "aot_eager", counting)

    def train(steps: int, name: str = "", **changes) -> tuple[list[int], int]:
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters
        counters.clear()
        backward_graphs.clear()
        config = trainer_config(tmp_path / name, corpus, **changes)
        config.training.steps = steps
        config.compile.enable, config.compile.backend = True, "aot_eager"
        compiled = []
        with running(config) as trainer:
            step = trainer.train_step

            def counting_step(batches) -> None:
                step(batches)
                compiled.append(counters["stats"]["unique_graphs"] + len(backward_graphs))

            trainer.train_step = counting_step
            trainer.train()
        return compiled, sum(counters["graph_break"].values())

    return train


@pytest.mark.parametrize("flavor", ["debug", "debug_moe"])
@pytest.mark.parametrize(
    ("nitp", "implementation"),
    [
        ({}, "fast"),
        ({"start_step": 6}, "fast"),
        ({"start_step": 6}, "reference"),
        ({"start_step": 6, "stop_gradient": False}, "fast"),
    ],
)
def test_nothing_is_compiled_after_the_third_step(graphs_compiled, flavor, nitp, implementation):
    loss = JointLoss.Config(chunk_tokens=100, implementation=implementation)
    nitp = NITPConfig(geometry_freq=0, **nitp)
    compiled, breaks = graphs_compiled(8, "nitp", flavor=flavor, nitp=nitp, loss=loss)
    assert compiled[2:] == [compiled[2]] * 6
    off = {"nitp": NITPConfig(enable=False), "loss": stock_loss()}
    stock, stock_breaks = graphs_compiled(3, "stock", flavor=flavor, **off)
    # The projector and the NITP loss, each forward and backward, and the cross-entropy no more often than stock: all
    # chunks are of one size.
    assert (compiled[-1] - stock[-1], breaks) == (4, stock_breaks)


def test_the_regulariser_too_is_compiled_before_its_start_step(graphs_compiled):
    compiled, _ = graphs_compiled(8, nitp=NITPConfig(loss="generic_cosine", geometry_freq=0, start_step=6))
    assert compiled[2:] == [compiled[2]] * 6


@pytest.mark.parametrize("start_step", [0, 6])
def test_validation_compiles_the_first_time_alone(tmp_path, corpus, graphs_compiled, start_step):
    data = trainer_config(tmp_path, corpus).dataloader
    validator = Validator.Config(enable=True, freq=2, steps=1, dataloader=data)
    nitp = NITPConfig(geometry_freq=0, start_step=start_step)
    compiled, _ = graphs_compiled(9, nitp=nitp, validator=validator)
    # TorchTitan validates after the first step, too.
    assert compiled[0] < compiled[1]
    assert compiled[1:] == [compiled[1]] * 8


def test_a_compiled_run_takes_the_nitp_branch_once_before_its_start_step(graphs_compiled, monkeypatch):
    calls = []
    nitp_sum = NITPDecoder._nitp_sum

    def noting(self, *args):
        calls.append(self.nitp_active)
        return nitp_sum(self, *args)

    monkeypatch.setattr(NITPDecoder, "_nitp_sum", noting)
    graphs_compiled(4, nitp=NITPConfig(geometry_freq=0, start_step=4))
    # A step has two micro-batches.
    assert calls == [False, True, True]
