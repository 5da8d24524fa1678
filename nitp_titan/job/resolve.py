"""From the layers to a job: command line over file over flavor over nitp_titan's defaults over TorchTitan's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nitp_titan.job import defaults
from nitp_titan.job.checks import hf_weights, idle, initial, schedule
from nitp_titan.job.checks.all import CHECKS, MACHINE_CHECKS
from nitp_titan.job.checks.model import check_model
from nitp_titan.job.checks.shape import check_shape
from nitp_titan.job.checks.unread import unread
from nitp_titan.job.draft import Draft, Layer, Setting, Unknown, run_checks
from nitp_titan.job.errors import JobError, Problem
from nitp_titan.job.job import Job
from nitp_titan.job.keys.schema import all_tables, from_toml
from nitp_titan.job.layout import Layout
from nitp_titan.job.model_facts import OURS, ModelFacts, facts, facts_of_shape
from nitp_titan.job.reading.command_line import read_command_line
from nitp_titan.job.reading.extends import ReadFile, read_file
from nitp_titan.job.shape import drop_unchanged, shape_of_draft
from nitp_titan.models.flavors import FLAVORS

DOUBTS = (idle.idle_doubts, idle.profile_doubts, schedule.doubts, schedule.resume_doubts)


def merge(file: str | Path | None, overrides: list[str], world_size: int) -> tuple[Draft, list[Problem]]:
    """Merge defaults, flavor, file and command line.

    Args:
        file: the job file; None for the defaults and the command line alone.
        overrides: ``--table.key value`` words.
        world_size: ranks of the run.

    Returns:
        The draft, without settings where not all of the file can be read, and what is wrong with the words of both.
    """
    read = read_file(file) if file is not None else ReadFile({}, set(), [], whole=True)
    from_words, bad_words, word_problems = read_command_line(overrides)
    problems = [*read.problems, *word_problems]
    draft = Draft(str(file) if file is not None else "defaults", world_size)
    if not read.whole:
        # What the rest is to agree with is not known.
        return draft, problems
    draft.bad = (read.bad - from_words.keys()) | bad_words
    defaults_layer = _defaults()
    for layer in (defaults_layer, read.layer, from_words):
        draft.settings.update(layer)
    flavor_layer = _flavor_layer(draft)
    draft.base = defaults_layer | flavor_layer
    draft.settings.update({key: s for key, s in flavor_layer.items() if draft.is_default(*key)})
    return draft, problems


def resolve(
    file: str | Path | None, overrides: list[str], world_size: int, *, for_training: bool = False
) -> tuple[Draft, list[Problem]]:
    """Merge the layers and check the result as far as that goes without importing the model.

    Args:
        for_training: also check what the run needs of this machine; the others are :func:`merge`'s.

    Returns:
        The draft, and everything that is wrong with it.
    """
    draft, problems = merge(file, overrides, world_size)
    if not draft.settings:
        return draft, problems
    if unknown := list(run_checks(draft, [check_model])):
        # What the flavor would have set is as unknown as the flavor.
        draft.bad |= {("model", "module"), ("model", "flavor")}
        draft.bad |= {key for key in _keys_of_flavors() if draft.is_default(*key)}
    drop_unchanged(draft)
    misshapen = list(run_checks(draft, [check_shape]))
    problems += unknown + misshapen
    draft.model = None if misshapen else _facts(draft)
    defaults.derive(draft)
    problems += run_checks(draft, CHECKS)
    if for_training:
        problems += run_checks(draft, MACHINE_CHECKS)
    return draft, problems


def _defaults() -> Layer:
    layer = {}
    for table, keys in all_tables().items():
        for name, key in keys.items():
            layer[table, name] = Setting(key.default, key.source)
    for table, values in defaults.STATIC.items():
        for name, value in values.items():
            layer[table, name] = Setting(value, "nitp_titan")
    return layer


def _flavor_layer(draft: Draft) -> Layer:
    module, flavor = (draft.settings["model", key].value for key in ("module", "flavor"))
    if module != OURS or flavor not in FLAVORS:
        return {}
    return {
        (table, name): Setting(from_toml(all_tables()[table][name], value), "flavor")
        for table, values in FLAVORS[flavor].job_defaults.items()
        for name, value in values.items()
    }


def _keys_of_flavors() -> set[tuple[str, str]]:
    defaults_of = [flavor.job_defaults for flavor in FLAVORS.values()]
    return {(table, key) for tables in defaults_of for table, keys in tables.items() for key in keys}


def _facts(draft: Draft) -> ModelFacts | None:
    try:
        shape = shape_of_draft(draft)
        return facts_of_shape(shape) if shape else facts(draft.get("model", "module"), draft.get("model", "flavor"))
    except Unknown:
        return None


def load_job(file: str | Path | None, overrides: list[str], world_size: int, *, for_training: bool = False) -> Job:
    """Read, merge and check a job. Torch is imported only for a model that is neither ours nor in the snapshot.

    Args:
        file: the job file; None for the defaults and the command line alone.
        overrides: ``--table.key value`` words of the command line.
        world_size: ranks of the run.
        for_training: missing assets and a missing GPU are errors, otherwise ``Job.warnings``.

    Raises:
        JobError: with every problem that was found.
    """
    draft, problems = resolve(file, overrides, world_size, for_training=for_training)
    if problems:
        raise JobError(problems)
    of_module = []
    if draft.model is None:
        from nitp_titan.job.backbone import import_facts, takes_backend

        draft.model = import_facts(draft)
        if draft.is_written("model", "attn_backend") and not takes_backend(draft.get("model", "module")):
            of_module = ["model.attn_backend is ignored: the module's model_registry does not take it"]
        defaults.derive(draft)
        if problems := list(run_checks(draft, CHECKS)):
            raise JobError(problems)
    warnings = list(run_checks(draft, MACHINE_CHECKS)) if not for_training else []
    switched_off, never_on = unread(draft, defaults.derive)
    doubts = [*of_module, *never_on, *(line for rule in DOUBTS for line in rule(draft))]
    return Job(
        file=draft.file,
        tables=_by_table(draft, "value"),
        sources=_by_table(draft, "source"),
        overrides=tuple(overrides),
        layout=Layout.of(draft),
        model=draft.model,
        notes=(*draft.notes, *initial.notes(draft), *hf_weights.notes(draft), *switched_off, *doubts),
        doubts=tuple(doubts),
        warnings=tuple(warnings),
    )


def _by_table(draft: Draft, attribute: str) -> Mapping[str, Mapping[str, Any]]:
    tables: dict[str, dict[str, Any]] = {table: {} for table in all_tables()}
    for (table, key), setting in draft.settings.items():
        tables[table][key] = getattr(setting, attribute)
    return MappingProxyType({table: MappingProxyType(values) for table, values in tables.items()})
