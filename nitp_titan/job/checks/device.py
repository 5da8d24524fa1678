"""What TorchTitan needs of the machine that a job runs on."""

from __future__ import annotations

from collections.abc import Iterator

from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem, quote
from nitp_titan.runtime import machine


def check_device(draft: Draft) -> Iterator[Problem]:
    """What needs a GPU; a job may be checked on a machine without one."""
    if machine.has_gpu():
        return
    backend = draft.get("model", "attn_backend")
    graphs, states = not draft.get("training", "disable_cuda_graphs"), draft.get("optimizer", "implementation")
    needs = [
        ("training", "disable_cuda_graphs", graphs, "true: CUDA graphs need a GPU"),
        ("model", "attn_backend", backend != "flex", f'"flex": {backend} needs a GPU'),
        (
            "optimizer",
            "implementation",
            states == "fused_opt_states_bf16",
            '"foreach": bf16 optimizer states need a GPU',
        ),
        (
            "parallelism",
            "enable_fsdp_symm_mem",
            draft.get("parallelism", "enable_fsdp_symm_mem"),
            "false: symmetric memory needs a GPU",
        ),
        (
            "training",
            "enable_cpu_offload",
            draft.get("training", "enable_cpu_offload"),
            "false: parameters are offloaded from a GPU",
        ),
        (
            "profiler",
            "enable_memory_snapshot",
            draft.get("profiler", "enable_memory_snapshot"),
            "false: torch records a GPU's memory alone",
        ),
    ]
    for table, key, wrong, expected in needs:
        if wrong:
            yield draft.problem(table, key, f"found no GPU, expected {expected}")


def check_torchcomms(draft: Draft) -> Iterator[Problem]:
    """The package of ``comm.mode = "torchcomms"`` is there."""
    if draft.get("comm", "mode") == "torchcomms" and not machine.has_module("torchcomms"):
        yield draft.problem("comm", "mode", 'found "torchcomms", and no package torchcomms in this environment')


def check_wandb(draft: Draft) -> Iterator[Problem]:
    """What TorchTitan would only log, and go on without: Weights & Biases is not installed."""
    if draft.get("metrics", "enable_wandb") and not machine.has_module("wandb"):
        message = "found true, and no package wandb in this environment"
        yield draft.problem("metrics", "enable_wandb", message, "pip install wandb")


def check_compiled_checkpointing(draft: Draft) -> Iterator[Problem]:
    """torch 2.13 fails on compiled blocks that are sharded and checkpointed, with and without NITP.

    Seen on a CPU, where torch 2.15 does it (selectively); not tried on a GPU.
    """
    mode = draft.get("activation_checkpoint", "mode")
    sharded = draft.get("parallelism", "tensor_parallel_degree") > 1
    if (
        draft.compiles_blocks()
        and mode in ("selective", "full")
        and sharded
        and machine.torch_version() == (2, 13)
        and not machine.has_gpu()
    ):
        yield draft.problem(
            "activation_checkpoint",
            "mode",
            f'found {quote(mode)}, expected "none" for compiled blocks under tensor parallelism with torch 2.13 '
            "on a CPU",
        )
