"""What a job's values must agree on: NITP and the loss with the model; and the list of all checks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from nitp_titan.job import (
    attention,
    data,
    experts,
    flex,
    float8,
    hf_weights,
    initial,
    layout,
    machine,
    pipeline,
    rules,
    schedule,
    tokenizer,
)
from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem, did_you_mean, one_of, quote
from nitp_titan.job.models import flavors, modules
from nitp_titan.nitp_config import NITPConfig


def check_model(draft: Draft) -> Iterator[Problem]:
    """Module and flavor exist, as far as can be told without importing them."""
    module, flavor = draft.get("model", "module"), draft.get("model", "flavor")
    if module == "flux":
        yield draft.problem("model", "module", 'found "flux", an image model', f"the decoders are {one_of(modules())}")
    elif module in modules():
        known = flavors(module)
        if flavor not in known:
            yield draft.problem(
                "model",
                "flavor",
                f"found {quote(flavor)}, expected {one_of(known)} (the flavors of {module})",
                did_you_mean(flavor, known),
            )
    elif "." in module:
        if not machine.has_module(module):
            hint = f"the built-in ones are {one_of(modules())}"
            yield draft.problem("model", "module", f"found {quote(module)}, a module that cannot be found", hint)
    else:
        yield draft.problem(
            "model",
            "module",
            f"found {quote(module)}, expected {one_of(modules())}, or a dotted path to a module with model_registry",
            did_you_mean(module, modules()),
        )


def check_nitp(draft: Draft) -> Iterator[Problem]:
    """[nitp] is within its ranges and the model's depth."""
    values = {key: setting.value for (table, key), setting in draft.settings.items() if table == "nitp"}
    # As an object that __post_init__ has not refused.
    config = NITPConfig()
    for key, value in values.items():
        setattr(config, key, value)
    for key, message in config.problems():
        yield draft.problem("nitp", key, message)
    depth = draft.facts().n_layers
    target = draft.get("nitp", "target_layer")
    if target is not None and target > depth:
        expected = f"0..{depth} (0 = the embeddings, {depth} = the last block)"
        hint = f'"none" is a fifth of the depth, {NITPConfig().target_layer_of(depth)}'
        yield draft.problem("nitp", "target_layer", f"found {target}, expected {expected}", hint)


def weight_doubts(draft: Draft) -> Iterator[str]:
    """Yield a line where NITP is computed for nothing."""
    if draft.get("nitp", "enable") and draft.get("nitp", "weight") == 0:
        yield "nitp.weight is 0: NITP is computed and logged, and trains nothing; nitp.enable = false is the baseline"


def check_loss(draft: Draft) -> Iterator[Problem]:
    """NITP trains with its own loss, and only NITP does."""
    name, nitp = draft.get("loss", "name"), draft.get("nitp", "enable")
    if nitp and name not in ("auto", "linear_cross_entropy"):
        yield draft.problem(
            "loss", "name", f'found {quote(name)}, expected "auto" or "linear_cross_entropy" with nitp.enable = true'
        )
    if not nitp and name == "linear_cross_entropy":
        yield draft.problem(
            "loss",
            "name",
            'found "linear_cross_entropy", which is for nitp.enable = true: without NITP a run is stock TorchTitan',
            'expected "auto", "chunked_cross_entropy" or "cross_entropy"',
        )
    if not nitp and name == "chunked_cross_entropy" and machine.torch_version() < (2, 13):
        found = ".".join(map(str, machine.torch_version()))
        yield draft.problem(
            "loss",
            "name",
            f'"chunked_cross_entropy" needs torch >= 2.13, found torch {found}',
            'install a newer torch, or set name = "cross_entropy"',
        )


def check_loss_chunks(draft: Draft) -> Iterator[Problem]:
    """The chunked loss splits a rank's part of the sequence into equal parts."""
    if loss_name(draft.get("loss", "name"), draft.get("nitp", "enable")) != "chunked_cross_entropy":
        return
    chunks, seq_len = draft.get("loss", "num_chunks"), draft.get("training", "seq_len")
    context = draft.get("parallelism", "context_parallel_degree")
    if chunks > 0 and context > 0 and seq_len % (chunks * context):
        each = f"loss.num_chunks {chunks}" + (f" x context_parallel_degree {context}" if context > 1 else "")
        yield draft.problem("training", "seq_len", f"found {seq_len}, expected a multiple of {each}")


def loss_name(name: str, nitp: bool) -> str:
    """Return the loss that "auto" stands for on this torch."""
    if name != "auto":
        return name
    if nitp:
        return "linear_cross_entropy"
    # Upstream's chunked loss fails on older torch: FSDP takes the unembedding's weight away between its chunks.
    return "chunked_cross_entropy" if machine.torch_version() >= (2, 13) else "cross_entropy"


CHECKS = (
    check_nitp,
    check_loss,
    check_loss_chunks,
    attention.check_attention,
    float8.check_float8,
    data.check_data,
    data.check_validation_data,
    tokenizer.check_tokenizer,
    hf_weights.check_hf_config,
    *layout.CHECKS,
    *flex.CHECKS,
    *experts.CHECKS,
    *pipeline.CHECKS,
    *rules.CHECKS,
    schedule.check_steps,
    initial.check_enabled,
)
"""Checks of what no machine could run; ``check_model`` comes before them."""


def check_output(draft: Draft) -> Iterator[Problem]:
    """The run's folder can be one."""
    folder = draft.get("job", "dump_folder")
    path = Path(folder)
    existing = next((p for p in (path, *path.absolute().parents) if p.exists()), path)
    if not folder.strip():
        yield draft.problem("job", "dump_folder", f"found {quote(folder)}, expected a folder's name")
    elif folder.startswith("~"):
        yield draft.problem("job", "dump_folder", f'found {quote(folder)}: "~" is not expanded, write the path out')
    elif not existing.is_dir():
        which = "which is a file" if existing == path else f"but {existing} is a file"
        yield draft.problem("job", "dump_folder", f"found {quote(folder)}, {which}; expected a folder's name")
    elif not os.access(existing, os.W_OK):
        yield draft.problem("job", "dump_folder", f"found {quote(folder)}, but {existing} cannot be written to")


MACHINE_CHECKS = (
    tokenizer.check_assets,
    hf_weights.check_hf_files,
    check_output,
    rules.check_device,
    rules.check_wandb,
    initial.check_files,
    rules.check_compiled_checkpointing,
    experts.check_exchange,
    float8.check_device,
)
"""Checks of this machine: errors of a training run, warnings of ``nitp-titan check``."""
