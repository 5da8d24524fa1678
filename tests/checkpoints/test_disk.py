"""A save that the disk refuses: one line, nothing of it left, the earlier checkpoints as they were."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from nitp_titan.checkpoints import space
from nitp_titan.checkpoints.disk import is_of_the_disk, whole_or_nothing
from nitp_titan.checkpoints.folder import saving
from nitp_titan.checkpoints.space import bytes_of, require_space
from nitp_titan.runs.errors import DiskError
from nitp_titan.training.ending import ending


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except type(error) as caught:
        return caught


def no_space(path: str = "") -> OSError:
    words = (errno.ENOSPC, os.strerror(errno.ENOSPC))
    return raised(OSError(*words, path) if path else OSError(*words))


@pytest.mark.parametrize(
    "error",
    [
        no_space("step-4/__1_0.distcp"),
        CheckpointException("save", {1: _wrap_exception(no_space("step-4/__1_0.distcp"))}),
        CheckpointException("save", {rank: _wrap_exception(no_space("step-4/__1_0.distcp")) for rank in range(64)}),
    ],
)
def test_what_the_disk_says_is_one_line_and_the_unfinished_folder_is_removed(tmp_path, error):
    final, earlier = tmp_path / "step-4", tmp_path / "step-2"
    for folder in (saving(final), earlier):
        folder.mkdir()
        (folder / "__0_0.distcp").write_bytes(b"x")
    (earlier / ".metadata").touch()
    with pytest.raises(DiskError) as said, whole_or_nothing(final):
        raise error
    assert str(said.value) == (
        f"The checkpoint {final} is not saved: step-4/__1_0.distcp: No space left on device; free space there, or "
        "give another job.dump_folder"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2"]
    assert sorted(path.name for path in earlier.iterdir()) == [".metadata", "__0_0.distcp"]


def test_a_complete_checkpoint_is_never_removed(tmp_path):
    final = tmp_path / "step-4"
    final.mkdir()
    (final / ".metadata").touch()
    with pytest.raises(DiskError), whole_or_nothing(final):
        raise no_space()
    assert (final / ".metadata").exists()


def test_what_is_not_the_disks_stays_what_it_is(tmp_path):
    mistake = CheckpointException("save", {0: _wrap_exception(raised(KeyError("weight")))})
    with pytest.raises(CheckpointException), whole_or_nothing(tmp_path / "step-1"):
        raise mistake
    with pytest.raises(RuntimeError, match="shape"), whole_or_nothing(tmp_path / "step-1"):
        raise RuntimeError("shape")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EROFS, "Read-only file system; mount it for writing"),
        (errno.EACCES, "Permission denied; give this user the right"),
        (errno.ENOTDIR, "Not a directory; remove the file that stands where a folder is wanted"),
        (errno.EDQUOT, "; free space there"),
    ],
)
def test_each_refusal_ends_a_run_with_1_and_says_what_to_do(number, words):
    end = ending(OSError(number, os.strerror(number), "/runs/a"))
    assert (end.exit_code, end.state, end.is_told) == (1, "failed", True)
    assert end.reason.startswith("/runs/a cannot be written: ")
    assert words in end.reason


def test_a_bug_is_not_taken_for_the_disks():
    end = ending(raised(RuntimeError("mat1 and mat2\nshapes")))
    assert (end.exit_code, end.is_told, end.reason) == (1, False, "RuntimeError: mat1 and mat2")
    assert not is_of_the_disk(FileNotFoundError(errno.ENOENT, "No such file"))


def test_a_file_that_is_cut_short_under_torchs_writer_is_the_disks(tmp_path):
    """As a disk that becomes full: torch's writer hides the error's number."""

    class Full:
        def write(self, data):
            raise no_space()

        def flush(self):
            pass

    with pytest.raises(DiskError), whole_or_nothing(tmp_path / "step-1"):
        torch.save({"a": torch.zeros(100_000)}, Full())


# --- space


class Optimizers(list):
    """As TorchTitan's container."""


def test_the_size_is_what_is_written_also_before_the_first_step(tmp_path):
    model = torch.nn.Linear(1000, 500)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {**model.state_dict(), "optimizer": Optimizers([optimizer])}
    weights = 4 * (1000 * 500 + 500)
    assert bytes_of(state) == 3 * weights
    model(torch.ones(1000)).sum().backward()
    optimizer.step()
    assert bytes_of(state) == 3 * weights + 2 * 4  # each parameter's count of steps


def test_what_does_not_fit_is_refused_with_numbers(tmp_path, monkeypatch):
    state = {"weight": torch.zeros(50_000_000, device="meta")}
    monkeypatch.setattr(space, "_free", lambda folder: 150_000_000)
    with pytest.raises(DiskError) as said:
        require_space(state, str(tmp_path / "checkpoint"))
    assert str(said.value).startswith(
        f"{tmp_path / 'checkpoint'}: a checkpoint takes 0.20 GB, and 0.15 GB are free there;"
    )
    monkeypatch.setattr(space, "_free", lambda folder: 200_000_000)
    require_space(state, str(tmp_path / "checkpoint"))


def test_free_space_is_that_of_the_nearest_folder_that_is_there(tmp_path):
    assert space._free(str(tmp_path / "not" / "yet")) > 0
    require_space({"weight": torch.zeros(2**60, device="meta")}, "s3://bucket/run")
