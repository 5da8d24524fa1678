"""nitp_titan.checkpoints.reader: checkpoints are read, nothing in them is run, and damage is noticed."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nitp_titan.checkpoints.reader import (
    CheckpointUnreadable,
    SafePlanner,
    SafeReader,
    SafeRemoteReader,
    damaged_items,
    ends_of_files,
)
from nitp_titan.runs.metadata import too_short
from nitp_titan.runs.steps import METADATA

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
VALUES = {
    "step": 7,
    "lr": 1e-3,
    "betas": (0.9, 0.95),
    "fused": True,
    "foreach": None,
    "name": "AdamW",
    "list": [1, "a"],
}


def state(fill: int = 3) -> dict[str, Any]:
    tensors = {str(dtype): torch.full((4, 3), fill).to(dtype) for dtype in DTYPES}
    return {"model": tensors, "scalar": torch.tensor(fill), "other": dict(VALUES)}


@pytest.fixture
def saved(tmp_path) -> Path:
    dcp.save(state(), checkpoint_id=tmp_path / "step-1", no_dist=True)
    return tmp_path / "step-1"


@pytest.mark.parametrize("reader", [SafeReader, SafeRemoteReader])
def test_a_checkpoint_is_read_as_torch_reads_it(reader, saved):
    found = state(0)
    found["other"] = dict.fromkeys(VALUES)
    dcp.load(found, storage_reader=reader(str(saved)), planner=SafePlanner(), no_dist=True)
    assert found["other"] == VALUES
    for name, tensor in state()["model"].items():
        assert torch.equal(found["model"][name], tensor)
        assert found["model"][name].dtype == tensor.dtype
    assert too_short(saved, ends_of_files(SafeReader(saved).read_metadata())) == []
    assert damaged_items(saved, SafeReader(saved).read_metadata(), lambda number: True) == []


class Runs:
    """Something whose unpickling calls a function."""

    def __init__(self, function: Any, *arguments: Any):
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


def hostile(mark: Path) -> dict[str, Any]:
    return {
        "open": Runs(open, str(mark), "w"),
        "system": Runs(os.system, f"touch {mark}"),
        "eval": Runs(eval, f"open({str(mark)!r}, 'w')"),
        "subprocess": Runs(subprocess.call, ["touch", str(mark)]),
        "torch.load": Runs(torch.load, str(mark)),
        "a class": Runs(subprocess.Popen, ["touch", str(mark)]),
        "makedirs": Runs(os.makedirs, str(mark)),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("kind", hostile(Path("x")))
def test_nothing_in_metadata_is_run(kind, protocol, saved, tmp_path):
    mark = tmp_path / "ran"
    metadata = dcp.FileSystemReader(saved).read_metadata()
    metadata.planner_data = {"x": hostile(mark)[kind]}
    (saved / METADATA).write_bytes(pickle.dumps(metadata, protocol))
    with pytest.raises(CheckpointUnreadable, match=r"its \.metadata asks for .*which no checkpoint needs"):
        SafeReader(saved).read_metadata()
    assert not mark.exists()


@pytest.mark.parametrize("name", ["Metadata.__init__", "Metadata.__init__.__globals__", "dataclass", "os"])
def test_a_way_through_an_allowed_module_is_none(name, saved):
    # As protocol 4 writes an attribute of an attribute.
    module = b"torch.distributed.checkpoint.metadata"
    words = b"".join(b"\x8c" + bytes([len(word)]) + word for word in (module, name.encode()))
    (saved / METADATA).write_bytes(b"\x80\x04" + words + b"\x93.")
    with pytest.raises(CheckpointUnreadable, match="which no checkpoint needs"):
        SafeReader(saved).read_metadata()


@pytest.mark.parametrize("kind", hostile(Path("x")))
def test_nothing_in_a_value_is_run(kind, tmp_path):
    mark = tmp_path / "ran"
    with pytest.MonkeyPatch.context() as patch:
        # What saves does not look at what it saves; here it is not to run it either.
        patch.setattr(dcp.default_planner.DefaultSavePlanner, "transform_object", _pickled)
        dcp.save({"evil": hostile(mark)[kind]}, checkpoint_id=tmp_path / "step-1", no_dist=True)
    with pytest.raises((CheckpointUnreadable, dcp.CheckpointException)) as caught:
        dcp.load({"evil": 0}, storage_reader=SafeReader(tmp_path / "step-1"), planner=SafePlanner(), no_dist=True)
    assert "its evil is no plain value, and what is in it is not run" in str(caught.value)
    assert not mark.exists()


def _pickled(self: Any, write_item: Any, object: Any) -> Any:
    import io

    written = io.BytesIO()
    torch.save(object, written)
    return written


@pytest.mark.parametrize("content", [b"", b"\x80", b"garbage", b"N.", b"]."])
def test_metadata_that_are_none_are_one_sentence(content, saved):
    (saved / METADATA).write_bytes(content)
    with pytest.raises(CheckpointUnreadable, match=r"its \.metadata (cannot be read|is something else)"):
        SafeReader(saved).read_metadata()
    (saved / METADATA).unlink()
    with pytest.raises(CheckpointUnreadable, match=r"it has no \.metadata"):
        SafeReader(saved).read_metadata()


def test_metadata_with_flipped_bytes_never_run_or_crash(saved):
    generator = random.Random(0)
    whole = (saved / METADATA).read_bytes()
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(generator.randrange(1, 4)):
            changed[generator.randrange(len(whole))] = generator.randrange(256)
        (saved / METADATA).write_bytes(changed)
        try:
            SafeReader(saved).read_metadata()
        except CheckpointUnreadable:
            continue


def test_a_flipped_byte_of_a_checkpoint_without_a_manifest_is_noticed(saved):
    """Of tensors' numbers: names and padding of torch's archives have no checksum."""
    generator = random.Random(1)
    metadata = SafeReader(saved).read_metadata()
    [file] = {place.relative_path for place in metadata.storage_data.values()}
    whole = (saved / file).read_bytes()
    numbers = torch.full((4, 3), 3).to(torch.float64).numpy().tobytes()
    start = whole.index(numbers)
    for _ in range(20):
        changed = bytearray(whole)
        changed[start + generator.randrange(len(numbers))] ^= 1 << generator.randrange(8)
        (saved / file).write_bytes(changed)
        assert damaged_items(saved, metadata, lambda number: True) == [f"model.torch.float64 in {file} is damaged"]
    (saved / file).write_bytes(whole[:-100])
    ends = ends_of_files(metadata)
    assert too_short(saved, ends)[0].startswith(f"{file} has {len(whole) - 100:,} bytes, of at least")
    (saved / file).unlink()
    assert too_short(saved, ends) == [f"{file} is missing"]
