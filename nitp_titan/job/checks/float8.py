"""``[float8]`` against model, layout and machine, and what ``nitp-titan check`` says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from nitp_titan.float8.config import Float8Config
from nitp_titan.float8.layers import (
    MULTIPLE,
    experts_problem,
    layers_of_shape,
    tokens_at_a_time,
    unmatched,
)
from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem, quote
from nitp_titan.job.layout import Layout
from nitp_titan.job.shape import shape_of_draft
from nitp_titan.nitp.config import NITPConfig
from nitp_titan.runtime import machine


def check_float8(draft: Draft) -> Iterator[Problem]:
    """What is to be converted, or left, is there and has sizes that float8 products can have.

    Of a model that is not ours the names and widths are checked when the run starts.
    """
    config = Float8Config(**draft.table("float8"))
    if config.recipe == "none":
        return
    if "" in config.filter_fqns:
        yield draft.problem(
            "float8", "filter_fqns", 'found "", which is in every name, expected parts of layers\' names'
        )
    if config.experts and not draft.facts().num_experts:
        yield draft.problem("float8", "experts", "found true, expected false: the model has no routed experts")
    shape = shape_of_draft(draft)
    if shape is not None:
        for word, near in unmatched(config, layers_of_shape(shape, NITPConfig())):
            hint = f'did you mean "{near}"?' if near else ""
            message = f"found {quote(word)}, which is in no linear layer's name"
            yield draft.problem("float8", "filter_fqns", message, hint)
        if config.experts and shape.num_experts and (wrong := experts_problem(shape.dim, shape.expert_hidden_dim)):
            yield draft.problem("float8", "experts", f"found true, expected false: {wrong}")
    tokens = tokens_of(Layout.of(draft), draft.get)
    if tokens % MULTIPLE and not config.emulate:
        message = f"a rank has {tokens} tokens at a time, expected a multiple of {MULTIPLE} with float8"
        yield draft.problem("training", ("seq_len", "local_batch_size"), message)


def check_device(draft: Draft) -> Iterator[Problem]:
    """Float8 products need a GPU."""
    recipe = draft.get("float8", "recipe")
    if recipe != "none" and not draft.get("float8", "emulate") and not machine.has_gpu():
        message = f"found {quote(recipe)} and no GPU, which float8 products need, expected emulate = true"
        yield draft.problem("float8", "recipe", message)


def tokens_of(layout: Layout, get: Callable[[str, str], Any]) -> int:
    return tokens_at_a_time(
        get("training", "local_batch_size"),
        get("training", "seq_len"),
        context=layout.context,
        pipeline=layout.pipeline,
        microbatch=get("parallelism", "pipeline_parallel_microbatch_size"),
    )
