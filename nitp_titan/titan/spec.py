"""NITP around any TorchTitan decoder: a ``ModelSpec`` in, its NITP twin out.

The twin has the decoder's own parameters and forward pass, and a projector (:mod:`nitp_titan.titan.twin` says what it
computes). Here it is configured, sharded, compiled and kept out of what is exported.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import spmd_types as spmd
import torch
from torch import nn
from torchtitan.config import ParallelismConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.config_utils import make_ffn_config
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.decoder_sharding import dense_activation_placement, set_dense_ffn_sharding
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter
from torchtitan.tools.utils import set_default_dtype

from nitp_titan.nitp.chunked_sum import ChunkedSum, Implementation
from nitp_titan.nitp.config import CHUNK_TOKENS, PROJECTOR_PREFIX, NITPConfig, has_projector
from nitp_titan.nitp.objective import Projector
from nitp_titan.nitp.sequence_shards import SequenceShards
from nitp_titan.titan.loss_head import loss_head_config
from nitp_titan.titan.retyped import retyped
from nitp_titan.titan.twin import NITPDecoder


@functools.cache
def _twin_class(base: type[Decoder]) -> Any:
    """Return the NITP class of a decoder class; one for all its configurations."""

    class Twin(NITPDecoder, base):
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            nitp: NITPConfig
            target_layer: int
            projector: FeedForward.Config | None

            @property
            def projector_tokens(self) -> int:
                """Tokens that the projector takes at a time."""
                chunk_tokens = self.lm_head.chunked_sum.chunk_tokens
                return self.nitp.projector_tokens(chunk_tokens, dim=self.dim, vocab_size=self.vocab_size)

            def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
                base.Config.update_from_config(self, config=config, **kwargs)
                if self.projector is not None:
                    # Its input is what lm_head sees: gathered over the sequence, replicated over tensor parallelism.
                    # Its output is sharded as the target is.
                    set_dense_ffn_sharding(
                        self.projector,
                        attn_x_layout=dense_activation_placement(tp=spmd.R),
                        enable_sp=config.parallelism.enable_sequence_parallel,
                    )

    Twin.__name__ = Twin.__qualname__ = f"NITP[{base.__name__}]"
    return Twin


class ProjectorModule(FeedForward):
    """The method's :class:`nitp_titan.nitp.objective.Projector` in a TorchTitan module of the same parameters.

    As such it is sharded, compiled, converted to float8 and counted like any feed-forward; what it computes is written
    in the method's room alone.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(FeedForward.Config):
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Projector.forward(self, x)


def _projector_config(dim: int, nitp: NITPConfig) -> FeedForward.Config | None:
    """Return the projector's configuration; None where training has none.

    The paper does not say how it is initialized: normal with standard deviation 0.02, as the blocks are.
    """
    if not has_projector(nitp):
        return None
    init = {"weight": partial(nn.init.normal_, std=0.02)}
    hidden = nitp.projector_ratio * dim
    plain = make_ffn_config(dim=dim, hidden_dim=hidden, w1_param_init=init, w2w3_param_init=init)
    return retyped(plain, ProjectorModule.Config)


def _parallelize(model: nn.Module, *, stock: Callable, **kwargs: Any) -> nn.Module:
    """Compile what NITP adds, then do what the decoder's own function does (which shards the whole model).

    ``model`` may be one pipeline stage, without projector and unembedding.
    """
    assert isinstance(model, NITPDecoder)
    model.sequence = _sequence_shards(kwargs["parallel_dims"], kwargs["parallelism"])
    if model.lm_head is None:
        model.projector = None
    elif model.projector is None and model.config.projector is not None:
        # TorchTitan's pipelining keeps the modules that it knows by name: the last stage's is built again.
        with torch.device("meta"), set_default_dtype(next(model.parameters()).dtype):
            model.projector = model.config.projector.build()
    compile_config = kwargs["compile_config"]
    model.compile_early = frozenset({True, False}) if compile_config.enable else frozenset()
    if compile_config.enable and "model" in compile_config.components and model.projector is not None:
        model.projector.compile(backend=compile_config.backend, fullgraph=True)

    if compile_config.enable and "loss" in compile_config.components and model.lm_head is not None:
        model.lm_head.compile_loss(compile_config.backend)
        model.compile_nitp_loss(compile_config.backend)
    return stock(model, **kwargs)


def _sequence_shards(parallel_dims: ParallelDims, parallelism: ParallelismConfig) -> SequenceShards:
    context = parallel_dims.cp
    tensor = parallel_dims.tp if parallelism.enable_sequence_parallel else 1
    meshes = [name for name, degree in (("cp", context), ("tp", tensor)) if degree > 1]
    if not meshes:
        return SequenceShards()
    mesh = parallel_dims.get_mesh(meshes)
    if len(meshes) > 1:
        mesh = mesh._flatten()
    return SequenceShards(
        context=context,
        tensor=tensor,
        head_tail=context > 1 and parallelism.context_parallel_load_balancer == "headtail",
        rank=mesh.get_local_rank(),
        group=mesh.get_group(),
    )


@functools.cache
def _backbone_adapter(base: type[BaseStateDictAdapter]) -> type[BaseStateDictAdapter]:
    class BackboneAdapter(base):
        """The decoder's own adapter, for the backbone alone: what leaves has no projector."""

        def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
            return super().to_hf({k: v for k, v in state_dict.items() if not k.startswith(PROJECTOR_PREFIX)})

    return BackboneAdapter


def backbone_config(config: Any) -> Any:
    """Return a decoder's configuration without NITP; ``config`` itself where it has none."""
    if not issubclass(type(config)._owner, NITPDecoder):
        return config
    stock = type(config).__bases__[0]
    return stock(**{field.name: getattr(config, field.name) for field in dataclasses.fields(stock)})


def nitp_model_spec(
    spec: ModelSpec, nitp: NITPConfig, *, chunk_tokens: int = CHUNK_TOKENS, implementation: Implementation = "fast"
) -> ModelSpec:
    """Return the NITP twin of a TorchTitan decoder's ``ModelSpec``; ``spec`` itself where NITP is off.

    The twin has the backbone's parameters under the same names and with the same initial values for a seed, and
    those of ``projector``. ``spec`` is left as it was.

    Args:
        spec: any TorchTitan decoder's: llama3, qwen3, deepseek_v3, this package's own.
        nitp: the options.
        chunk_tokens: tokens whose logits exist at a time; the projector takes as many as need no more memory.
        implementation: of both losses, "fast" or "reference" (see :mod:`nitp_titan.nitp.chunked_sum`).

    Raises:
        ValueError: the model is no decoder, has multi-token-prediction heads, or the target layer is beyond its depth.
    """
    if not nitp.enable:
        return spec
    stock = spec.model
    owner = type(stock)._owner
    if not isinstance(stock, Decoder.Config) or owner is None:
        raise ValueError(f"NITP needs a TorchTitan decoder; {spec.name} {spec.flavor} is a {type(stock).__qualname__}")
    if issubclass(owner, NITPDecoder):
        raise ValueError(f"{spec.name} {spec.flavor} is an NITP twin already")
    if getattr(stock, "mtp_layers", None):
        raise ValueError(f"NITP does not work with multi-token-prediction heads, which {spec.name} {spec.flavor} has")

    # A copy, since TorchTitan writes a run's sequence length and sharding into the configuration that it builds.
    stock = copy.deepcopy(stock)
    twin = retyped(
        stock,
        _twin_class(owner).Config,
        lm_head=loss_head_config(stock.lm_head, ChunkedSum(chunk_tokens, implementation)),
        nitp=nitp,
        target_layer=nitp.target_layer_of(len(stock.layers)),
        projector=_projector_config(stock.dim, nitp),
    )
    adapter = spec.state_dict_adapter
    return dataclasses.replace(
        spec,
        model=twin,
        parallelize_fn=partial(_parallelize, stock=spec.parallelize_fn),
        state_dict_adapter=_backbone_adapter(adapter) if adapter is not None else None,
    )
