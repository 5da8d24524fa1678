"""Degrees of parallelism against ranks, heads, sequence and batch."""

from __future__ import annotations

import math
from collections.abc import Iterator

from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem
from nitp_titan.job.layout import DEGREES, Layout
from nitp_titan.nitp.config import REGULARISER
from nitp_titan.runtime import machine

FLEX_BLOCK = 128
"""Tokens of a block of flex attention's mask: context parallelism spreads whole ones."""


def check_degrees(draft: Draft) -> Iterator[Problem]:
    """Degrees are whole and multiply to the world size."""
    values = {key: draft.get("parallelism", key) for key in DEGREES}
    wrong = False
    for key, value in values.items():
        if value < 1 and not (key == "data_parallel_shard_degree" and value == -1):
            wrong = True
            rest = " (or -1: all ranks that are left)" if key == "data_parallel_shard_degree" else ""
            yield draft.problem("parallelism", key, f"found {value}, expected at least 1{rest}")
    if wrong:
        return
    world = draft.world_size
    expert = values.pop("expert_parallel_degree")
    shard = values["data_parallel_shard_degree"]
    given = {key: value for key, value in values.items() if value != -1}
    product = math.prod(given.values())
    fits = product == world if shard != -1 else world % product == 0
    if not fits:
        said = [key for key, value in given.items() if value != 1 or not draft.is_default("parallelism", key)]
        keys = said or list(given)
        named = " x ".join(f"{key} {given[key]}" for key in keys)
        expected = f"the world size {world}" if shard != -1 else f"a divisor of the world size {world}"
        found = f"{named} = {product}" if len(keys) > 1 else f"{product}"
        others = product // given.get("data_parallel_shard_degree", 1)
        fitting = f"data_parallel_shard_degree = {world // others} would fit; " if world % others == 0 else ""
        yield draft.problem(
            "parallelism",
            keys,
            f"found {found}, expected {expected}",
            f"{fitting}the world size is --ngpu of nitp-titan check, NNODES x NGPU of run_train.sh",
        )
        return
    shard = world // product if shard == -1 else shard
    ranks = shard * values["context_parallel_degree"] * values["tensor_parallel_degree"]
    if ranks % expert:
        yield draft.problem(
            "parallelism",
            "expert_parallel_degree",
            f"found {expert}, expected a divisor of data_parallel_shard x context x tensor = {ranks}",
        )


def check_support(draft: Draft) -> Iterator[Problem]:
    """Parallelisms that this release, or the installed torch, cannot do."""
    torch = machine.torch_version()
    found = f"found torch {torch[0]}.{torch[1]}"
    if draft.get("parallelism", "expert_parallel_degree") > 1 and torch < (2, 13):
        yield draft.problem(
            "parallelism",
            "expert_parallel_degree",
            f"expert parallelism needs torch >= 2.13, {found}",
            "install a newer torch, or set expert_parallel_degree = 1",
        )
    if draft.get("parallelism", "spmd_backend") == "spmd_types" and torch < (2, 14):
        yield draft.problem(
            "parallelism",
            "spmd_backend",
            f'"spmd_types" needs torch >= 2.14, {found}',
            'install a newer torch, or set spmd_backend = "partial_dtensor"',
        )
    if draft.get("nitp", "enable"):
        backend = draft.get("parallelism", "spmd_backend")
        if backend != "partial_dtensor" and not (backend == "spmd_types" and torch < (2, 14)):
            yield draft.problem(
                "parallelism",
                "spmd_backend",
                f'found "{backend}", expected "partial_dtensor" with NITP in this version',
            )


def check_context(draft: Draft) -> Iterator[Problem]:
    """What context parallelism asks of attention, balancer, sequence and loss."""
    degree = draft.get("parallelism", "context_parallel_degree")
    if degree <= 1:
        return
    backend = draft.get("model", "attn_backend")
    if backend == "varlen":
        yield draft.problem(
            "model", "attn_backend", f'found "{backend}", expected "flex" with context_parallel_degree {degree}'
        )
    if draft.get("nitp", "enable"):
        if draft.get("parallelism", "context_parallel_load_balancer") == "ptrr":
            yield draft.problem(
                "parallelism",
                "context_parallel_load_balancer",
                'found "ptrr", expected "headtail" or "none" with NITP: a token\'s successor could be on any rank',
                "it changes no loss",
            )
        if draft.get("nitp", "loss") == REGULARISER:
            yield draft.problem(
                "parallelism",
                "context_parallel_degree",
                f'found {degree}, expected 1 with nitp.loss = "generic_cosine": it compares all tokens of a sequence',
                "tensor parallelism with sequence parallelism spreads a long sequence too",
            )
    seq_len, block = draft.get("training", "seq_len"), FLEX_BLOCK * degree
    if machine.has_gpu() and seq_len % block:
        yield draft.problem(
            "training",
            "seq_len",
            f"found {seq_len}, expected a multiple of {block}: {FLEX_BLOCK}-token blocks over {degree} context ranks",
            _neighbours(seq_len, block),
        )


def check_heads_and_experts(draft: Draft) -> Iterator[Problem]:
    """Tensor parallelism splits the heads, expert parallelism the experts."""
    model = draft.facts()
    tensor = draft.get("parallelism", "tensor_parallel_degree")
    expert = draft.get("parallelism", "expert_parallel_degree")
    heads = {"heads": model.n_heads, "key-value heads": model.n_kv_heads}
    if tensor > 1 and any(number and number % tensor for number in heads.values()):
        said = " and ".join(f"{number} {name}" for name, number in heads.items() if number)
        largest = max(n for n in range(1, tensor) if not any(number and number % n for number in heads.values()))
        yield draft.problem(
            "parallelism",
            "tensor_parallel_degree",
            f"found {tensor}, expected a divisor of the model's {said}",
            f"the largest below it is {largest}",
        )
    if model.num_experts and expert > 1 and model.num_experts % expert:
        yield draft.problem(
            "parallelism",
            "expert_parallel_degree",
            f"found {expert}, expected a divisor of the model's {model.num_experts} experts",
        )


def check_sequence(draft: Draft) -> Iterator[Problem]:
    """The sequence length fits the model and splits over ranks."""
    seq_len = draft.get("training", "seq_len")
    longest = draft.model.max_seq_len if draft.model else None
    if longest and seq_len > longest:
        yield draft.problem("training", "seq_len", f"found {seq_len}, expected at most the model's {longest}")
    layout = Layout.of(draft)
    if seq_len % layout.sequence_divisor:
        divisor = layout.sequence_divisor
        yield draft.problem(
            "training",
            "seq_len",
            f"found {seq_len}, expected a multiple of {divisor} (tensor {layout.tensor}, context {layout.context})",
            _neighbours(seq_len, divisor),
        )


def check_batch(draft: Draft) -> Iterator[Problem]:
    """The global batch splits over ranks and micro-batches, the data streams over ranks."""
    layout = Layout.of(draft)
    local, total = draft.get("training", "local_batch_size"), draft.get("training", "global_batch_size")
    ranks = layout.data_parallel
    if total > 0 and total % ranks and not draft.is_written("training", "local_batch_size"):
        yield draft.problem(
            "training",
            "global_batch_size",
            f"found {total}, expected a multiple of the data-parallel degree {ranks}",
            _neighbours(total, ranks),
        )
    elif local > 0 and total > 0 and total % (local * ranks):
        yield draft.problem(
            "training",
            ("global_batch_size", "local_batch_size"),
            f"found a global_batch_size of {total}, expected a multiple of "
            f"local_batch_size {local} x data-parallel degree {ranks} = {local * ranks}",
            _neighbours(total, local * ranks),
        )
    # One pass through the data is one stream, which every rank draws.
    endless = {"dataloader": draft.get("dataloader", "infinite")}
    endless["validator.dataloader"] = draft.get("validator", "enable") and draft.get("validator", "steps") != -1
    for table in [table for table, streams_used in endless.items() if streams_used]:
        streams = draft.get(table, "num_streams")
        if streams > 0 and streams % ranks:
            message = f"found {streams}, expected a multiple of the data-parallel degree {ranks}"
            yield draft.problem(table, "num_streams", message, _neighbours(streams, ranks))


def _neighbours(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return f"the nearest are {below} and {below + divisor}" if below else f"the smallest is {divisor}"


CHECKS = (
    check_degrees,
    check_support,
    check_context,
    check_heads_and_experts,
    check_sequence,
    check_batch,
)
