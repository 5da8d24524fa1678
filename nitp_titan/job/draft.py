"""A job on its way: the layers merged so far, and what is known to be wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nitp_titan.data.errors import shortened
from nitp_titan.job.errors import COMMAND_LINE, Problem, quote
from nitp_titan.job.model_facts import ModelFacts


@dataclass(frozen=True, slots=True)
class Setting:
    """A value and where it comes from."""

    value: Any
    source: str
    """"command line", "file", "flavor", "nitp_titan" or "upstream"."""
    where: str = ""
    """Path of the file, for a value from one."""
    line: int | None = None


Layer = dict[tuple[str, str], Setting]
"""(table, key) -> setting, for the keys that one source sets."""


class Unknown(Exception):
    """A check asked for a value that is already known to be wrong; it has nothing to add."""


@dataclass
class Draft:
    """Merged settings. A check reads them with :meth:`get` and reports with :meth:`problem`."""

    file: str
    world_size: int
    settings: Layer = field(default_factory=dict)
    bad: set[tuple[str, str]] = field(default_factory=set)
    """Keys whose value was wrong: what stands in ``settings`` is only the default."""
    model: ModelFacts | None = None
    notes: list[str] = field(default_factory=list)
    base: Layer = field(default_factory=dict)
    """Every key without file and command line: TorchTitan's defaults, nitp_titan's and the flavor's."""
    replaced: Layer = field(default_factory=dict)
    """What stood where :meth:`replace` has put something else."""

    def get(self, table: str, key: str) -> Any:
        """Return a value.

        Raises:
            Unknown: the value that was given is wrong.
        """
        if (table, key) in self.bad:
            raise Unknown
        return self.settings[table, key].value

    def table(self, table: str) -> dict[str, Any]:
        """Return a whole table."""
        return {key: self.get(name, key) for name, key in self.settings if name == table}

    def facts(self) -> ModelFacts:
        """Return the facts of the model.

        Raises:
            Unknown: which model it is, or what it looks like, is not known.
        """
        if self.model is None:
            raise Unknown
        return self.model

    def compiles_blocks(self) -> bool:
        """Whether the model's blocks are compiled."""
        return self.get("compile", "enable") and "model" in self.get("compile", "components")

    def is_default(self, table: str, key: str) -> bool:
        """Whether neither file, command line nor flavor sets the key."""
        return self.settings[table, key].source in ("nitp_titan", "upstream")

    def is_written(self, table: str, key: str) -> bool:
        """Whether file or command line sets the key."""
        return self.settings[table, key].source in ("file", "command line")

    def derive(self, table: str, key: str, value: Any) -> None:
        """Give a default of nitp_titan's to a key that nobody has set."""
        if self.is_default(table, key):
            self.replace(table, key, value)

    def replace(self, table: str, key: str, value: Any) -> None:
        """Put a value of nitp_titan's in a setting's place."""
        self.replaced.setdefault((table, key), self.settings[table, key])
        self.settings[table, key] = Setting(value, "nitp_titan")

    def restore(self) -> None:
        """Undo what :meth:`derive` and :meth:`replace` have done, notes included."""
        self.settings.update(self.replaced)
        self.replaced.clear()
        self.notes.clear()

    def problem(self, table: str, key: str | Iterable[str], message: str, hint: str = "") -> Problem:
        """Return a problem with a key; of several keys, with the first that the user, else the flavor, sets."""
        keys = [key] if isinstance(key, str) else list(key)
        by_flavor = next((k for k in keys if not self.is_default(table, k)), keys[0])
        name = next((k for k in keys if self.is_written(table, k)), by_flavor)
        setting = self.settings[table, name]
        if setting.source == "command line":
            return Problem(COMMAND_LINE, f"--{table}.{name}", message, hint)
        default = "" if setting.source == "file" else f" (default of {setting.source})"
        return Problem(setting.where or self.file, f"[{table}] {name}{default}", message, hint, setting.line)


Check = Callable[[Draft], Iterator[Problem]]


def run_checks(draft: Draft, checks: Iterable[Check]) -> Iterator[Problem]:
    """Yield what every check finds; one that needs a value known to be wrong stops there.

    A path that the operating system does not take, because it is too long for example, is a problem of its own.
    """
    for check in checks:
        try:
            yield from check(draft)
        except Unknown:
            continue
        except OSError as error:
            yield _unusable(draft, str(error.filename), error.strerror or str(error))


def _unusable(draft: Draft, path: str, reason: str) -> Problem:
    """Return the problem of a path that the operating system does not take, at the setting that it comes from."""
    parts = set(Path(path).parts)
    written = {key: setting.value for key, setting in draft.settings.items() if draft.is_written(*key)}
    texts = {key: value for key, value in written.items() if isinstance(value, str) and value}
    suspects = [key for key, value in texts.items() if parts.issuperset(Path(value).parts)]
    if suspects:
        name = max(suspects, key=lambda key: len(texts[key]))
        return draft.problem(*name, f"found {quote(shortened(texts[name]))}: {reason}")
    return Problem(draft.file, "", f"{reason}: {quote(shortened(path))}")
