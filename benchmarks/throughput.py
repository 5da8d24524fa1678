"""Complete training steps of several variants, in turn, in one process group: tokens/s, MFU, memory, overheads.

    python -m benchmarks.throughput --config train_configs/nitp_0.5b.toml --variants ntp,nitp,mtp,stock --device auto
    torchrun --nproc-per-node 8 -m benchmarks.throughput --config ...
    ... --variant nitp_float8:float8.recipe=tensorwise       a variant of your own: what it changes in "nitp"
    ... --depths 4,2                                          slices of the model, and the whole one extrapolated
    ... --training.local_batch_size 4 --compile.enable        any key of the job, for all variants
    ... --profile nitp                                        where a step's time goes, kernel by kernel

Writes JSON after every round, so that a run that is cut off leaves what it had, and ends with a table.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.console import at_least, choose_device, compiled_alone, print_table, quiet_logs, show
from benchmarks.jobs import Data, Entry, load_entry
from benchmarks.measure import DeviceClock
from benchmarks.summary import summarize, table
from benchmarks.variants import BASELINE, VARIANTS, Variant, choose
from nitp_titan.job import JobError
from nitp_titan.job.reading.command_line import split_command_line
from nitp_titan.train import build, launch_alone


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the ``--table.key value`` words for the job."""
    words, others = split_command_line(list(sys.argv[1:] if arguments is None else arguments))
    parser = argparse.ArgumentParser(
        prog="benchmarks.throughput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="job file")
    parser.add_argument("--variants", default="ntp,nitp", help=f"of {', '.join(VARIANTS)}, with commas (%(default)s)")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME:key=value,...", help="a further one")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--repeats", type=int, default=5, help="rounds: a turn of every variant (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a turn (%(default)s)")
    parser.add_argument("--settle", type=int, default=1, help="steps of a turn before them (%(default)s)")
    parser.add_argument("--warmup", type=int, default=4, help="steps of each variant before the rounds (%(default)s)")
    parser.add_argument("--depths", default="", help="numbers of layers with commas, the largest for all variants")
    parser.add_argument("--profile", default="", help="variants whose kernels of one step are listed, with commas")
    parser.add_argument("--mean-document", type=int, default=Data().mean_document, help="tokens, 0 = whole sequences")
    parser.add_argument("--verbose", action="store_true", help="the trainers' logs")
    parser.add_argument("--out", type=Path, default=None, help="JSON file (benchmarks/results/DEVICE/...)")
    options = parser.parse_args(others)
    at_least(parser, options, repeats=1, steps=1, settle=0, warmup=2, mean_document=0)
    return options, words


def load_entries(options: argparse.Namespace, words: list[str], dump_folder: str) -> tuple[list[Entry], int | None]:
    """Load the jobs of all variants; with ``--depths`` also the baseline's at every smaller depth.

    Returns:
        The entries, and the depth of the whole model where they are slices of it.

    Raises:
        ValueError: wrong variants or depths.
        JobError: a job with problems.
    """
    variants = choose(filter(None, options.variants.split(",")), options.variant)
    world_size = int(os.environ["WORLD_SIZE"])

    def load(variant: Variant, *more: str, name: str | None = None) -> Entry:
        variant = dataclasses.replace(variant, overrides=(*variant.overrides, *more))
        return load_entry(options.config, words, variant, world_size=world_size, dump_folder=dump_folder, name=name)

    if not options.depths:
        return [load(variant) for variant in variants], None
    base = next((variant for variant in variants if variant.name == BASELINE), None)
    if base is None:
        raise ValueError(f"--depths: expected {BASELINE} among the variants, found {options.variants}")
    whole = load(base)
    try:
        depths = sorted({int(depth) for depth in options.depths.split(",")}, reverse=True)
    except ValueError:
        depths = []
    if len(depths) < 2 or not 0 < depths[-1] < depths[0] <= whole.layers:
        expected = f"two numbers of layers or more, up to {whole.layers}"
        raise ValueError(f"--depths: found {options.depths!r}, expected {expected}")

    def sliced(depth: int) -> list[str]:
        # A target beyond the slice becomes a fifth of its depth: NITP's work does not depend on it.
        target = whole.job.nitp.target_layer
        beyond = target is not None and target > depth
        return [f"--model.shape.n_layers={depth}", *(["--nitp.target_layer=none"] if beyond else [])]

    loaded = [load(variant, *sliced(depths[0])) for variant in variants]
    loaded += [load(base, *sliced(depth), name=f"{BASELINE}@{depth}") for depth in depths[1:]]
    return loaded, whole.layers


def run(options: argparse.Namespace, words: list[str], dump_folder: str) -> int:
    """Run the benchmark; return the exit code."""
    entries, full_layers = load_entries(options, words, dump_folder)
    profiled = [name for name in options.profile.split(",") if name]
    if unknown := [name for name in profiled if name not in {entry.name for entry in entries}]:
        raise ValueError(f"--profile: found {unknown[0]!r}, expected some of {', '.join(e.name for e in entries)}")
    if options.out:
        results.check_writable(options.out)
    build(entries[0].job)  # makes TorchTitan ready for this machine, before anything else imports it
    from benchmarks import kernels
    from benchmarks.race import Race, compiled_graphs, peak_flops, say

    first = os.environ["RANK"] == "0"
    data = Data(mean_document=options.mean_document)
    race = Race(entries, data, warmup=options.warmup)
    facts = results.machine_facts()
    out = options.out or results.default_path(
        "throughput", Path(options.config).stem, facts["device"], facts["device_type"]
    )
    about = {
        **facts,
        "config": str(options.config),
        "job_overrides": words,
        "data": dataclasses.asdict(data),
        "steps": options.steps,
        "settle": options.settle,
        "warmup": options.warmup,
        "clock": DeviceClock(facts["device_type"]).kind,
        "peak_flops": peak_flops(),
    }
    result: dict[str, Any] = {}
    compiled = compiled_graphs()

    def after_round(seconds: dict[str, list[float]]) -> None:
        nonlocal result
        result = summarize(about, race.entries, race.figures, seconds, full_layers=full_layers)
        result |= {"compiled_while_timed": compiled_graphs() - compiled, "failed": race.failed}
        if first:
            results.write(out, result)
        say(f"round {result['rounds']} of {options.repeats}")

    race.run(rounds=options.repeats, steps=options.steps, settle=options.settle, after_round=after_round)
    for name, loss in race.last_losses().items():
        result["variants"][name]["last_loss"] = loss
    for name, found in race.profiles(profiled):
        result.setdefault("profiles", {})[name] = found
        if first:
            results.write(out, result)
            print_table(kernels.table(name, found))
    race.close()
    if first and race.contestants:
        results.write(out, result)
        show(table(result), out)
    return 1 if race.failed else 0


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Leave no process group behind that was not there before."""
    import torch

    already = torch.distributed.is_initialized()
    try:
        yield
    finally:
        if torch.distributed.is_initialized() and not already:
            torch.distributed.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 where a variant failed, 2 for a wrong option or job."""
    options, words = parse(arguments)
    try:
        choose_device(options.device)
        launch_alone()
        with tempfile.TemporaryDirectory() as folder, quiet_logs(options.verbose), process_group(), compiled_alone():
            return run(options, words, folder)
    except (JobError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
