"""One lookup for every table of a job file: keys, types, defaults, what they mean; and the check of one value."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nitp_titan.checkpoints.keys import CheckpointKeys
from nitp_titan.data.keys import DataloaderKeys
from nitp_titan.float8.config import Float8Config
from nitp_titan.job.keys import tables
from nitp_titan.job.keys.types import is_list, parse_type
from nitp_titan.models.flavors import Shape
from nitp_titan.models.flex_options import FlexKernelOptions
from nitp_titan.nitp.config import NITPConfig
from nitp_titan.training.faults_config import FaultsConfig

UPSTREAM_SCHEMA = Path(__file__).with_name("upstream_schema.json")

OUR_TABLES: dict[str, type] = {
    "job": tables.JobTable,
    "model": tables.ModelTable,
    "model.shape": Shape,
    "model.flex_kernel_options": FlexKernelOptions,
    "nitp": NITPConfig,
    "float8": Float8Config,
    "faults": FaultsConfig,
    "tokenizer": tables.TokenizerTable,
    "dataloader": DataloaderKeys,
    "optimizer": tables.OptimizerTable,
    "loss": tables.LossTable,
    "activation_checkpoint": tables.ActivationCheckpointTable,
    "validator.dataloader": DataloaderKeys,
}
"""Table -> the dataclass that defines it."""

_ADDED: dict[str, type] = {"checkpoint": CheckpointKeys}
"""Table of upstream's -> the dataclass of keys that ours has beside upstream's."""

# Tables whose keys are all optional: unset, something else decides ([model] flavor, torch).
_OPTIONAL_TABLES = ("model.shape", "model.flex_kernel_options")

# Keys of upstream's tables that mean more in ours, since NITPTrainer.Config has our class there: type and meaning.
_EXTENDED: dict[tuple[str, str], tuple[Any, str]] = {
    ("lr_scheduler", "decay_type"): (
        Literal["linear", "sqrt", "cosine", "exponential"],
        'Curve of the decay; "exponential" falls by a constant factor a step, down to min_lr_factor, which is above 0',
    ),
}

# The order of a resolved file; a table of a later TorchTitan that is not here comes last.
_ORDER = ["job", "model", "model.shape", "model.flex_kernel_options", "nitp", "float8", "faults"]
_ORDER += ["tokenizer", "dataloader"]
_ORDER += [
    "training",
    "optimizer",
    "lr_scheduler",
    "loss",
    "parallelism",
    "activation_checkpoint",
    "compile",
    "checkpoint",
    "metrics",
]
_ORDER += ["validator", "validator.dataloader", "profiler", "comm", "debug", "override"]


@dataclass(frozen=True, slots=True)
class Key:
    """One key of one table."""

    table: str
    name: str
    type: Any
    default: Any
    doc: str
    source: Literal["nitp_titan", "upstream"]

    @property
    def optional(self) -> bool:
        """Whether ``"none"`` unsets it."""
        return type(None) in typing.get_args(self.type)

    @property
    def flag(self) -> bool:
        """Whether ``--table.key`` and ``--table.no-key`` set it."""
        return self.type is bool or (self.optional and bool in typing.get_args(self.type))


@functools.cache
def upstream() -> dict[str, Any]:
    """Return the snapshot of TorchTitan's tables and models that ``nitp_titan.job.snapshot`` writes."""
    return json.loads(UPSTREAM_SCHEMA.read_text(encoding="utf-8"))


@functools.cache
def all_tables() -> dict[str, dict[str, Key]]:
    """Return table -> key name -> key, in the order of a resolved file."""
    found: dict[str, dict[str, Key]] = {}
    for table, keys in upstream()["tables"].items():
        found[table] = {
            name: Key(table, name, parse_type(key["type"]), key["default"], key["doc"], "upstream")
            for name, key in keys.items()
        }
    for table, cls in _ADDED.items():
        found[table] |= _keys_of(table, cls)
    for (table, name), (tp, doc) in _EXTENDED.items():
        found[table][name] = dataclasses.replace(found[table][name], type=tp, doc=doc)
    for table, cls in OUR_TABLES.items():
        keys = _keys_of(table, cls)
        if table in _OPTIONAL_TABLES:
            keys = {name: dataclasses.replace(key, type=key.type | None, default=None) for name, key in keys.items()}
        found[table] = keys
    order = {table: place for place, table in enumerate(_ORDER)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def _keys_of(table: str, cls: type) -> dict[str, Key]:
    hints, docs = typing.get_type_hints(cls), docstrings(cls)
    return {
        field.name: Key(table, field.name, hints[field.name], default_of(field), docs.get(field.name, ""), "nitp_titan")
        for field in dataclasses.fields(cls)
    }


def default_of(field: dataclasses.Field) -> Any:
    """Return the default value of a dataclass field that has one."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def docstrings(cls: type) -> dict[str, str]:
    """Return field -> the first paragraph under it in the source of ``cls`` and its bases, in one line."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        definition = ast.parse(_dedent(inspect.getsource(base))).body[0]
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                paragraph = inspect.cleandoc(str(following.value.value)).split("\n\n")[0]
                docs[statement.target.id] = " ".join(paragraph.split())
    return docs


def _dedent(source: str) -> str:
    indent = len(source) - len(source.lstrip())
    return "\n".join(line[indent:] if not line[:indent].strip() else line for line in source.splitlines())


def _items(word: str) -> list[Any]:
    """Split at commas; ``target={"key": value}`` (of override.imports) is one item, as upstream has it."""
    target, equals, options = word.partition("=")
    if equals and options.startswith("{"):
        return [[target, json.loads(options)]]
    return [item.strip() for item in word.split(",") if item.strip()]


@functools.cache
def _adapter(table: str, name: str) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(all_tables()[table][name].type)


def from_toml(key: Key, value: Any) -> Any:
    """Return a TOML value as the key's type; ``"none"`` is None where the key is optional.

    Raises:
        ValueError: the value is of another type, or none of the choices.
    """
    if value == "none" and key.optional:
        return None
    # Strict JSON rules are TOML's: a whole number is a number too, an array does for a tuple, nothing else converts.
    return _adapter(key.table, key.name).validate_json(json.dumps(value), strict=True)


def from_words(key: Key, words: list[str]) -> Any:
    """Return a command-line option's words as the key's type, the way ``from_toml`` would read them unquoted.

    Raises:
        ValueError: the words do not make a value of the key's type.
    """
    import tomli

    if is_list(key.type) and not (key.optional and words == ["none"]) and not words[0].lstrip().startswith("["):
        return from_toml(key, [item for word in words for item in _items(word)])
    if len(words) != 1:
        raise ValueError("expected one value")
    [word] = words
    readings: list[Any] = [word]
    try:
        readings.append(tomli.loads(f"value = {word}")["value"])
    except tomli.TOMLDecodeError:
        readings.append(word.lower() if word.lower() in ("true", "false") else word)
    for reading in readings:
        try:
            return from_toml(key, reading)
        except (ValueError, TypeError):
            continue
    return _adapter(key.table, key.name).validate_python(word, strict=False)
