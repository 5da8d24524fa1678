"""Hugging Face weights that a job starts from, against its model: by their config.json, without importing torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nitp_titan.job.checks.initial import latest_step
from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem, quote
from nitp_titan.job.keys.schema import all_tables
from nitp_titan.job.model_facts import OURS, ModelFacts, facts, flavors, modules
from nitp_titan.models.hf.config_json import Difference, differences
from nitp_titan.models.hf.families import Computed
from nitp_titan.runs.steps import HF_INDEX

CONFIG = "config.json"

# What TorchTitan's readers turn back into plain numbers, by the architecture that has such weights.
_QUANTIZED = {"DeepseekV3ForCausalLM": "fp8", "Ernie4_5_MoeForCausalLM": "fp8"}
_QUANTIZED_KEY = "initial_load_in_hf_quantized"


def folder_of(draft: Draft) -> tuple[str, tuple[str, ...], str] | None:
    """Return table and keys that name the folder which the run's first weights are read from, and its path.

    None where the run reads no such weights: it has none in this format, or goes on from a checkpoint of its own.
    """
    if not draft.get("checkpoint", "enable") or not draft.get("checkpoint", "initial_load_in_hf"):
        return None
    own = Path(draft.get("job", "dump_folder"), draft.get("checkpoint", "folder"))
    if latest_step(own) is not None:
        return None
    path = (draft.get("checkpoint", "initial_load_path") or "").strip()
    if "://" in path:
        return None
    if path:
        return "checkpoint", ("initial_load_path", "initial_load_in_hf"), path
    return "model", ("hf_assets_path",), draft.get("model", "hf_assets_path")


def check_hf_config(draft: Draft) -> Iterator[Problem]:
    """The folder's config.json says what the model computes: every difference is a problem of its own."""
    found = folder_of(draft)
    if found is None or not found[2] or not Path(found[2], CONFIG).is_file():
        return
    table, keys, path = found
    file = Path(path, CONFIG)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("is not an object")
    except (OSError, ValueError) as error:
        yield draft.problem(table, keys, f"{file} cannot be read: {error}")
        return
    model = draft.facts()
    yield from _check_quantization(draft, model, file, values)
    try:
        unequal = differences(values, _comparable(model))
    except ValueError as error:
        yield draft.problem(table, keys, f"{file} {error}")
        return
    elsewhere = _computed_elsewhere(values) if unequal else ""
    is_ours = draft.get("model", "module") == OURS and all(d.said.name != "architecture" for d in unequal)
    for difference in unequal:
        (name, key, said), ours = difference
        message = f"{file} has {key} = {quote(said)}, the job's model has {name} = {quote(ours)}"
        yield draft.problem(table, keys, message, elsewhere or (_as_shape(difference) if is_ours else ""))


def _comparable(model: ModelFacts) -> Computed:
    """What of a model can be compared; of one that no stock architecture has the weights of, its sizes."""
    if model.computed is not None:
        return model.computed
    sizes = {"n_layers": model.n_layers, "dim": model.dim, "n_heads": model.n_heads, "vocab_size": model.vocab_size}
    return {name: value for name, value in sizes.items() if value is not None}


def _as_shape(difference: Difference) -> str:
    """A hint how a model of ours computes what the file says; empty where no key of its shape changes that."""
    name, value = difference.said.name, difference.said.value
    alike = type(value) is type(difference.ours) or {type(value), type(difference.ours)} == {int, float}
    return f"set model.shape.{name} = {quote(value)}" if alike and name in all_tables()["model.shape"] else ""


def _computed_elsewhere(values: dict[str, Any]) -> str:
    """A hint which flavor computes exactly what the file says; empty where none does."""
    for module in modules():
        for flavor in flavors(module):
            model = facts(module, flavor)
            if model is not None and model.computed is not None and not differences(values, model.computed):
                return f"model.module = {quote(module)} with model.flavor = {quote(flavor)} computes what it says"
    return ""


def _check_quantization(draft: Draft, model: ModelFacts, file: Path, values: dict[str, Any]) -> Iterator[Problem]:
    """Quantized weights are read as such, and others are not."""
    asked = draft.get("checkpoint", _QUANTIZED_KEY)
    quantization = values.get("quantization_config")
    method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else None
    if asked and method is None:
        yield draft.problem("checkpoint", _QUANTIZED_KEY, f"found true, but {file} has no quantization_config")
    elif method is not None and model.computed is not None:
        readable = _QUANTIZED.get(model.computed["architecture"])
        if method != readable:
            expected = f"{quote(readable)} or unquantized ones" if readable else "unquantized ones"
            message = f"{file} says that its weights are quantized ({quote(method)}), expected {expected}"
            yield draft.problem("checkpoint", "initial_load_in_hf", message)
        elif not asked:
            message = f"found false, expected true: {file} says that its weights are quantized ({quote(method)})"
            yield draft.problem("checkpoint", _QUANTIZED_KEY, message)


def check_hf_files(draft: Draft) -> Iterator[Problem]:
    """The weights are whole and have a config.json; they may be still to be downloaded when a job is checked.

    :mod:`nitp_titan.job.checks.initial` says it where there are none.
    """
    found = folder_of(draft)
    if found is None or not any(Path(found[2]).glob("*.safetensors")):
        return
    table, keys, path = found
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        message = f"found {quote(path)}, which has no {CONFIG} to compare the model with"
        yield draft.problem(table, keys, message, f"put the {CONFIG} of its weights there")
    for name in _lacking_files(folder):
        yield draft.problem(table, keys, f"found {quote(path)}, whose {HF_INDEX} names {name}, which is not there")


def _lacking_files(folder: Path) -> list[str]:
    try:
        files = json.loads((folder / HF_INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # None, or one that the reader of the weights will speak of.
        return []
    return sorted(name for name in set(files) if not (folder / str(name)).is_file())


def notes(draft: Draft) -> Iterator[str]:
    """Yield a line where a config.json is compared in part."""
    if folder_of(draft) is not None and draft.facts().computed is None:
        module = draft.get("model", "module")
        yield (
            f"of the Hugging Face folder's {CONFIG} only sizes are compared: nitp_titan does not know what {module} is "
            "in transformers"
        )
