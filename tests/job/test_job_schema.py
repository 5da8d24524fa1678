"""The tables: the snapshot is the installed TorchTitan's, and every key can be set from both sides."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any, Literal

import pytest
import tomli_w

from nitp_titan.job import snapshot
from nitp_titan.job.keys.schema import OUR_TABLES, UPSTREAM_SCHEMA, Key, all_tables, from_toml
from nitp_titan.job.keys.types import describe, parse_type, render_type
from nitp_titan.job.reading.command_line import read_command_line
from nitp_titan.job.reading.extends import read_file
from nitp_titan.models.flavors import Shape

KEYS = [key for keys in all_tables().values() for key in keys.values()]


def test_snapshot_is_the_installed_torchtitan():
    now, then = snapshot.take(), json.loads(UPSTREAM_SCHEMA.read_text())
    for module, flavors in then["models"].items():
        if None in flavors.values():  # needs a package that a machine may have or not: the names are compared
            now["models"][module] = dict.fromkeys(now["models"][module])
    assert now == then, "run python -m nitp_titan.job.snapshot"


def test_every_field_of_the_trainer_is_a_table():
    from nitp_titan.training.trainer import NITPTrainer

    fields = {field.name for field in dataclasses.fields(NITPTrainer.Config)}
    covered = set(all_tables()) - {"job", "model", "model.shape", "model.flex_kernel_options", "validator.dataloader"}
    assert fields - {"model_spec", "hf_assets_path", "dump_folder"} == covered


def test_types_are_those_of_the_trainers_own_configurations():
    """Our trainer has subclasses of some of upstream's configurations, whose keys may take more."""
    from nitp_titan.training.trainer import NITPTrainer

    ours = []
    for field in dataclasses.fields(NITPTrainer.Config):
        if field.name in all_tables() and field.name not in OUR_TABLES:
            config = field.default_factory()
            ours += [field.name] * type(config).__module__.startswith("nitp_titan")
            hints = typing.get_type_hints(type(config))
            for key in all_tables()[field.name].values():
                assert (key.type, key.default) == (hints[key.name], getattr(config, key.name)), key
    assert "lr_scheduler" in ours


def test_shape_table_is_the_shape_with_every_key_optional():
    hints = typing.get_type_hints(Shape)
    assert {key.name: key.type for key in all_tables()["model.shape"].values()} == {
        field.name: hints[field.name] | None for field in dataclasses.fields(Shape)
    }


def test_dataloader_table_is_the_loaders():
    from nitp_titan.data.loader import TextDataLoader

    config = TextDataLoader.Config()
    for name in ("dataloader", "validator.dataloader"):
        table = all_tables()[name]
        hints = typing.get_type_hints(type(config))
        assert {key.name: (key.type, key.default) for key in table.values()} == {
            field.name: (hints[field.name], getattr(config, field.name)) for field in dataclasses.fields(config)
        }


def test_every_key_of_ours_is_documented():
    for table in OUR_TABLES:
        assert [key.name for key in all_tables()[table].values() if not key.doc] == []


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key.table}.{key.name}")
def test_type_expression_and_default(key: Key):
    assert parse_type(render_type(key.type)) == key.type
    assert "typing" not in describe(key.type)
    assert from_toml(key, "none" if key.default is None else key.default) == key.default


def sample(tp: Any, default: Any) -> Any:
    """Return a value of type ``tp`` that is not the default."""
    if typing.get_origin(tp) is Literal:
        return next((choice for choice in typing.get_args(tp) if choice != default), default)
    if tp is bool:
        return not default
    if typing.get_origin(tp) is list:
        [inner] = typing.get_args(tp)
        return [sample(inner, None)] * 2
    if typing.get_args(tp):
        return sample(typing.get_args(tp)[0], default)
    return {int: 1234, float: 0.125, str: "some text"}[tp]


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key.table}.{key.name}")
def test_key_is_set_by_file_and_command_line(key: Key, tmp_path):
    value = sample(key.type, key.default)
    only_choice = render_type(key.type).count(",") == 0 and "Literal" in render_type(key.type)
    assert value != key.default or only_choice

    document: dict[str, Any] = {key.name: value}
    for part in reversed(key.table.split(".")):
        document = {part: document}
    path = tmp_path / "job.toml"
    path.write_text(tomli_w.dumps(document))
    layer, bad, problems, _ = read_file(path)
    assert (problems, bad) == ([], set())
    assert {k: s.value for k, s in layer.items()} == {(key.table, key.name): value}

    option = f"--{key.table}.{key.name}"
    if key.type is bool:
        arguments = [[option if value else f"--{key.table}.no-{key.name}"], [option, str(value)], [f"{option}={value}"]]
    elif isinstance(value, list):
        arguments = [[option, tomli_w.dumps({"v": value}).partition("=")[2].replace("\n", "")]]
        if isinstance(value[0], str):
            arguments += [[option, ",".join(value)], [option, *value]]
    else:
        arguments = [[option, str(value)], [f"{option}={value}"]]
    for words in arguments:
        layer, bad, problems = read_command_line(words)
        assert (problems, bad) == ([], set())
        assert {k: s.value for k, s in layer.items()} == {(key.table, key.name): value}
