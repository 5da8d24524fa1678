"""The model that a job names is there."""

from __future__ import annotations

from collections.abc import Iterator

from nitp_titan.job.draft import Draft
from nitp_titan.job.errors import Problem, did_you_mean, one_of, quote
from nitp_titan.job.model_facts import flavors, modules
from nitp_titan.runtime import machine


def check_model(draft: Draft) -> Iterator[Problem]:
    """Module and flavor exist, as far as can be told without importing them."""
    module, flavor = draft.get("model", "module"), draft.get("model", "flavor")
    if module == "flux":
        yield draft.problem("model", "module", 'found "flux", an image model', f"the decoders are {one_of(modules())}")
    elif module in modules():
        known = flavors(module)
        if flavor not in known:
            yield draft.problem(
                "model",
                "flavor",
                f"found {quote(flavor)}, expected {one_of(known)} (the flavors of {module})",
                did_you_mean(flavor, known),
            )
    elif "." in module:
        if not machine.has_module(module):
            hint = f"the built-in ones are {one_of(modules())}"
            yield draft.problem("model", "module", f"found {quote(module)}, a module that cannot be found", hint)
    else:
        yield draft.problem(
            "model",
            "module",
            f"found {quote(module)}, expected {one_of(modules())}, or a dotted path to a module with model_registry",
            did_you_mean(module, modules()),
        )
