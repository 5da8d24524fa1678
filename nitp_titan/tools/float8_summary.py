"""What float8 converts of a job, in words."""

from __future__ import annotations

from nitp_titan.float8.layers import experts_of_shape, layers_of_shape
from nitp_titan.float8.plan import Plan, plan
from nitp_titan.job import Job
from nitp_titan.job.checks.float8 import tokens_of
from nitp_titan.runtime import machine


def explain(job: Job) -> tuple[list[str], list[str]]:
    """Return what float8 does in a job, a line each, and what to know before it runs; empty where it is off."""
    config = job.float8
    if config.recipe == "none":
        return [], []
    made = _plan(job)
    if made is None:
        return [f"{config.recipe}: the run's log says which layers are converted"], []
    table = job["compile"]
    compiled = table["enable"] and "model" in table["components"]
    return [made.summary(), *made.lines()], list(made.warnings(compiled=compiled, gpu=machine.has_gpu()))


def _plan(job: Job) -> Plan | None:
    if job.shape is None:
        return None
    return plan(
        job.float8,
        layers_of_shape(job.shape, job.nitp, chunk_tokens=job["loss"]["chunk_tokens"]),
        tokens=tokens_of(job.layout, lambda table, key: job[table][key]),
        experts=experts_of_shape(job.shape),
        tensor_parallel=job.layout.tensor,
        expert_parallel=job.layout.expert,
    )
