"""Writes ``upstream_schema.json``: TorchTitan's tables and models as the checks of a job file need them.

With it a job is checked without importing torch and torchtitan (seconds). After an update of TorchTitan:
``python -m nitp_titan.job.snapshot``; a test fails while the file is older than the installed release.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import typing
from pathlib import Path
from typing import Any

from nitp_titan.job.keys.schema import OUR_TABLES, UPSTREAM_SCHEMA, docstrings
from nitp_titan.job.keys.types import render_type
from nitp_titan.job.model_facts import facts_of

# Named by our own tables: job.dump_folder, model.hf_assets_path, model.module and model.flavor.
_NOT_TABLES = ("model_spec", "hf_assets_path", "dump_folder")
# An image model: no next token.
_NOT_DECODERS = ("flux",)


def take() -> dict[str, Any]:
    """Return the snapshot of the installed TorchTitan."""
    return {"torchtitan": importlib.metadata.version("torchtitan"), "tables": _tables(), "models": _models()}


def _tables() -> dict[str, Any]:
    from torchtitan.trainer import Trainer

    tables = {}
    for field in dataclasses.fields(Trainer.Config):
        if field.name not in _NOT_TABLES and field.name not in OUR_TABLES:
            tables[field.name] = _keys(field.name, field.default_factory())
    return tables


def _keys(table: str, config: Any) -> dict[str, Any]:
    cls = type(config)
    hints, docs = typing.get_type_hints(cls, include_extras=True), docstrings(cls)
    keys = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        # Annotated here means "not on the command line": objects that only Python code can give.
        if typing.get_origin(hint) is typing.Annotated or f"{table}.{field.name}" in OUR_TABLES:
            continue
        doc = docs.get(field.name, "").split(". ")[0].rstrip(".")
        keys[field.name] = {"type": render_type(hint), "default": getattr(config, field.name), "doc": doc}
    return keys


def _models() -> dict[str, Any]:
    from torchtitan.models import _supported_models

    models: dict[str, Any] = {}
    for module in sorted(_supported_models.difference(_NOT_DECODERS)):
        models[module] = dict.fromkeys(_flavors(module))
        try:
            registry = importlib.import_module(f"torchtitan.models.{module}").model_registry
        except ImportError:  # needs a package that is not installed: the flavors have names and no figures
            continue
        for flavor in models[module]:
            facts = facts_of(registry(flavor, attn_backend="flex").model)
            models[module][flavor] = dataclasses.asdict(facts) if facts else None
    return models


def _flavors(module: str) -> list[str]:
    """Read the keys of the module's ``*_configs`` dictionary from its source."""
    spec = importlib.util.find_spec(f"torchtitan.models.{module}")
    assert spec is not None
    assert spec.origin is not None
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            [target] = node.targets
            if isinstance(target, ast.Name) and target.id.endswith("_configs"):
                return [ast.literal_eval(key) for key in node.value.keys if key is not None]
    raise AssertionError(f"torchtitan.models.{module} has no dictionary of configurations")


def main() -> None:
    """Write the snapshot beside this file."""
    from nitp_titan.runtime import prepare

    prepare()
    UPSTREAM_SCHEMA.write_text(json.dumps(take(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {UPSTREAM_SCHEMA}")


if __name__ == "__main__":
    main()
