"""What makes a folder a whole checkpoint: a list of its files with sizes and checksums, which is written last.

Free of torch.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import xxhash

NAME = "manifest.json"
Holds = Literal["everything", "weights", "hugging face"]
_VERSION = 1
WEIGHTS_ALONE = (
    "has no optimizer state: a run can start from it (checkpoint.initial_load_path, another job.dump_folder), not go on"
)
"""Why a run does not go on from a checkpoint that holds less than everything."""
LATER_VERSION = "is of a later version of nitp_titan"
_BLOCK = 1 << 22
"""Bytes that are read at a time."""


class ManifestError(ValueError):
    """A manifest cannot be read, or is not what was written; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a checkpoint."""

    size: int
    """Bytes."""

    xxh3_128: str
    """Checksum, in hexadecimal digits: for damage, not against a forger, who could write another manifest."""

    @classmethod
    def of(cls, path: Path) -> Entry:
        """Read a file.

        Raises:
            OSError: it cannot be read.
        """
        digest, size = xxhash.xxh3_128(), 0
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                size += len(block)
        return cls(size, digest.hexdigest())


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The files of a checkpoint, and what the run was that saved it."""

    step: int
    files: Mapping[str, Entry]
    """Path in the checkpoint's folder -> what it is. Other files are nobody's business."""

    holds: Holds = "everything"
    """Whether a run can go on from it, or only start: the weights alone, or these in Hugging Face's format."""

    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    """What the run was (``checkpoints/fingerprint.py``)."""

    saved: str = ""
    """When, in UTC."""

    @classmethod
    def of(cls, step: int, files: Mapping[str, Entry], holds: Holds, fingerprint: Mapping[str, Any]) -> Manifest:
        """Return one of this moment."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return cls(step=step, files=dict(sorted(files.items())), holds=holds, fingerprint=fingerprint, saved=now)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Return a checkpoint's manifest; None where it has none, as those of TorchTitan and of older versions.

        Raises:
            ManifestError: it is not what was written.
        """
        try:
            text = (folder / NAME).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise ManifestError(f"its {NAME} cannot be read ({type(error).__name__})") from None
        try:
            found = json.loads(text)
            checksum = found.pop("checksum")
            if checksum != _checksum(found):
                raise ManifestError(f"its {NAME} is damaged: it does not have its own checksum")
            if found.pop("version") != _VERSION:
                raise ManifestError(f"its {NAME} {LATER_VERSION}")
            return cls(**found | {"files": {name: Entry(**entry) for name, entry in found["files"].items()}})
        except ManifestError:
            raise
        except (ValueError, TypeError, AttributeError, KeyError):
            raise ManifestError(f"its {NAME} is damaged") from None

    def write(self, folder: Path) -> None:
        """Write it into a folder, at once or not at all, and have it on the disk before this returns.

        Raises:
            OSError: it cannot be written.
        """
        values: dict[str, Any] = {"version": _VERSION, **asdict(self)}
        text = json.dumps(values | {"checksum": _checksum(values)}, indent=1) + "\n"
        unfinished = folder / f"{NAME}.tmp"
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(folder / NAME)
        sync_folder(folder)

    def wrong_sizes(self, folder: Path) -> list[str]:
        """Return what is wrong with the files, as far as their sizes tell."""
        found = []
        for name, entry in self.files.items():
            try:
                size = (folder / name).stat().st_size
            except OSError:
                found.append(f"{name} is missing")
                continue
            if size != entry.size:
                found.append(f"{name} has {size:,} bytes, not {entry.size:,}")
        return found

    def wrong_checksums(self, folder: Path, names: Iterable[str]) -> list[str]:
        """Return what is wrong with some of the files, which are read whole."""
        found = []
        for name in names:
            try:
                same = Entry.of(folder / name) == self.files[name]
            except OSError as error:
                found.append(f"{name} cannot be read ({error.strerror})")
                continue
            if not same:
                found.append(f"{name} is damaged: it has another checksum than when it was saved")
        return found


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the file system lets a folder be synced."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def _checksum(values: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())
