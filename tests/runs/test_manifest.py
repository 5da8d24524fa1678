"""nitp_titan.runs.manifest: what was written is noticed to be otherwise, whatever was changed."""

from __future__ import annotations

import json
import random

import pytest

from nitp_titan.runs.manifest import NAME, Entry, Manifest, ManifestError

FINGERPRINT = {"model": {"model.shape.n_layers": 6}, "data": {"dataloader.dataset_path": None}}


@pytest.fixture
def saved(tmp_path):
    (tmp_path / "sharded").mkdir()
    files = {"a.distcp": bytes(range(256)) * 50, "sharded/b.safetensors": b"b" * 7, "empty": b""}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    entries = {name: Entry.of(tmp_path / name) for name in files}
    Manifest.of(7, entries, "everything", FINGERPRINT).write(tmp_path)
    return tmp_path


def test_it_is_read_as_it_was_written(saved):
    manifest = Manifest.read(saved)
    assert manifest is not None
    assert manifest.step == 7
    assert manifest.holds == "everything"
    assert manifest.fingerprint == FINGERPRINT
    assert manifest.saved.endswith("+00:00")
    assert {name: entry.size for name, entry in manifest.files.items()} == {
        "a.distcp": 12800,
        "empty": 0,
        "sharded/b.safetensors": 7,
    }
    assert manifest.wrong_sizes(saved) == manifest.wrong_checksums(saved, manifest.files) == []
    assert not list(saved.glob("*.tmp"))


def test_a_folder_without_one_has_none(tmp_path):
    assert Manifest.read(tmp_path) is None


def test_any_changed_byte_of_a_file_is_noticed(saved):
    generator = random.Random(0)
    manifest = Manifest.read(saved)
    assert manifest is not None
    for name in ("a.distcp", "sharded/b.safetensors"):
        whole = (saved / name).read_bytes()
        for _ in range(20):
            changed = bytearray(whole)
            changed[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
            (saved / name).write_bytes(changed)
            assert manifest.wrong_sizes(saved) == []
            assert manifest.wrong_checksums(saved, manifest.files) == [
                f"{name} is damaged: it has another checksum than when it was saved"
            ]
        (saved / name).write_bytes(whole)
    assert manifest.wrong_checksums(saved, ["empty"]) == []


def test_sizes_tell_what_is_missing_and_what_is_cut(saved):
    manifest = Manifest.read(saved)
    assert manifest is not None
    (saved / "a.distcp").write_bytes(b"12")
    (saved / "empty").unlink()
    assert manifest.wrong_sizes(saved) == ["a.distcp has 2 bytes, not 12,800", "empty is missing"]


def test_any_changed_character_of_the_manifest_itself_is_noticed(saved):
    generator = random.Random(1)
    whole = (saved / NAME).read_text()
    values = json.loads(whole)
    for _ in range(100):
        place = generator.randrange(len(whole))
        changed = whole[:place] + chr((ord(whole[place]) - 31) % 95 + 32) + whole[place + 1 :]
        (saved / NAME).write_text(changed)
        try:
            same = json.loads(changed) == values  # white space
        except ValueError:
            same = False
        if same:
            Manifest.read(saved)
            continue
        with pytest.raises(ManifestError, match=r"its manifest.json is (damaged|of a later version)"):
            Manifest.read(saved)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "\x00\xff", '{"checksum": 1}', "{" * 40])
def test_what_is_no_manifest_is_one_sentence(text, tmp_path):
    (tmp_path / NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(ManifestError, match=r"its manifest\.json"):
        Manifest.read(tmp_path)


def test_a_later_version_is_named(saved):
    values = json.loads((saved / NAME).read_text())
    values.pop("checksum")
    from nitp_titan.runs.manifest import _checksum

    values["version"] = 2
    (saved / NAME).write_text(json.dumps(values | {"checksum": _checksum(values)}))
    with pytest.raises(ManifestError, match="of a later version of nitp_titan"):
        Manifest.read(saved)
