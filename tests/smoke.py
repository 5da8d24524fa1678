"""The smoke job of a CI: both debug jobs, eager and compiled, on one GPU or, where there is none, on the CPU.

    python -m tests.smoke [--steps N] [--out FOLDER] [--at-once N]      (make smoke)

Exits 1 unless every run ends well, its losses are finite and have fallen, and TensorBoard has every tag.
FOLDER/smoke.json has what is wrong with each run: nothing, where all is well.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nitp_titan.runs.scalars import read_scalars
from nitp_titan.runtime.machine import has_gpu

ROOT = Path(__file__).parent.parent
LOSSES = ["loss_metrics/global_avg_loss", "loss_metrics/ntp_loss", "loss_metrics/nitp_loss"]
TAGS = [*LOSSES, "geometry/effective_rank", "geometry/mean_cosine_similarity", "throughput(tps)"]
JOBS = {"debug": [], "debug_moe": ["moe/max_load"]}
MODES = {"eager": [], "compiled": ["--compile.enable"]}


def problems_of(run: Path, tags: list[str]) -> list[str]:
    """What is wrong with a run's metrics."""
    try:
        scalars = read_scalars(run)
    except ValueError as error:
        return [str(error)]
    problems = [f"no tag {tag}" for tag in tags if not scalars.get(tag)]
    for tag in LOSSES:
        values = [value for _, value in scalars.get(tag, [])]
        if not all(map(math.isfinite, values)):
            problems.append(f"{tag} is not finite: {values}")
        elif values and not values[-1] < values[0]:
            problems.append(f"{tag} did not fall: {values[0]:.4f} -> {values[-1]:.4f}")
    return problems


def run_job(job: str, mode: str, steps: int, out: Path) -> list[str]:
    """Train a job in a process of its own; return what is wrong."""
    run = out / f"{job}-{mode}"
    command = [sys.executable, "-m", "nitp_titan.train", "--job.config_file", f"train_configs/{job}.toml"]
    command += ["--job.dump_folder", str(run), "--training.steps", str(steps), "--checkpoint.no-enable"]
    command += ["--nitp.geometry_freq", "10", *MODES[mode]]
    log = run.with_suffix(".log")
    with log.open("w") as output:
        code = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        return [f"exit code {code}; the end of {log}:", *log.read_text().splitlines()[-15:]]
    return problems_of(run, TAGS + JOBS[job])


def device() -> str:
    """Name the device that is about to be tested.

    Raises:
        SystemExit: there is a GPU that this torch cannot use: a CPU's results would pass for it.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if list(Path("/dev").glob("nvidia[0-9]*")):
        raise SystemExit(f"this machine has a GPU, but torch {torch.__version__} cannot use it; see nitp-titan env")
    return "CPU"


def main() -> int:
    """Run the jobs; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100 if has_gpu() else 30, help="steps of each run (%(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="folder of the runs (outputs/smoke-TIME)")
    parser.add_argument("--at-once", type=int, default=1, help="runs beside each other (%(default)s)")
    arguments = parser.parse_args()
    out = (arguments.out or ROOT / "outputs" / time.strftime("smoke-%Y%m%d-%H%M%S")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(f"Device: {device()}", flush=True)

    found: dict[str, list[str]] = {}

    def check(run: tuple[str, str]) -> None:
        begin = time.monotonic()
        problems = run_job(*run, arguments.steps, out)
        found["-".join(run)] = problems
        # After each, in case somebody's patience ends before the last.
        (out / "smoke.json").write_text(json.dumps(found, indent=2) + "\n")
        verdict = "FAILED" if problems else "ok"
        took = f"{time.monotonic() - begin:6.1f} s"
        print(f"{run[0]:10} {run[1]:9} {took}  {verdict}", *problems, sep="\n  ", flush=True)

    runs = [(job, mode) for job in JOBS for mode in MODES]
    with ThreadPoolExecutor(arguments.at_once) as pool:
        list(pool.map(check, runs))
    print(f"Runs and logs: {out}")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
