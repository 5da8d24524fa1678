"""The two layers that a user writes: a TOML file and the command line. All problems are collected."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import tomli

from nitp_titan.job.draft import Layer, Setting
from nitp_titan.job.errors import Problem, did_you_mean, nearest, quote
from nitp_titan.job.keys.schema import Key, all_tables, from_toml
from nitp_titan.job.keys.types import choices, describe
from nitp_titan.job.reading.lines import lines_of_keys

Bad = set[tuple[str, str]]
EXTENDS = "extends"
"""The one key outside of any table; see :mod:`nitp_titan.job.reading.extends`."""


class OneFile(NamedTuple):
    """A job file without the files that it extends."""

    layer: Layer
    bad: Bad
    """Keys whose value is wrong."""
    problems: list[Problem]
    """Everything that is wrong with it."""
    parents: list[str]
    """What ``extends`` says."""
    extends_line: int | None
    whole: bool
    """False where what it says is not known: it cannot be read, or ``extends`` is wrong."""


def read_one_file(path: Path) -> OneFile:
    """Read a job file."""

    def unreadable(message: str, hint: str = "", line: int | None = None) -> OneFile:
        return OneFile({}, set(), [Problem(str(path), "", message, hint, line)], [], None, whole=False)

    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        return unreadable("no such file", nearest_file(path))
    except UnicodeDecodeError as error:
        line = path.read_bytes().count(b"\n", 0, error.start) + 1
        return unreadable("not UTF-8 text, which TOML is", line=line)
    except OSError as error:
        return unreadable(f"cannot be read: {error.strerror}")
    try:
        document = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        message = re.sub(r" \(at .*\)$", "", error.msg)
        where = f" (column {error.colno})" if getattr(error, "colno", None) else ""
        return unreadable(f"TOML syntax error: {message}{where}", line=error.lineno)
    except RecursionError as error:
        return unreadable(str(error))
    reader = _Reader(str(path), lines_of_keys(text))
    reader.document(document)
    line = reader.line((EXTENDS,))
    return OneFile(reader.layer, reader.bad, reader.problems, reader.parents, line, reader.whole)


def nearest_file(path: Path, written: str | None = None) -> str:
    """Return a hint to the file that was meant; ``written`` is how the file that asks for ``path`` calls it."""
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {str(folder)!r} either"
    names = sorted(p.name for p in folder.glob("*.toml"))
    match = nearest(path.name, names) or (nearest(path.name + ".toml", names) if not path.suffix else "")
    if match:
        return f'did you mean "{(folder if written is None else Path(written).parent) / match}"?'
    return f"{str(folder)!r} has {', '.join(names)}" if names else f"{str(folder)!r} has no .toml file"


class _Reader:
    """Checks a document against the tables."""

    def __init__(self, file: str, lines: dict[tuple[str, ...], int]) -> None:
        self.file, self.lines = file, lines
        self.layer: Layer = {}
        self.bad: Bad = set()
        self.problems: list[Problem] = []
        self.parents: list[str] = []
        self.whole = True

    def document(self, document: dict[str, Any]) -> None:
        for name, value in document.items():
            if name in all_tables():
                self.table(name, value)
            elif name == EXTENDS:
                self.extends(value)
            elif isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
                hint = did_you_mean(name, all_tables()) or f"the tables are {', '.join(all_tables())}"
                self.report((name,), f"[{name}]", "unknown table", hint)
            else:
                self.report((name,), name, "a key outside of any table", _elsewhere(name))

    def extends(self, value: Any) -> None:
        names = value if isinstance(value, list) else [value]
        if all(isinstance(name, str) and name and "\0" not in name for name in names):
            self.parents = names
        else:
            self.whole = False
            self.report((EXTENDS,), EXTENDS, f"found {quote(value)}, expected a file name or a list of file names")

    def table(self, table: str, value: Any) -> None:
        path = tuple(table.split("."))
        if not isinstance(value, dict):
            twice = isinstance(value, list) and value and isinstance(value[0], dict)
            found = f"[[{table}]], a list of tables" if twice else quote(value)
            self.report(path, f"[{table}]", f"found {found}, expected a table")
            return
        keys = all_tables()[table]
        for name, item in value.items():
            if f"{table}.{name}" in all_tables():
                self.table(f"{table}.{name}", item)
            elif name in keys:
                self.key(keys[name], item)
            else:
                self.report((*path, name), f"[{table}] {name}", "unknown key", _hint(table, name))

    def key(self, key: Key, value: Any) -> None:
        path = (*key.table.split("."), key.name)
        texts = value if isinstance(value, list) else [value]
        if any("\0" in text for text in texts if isinstance(text, str)):
            # TOML can write it, and neither a command line nor a path can.
            self.bad.add((key.table, key.name))
            self.report(path, f"[{key.table}] {key.name}", "found a text with the character NUL in it")
            return
        try:
            read = from_toml(key, value)
        except (ValueError, TypeError):
            self.bad.add((key.table, key.name))
            self.report(path, f"[{key.table}] {key.name}", *_mismatch(key, value, quote(value)))
        else:
            self.layer[key.table, key.name] = Setting(read, "file", self.file, self.line(path))

    def report(self, path: tuple[str, ...], key: str, message: str, hint: str = "") -> None:
        self.problems.append(Problem(self.file, key, message, hint, self.line(path)))

    def line(self, path: tuple[str, ...]) -> int | None:
        """Return the line of a key, or of the table that holds it."""
        return next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), None)


def _mismatch(key: Key, value: Any, found: str) -> tuple[str, str]:
    kind = {bool: "", int: "", float: "", str: "", list: "", dict: ""}.get(type(value), f" (a {type(value).__name__})")
    message = f"found {found}{kind}, expected {describe(key.type)}"
    if key.optional and '"none"' not in message:
        message += ' or "none"'
    texts = [choice for choice in choices(key.type) if isinstance(choice, str)]
    return message, did_you_mean(value, texts) if isinstance(value, str) and len(texts) > 1 else ""


def _elsewhere(name: str) -> str:
    """Return a hint to the tables that have such a key."""
    if nearest(name, [EXTENDS]):
        return f'"{EXTENDS}" stands at the top of the file, before the first table'
    owners = [table for table, keys in all_tables().items() if name in keys]
    if owners:
        return "it belongs to " + " or ".join(f"[{table}]" for table in owners)
    names = dict.fromkeys(key for keys in all_tables().values() for key in keys)
    match = nearest(name, names)
    owner = next((table for table, keys in all_tables().items() if match in keys), "")
    return f'did you mean "{match}" of [{owner}]?' if match else ""


SYNONYMS = {"lambda": "weight", "learning_rate": "lr", "batch_size": "local_batch_size", "lambda_": "weight"}
"""What other libraries, or the paper, call a key."""


def _hint(table: str, name: str) -> str:
    """Return the nearest key of a table, one of another table, or else all that the table has."""
    here = [*all_tables()[table], *(t.rpartition(".")[2] for t in all_tables() if t.startswith(f"{table}."))]
    synonym = SYNONYMS.get(name, "")
    if synonym in here:
        return f'did you mean "{synonym}"?'
    return did_you_mean(name, here) or _elsewhere(synonym or name) or f"the keys are {', '.join(here)}"
