"""Distributed checkpoints read so that nothing in them is run.

torch's reader unpickles the metadata, and the values that are no tensors, with whatever they ask for. Here metadata are
made of the few classes that they are made of, and values of what ``torch.load(weights_only=True)`` makes.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from nitp_titan.runs.metadata import ends
from nitp_titan.runs.steps import METADATA

_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
    "collections": ("OrderedDict",),
}
"""What the metadata of a checkpoint are made of, module by module."""


class CheckpointUnreadable(ValueError):
    """A checkpoint cannot be read, or would run something; the message says what is wrong with it."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            # A path of another system is a path here.
            name = "Path" if "pathlib" in module else name
            return super().find_class("pathlib" if "pathlib" in module else module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise CheckpointUnreadable(
            f"its {METADATA} asks for {module}.{name}, which no checkpoint needs: what is in it is not run"
        )


class _OnlyMetadata(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As torch's.

        Raises:
            CheckpointUnreadable: they are empty, damaged, or ask for something to be run.
        """
        path = self._get_metadata_path(kwargs.get("rank"))
        try:
            with self.fs.create_stream(path, "rb") as file:
                metadata = _Unpickler(file).load()
        except CheckpointUnreadable:
            raise
        except FileNotFoundError:
            raise CheckpointUnreadable(f"it has no {METADATA}") from None
        except Exception as error:  # of a damaged pickle anything can come
            raise CheckpointUnreadable(f"its {METADATA} cannot be read ({type(error).__name__})") from None
        if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
            raise CheckpointUnreadable(f"its {METADATA} is something else than metadata")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        cast(StorageMeta, metadata.storage_meta).load_id = self.load_id
        return metadata


class SafeReader(_OnlyMetadata):
    """torch's reader of a checkpoint's folder, with metadata that are only metadata."""


class SafeRemoteReader(_OnlyMetadata, FsspecReader):
    """The same for a remote folder."""


class SafePlanner(DefaultLoadPlanner):
    """torch's plan of what is read, with values that are only values."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """As torch's.

        Raises:
            CheckpointUnreadable: the value is damaged, or asks for something to be run.
        """
        name = read_item.dest_index.fqn
        try:
            found = torch.load(value, map_location="cpu", weights_only=True)
        except Exception as error:
            what = f"its {name} is no plain value, and what is in it is not run"
            raise CheckpointUnreadable(f"{what} ({type(error).__name__})") from None
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], found)
        else:
            self.state_dict[name] = found


def ends_of_files(metadata: Metadata) -> dict[str, int]:
    """Return a checkpoint's files with the bytes that each has at the least."""
    places = cast(Mapping[Any, Any], metadata.storage_data or {}).values()
    return ends((place.relative_path, place.offset + place.length) for place in places)


def damaged_items(folder: Path, metadata: Metadata, mine: Callable[[int], bool]) -> list[str]:
    """Return the damaged items of a checkpoint without a manifest.

    torch saves each as an archive, whose own checksums nobody looks at when it is loaded.

    Args:
        mine: of an item's number, whether this rank looks at it.
    """
    found = []
    items: Iterable[tuple[Any, Any]] = cast(Mapping[Any, Any], metadata.storage_data).items()
    for number, (index, place) in enumerate(items):
        if not mine(number):
            continue
        try:
            with (folder / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                item = io.BytesIO(file.read(place.length))
            if zipfile.is_zipfile(item):
                with zipfile.ZipFile(item) as archive:
                    whole = archive.testzip() is None
            else:
                whole = False
        except (OSError, zipfile.BadZipFile, EOFError, RuntimeError, ValueError):
            whole = False
        if not whole:
            found.append(f"{index.fqn} in {place.relative_path} is damaged")
    return found
