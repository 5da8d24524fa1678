"""NITP around any TorchTitan decoder: a ``ModelSpec`` in, its NITP twin out.

The twin runs the decoder's own forward pass. It adds the projector, keeps the residual stream after the target block
and, where it is given labels, returns the two loss sums of the batch instead of logits:

    tokens -> blocks 1..k -> z -> blocks k+1..N -> final norm -> h -> unembedding  -> sum of cross-entropies
                                                                 h -> projector -> p, against z shifted left -> NITP sum

Without labels it is the plain backbone, which is what inference sees.
"""

# Shape suffixes: B = batch, L = sequence, D = model dim

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import spmd_types as spmd
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torchtitan.models.common.config_utils import make_ffn_config
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.decoder_sharding import dense_activation_placement, set_dense_ffn_sharding
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.module import ModuleDict
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

from nitp_titan.linear_cross_entropy import loss_head_config
from nitp_titan.nitp_config import NITPConfig
from nitp_titan.objective import nitp_loss, pair_mask, shift_left

PROJECTOR_PREFIX = "projector."
"""How the names of the projector's parameters begin: ``projector.w1.weight`` and so on."""


class TappedBlocks(ModuleDict):
    """A decoder's blocks, whose iteration can also keep the residual stream between two of them.

    Every TorchTitan decoder runs ``for layer in self.layers.values(): h = layer(h, ...)``. Tapping there leaves its
    forward pass as it is, and stays outside what wraps a block: checkpointing, compilation, FSDP.
    """

    _tap: Tap | None = None

    @contextlib.contextmanager
    def tapped(self, layer: int) -> Iterator[Tap]:
        """While open, the iteration hands the residual stream after ``layer`` blocks to the ``Tap``."""
        self._tap = Tap(layer)
        try:
            yield self._tap
        finally:
            self._tap = None

    def values(self) -> Any:
        if self._tap is None:
            return super().values()
        return [partial(self._tap.run, int(name), block) for name, block in self.items()]


class Tap:
    """Keeps the residual stream after a number of blocks; 0 is the embeddings."""

    def __init__(self, layer: int):
        self.layer = layer
        self.residual_BLD: torch.Tensor | None = None

    def run(self, index: int, block: Callable, h_BLD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the block with this index (from 0)."""
        if index == self.layer:
            self.residual_BLD = h_BLD
        h_BLD = block(h_BLD, *args, **kwargs)
        if index + 1 == self.layer:
            self.residual_BLD = h_BLD
        return h_BLD


class NITPDecoder:
    """Mixin over a TorchTitan ``Decoder``; ``nitp_model_spec`` makes the classes that have it."""

    # The decoder's own switch: its forward returns what the unembedding would see.
    _skip_lm_head = True

    nitp_active: bool = True
    """Whether this step has the NITP term; the trainer clears it before ``nitp.start_step``."""

    _nitp_loss: Callable[..., torch.Tensor] = staticmethod(nitp_loss)

    def __init__(self, config: Any):
        super().__init__(config)  # pyrefly: ignore [bad-argument-count]
        self.layers = TappedBlocks(self.layers)
        self.projector = config.projector.build() if config.projector is not None else None

    def compile_nitp_loss(self, backend: str) -> None:
        """Compile the NITP loss, as TorchTitan does its own (``compile.components`` has "loss")."""
        self._nitp_loss = torch.compile(nitp_loss, backend=backend)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        attention_masks: Any = None,
        *,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Map tokens (B, L) to logits (B, L, V), or with ``labels`` (B, L) to the loss sums (1, 2): [[NTP, NITP]].

        Both sums are fp32, over this batch alone: NTP's over valid labels, NITP's over valid pairs (paper eq. 3).
        The NITP sum is zero, and nothing of it is computed, while ``nitp_active`` is false.
        """
        nitp, target_layer = self.config.nitp, self.config.target_layer  # pyrefly: ignore [missing-attribute]
        with self.layers.tapped(target_layer) as tap:
            # pyrefly: ignore [missing-attribute]
            h_BLD = super().forward(tokens, positions=positions, attention_masks=attention_masks, **kwargs)
        if labels is None:
            return self.lm_head(h_BLD)  # pyrefly: ignore [missing-attribute]

        ntp_sum = self.lm_head(h_BLD, labels=labels)  # pyrefly: ignore [missing-attribute]
        if self.nitp_active:
            assert tap.residual_BLD is not None, f"no block {target_layer} among {list(self.layers)}"
            mask_BL = counted(nitp, positions, labels)
            nitp_sum = self._nitp_sum(h_BLD, tap.residual_BLD, mask_BL)
        else:
            nitp_sum = torch.zeros_like(ntp_sum)
        # Joined rather than viewed as (1, 2): FSDP hooks into what a module returns.
        return torch.cat([ntp_sum.view(1, 1), nitp_sum.view(1, 1)], dim=1)

    def _nitp_sum(self, h_BLD: torch.Tensor, target_BLD: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        nitp = self.config.nitp  # pyrefly: ignore [missing-attribute]
        if nitp.loss == "generic_cosine":
            return self._nitp_loss(_replicated(h_BLD), None, mask_BL, kind=nitp.loss)
        prediction_BLD = self.projector(h_BLD) if self.projector is not None else h_BLD
        # Cut here, not in the loss alone: gathering a target has a backward pass of its own.
        target_BLD = _replicated(target_BLD.detach() if nitp.stop_gradient else target_BLD)
        if nitp_shift(nitp):
            target_BLD = shift_left(target_BLD)
        return self._nitp_loss(
            _replicated(prediction_BLD), target_BLD, mask_BL, kind=nitp.loss, stop_gradient=nitp.stop_gradient
        )


def nitp_shift(nitp: NITPConfig) -> int:
    """The shift that decides which positions count: the generic-cosine baseline has no target, so none."""
    return 0 if nitp.loss == "generic_cosine" else nitp.shift


def counted(nitp: NITPConfig, positions: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
    """Return which positions of a batch count in the NITP loss: (B, L) bool.

    Args:
        positions: (B, L); without them every row is one document, as TorchTitan's attention takes it.
        labels: (B, L).
    """
    if positions is None:
        positions = torch.arange(labels.shape[1], device=labels.device).expand(labels.shape)
    return pair_mask(positions, labels, shift=nitp_shift(nitp))


def _replicated(x: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that tensor parallelism may have sharded, as a plain one."""
    if not isinstance(x, DTensor):
        return x
    replicate = [Replicate()] * x.device_mesh.ndim
    return x.redistribute(placements=replicate).to_local(grad_placements=replicate)


@functools.cache
def _twin_class(base: type[Decoder]) -> Any:
    """Return the NITP class of a decoder class; one for all its configurations."""

    class Twin(NITPDecoder, base):  # pyrefly: ignore [invalid-inheritance]
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            nitp: NITPConfig
            target_layer: int
            projector: FeedForward.Config | None

            def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
                base.Config.update_from_config(self, config=config, **kwargs)
                if self.projector is not None:
                    # Its input is what lm_head sees: gathered over the sequence, replicated over tensor parallelism.
                    set_dense_ffn_sharding(
                        self.projector, attn_x_layout=dense_activation_placement(tp=spmd.R), enable_sp=False
                    )

    Twin.__name__ = Twin.__qualname__ = f"NITP[{base.__name__}]"
    return Twin


def _projector_config(dim: int, nitp: NITPConfig) -> FeedForward.Config | None:
    """The projector as a TorchTitan module, so that it is sharded, compiled and converted like any feed-forward.

    Same arithmetic and parameter names as :class:`nitp_titan.objective.Projector`. The paper does not say how it is
    initialized: normal with standard deviation 0.02, as the blocks are.
    """
    if nitp.projector == "none" or nitp.loss == "generic_cosine":
        return None
    init = {"weight": partial(nn.init.normal_, std=0.02)}
    return make_ffn_config(dim=dim, hidden_dim=nitp.projector_ratio * dim, w1_param_init=init, w2w3_param_init=init)


def _parallelize(model: nn.Module, *, stock: Callable, **kwargs: Any) -> nn.Module:
    """Compile what NITP adds, then do what the decoder's own function does (which shards the whole model)."""
    compile_config = kwargs["compile_config"]
    if compile_config.enable and "model" in compile_config.components and model.projector is not None:
        model.projector.compile(backend=compile_config.backend, fullgraph=True)
    if compile_config.enable and "loss" in compile_config.components:
        model.lm_head.compile_loss(compile_config.backend)  # pyrefly: ignore [not-callable]
        model.compile_nitp_loss(compile_config.backend)  # pyrefly: ignore [not-callable]
    return stock(model, **kwargs)


@functools.cache
def _backbone_adapter(base: type[BaseStateDictAdapter]) -> type[BaseStateDictAdapter]:
    class BackboneAdapter(base):
        """The decoder's own adapter, for the backbone alone: what leaves has no projector."""

        def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
            return super().to_hf({k: v for k, v in state_dict.items() if not k.startswith(PROJECTOR_PREFIX)})

    return BackboneAdapter


def nitp_model_spec(spec: ModelSpec, nitp: NITPConfig, *, chunk_tokens: int = 2048) -> ModelSpec:
    """Return the NITP twin of a TorchTitan decoder's ``ModelSpec``; ``spec`` itself where NITP is off.

    The twin has the backbone's parameters under the same names and with the same initial values for a seed, and
    those of ``projector``. ``spec`` is left as it was.

    Args:
        spec: any TorchTitan decoder's: llama3, qwen3, deepseek_v3, this package's own.
        nitp: the options.
        chunk_tokens: tokens whose logits exist at a time (see :mod:`nitp_titan.linear_cross_entropy`).

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
    values = {f.name: copy.deepcopy(getattr(stock, f.name)) for f in fields(stock)}
    values["lm_head"] = loss_head_config(values["lm_head"], chunk_tokens=chunk_tokens)
    twin = _twin_class(owner).Config(
        **values,
        nitp=nitp,
        target_layer=nitp.target_layer_of(len(stock.layers)),
        projector=_projector_config(stock.dim, nitp),
    )
    adapter = spec.state_dict_adapter
    return dataclasses.replace(
        spec,
        model=twin,
        parallelize_fn=partial(_parallelize, stock=spec.parallelize_fn),
        pipelining_fn=None,
        state_dict_adapter=_backbone_adapter(adapter) if adapter is not None else None,
    )
