"""What a Hugging Face folder's ``config.json`` says that its model computes, compared with a decoder. Free of torch.

Both sides are brought to the same names, those of ``[model.shape]`` where it has one. A key that the file lacks has the
default of its class in transformers; 4 and 5 agree on all that are used here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from nitp_titan.models.flavors import Shape
from nitp_titan.models.hf.families import COMMON, FAMILIES, NO_EXTRAS, PLAIN_ROUTER, SIZES, Computed, Family


class Said(NamedTuple):
    """One value of a ``config.json``."""

    name: str
    """The name that both sides have."""
    key: str
    """The file's key."""
    value: Any


class Difference(NamedTuple):
    """Where file and decoder disagree."""

    said: Said
    ours: Any
    """The decoder's value."""


def computed_by_shape(shape: Shape) -> Computed:
    """Return what one of our own models computes."""
    sparse = shape.num_experts > 0
    dense_layers = shape.n_dense_layers if sparse else shape.n_layers
    computed = {
        "architecture": "Ernie4_5_MoeForCausalLM" if sparse else "LlamaForCausalLM",
        **{name: getattr(shape, name) for name in ("n_layers", "dim", "n_heads", "n_kv_heads", "head_dim")},
        **({"hidden_dim": shape.hidden_dim} if dense_layers else {}),
        **{name: getattr(shape, name) for name in ("vocab_size", "norm_eps", "tie_embeddings")},
        **NO_EXTRAS,
        **rope_facts({"rope_theta": shape.rope_theta}, latent=False),
        "num_experts": shape.num_experts,
    }
    if sparse:
        names = ("top_k", "expert_hidden_dim", "num_shared_experts", "n_dense_layers", "router_score_func")
        computed |= {name: getattr(shape, name) for name in names}
        computed |= {"router_norm": shape.router_norm, **PLAIN_ROUTER}
    return computed


def leading(dense: Iterable[int]) -> int | list[int]:
    """Return how many blocks are dense, where they are the lowest ones; else the blocks themselves."""
    blocks = list(dense)
    return len(blocks) if blocks == list(range(len(blocks))) else blocks


def rope_facts(rope: Mapping[str, Any], *, latent: bool) -> Computed:
    """Return what rotary positions compute.

    Args:
        rope: ``rope_parameters`` of a ``config.json``, with ``rope_theta``.
        latent: whether DeepSeek-V3's attention reads them, which scales its softmax, too.
    """
    facts: Computed = {"rope_theta": rope["rope_theta"]}
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", 1.0)
    if partial not in (None, 1):
        facts["partial_rotary_factor"] = partial
    if kind == "yarn" and isinstance(rope.get("factor"), int | float) and rope["factor"] <= 1:
        kind = "default"  # It stretches nothing.
    facts["rope_type"] = kind
    if kind == "yarn":
        names: tuple[str, ...] = ("factor", "original_max_position_embeddings")
        facts |= {"rope_beta_fast": rope.get("beta_fast") or 32, "rope_beta_slow": rope.get("beta_slow") or 1}
        facts |= {"rope_truncate": rope.get("truncate", True), "rope_attention_factor": _yarn_attention(rope)}
        if latent:
            facts["rope_mscale_all_dim"] = rope.get("mscale_all_dim") or 0
    elif kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    else:
        names = tuple(key for key in rope if key not in ("rope_theta", "rope_type", "type", "partial_rotary_factor"))
    # "default" has no further parameters, whatever stands there.
    return facts | {f"rope_{name}": rope.get(name) for name in names if kind != "default"}


def _yarn_attention(rope: Mapping[str, Any]) -> Any:
    """The factor of queries times keys that transformers derives where none is given."""
    if rope.get("attention_factor") is not None or not isinstance(rope.get("factor"), int | float):
        return rope.get("attention_factor")

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope["factor"]) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1)


def differences(values: Mapping[str, Any], computed: Computed) -> list[Difference]:
    """Return in what a ``config.json`` differs from a decoder; of what only one side has, nothing is said.

    Args:
        values: the file's contents.
        computed: what the decoder computes, all of it or a part.

    Raises:
        ValueError: the file lacks a size, or has a value that is none.
    """
    nested = values.get("text_config")
    if isinstance(nested, dict) and "architecture" not in computed:
        values = nested
    try:
        found = [Difference(said, computed[said.name]) for said in _said(values) if said.name in computed]
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"has a value that is none of its kind: {error}") from error
    return [difference for difference in found if not _same(difference.said.value, difference.ours)]


def _same(one: Any, other: Any) -> bool:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other))
    return math.isclose(one, other, rel_tol=1e-6) if numbers else one == other and type(one) is type(other)


def _said(values: Mapping[str, Any]) -> Iterator[Said]:
    """Yield what the file says, under the names of :data:`Computed`."""
    kind = values.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    named = values.get("architectures")
    if isinstance(named, list) and named:
        yield Said("architecture", "architectures", named[0])
    elif family is not None:
        yield Said("architecture", "model_type", family.architecture)
    if family is None:
        yield Said("architecture", "model_type", kind)
        generic = COMMON | {"n_kv_heads": ("num_key_value_heads",)}
        for name, keys in generic.items():
            yield from (Said(name, key, values[key]) for key in keys if values.get(key) is not None)
        return
    if isinstance(named, list) and named and named[0] != family.architecture:
        yield Said("architecture", "model_type", family.architecture)
    yield from _sizes(values, family)
    fixed = family.fixed | ({} if "sliding_window" in family.fixed else {"sliding_window": _window(values, kind)})
    for name, value in fixed.items():
        yield Said(name, name if name == "sliding_window" else f"{name} of {family.architecture}", value)
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    outside = values.get("rope_theta")
    theta = rope.get("rope_theta", family.theta if outside is None else outside)
    facts = rope_facts(_rope_defaults(values) | dict(rope) | {"rope_theta": theta}, latent=family.latent)
    yield from (Said(name, name, value) for name, value in facts.items())
    if outside is not None and not _same(outside, theta):
        # transformers 4 and 5 would read different ones.
        yield Said("rope_theta", "rope_theta beside its rope_parameters", outside)


def _sizes(values: Mapping[str, Any], family: Family) -> Iterator[Said]:
    found: dict[str, Any] = {}
    for name, keys in family.keys.items():
        key = next((key for key in keys if key in values), keys[0])
        value = values.get(key)
        if value is None and key not in values:
            value = family.defaults.get(name)
        if value is None and name == "n_kv_heads":
            value = found["n_heads"]
        if value is None and name == "head_dim":
            value = found["dim"] // found["n_heads"]
        if value is None and name.startswith("router_groups"):
            value = 1
        if name == "q_lora_rank":
            value = value or 0
        if value is None:
            raise ValueError(f"lacks {key}")
        if name in SIZES and (type(value) is not int or value < 1):
            raise ValueError(f"has {key} = {value!r}, expected a whole number")
        found[name] = value
        yield Said(name, key, value)
    if family.is_dense is not None:
        dense = leading(block for block in range(found["n_layers"]) if family.is_dense(values, block))
        yield Said("n_dense_layers", family.dense_key, dense)


def _window(values: Mapping[str, Any], kind: Any) -> int:
    """The sliding window that some block attends to; 0 where all attend to everything."""
    window = values.get("sliding_window", 4096) if values.get("use_sliding_window") else None
    layers = values.get("layer_types")
    if kind == "qwen3" and isinstance(layers, list):
        return (window or 0) if "sliding_attention" in layers else 0
    if kind == "qwen3" and values.get("max_window_layers", 28) >= values.get("num_hidden_layers", 0):
        return 0
    return window or 0


def _rope_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers takes from elsewhere in the file where the rotary parameters lack it."""
    keys = {"max_position_embeddings": "original_max_position_embeddings", "partial_rotary_factor": ""}
    return {name or key: values[key] for key, name in keys.items() if key in values}
