"""What the rooms of the package may import: no circle, the method free of TorchTitan, jobs free of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "nitp_titan"
LONGEST = 400


def modules() -> dict[str, Path]:
    """Module -> file, of the whole package."""
    files = (ROOT / PACKAGE).rglob("*.py")
    names = {file.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


def imported(file: Path) -> Iterator[str]:
    """Every name that a file imports, in functions too, but for what only a type checker reads."""
    names = modules()

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}:{child.lineno}: a relative import"
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    yield whole if whole in names else child.module or ""
            elif isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            yield from visit(child)

    yield from visit(ast.parse(file.read_text()))


@cache
def graph() -> dict[str, set[str]]:
    """Module -> the package's modules that it imports."""
    names = modules()
    return {name: {i for i in imported(file) if i in names} - {name} for name, file in names.items()}


def circle_in(arrows: dict[str, set[str]]) -> list[str]:
    """A way from a module back to itself; empty where there is none."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(arrows.get(name, ())):
            if found := walk(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in arrows if (found := walk(name, []))), [])


def test_no_circle():
    assert circle_in(graph()) == []


def test_a_circle_would_be_found():
    assert circle_in({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]


@pytest.mark.parametrize(
    ("room", "never"),
    [
        ("nitp", ("torchtitan", "torchao")),
        ("job", ("nitp_titan.tools", "nitp_titan.cli")),
        ("training", ("nitp_titan.tools", "nitp_titan.cli", "nitp_titan.evaluation", "nitp_titan.experiments")),
        ("data", ("nitp_titan.job", "nitp_titan.training")),
        ("models", ("nitp_titan.titan", "nitp_titan.job", "nitp_titan.training")),
        ("titan", ("nitp_titan.job", "nitp_titan.training", "nitp_titan.models")),
        ("runtime", ("nitp_titan.job", "nitp_titan.training", "nitp_titan.titan")),
    ],
)
def test_what_a_room_never_imports(room, never):
    files = list((ROOT / PACKAGE / room).rglob("*.py"))
    assert files
    found = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imported(file)
        if any(name == other or name.startswith(f"{other}.") for other in never)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("nitp_titan", ("torch", "torchtitan")),
        ("nitp_titan.job", ("torch", "datasets")),
        ("nitp_titan.cli.main", ("torch",)),
        ("nitp_titan.runtime", ("torch",)),
        ("nitp_titan.nitp.objective", ("torchtitan",)),
        ("nitp_titan.nitp.geometry", ("torchtitan",)),
        ("nitp_titan.nitp.chunked_sum", ("torchtitan",)),
    ],
)
def test_what_an_import_brings_along(module, never):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(never) & set(done.stdout.split())


def test_every_room_says_what_it_holds():
    for file in (ROOT / PACKAGE).rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(file.read_text())), file


def test_files_are_of_one_purpose():
    long = {
        str(file.relative_to(ROOT)): lines
        for folder in (PACKAGE, "tests", "benchmarks")
        for file in (ROOT / folder).rglob("*.py")
        if (lines := len(file.read_text().splitlines())) > LONGEST
    }
    assert long == {}
