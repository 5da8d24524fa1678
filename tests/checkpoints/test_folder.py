"""nitp_titan.checkpoints.folder: whatever is killed in between, a checkpoint is whole; what is kept and what is not."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nitp_titan.checkpoints.folder import clean_up, put_in_place, saving, set_aside, take_away, to_remove
from nitp_titan.runs.manifest import Entry, Manifest
from nitp_titan.runs.steps import METADATA, complete_steps, is_complete


def write(folder: Path, text: str, *, sealed: bool = True) -> Path:
    folder.mkdir(parents=True)
    for name in (METADATA, "data"):
        (folder / name).write_text(text)
    if sealed:
        step = int(folder.name.rpartition("-")[2])
        files = {name: Entry.of(folder / name) for name in (METADATA, "data")}
        Manifest.of(step, files, "everything", {}).write(folder)
    return folder


class Killed(BaseException):
    """A process that is no more."""


def killed_at(call: int) -> tuple[Any, Any]:
    """Let the process die right before its n-th change of a name, or amid it where a folder is removed."""
    calls = 0

    def dying(usual):
        def run(path, *args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > call:
                if usual is removed and path.is_dir():
                    for file in path.iterdir():
                        if file.name != METADATA:
                            file.unlink()
                raise Killed
            return usual(path, *args, **kwargs)

        return run

    removed = shutil.rmtree
    renames = mock.patch.object(Path, "rename", dying(Path.rename))
    return renames, mock.patch.object(shutil, "rmtree", dying(shutil.rmtree))


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("call", range(6))
def test_a_kill_at_any_change_of_a_name_leaves_a_whole_checkpoint(there, call, tmp_path):
    final = tmp_path / "step-8"
    if there:
        write(final, "old")
    new = write(saving(final), "new")
    renames, removals = killed_at(call)
    with renames, removals:
        try:
            put_in_place(new, final)
            killed = False
        except Killed:
            killed = True
    clean_up(tmp_path)
    assert complete_steps(tmp_path) == [8]
    assert [path.name for path in tmp_path.iterdir()] == ["step-8"]
    text = (final / METADATA).read_text()
    assert (final / "data").read_text() == text
    assert text == "new" if not killed else text in ("old", "new")
    assert killed == (call < (4 if there else 2))


def test_what_is_half_written_goes_away_and_what_is_whole_is_kept(tmp_path):
    write(tmp_path / ".saving-4", "half", sealed=False)
    write(tmp_path / ".saving-6", "whole")
    write(tmp_path / ".replaced-2", "whole")
    write(tmp_path / ".deleting-1", "half", sealed=False)
    damaged = write(tmp_path / ".saving-7", "whole")
    (damaged / METADATA).write_text("cut")
    names = ["best-step-7", "step-7.bak", ".saving-x", "saving-3", ".saving-03", "notes"]
    for name in names:
        (tmp_path / name).mkdir()
    lines = clean_up(tmp_path)
    assert complete_steps(tmp_path) == [2, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "step-2", "step-6"])
    assert lines == [
        f"{tmp_path / '.saving-4'}: what an interrupted save had left is removed",
        f"{tmp_path / 'step-6'} had been saved whole, and is put in its place",
        f"{tmp_path / '.saving-7'}: what an interrupted save had left is removed",
        f"{tmp_path / '.deleting-1'}: what an interrupted removal had left is removed",
        f"{tmp_path / 'step-2'} is put back: what was to replace it was not finished",
    ]
    assert clean_up(tmp_path) == []


def test_retention_against_brute_force(tmp_path):
    """Drawn folders: at least k complete ones are left, the latest; multiples for good; nothing else is named."""
    generator = random.Random(0)
    for number in range(60):
        folder = tmp_path / str(number)
        complete = sorted(generator.sample(range(30), generator.randrange(9)))
        for step in complete:
            write(folder / f"step-{step}", "x", sealed=generator.random() < 0.7)
        for step in generator.sample(range(30, 40), 2):
            (folder / f"step-{step}").mkdir(parents=True)  # incomplete, and later
        for name in ("best-step-50", "step-60.bak"):
            write(folder / name, "x", sealed=False)
        k, every = generator.randrange(4), generator.choice([0, 0, 1, 3, 7])
        last = complete[-1] if complete else -1
        gone = to_remove(folder, keep_latest=k, keep_every=every, protected=[last])
        for_good = {step for step in complete if every and step and step % every == 0}
        others = [step for step in complete if step not in for_good]
        assert gone == (others[: max(0, len(others) - k)] if k else []), (complete, k, every)
        assert last not in gone or not complete
        for step in gone:
            shutil.rmtree(take_away(folder, step))
        assert set(complete_steps(folder)) == set(complete) - set(gone)


def test_later_steps_are_set_aside_under_names_of_their_own(tmp_path):
    for step in (2, 4, 6):
        write(tmp_path / f"step-{step}", "first")
    assert [path.name for path in set_aside(tmp_path, 2)] == ["abandoned-4", "abandoned-6"]
    write(tmp_path / "step-4", "second")
    assert [path.name for path in set_aside(tmp_path, 2)] == ["abandoned-4.2"]
    assert complete_steps(tmp_path) == [2]
    assert is_complete(tmp_path / "abandoned-4.2")
    assert clean_up(tmp_path) == []
