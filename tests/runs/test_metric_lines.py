"""nitp_titan.runs.metric_lines"""

from __future__ import annotations

import json

import pytest

from nitp_titan.runs.metric_lines import keep_until


def line(step: int, value: int = 0) -> str:
    return json.dumps({"step": step, "a": value}) + "\n"


@pytest.mark.parametrize(
    ("before", "last_step", "after"),
    [
        (line(1) + line(2) + line(3), 2, line(1) + line(2)),
        (line(1) + line(2) + line(3), 0, ""),
        (line(1) + line(2), 2, line(1) + line(2)),
        (line(1) + line(2)[:-4], 2, line(1)),
        (line(1) + line(2)[:-1], 2, line(1)),
        (line(1) + "\0\0\0\n{}\n[1]\n" + line(2), 2, line(1) + line(2)),
        (line(1) + line(2) + line(3) + line(2, 5) + line(4), 4, line(1) + line(2, 5) + line(4)),
        ("", 3, ""),
    ],
)
def test_each_step_up_to_the_last_stays_once(before, last_step, after, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(before)
    assert keep_until(path, last_step) == len(before.splitlines()) - len(after.splitlines())
    assert path.read_text() == after
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_missing_or_right_is_not_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert keep_until(path, 3) == 0
    assert not path.exists()
    path.write_text(line(1))
    inode = path.stat().st_ino
    keep_until(path, 1)
    assert path.stat().st_ino == inode


def test_a_file_that_cannot_be_replaced_stays_whole(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + line(2))

    def full(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        keep_until(path, 1)
    assert path.read_text() == line(1) + line(2)
