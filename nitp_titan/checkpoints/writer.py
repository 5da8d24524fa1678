"""A distributed checkpoint that is written beside its place, with checksums, and put there when it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from nitp_titan.checkpoints.folder import put_in_place, saving
from nitp_titan.runs.manifest import Entry, Holds, Manifest
from nitp_titan.runs.steps import METADATA


@dataclass(frozen=True)
class _Checksums:
    """What a rank tells the first one of the files that it has written."""

    files: Mapping[str, Entry]


class WholeWriter(FileSystemWriter):
    """torch's writer; what it writes becomes ``final`` when all ranks' files, checksums and manifest are on the disk.

    Each rank reads the files that it has written once more, out of the system's cache, for their checksums. The first
    rank writes the manifest and renames the folder, in the process and the thread that write.
    """

    def __init__(self, final: Path, *, step: int, holds: Holds, fingerprint: Mapping[str, Any]):
        super().__init__(saving(final))
        self._final, self._about = final, {"step": step, "holds": holds, "fingerprint": fingerprint}

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As torch's, on the first rank, before any writes: what an earlier attempt has left goes away."""
        folder = Path(self.path)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """As torch's; the last result holds the checksums."""
        results = super().write_data(plan, planner).wait()
        folder = Path(self.path)
        names = {result.storage_data.relative_path for result in results}
        sums = _Checksums({name: Entry.of(folder / name) for name in sorted(names)})
        results.append(WriteResult(index=MetadataIndex(fqn=""), size_in_bytes=0, storage_data=sums))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """As torch's, on the first rank; then the checkpoint is put in its place."""
        files: dict[str, Entry] = {}
        without = []
        for of_rank in results:
            without.append([result for result in of_rank if not isinstance(result.storage_data, _Checksums)])
            for result in of_rank:
                if isinstance(result.storage_data, _Checksums):
                    files.update(result.storage_data.files)
        super().finish(metadata, without)
        folder = Path(self.path)
        files[METADATA] = Entry.of(folder / METADATA)
        Manifest.of(files=files, **self._about).write(folder)
        put_in_place(folder, self._final)

    def storage_meta(self) -> StorageMeta | None:
        """As torch's, with the checkpoint's own place."""
        return StorageMeta(checkpoint_id=self._final, save_id=self.save_id)


def seal(final: Path, *, step: int, fingerprint: Mapping[str, Any]) -> None:
    """Give a folder of other files, as Hugging Face's, checksums and a manifest, and put it in its place.

    Raises:
        OSError: it cannot be read, written or renamed.
    """
    folder = saving(final)
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: Entry.of(folder / name) for name in names}
    Manifest.of(step, files, "hugging face", fingerprint).write(folder)
    put_in_place(folder, final)
