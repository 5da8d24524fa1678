"""Which files a `dataset_path` names.

Standard library only: the job checker answers a wrong path in an instant, without torch or datasets.
"""

import difflib
import glob
import logging
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from nitp_titan.data.errors import DataError

logger = logging.getLogger(__name__)

FORMATS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
"""File ending -> format."""

COMPRESSED = (".gz", ".zst")
READABLE_ENDINGS = ".txt, .jsonl (either also as .gz or .zst), .parquet"


def file_format(path: Path | str) -> str | None:
    """ "text", "json" or "parquet" by the file's ending; None for an ending that is not read."""
    name = os.path.basename(path).lower()
    stem, ending = os.path.splitext(name)
    if ending in COMPRESSED:
        inner = FORMATS.get(os.path.splitext(stem)[1])
        return None if inner == "parquet" else inner  # parquet compresses by itself
    return FORMATS.get(ending)


def find_text_files(dataset_path: str) -> list[Path]:
    """Text files that `dataset_path` names, sorted by path.

    Args:
        dataset_path: a file, a folder (searched with all its subfolders) or a glob ("~" and "**" included). Hidden
            files and folders are ignored, unless the path itself goes through them.

    Returns:
        At least one path. In a folder or a glob, files of other endings are left out, with one warning.

    Raises:
        DataError: nothing matches, a named file has an ending that is not read, or something cannot be read.
    """
    if not dataset_path or not str(dataset_path).strip():
        raise DataError("dataset_path is empty: give a file, a folder or a glob of text files")
    path = Path(os.path.expanduser(str(dataset_path)))
    # A file whose name has brackets or a star in it is a file first, and a glob only if it does not exist.
    if path.is_file():
        if file_format(path) is None:
            hint = "; rename it to .jsonl if it has one JSON object a line" if path.suffix == ".json" else ""
            raise DataError(
                f"dataset_path {str(path)!r} has an ending that is not read: expected {READABLE_ENDINGS}{hint}"
            )
        found, skipped = [path], []
    else:
        if path.is_dir():
            candidates = _walk(path)
        else:
            candidates = (Path(p) for p in glob.iglob(str(path), recursive=True) if os.path.isfile(p))
        found, skipped = [], []
        for candidate in candidates:
            (found if file_format(candidate) else skipped).append(candidate)
    if not found:
        raise DataError(_nothing_found(str(dataset_path), path, skipped))
    # `set`: a glob such as "**/**" yields a file more than once.
    found = sorted(set(found))
    for file in found:
        if not os.access(file, os.R_OK):
            raise DataError(f"dataset_path: {str(file)!r} cannot be read (permission denied)")
    if skipped:
        endings = ", ".join(f"{n} x {e or 'no ending'}" for e, n in Counter(p.suffix for p in skipped).most_common(5))
        logger.warning(
            "dataset_path %r: %d files skipped because of their ending (%s); %s are read",
            str(dataset_path),
            len(set(skipped)),
            endings,
            READABLE_ENDINGS,
        )
    return found


def stdlib_files() -> list[Path]:
    """Python sources of the running interpreter's standard library, sorted by relative path.

    Real text that every machine has. Tests, caches and installed packages are left out.

    Raises:
        DataError: the interpreter has no sources on disk (a zipped or frozen library).
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [d for d in subfolders if d not in left_out]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise DataError(f"dataset 'python_stdlib': this Python has no library sources in {str(root)!r}")
    return sorted(files, key=lambda p: p.relative_to(root).parts)


def nearest_name(name: str, names) -> str:
    """ " (did you mean 'x'?)" for the name most like `name`, or nothing."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _walk(root: Path) -> Iterator[Path]:
    """Files below `root` that are not hidden, symbolic links followed; no folder is entered twice."""

    def fail(error: OSError):
        raise DataError(f"dataset_path: folder {error.filename!r} cannot be read ({error.strerror})")

    entered = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        if real in entered:
            subfolders.clear()
            continue
        entered.add(real)
        # Sorted, so that of two links to one folder the same one is entered on every machine.
        subfolders[:] = sorted(d for d in subfolders if not d.startswith("."))
        for name in names:
            if not name.startswith(".") and os.path.isfile(os.path.join(folder, name)):
                yield Path(folder, name)


def _nothing_found(given: str, path: Path, skipped: list[Path]) -> str:
    """One sentence on why nothing was found, with the nearest path that exists."""
    message = f"no text files match dataset_path {given!r}: {READABLE_ENDINGS} are read"
    if skipped:
        return f"{message}, and all {len(skipped)} files there have other endings, such as {skipped[0].name!r}"
    if path.is_dir():
        return f"{message}, and that folder has none (hidden files are ignored)"
    absolute = Path(os.path.abspath(path))
    nearest = next(p for p in absolute.parents if p.is_dir())
    missing = absolute.relative_to(nearest).parts[0]
    try:
        hint = nearest_name(missing, os.listdir(nearest))
    except OSError:
        hint = ""
    return f"{message}; looked in {str(nearest)!r}, the nearest folder that exists, for {missing!r}{hint}"
