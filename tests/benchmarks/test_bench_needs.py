"""Missing dependencies are named before a suite begins."""

from __future__ import annotations

import torch
from packaging.requirements import Requirement

from benchmarks import needs


def test_an_installed_project_lacks_nothing(capsys):
    assert needs.main() == 0
    assert capsys.readouterr().out == "all dependencies are here\n"


def test_all_dependencies_are_asked_for():
    names = {Requirement(line).name for line in needs.dependencies()}
    assert {"torch", "torchtitan", "pydantic", "tomli-w"} <= names


def test_a_compiler_and_pythons_headers_are_asked_for(tmp_path, monkeypatch):
    assert list(needs.unmet_by_compiling()) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(needs.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert list(needs.unmet_by_compiling()) == [
        "no C compiler: install gcc, or set CC",
        f"no {tmp_path / 'Python.h'}: install Python's headers",
    ]


def test_what_is_missing_old_or_broken_is_named(tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken_one-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-one\nVersion: 1.0\n")
    (tmp_path / "broken_one.py").write_text("import that_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    wanted = ["torch<2", "no-such-package>=3", "no-such-other", "broken-one", "rich"]
    monkeypatch.setattr(needs, "dependencies", lambda: wanted)
    assert needs.main() == 1
    assert capsys.readouterr().out.splitlines() == [
        f"torch: found {torch.__version__}, expected <2",
        "no-such-package: not installed, expected >=3",
        "no-such-other: not installed, expected any version",
        "broken-one 1.0: cannot be imported: No module named 'that_it_needs'",
    ]
