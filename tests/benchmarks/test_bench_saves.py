"""The benchmark of whole saves at toy size: both ways save the same. No times are asserted."""

from __future__ import annotations

import json

import torch
import torch.distributed.checkpoint as dcp

from benchmarks import saves
from nitp_titan.runs.manifest import Manifest


def test_both_ways_save_the_same(tmp_path):
    for save in saves.ways(tmp_path).values():
        save({"w": torch.arange(5.0)})
    for name in ("torch", "step-2"):
        found = {"w": torch.zeros(5)}
        dcp.load(found, checkpoint_id=tmp_path / name, no_dist=True)
        assert torch.equal(found["w"], torch.arange(5.0))
    assert Manifest.read(tmp_path / "step-2") is not None
    assert Manifest.read(tmp_path / "torch") is None


def test_program(tmp_path, capsys):
    out = tmp_path / "x.json"
    assert saves.main(["--mib", "1", "--repeats", "2", "--folder", str(tmp_path), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert set(result["seconds"]) == {"torch", "ours"}
    assert set(result["overhead_percent_by_round"]) == {"median", "min", "max"}
    assert "a save of 1 MiB" in capsys.readouterr().out
