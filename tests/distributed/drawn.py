"""Layouts drawn at random from all that ``nitp-titan check`` accepts, held to one process as the table's rows are.

    python -m tests.distributed.drawn --seed 8 --count 60 --out tests/distributed/drawn_layouts.md

writes a row for each as it ends: what was trained, and how far from one process it was. The exit code is 1 if any row
is beyond its tolerances.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch

from nitp_titan.job import load_job
from nitp_titan.job.checks.pipeline import SCHEDULES
from nitp_titan.job.errors import JobError
from nitp_titan.nitp.config import LossKind, NITPConfig
from tests.distributed.batches import ROWS, SEQ_LEN
from tests.distributed.layouts import SHORT, Layout, layout
from tests.distributed.models import model_registry

T = TypeVar("T")

MODELS = {"debug": 9, "debug_moe": 9, "llama3": 2, "qwen3": 2, "qwen3_moe": 3, "deepseek_v3": 2}
"""Model -> how often it is drawn; TorchTitan's mixtures are slow on a CPU."""

RANKS = {2: 9, 4: 9, 8: 2}
DEGREES = ("replicate", "shard", "cp", "tp", "pp")
BALANCERS = ("headtail", None, "ptrr")
RECOMPUTATION = (None, "selective", "full")
CHUNKS = (17, 64, 4096)
"""Tokens of a chunk of the losses: some that do not divide a batch, some that do, all of them."""

RESHARD = ("default", "always", "never")

USUAL = {"replicate": 1, "cp": 1, "tp": 1, "pp": 1, "ep": 1, "sp": True, "micro": 1, "reshard": "default"}
"""What a layout has that says nothing else; it is sharded over the ranks that are left."""


def drawn(
    seed: int, count: int, *, ranks: Sequence[int] = tuple(RANKS), models: Sequence[str] = tuple(MODELS)
) -> list[Layout]:
    """Return the first ``count`` different layouts of a seed that ``check`` accepts for training on this machine.

    Args:
        ranks: only layouts with one of these numbers of ranks.
        models: only layouts of one of these.
    """
    generator = random.Random(seed)
    found: dict[str, Layout] = {}
    while len(found) < count:
        candidate = _candidate(generator, ranks, models)
        if str(candidate) not in found and accepted(candidate):
            found[str(candidate)] = candidate
    return list(found.values())


def _candidate(generator: random.Random, allowed_ranks: Sequence[int], allowed_models: Sequence[str]) -> Layout:
    """Draw a layout whose degrees multiply to its ranks; whether it can be trained is for ``check`` to say."""

    def one_of(choices: Sequence[T]) -> T:
        return generator.choice(choices)

    def weighted(weights: dict[T, int]) -> T:
        return generator.choices(list(weights), list(weights.values()))[0]

    model = weighted({name: MODELS[name] for name in allowed_models})
    ranks = weighted({number: RANKS[number] for number in allowed_ranks})
    degrees = dict.fromkeys(DEGREES, 1)
    for _ in range(ranks.bit_length() - 1):
        degrees[one_of(DEGREES)] *= 2
    # Over as many ranks as are left FSDP shards without being told.
    parallelism: dict[str, Any] = {name: degree for name, degree in degrees.items() if name != "shard"}
    if degrees["tp"] > 1:
        parallelism["sp"] = one_of((True, True, False))
    if degrees["cp"] > 1:
        parallelism["balancer"] = one_of(BALANCERS)
    if degrees["pp"] > 1:
        parallelism["schedule"] = one_of(SCHEDULES)
        parallelism["micro"] = one_of((1, 1, 2))
    spread = degrees["shard"] * degrees["cp"] * degrees["tp"]
    if "moe" in model or model == "deepseek_v3":
        parallelism["ep"] = one_of((1, *(degree for degree in (1, 2, 4, 8) if degree <= spread)))
    if spread > 1:
        parallelism["reshard"] = one_of(RESHARD)
    depth = len(model_registry(model).model.layers)
    rows = ROWS // (degrees["replicate"] * degrees["shard"])
    nitp = {
        "loss": weighted({"cosine": 4, **{kind: 1 for kind in get_args(LossKind) if kind != "cosine"}}),
        "shift": one_of((1, 1, 0)),
        "stop_gradient": one_of((True, True, False)),
        "target_layer": generator.randint(0, depth),
        "projector": one_of(("swiglu", "swiglu", "swiglu", "none")),
    }
    return layout(
        model,
        ranks,
        **_unusual(parallelism, USUAL),
        local_batch_size=one_of([size for size in (1, 1, 2, 4, 8) if size <= rows]),
        ac=one_of(RECOMPUTATION),
        compile=one_of((*[None] * 9, "aot_eager")),
        implementation=one_of((None, None, "reference")),
        chunk=one_of(CHUNKS),
        nitp=_unusual(nitp, dataclasses.asdict(NITPConfig())),
    )


def _unusual(values: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is so anyway: a row says what is special about it."""
    return {name: value for name, value in values.items() if name not in usual or value != usual[name]}


def accepted(drawn_layout: Layout) -> bool:
    """Whether ``nitp-titan check`` accepts the layout as a job, this machine's own limits included."""
    try:
        load_job(None, words(drawn_layout), drawn_layout.ranks, for_training=True)
    except JobError:
        return False
    return True


def words(drawn_layout: Layout) -> list[str]:
    """Return the layout as the words of a job's command line."""
    ours = drawn_layout.model in ("debug", "debug_moe")
    values: dict[str, Any] = {
        "model.module": "nitp_titan" if ours else model_registry.__module__,
        "model.flavor": drawn_layout.model,
        "tokenizer.name": "byte",
        "dataloader.dataset": "python_stdlib",
        "training.seq_len": SEQ_LEN,
        "training.global_batch_size": ROWS,
        "training.local_batch_size": drawn_layout.local_batch_size,
        "activation_checkpoint.mode": drawn_layout.ac or "none",
        "loss.chunk_tokens": drawn_layout.chunk_tokens,
        "loss.implementation": drawn_layout.implementation or "fast",
        "compile.enable": bool(drawn_layout.compile),
        "validator.enable": drawn_layout.validates,
        # A job that says nothing of its layout is given one.
        "parallelism.expert_parallel_degree": 1,
    }
    values |= {"compile.backend": drawn_layout.compile} if drawn_layout.compile else {}
    values |= {f"parallelism.{SHORT[name]}": value for name, value in drawn_layout.parallelism.items()}
    values |= {f"nitp.{name}": value for name, value in drawn_layout.nitp.items()}
    return [word for name, value in values.items() for word in _word(name, value)]


def _word(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        table, key = name.rsplit(".", 1)
        return [f"--{name}" if value else f"--{table}.no-{key}"]
    return [f"--{name}", "none" if value is None else str(value)]


HEADER = """# Layouts drawn at random

Made with torch {torch} by

    python -m tests.distributed.drawn --seed {seed} --count {count} --out {out}

The first {count} layouts of that seed that `nitp-titan check` accepts were each trained for six steps on gloo ranks
and compared with one process, as `tests/distributed/parity.py` says. The numbers are the largest relative differences:
of total, NTP and NITP loss, of both figures of the geometry and of the gradient's norm, in the first step and in the
five after it; of the validation; of the gradients of the first step the worst parameter's, as the norm of the error
over the gradient's. The last column says what is beyond its tolerance. TorchTitan's mixtures (qwen3_moe, deepseek_v3)
compute their experts in bfloat16.

| | layout | losses, first | later | geometry, first | later | norm, first | later | validation | gradient | of | |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def rows(layouts: dict[int, Layout]) -> Iterator[tuple[str, bool]]:
    """Train numbered layouts; yield each one's row of the table, and whether it is within its tolerances."""
    from tests.distributed.parity import References, compare

    with tempfile.TemporaryDirectory() as folder:
        references = References(Path(folder, "one"))
        for number, drawn_layout in layouts.items():
            begin = f"| {number} | {drawn_layout} "
            run = Path(folder, str(number))
            run.mkdir()
            try:
                found = compare(drawn_layout, run, references)
            except Exception as error:  # whatever it is, the other layouts are worth running
                traceback.print_exc()
                yield f"{begin}{'| ' * 9}| FAILED: {str(error).strip().splitlines()[-1]} |", False
                continue
            pairs = zip(found.first, found.later, strict=True)
            numbers = [*(value for pair in pairs for value in pair), found.validation, found.gradient]
            wrong = "; ".join(found.problems(drawn_layout))
            shown = " | ".join(f"{value:.1e}" for value in numbers)
            yield f"{begin}| {shown} | {found.parameter} | {wrong} |", not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the layouts to train, counted from 1")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    layouts = dict(enumerate(drawn(options.seed, options.count), start=1))
    layouts = {number: layouts[number] for number in options.only or layouts}
    fine = True
    with options.out.open("w") as out:
        print(HEADER.format(**vars(options), torch=torch.__version__), end="", file=out, flush=True)
        for row, within in rows(layouts):
            print(row, file=out, flush=True)
            fine &= within
    return 0 if fine else 1


if __name__ == "__main__":
    import tests.helpers.prepared  # noqa: F401

    sys.exit(main())
