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
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torchtitan.config import ParallelismConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.config_utils import make_ffn_config
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.decoder_sharding import dense_activation_placement, set_dense_ffn_sharding
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.module import ModuleDict
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter
from torchtitan.tools.utils import set_default_dtype

from nitp_titan.linear_cross_entropy import Implementation, loss_head_config
from nitp_titan.nitp_config import NITPConfig
from nitp_titan.objective import nitp_loss
from nitp_titan.pairs import counted
from nitp_titan.sequence_shards import SequenceShards, take_rows

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

    compile_early: bool = False
    """Whether the first step is to compile the NITP branch even if it is inactive, rather than a step in mid-run."""

    sequence: SequenceShards = SequenceShards()
    """How sequences are spread over ranks; set where the model is parallelized."""

    _nitp_loss: Callable[..., torch.Tensor] = staticmethod(nitp_loss)

    def __init__(self, config: Any):
        super().__init__(config)  # pyrefly: ignore [bad-argument-count]
        self.layers = TappedBlocks(self.layers)
        self.projector = config.projector.build() if config.projector is not None else None

    def compile_nitp_loss(self, backend: str) -> None:
        """Compile the NITP loss, as TorchTitan does its own (``compile.components`` has "loss")."""
        self._nitp_loss = torch.compile(nitp_loss, backend=backend)

    # The three below read what a pipeline stage has kept of the model; without pipeline parallelism that is all of it.

    @property
    def _has_target(self) -> bool:
        """Whether the residual stream after the target block passes through here: it is what the next block reads."""
        target_layer = self.config.target_layer  # pyrefly: ignore [missing-attribute]
        if target_layer == len(self.config.layers):  # pyrefly: ignore [missing-attribute]
            return self.norm is not None  # pyrefly: ignore [missing-attribute]
        return str(target_layer) in self.layers

    @property
    def receives_target(self) -> bool:
        """Whether the previous pipeline stage sends the target along with the residual stream."""
        if self.config.nitp.loss == "generic_cosine":  # pyrefly: ignore [missing-attribute]
            return False
        last = len(self.config.layers)  # pyrefly: ignore [missing-attribute]
        # pyrefly: ignore [missing-attribute]
        after_blocks = last if self.norm is not None else last + 1  # pyrefly: ignore [missing-attribute]
        # pyrefly: ignore [missing-attribute]
        first = 0 if self.tok_embeddings is not None else min(map(int, self.layers), default=after_blocks)
        return first > self.config.target_layer  # pyrefly: ignore [missing-attribute]

    @property
    def sends_target(self) -> bool:
        """Whether a later pipeline stage needs the target from here."""
        if self.lm_head is not None or self.config.nitp.loss == "generic_cosine":  # pyrefly: ignore [missing-attribute]
            return False
        return self._has_target or self.receives_target

    def forward(
        self,
        tokens: torch.Tensor,
        *args: Any,
        labels: torch.Tensor | None = None,
        pairs: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Map tokens (B, L) to logits (B, L, V), or with ``labels`` (B, L) to the loss sums (1, 2): [[NTP, NITP]].

        Both sums are fp32, over this batch alone: NTP's over valid labels, NITP's over valid pairs (paper eq. 3);
        under context parallelism over this rank's tokens. The NITP sum is zero, and nothing of it is computed, while
        ``nitp_active`` is false (but see ``compile_early``).

        Args:
            args, kwargs: the decoder's own: positions (B, L), attention masks.
            pairs: (B, L) bool, where the NITP loss counts. By default from positions and labels, which under context
                parallelism do not say it.

        A pipeline stage maps the residual stream (B, L, D) of the previous one, and the target (B, L, D) if it
        :attr:`receives_target`, to its own, with the target if it :attr:`sends_target`.

        Raises:
            ValueError: no ``pairs`` under context parallelism.
        """
        target_BLD = None
        if self.receives_target:
            target_BLD, *args = args
        with self._tapped() as tap:
            h_BLD = super().forward(tokens, *args, **kwargs)  # pyrefly: ignore [missing-attribute]
        if target_BLD is None:
            # A stage without blocks before the norm, the target being the last block's output: that is its input.
            target_BLD = tap.residual_BLD if tap.residual_BLD is not None else tokens
        if self.lm_head is None:  # pyrefly: ignore [missing-attribute]
            return (h_BLD, self._cut(target_BLD)) if self.sends_target else h_BLD
        if labels is None:
            return self.lm_head(h_BLD)  # pyrefly: ignore [missing-attribute]

        ntp_sum = self.lm_head(h_BLD, labels=labels)  # pyrefly: ignore [missing-attribute]
        if pairs is None:
            if self.sequence.context > 1:
                raise ValueError("pairs: found None, expected a (B, L) mask under context parallelism")
            nitp = self.config.nitp  # pyrefly: ignore [missing-attribute]
            pairs = counted(nitp, kwargs.get("positions", args[0] if args else None), labels)
        if self.nitp_active:
            nitp_sum = self._nitp_sum(h_BLD, target_BLD, pairs)
        else:
            if self.compile_early and torch.is_grad_enabled():
                self._nitp_sum(h_BLD, target_BLD, pairs)
            nitp_sum = torch.zeros_like(ntp_sum)
        self.compile_early = self.compile_early and not torch.is_grad_enabled()
        # Joined rather than viewed as (1, 2): FSDP hooks into what a module returns.
        return torch.cat([ntp_sum.view(1, 1), nitp_sum.view(1, 1)], dim=1)

    def _tapped(self) -> contextlib.AbstractContextManager[Tap]:
        target_layer = self.config.target_layer  # pyrefly: ignore [missing-attribute]
        if isinstance(self.layers, TappedBlocks):
            return self.layers.tapped(target_layer)
        # TorchTitan's pipelining leaves a stage without blocks an empty dictionary of its own.
        return contextlib.nullcontext(Tap(target_layer))

    def _cut(self, target_BLD: torch.Tensor) -> torch.Tensor:
        # Cut early, not in the loss alone: moving a target between ranks has a backward pass of its own.
        return target_BLD.detach() if self.config.nitp.stop_gradient else target_BLD  # pyrefly: ignore

    def _nitp_sum(self, h_BLD: torch.Tensor, target_BLD: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        nitp = self.config.nitp  # pyrefly: ignore [missing-attribute]
        if nitp.loss == "generic_cosine":
            return self._nitp_loss(_local(h_BLD, Replicate()), None, mask_BL, kind=nitp.loss)
        loss = partial(self._nitp_loss, kind=nitp.loss, stop_gradient=nitp.stop_gradient)
        prediction_BLD = self.projector(h_BLD) if self.projector is not None else h_BLD
        # Under sequence parallelism each rank of the tensor-parallel group takes its part of the sequence.
        sharded = self.sequence.tensor > 1
        placement = Shard(1) if sharded else Replicate()
        mesh = prediction_BLD.device_mesh if isinstance(prediction_BLD, DTensor) else None
        prediction_BLD = _local(prediction_BLD, placement)
        target_BLD = _local(self._cut(target_BLD), placement)
        if sharded:
            mask_BL = mask_BL.chunk(self.sequence.tensor, dim=1)[self.sequence.rank % self.sequence.tensor]

        nitp_sum = _sum_over_pairs(loss, prediction_BLD, target_BLD, mask_BL, nitp.shift, self.sequence)
        if sharded:
            assert mesh is not None
            nitp_sum = DTensor.from_local(nitp_sum, mesh, [Partial()], run_check=False)
            nitp_sum = nitp_sum.redistribute(placements=[Replicate()]).to_local()
        return nitp_sum


def _sum_over_pairs(
    loss: Callable[..., torch.Tensor],
    prediction_BLD: torch.Tensor,
    target_BLD: torch.Tensor,
    mask_BL: torch.Tensor,
    shift: int,
    sequence: SequenceShards,
) -> torch.Tensor:
    """Sum the loss over this rank's predictions, each against the target ``shift`` positions later.

    The target is looked at one row further on rather than moved: no copy of it.
    """
    if shift == 0:
        return loss(prediction_BLD, target_BLD, mask_BL)
    if sequence.ranks == 1:
        return loss(prediction_BLD[:, :-1], target_BLD[:, 1:], mask_BL[:, :-1])
    plan = sequence.plan(mask_BL.shape[1])
    inside_BL = mask_BL.clone()
    for row in plan.ends:
        inside_BL[:, row] = False
    inside = loss(prediction_BLD[:, :-1], target_BLD[:, 1:], inside_BL[:, :-1])
    # A row or two: not worth a compilation of their own.
    eager = partial(nitp_loss, **loss.keywords)  # pyrefly: ignore [missing-attribute]
    next_BKD = sequence.next_rows(target_BLD, plan)
    return inside + eager(take_rows(prediction_BLD, plan.rows), next_BKD, take_rows(mask_BL, plan.rows))


def _local(x: torch.Tensor, placement: Placement) -> torch.Tensor:
    """This rank's plain tensor of what tensor parallelism may have spread, in the given placement."""
    if not isinstance(x, DTensor):
        return x
    placements = [placement] * x.device_mesh.ndim
    return x.redistribute(placements=placements).to_local(grad_placements=placements)


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
                    # Its output is sharded as the target is.
                    set_dense_ffn_sharding(
                        self.projector,
                        attn_x_layout=dense_activation_placement(tp=spmd.R),
                        enable_sp=config.parallelism.enable_sequence_parallel,
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
    """Compile what NITP adds, then do what the decoder's own function does (which shards the whole model).

    ``model`` may be one pipeline stage, without projector and unembedding.
    """
    assert isinstance(model, NITPDecoder)
    model.sequence = _sequence_shards(kwargs["parallel_dims"], kwargs["parallelism"])
    if model.lm_head is None:  # pyrefly: ignore [missing-attribute]
        model.projector = None
    elif model.projector is None and model.config.projector is not None:  # pyrefly: ignore [missing-attribute]
        # TorchTitan's pipelining keeps the modules that it knows by name: the last stage's is built again.
        with torch.device("meta"), set_default_dtype(next(model.parameters()).dtype):
            model.projector = model.config.projector.build()  # pyrefly: ignore [missing-attribute]
    compile_config = kwargs["compile_config"]
    model.compile_early = compile_config.enable
    if compile_config.enable and "model" in compile_config.components and model.projector is not None:
        model.projector.compile(backend=compile_config.backend, fullgraph=True)
    # pyrefly: ignore [missing-attribute]
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


def nitp_model_spec(
    spec: ModelSpec, nitp: NITPConfig, *, chunk_tokens: int = 2048, implementation: Implementation = "fast"
) -> ModelSpec:
    """Return the NITP twin of a TorchTitan decoder's ``ModelSpec``; ``spec`` itself where NITP is off.

    The twin has the backbone's parameters under the same names and with the same initial values for a seed, and
    those of ``projector``. ``spec`` is left as it was.

    Args:
        spec: any TorchTitan decoder's: llama3, qwen3, deepseek_v3, this package's own.
        nitp: the options.
        chunk_tokens: tokens whose logits exist at a time (see :mod:`nitp_titan.linear_cross_entropy`).
        implementation: of the cross-entropy: "fast" or "reference".

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
    values["lm_head"] = loss_head_config(values["lm_head"], chunk_tokens=chunk_tokens, implementation=implementation)
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
        state_dict_adapter=_backbone_adapter(adapter) if adapter is not None else None,
    )
