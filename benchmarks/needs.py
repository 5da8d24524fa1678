"""What of the project's dependencies a machine lacks, asked before a suite that has minutes and no package index.

    python -m benchmarks.needs

Prints a line for each and ends with 1 if there is one. Reads ``pyproject.toml``: a checkout need not be installed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import sys
import sysconfig
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement

from benchmarks.results import ROOT


def dependencies() -> list[str]:
    """Return the requirements of ``pyproject.toml``, without its extras."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def unmet(requirements: Sequence[str]) -> Iterator[str]:
    """Yield a line for every requirement that is not installed, is of another version or cannot be imported.

    What these need themselves shows in the import alone: packages ask for more than we use of them.
    """
    for requirement in map(Requirement, requirements):
        try:
            found = importlib.metadata.version(requirement.name)
            if not requirement.specifier.contains(found, prereleases=True):
                yield f"{requirement.name}: found {found}, expected {requirement.specifier}"
                continue
            importlib.import_module(requirement.name.replace("-", "_"))
        except importlib.metadata.PackageNotFoundError:
            yield f"{requirement.name}: not installed, expected {requirement.specifier or 'any version'}"
        except ImportError as error:
            yield f"{requirement.name} {found}: cannot be imported: {error}"


def unmet_by_compiling() -> Iterator[str]:
    """Yield a line for what torch.compile needs and is not there: Triton builds its launcher in C."""
    if not any(shutil.which(name) for name in filter(None, (os.environ.get("CC"), "gcc", "cc", "clang"))):
        yield "no C compiler: install gcc, or set CC"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.exists():
        yield f"no {header}: install Python's headers"


def main() -> int:
    """Run the command line; return the exit code."""
    lines = [*unmet(dependencies()), *unmet_by_compiling()]
    print("\n".join(lines) or "all dependencies are here")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
