"""Our configuration of a job as TorchTitan's own: its trainer, metrics, schedule, experts, rotary positions
and loss.

The shapes, the attention kernel, precision, layout and optimizer are the job's, so that both train the same model.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import Any

from torchtitan.config import Configurable
from torchtitan.models.common import RoPE
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from nitp_titan.training.trainer import NITPTrainer


def stock_config(config: NITPTrainer.Config) -> Trainer.Config:
    """Return what ``config``, which has NITP off, is in TorchTitan's own terms.

    Raises:
        ValueError: NITP is on, or a component of ours has no counterpart there.
    """
    if config.nitp.enable:
        raise ValueError("the stock variant trains without NITP: set nitp.enable = false")
    assert config.model_spec is not None
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(Trainer.Config)}
    del values["validator"]  # reads data with our loader; a benchmark does not validate
    kept = {"model_spec", "dataloader", "tokenizer"}
    values = {name: value if name in kept else _upstream(value) for name, value in values.items()}
    values["model_spec"] = _stock_spec(config.model_spec)
    return Trainer.Config(**values)


def _stock_spec(spec: ModelSpec) -> ModelSpec:
    spec = dataclasses.replace(spec, model=copy.deepcopy(spec.model))
    for kind in (GroupedExperts.Config, RoPE.Config):
        for _, config, parent, attribute in list(spec.traverse(kind)):
            assert parent is not None
            assert isinstance(attribute, str)
            setattr(parent, attribute, _upstream(config))
    return spec


def _upstream(config: Any) -> Any:
    """A component's configuration, as that of the TorchTitan class that ours derives from."""
    if not isinstance(config, Configurable.Config) or _is_upstream(type(config)._owner):
        return config
    owner = type(config)._owner
    assert owner is not None
    base = next((cls for cls in owner.__mro__ if _is_upstream(cls) and "Config" in vars(cls)), None)
    if base is None or inspect.isabstract(base):
        raise ValueError(f"{owner.__qualname__} has no counterpart in TorchTitan")
    return base.Config(**{field.name: getattr(config, field.name) for field in dataclasses.fields(base.Config)})


def _is_upstream(cls: type | None) -> bool:
    return cls is not None and cls.__module__.startswith("torchtitan.")
