"""The list of all checks of what a job's values must agree on."""

from __future__ import annotations

from nitp_titan.job.checks import (
    attention,
    data,
    device,
    experts,
    flex,
    float8,
    hf_weights,
    initial,
    layout,
    pipeline,
    recomputation,
    schedule,
    split,
    tokenizer,
    upstream,
)
from nitp_titan.job.checks.faults import check_faults
from nitp_titan.job.checks.loss import check_loss, check_loss_chunks
from nitp_titan.job.checks.nitp import check_nitp
from nitp_titan.job.checks.output import check_output

CHECKS = (
    check_nitp,
    check_loss,
    check_loss_chunks,
    attention.check_attention,
    float8.check_float8,
    check_faults,
    data.check_data,
    data.check_validation_data,
    tokenizer.check_tokenizer,
    hf_weights.check_hf_config,
    *layout.CHECKS,
    *flex.CHECKS,
    *experts.CHECKS,
    *pipeline.CHECKS,
    split.check_split,
    *recomputation.CHECKS,
    *upstream.CHECKS,
    schedule.check_steps,
    initial.check_enabled,
    initial.check_branch,
)
"""Checks of what no machine could run; ``check_model`` comes before them."""


MACHINE_CHECKS = (
    tokenizer.check_assets,
    hf_weights.check_hf_files,
    check_output,
    device.check_device,
    device.check_wandb,
    device.check_torchcomms,
    initial.check_files,
    device.check_compiled_checkpointing,
    experts.check_exchange,
    float8.check_device,
)
"""Checks of this machine: errors of a training run, warnings of ``nitp-titan check``."""
