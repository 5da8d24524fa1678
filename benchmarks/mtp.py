"""A multi-token-prediction head of depth 1 on any decoder of ours: what NITP's cost is held against.

DeepSeek-V3's (arXiv 2412.19437, section 2.2), with TorchTitan's block: the last block's output and the next token's
embedding, each normalized, are joined by a projection 2 d -> d, pass one more block of the model's last kind and a
norm, and the shared unembedding predicts the token after next:

    tokens -> embeddings -> blocks -> h -> final norm -> unembedding                         -> sum over next labels
              embeddings, shifted left, and h -> projection -> block -> norm -> unembedding  -> sum over those after

It takes NITP's place in every respect: both sums come from the unembedding of ``nitp_titan.titan.loss_head``, a
chunk of tokens at a time, and the trainer is ours. TorchTitan's own MTP decoder holds both whole: at the paper's
vocabulary and 65,536 tokens 20 GB each in bf16, before the loss.
"""

# Shape suffixes: B = batch, L = sequence, D = model dim

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss
from torchtitan.config import CompileConfig
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.linear import Linear
from torchtitan.models.deepseek_v3.mtp import MTPTransformerBlock
from torchtitan.protocols.model_spec import ModelSpec

from nitp_titan.nitp.chunked_sum import ChunkedSum
from nitp_titan.nitp.config import CHUNK_TOKENS
from nitp_titan.nitp.objective import next_token_mask, shift_left
from nitp_titan.titan.loss_head import loss_head_config
from nitp_titan.titan.retyped import retyped
from nitp_titan.training.trainer import NITPTrainer


def labels_after_next(labels_BL: torch.Tensor, positions_BL: torch.Tensor) -> torch.Tensor:
    """Return for every position the label of the next one, (B, L); ``IGNORE_INDEX`` at the end of a document."""
    return shift_left(labels_BL).masked_fill(~next_token_mask(positions_BL), IGNORE_INDEX)


class MTPDecoder:
    """Mixin over a TorchTitan ``Decoder`` whose last entry of ``layers`` is the head's block."""

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attention_masks: Any = None,
        *,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """Map tokens (B, L) with labels (B, L) to the loss sums (1, 2): [[next token, token after next]], fp32."""
        model: Any = self
        *blocks, head = model.layers.values()
        embeddings_BLD = h_BLD = model.tok_embeddings(tokens)
        for block in blocks:
            h_BLD = block(h_BLD, attention_masks, positions)
        has_next_BL = next_token_mask(positions)
        # Not looked up again: only the last row of a document differs, and nothing reads it.
        next_BLD = shift_left(embeddings_BLD)
        ahead_BLD = head(next_BLD, h_BLD, has_next_BL, attention_masks, positions)
        # One call: FSDP gathers and frees the shared weight around it.
        return model.lm_head(model.norm(h_BLD), labels, ahead_BLD, labels_after_next(labels, positions))


@functools.cache
def _decoder_class(base: type[Decoder]) -> Any:
    class Twin(MTPDecoder, base):  # pyrefly: ignore [invalid-inheritance]
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            pass

    Twin.__name__ = Twin.__qualname__ = f"MTP[{base.__name__}]"
    return Twin


@functools.cache
def _two_sums_class(base: type[Linear]) -> Any:
    class TwoSums(base):  # pyrefly: ignore [invalid-inheritance]
        """An unembedding with a loss that is taken of two hidden states in one call."""

        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            pass

        def forward(
            self,
            input: torch.Tensor,
            labels: torch.Tensor,
            ahead_BLD: torch.Tensor,
            ahead_labels_BL: torch.Tensor,
        ) -> torch.Tensor:
            sums = [super().forward(input, labels), super().forward(ahead_BLD, ahead_labels_BL)]
            # Joined rather than viewed as (1, 2): FSDP hooks into what a module returns.
            return torch.cat([part.view(1, 1) for part in sums], dim=1)

    return TwoSums


def _head_block(model: Decoder.Config) -> MTPTransformerBlock.Config:
    """One more block like the model's last, with the projection before it and the norms around."""
    last = copy.deepcopy(model.layers[-1])
    shared = {name: getattr(last, name) for name in ("attention", "feed_forward", "moe", "attention_norm", "ffn_norm")}
    norms = {name: copy.deepcopy(model.norm) for name in ("enorm", "hnorm", "mtp_norm")}
    projection = Linear.Config(
        in_features=2 * model.dim,
        out_features=model.dim,
        param_init={"weight": partial(nn.init.normal_, std=0.02)},
    )
    return MTPTransformerBlock.Config(**shared, **norms, eh_proj=projection)


def _parallelize(model: nn.Module, *, stock: Callable, **kwargs: Any) -> nn.Module:
    compile_config = kwargs["compile_config"]
    if compile_config.enable and "loss" in compile_config.components:
        model.lm_head.compile_loss(compile_config.backend)  # pyrefly: ignore [not-callable, missing-attribute]
    return stock(model, **kwargs)


def mtp_model_spec(spec: ModelSpec, *, chunk_tokens: int) -> ModelSpec:
    """Return the decoder with an MTP-1 head, for training alone; ``spec`` is left as it was.

    Its backbone has the same parameters under the same names. The head's block is the last of ``layers``, where it is
    sharded, compiled, checkpointed and balanced as every other.

    Args:
        chunk_tokens: tokens whose logits exist at a time.

    Raises:
        ValueError: the model is not a plain decoder.
    """
    stock = spec.model
    owner = type(stock)._owner
    if not isinstance(stock, Decoder.Config) or owner is None or getattr(stock, "mtp_layers", None):
        raise ValueError(f"the MTP variant needs a plain decoder, found {spec.name} {spec.flavor}")
    stock = copy.deepcopy(stock)
    head = loss_head_config(stock.lm_head, ChunkedSum(chunk_tokens))
    twin = retyped(
        stock,
        _decoder_class(owner).Config,
        layers=[*stock.layers, _head_block(stock)],
        lm_head=retyped(head, _two_sums_class(type(head)._owner).Config),
    )
    parallelize = partial(_parallelize, stock=spec.parallelize_fn)
    return dataclasses.replace(
        spec, model=twin, parallelize_fn=parallelize, pipelining_fn=None, state_dict_adapter=None
    )


class MTPLoss(BaseLoss):
    """``next token + weight * token after next``, both over the step's valid labels, as TorchTitan's ``MTPLoss``."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        weight: float = 0.3
        """DeepSeek-V3's for most of its training; TorchTitan's ``mtp_scale``."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        self.weight = config.weight

    def __call__(
        self,
        pred: torch.Tensor,
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Combine the sums (1, 2) of an ``MTPDecoder``; without a count they are not divided."""
        total = pred[0, 0] + self.weight * pred[0, 1]
        return total if global_valid_tokens is None else total / global_valid_tokens, {}


class MTPTrainer(NITPTrainer):
    """Our trainer, without NITP, of a model with an MTP-1 head.

    Raises:
        ValueError: NITP is on, or the layout splits sequences or weights, which the head does not know of.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(NITPTrainer.Config):
        chunk_tokens: int = CHUNK_TOKENS
        """Tokens whose logits exist at a time."""

    def __init__(self, config: Config):
        if config.nitp.enable:
            raise ValueError("the MTP variant trains without NITP: set nitp.enable = false")
        for degree in ("tensor_parallel_degree", "context_parallel_degree", "pipeline_parallel_degree"):
            if getattr(config.parallelism, degree) > 1:
                raise ValueError(
                    f"parallelism.{degree}: found {getattr(config.parallelism, degree)}, expected 1 with an MTP head"
                )
        assert config.model_spec is not None
        spec = mtp_model_spec(config.model_spec, chunk_tokens=config.chunk_tokens)
        super().__init__(dataclasses.replace(config, model_spec=spec, loss=MTPLoss.Config()))

    def post_dataloading_process(
        self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """As TorchTitan's; the decoder also gets the labels, since it returns its losses."""
        inputs, labels, extra_kwargs = super().post_dataloading_process(input_dict, labels)
        return inputs, labels, {**extra_kwargs, "labels": labels}
