"""The plain model of a job, before NITP: ours, TorchTitan's or somebody else's. Imports torch, inside functions."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import JobError, one_of, quote
from nitp_titan.job.model_facts import OURS, ModelFacts, facts_of, modules

if TYPE_CHECKING:
    from torchtitan.protocols.model_spec import ModelSpec


def model_spec(
    module: str, flavor: str, attn_backend: str, *, flex_options: dict[str, int] | None = None, **shape: Any
) -> ModelSpec:
    """Return the plain backbone, without NITP, from ours, TorchTitan's or somebody else's ``model_registry``.

    Args:
        flex_options: ``kernel_options`` of flex attention, over those that the model has.
        shape: the fields of :class:`Shape` in which a model of ours differs from its flavor.
    """
    _prepare()
    if module == OURS:
        from nitp_titan.models.registry import model_registry

        spec = model_registry(flavor, attn_backend=attn_backend, **shape)
    else:
        registry = importlib.import_module(_path(module)).model_registry
        spec = registry(flavor, **({"attn_backend": attn_backend} if takes_backend(module) else {}))
    if flex_options:
        from torchtitan.models.common.attention import FlexAttention

        attentions = [config for _, config, _, _ in spec.traverse(FlexAttention.Config)]
        if not attentions:
            raise ValueError("model.flex_kernel_options: the model has no flex attention that would take them")
        for attention in attentions:
            attention.kernel_options = attention.kernel_options | flex_options
    return spec


def _path(module: str) -> str:
    return module if "." in module else f"torchtitan.models.{module}"


def takes_backend(module: str) -> bool:
    """Whether ``attn_backend`` reaches the models of a module, which is imported."""
    registry = importlib.import_module(_path(module)).model_registry
    parameters = inspect.signature(registry).parameters.values()
    return any(p.name == "attn_backend" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def import_facts(draft: Draft) -> ModelFacts:
    """Import a module that the snapshot does not know, and return the facts of its flavor.

    Raises:
        JobError: there is no such module or flavor, or it is not a decoder.
    """
    module, flavor = draft.get("model", "module"), draft.get("model", "flavor")
    path = _path(module)

    def refuse(key: str, message: str, hint: str = "") -> JobError:
        return JobError([draft.problem("model", key, message, hint)])

    _prepare()
    try:
        imported = importlib.import_module(path)
    except Exception as error:  # somebody else's code
        hint = f"the built-in ones are {one_of(modules())}"
        raise refuse("module", f"{path} cannot be imported: {error}", hint) from error
    if not callable(getattr(imported, "model_registry", None)):
        raise refuse("module", f"found {quote(module)}, which has no function model_registry(flavor)")
    try:
        config = model_spec(module, flavor, draft.get("model", "attn_backend")).model
    except Exception as error:
        named = [value for name, value in vars(imported).items() if name.endswith("_configs")]
        known = list(named[0]) if named and isinstance(named[0], dict) else []
        expected = f", expected {one_of(known)}" if known else ""
        reason = "" if isinstance(error, KeyError) and known else f" ({type(error).__name__}: {error})"
        raise refuse("flavor", f"found {quote(flavor)}{expected}{reason}") from error
    facts = facts_of(config)
    if facts is None:
        raise refuse("module", f"found {quote(module)}, whose {flavor} is not a TorchTitan decoder")
    return facts


def _prepare() -> None:
    from nitp_titan.runtime import prepare

    prepare()
