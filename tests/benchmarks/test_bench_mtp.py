"""The MTP-1 head against documents that are run one by one, with whole logits, and against TorchTitan's own pieces."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.models.common.decoder import create_attention_mask
from torchtitan.models.deepseek_v3 import mtp as upstream

from benchmarks.mtp import MTPLoss, MTPTrainer, labels_after_next, mtp_model_spec
from nitp_titan.models.registry import model_registry
from nitp_titan.nitp.config import NITPConfig
from nitp_titan.titan.retyped import retyped
from tests.helpers.decoders import OWN, PackedBatch, backbone, built, packed_batch
from tests.helpers.trainers import running, trainer_config

DOCUMENTS = ((7, 1, 16), (2, 22))


def model_of(flavor: str) -> torch.nn.Module:
    model = built(mtp_model_spec(backbone("nitp_titan", flavor), chunk_tokens=10))
    return model.double() if flavor == "debug" else model


def sums_of(model, batch: PackedBatch) -> torch.Tensor:
    masks = model.get_attention_masks(positions=batch.positions)
    return model(batch.tokens, positions=batch.positions, attention_masks=masks, labels=batch.labels)


def documents_of(batch: PackedBatch):
    """Yield the (tokens, labels) of each document, (1, n) each."""
    for row, lengths in enumerate(DOCUMENTS):
        start = 0
        for n in lengths:
            part = slice(start, start + n)
            yield batch.tokens[row : row + 1, part], batch.labels[row : row + 1, part]
            start += n


def by_document(model, batch: PackedBatch) -> torch.Tensor:
    """The two sums with every document alone: token i is joined with token i + 1, and predicts the label of i + 1."""
    *blocks, head = model.layers.values()
    weight = model.lm_head.weight
    totals = torch.zeros(2, dtype=weight.dtype)
    for tokens, labels in documents_of(batch):
        n = tokens.shape[1]
        positions = torch.arange(n)[None]
        masks = create_attention_mask(lambda b, h, q, k: q >= k, 1, None, n, n, device="cpu")
        h = model.tok_embeddings(tokens)
        for block in blocks:
            h = block(h, masks, positions)
        logits = F.linear(model.norm(h), weight)
        totals[0] += F.cross_entropy(logits[0], labels[0], reduction="sum", ignore_index=IGNORE_INDEX)
        if n == 1:
            continue
        joined = torch.cat([head.enorm(model.tok_embeddings(tokens[:, 1:])), head.hnorm(h[:, :-1])], dim=-1)
        x, masks, positions = head.eh_proj(joined), masks[..., :-1, :-1], positions[:, :-1]
        x = x + head.attention(head.attention_norm(x), masks, positions)
        x = x + (head.moe if head.moe_enabled else head.feed_forward)(head.ffn_norm(x))
        logits = F.linear(head.mtp_norm(x), weight)
        totals[1] += F.cross_entropy(logits[0], labels[0, 1:], reduction="sum", ignore_index=IGNORE_INDEX)
    return totals


@pytest.mark.parametrize("flavor", [flavor for _, flavor in OWN])
def test_sums_and_gradients_are_those_of_the_documents_alone(flavor):
    model = model_of(flavor)
    batch = packed_batch(320, documents=DOCUMENTS)
    found, expected = sums_of(model, batch)[0], by_document(model, batch)
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-5, atol=0)
    assert found[1] != found[0]

    (found[0] + 0.3 * found[1]).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    (expected[0] + 0.3 * expected[1]).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-4 * p.grad.abs().max().item())


def test_labels_after_next_by_a_loop():
    batch = packed_batch(50, documents=DOCUMENTS)
    found = labels_after_next(batch.labels, batch.positions)
    for b in range(2):
        for t in range(24):
            same = t + 1 < 24 and batch.positions[b, t + 1] == batch.positions[b, t] + 1
            assert found[b, t] == (batch.labels[b, t + 1] if same else IGNORE_INDEX)
    rolled = upstream.roll_mtp_sequence(batch.labels, shift=1, fill_value=IGNORE_INDEX, positions=batch.positions)
    assert torch.equal(found, rolled)


def test_loss_is_torchtitans():
    batch = packed_batch(50, documents=DOCUMENTS)
    logits = [torch.randn(2, 24, 50) for _ in range(2)]
    count = (batch.labels != IGNORE_INDEX).sum()
    theirs, _ = upstream.MTPLoss.Config().build()(logits, batch.labels, count, positions=batch.positions)
    labels = batch.labels, labels_after_next(batch.labels, batch.positions)
    sums = [F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="sum") for x, y in zip(logits, labels, strict=True)]
    ours, _ = MTPLoss.Config().build()(torch.stack(sums)[None], batch.labels, count)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("flavor", [flavor for _, flavor in OWN])
def test_backbone_is_the_same_and_the_head_is_one_block_more(flavor):
    spec = backbone("nitp_titan", flavor)
    plain = built(spec)
    model = built(mtp_model_spec(spec, chunk_tokens=10))
    shapes = {name: p.shape for name, p in plain.named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters() if name in shapes} == shapes
    depth, d = len(plain.layers), 128
    block = sum(p.numel() for p in plain.layers[str(depth - 1)].parameters())
    more = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert more == block + 2 * d * d + 3 * d
    assert len(spec.model.layers) == depth  # left as it was


def test_tied_embeddings_stay_tied():
    spec = model_registry("debug", tie_embeddings=True)
    model = built(mtp_model_spec(spec, chunk_tokens=10))
    assert model.tok_embeddings.weight is model.lm_head.weight


def config_of(folder: Path, corpus: Path, **changes) -> MTPTrainer.Config:
    config = trainer_config(folder, corpus, nitp=NITPConfig(enable=False, geometry_freq=0), **changes)
    return retyped(config, MTPTrainer.Config, chunk_tokens=50)


@pytest.mark.parametrize("flavor", [flavor for _, flavor in OWN])
def test_it_trains(flavor, tmp_path, corpus):
    with running(config_of(tmp_path, corpus, flavor=flavor)) as trainer:
        head = list(trainer.model_parts[0].layers.values())[-1]
        before = {name: p.detach().full_tensor().clone() for name, p in head.named_parameters()}
        trainer.train()
        for name, p in head.named_parameters():
            assert not torch.equal(p.detach().full_tensor(), before[name]), name


def test_what_it_refuses(tmp_path, corpus):
    config = config_of(tmp_path, corpus)
    with pytest.raises(ValueError, match=r"without NITP: set nitp\.enable = false"):
        MTPTrainer(dataclasses.replace(config, nitp=NITPConfig()))
    parallelism = dataclasses.replace(config.parallelism, tensor_parallel_degree=2)
    with pytest.raises(ValueError, match="tensor_parallel_degree: found 2, expected 1"):
        MTPTrainer(dataclasses.replace(config, parallelism=parallelism))
    twice = mtp_model_spec(backbone("deepseek_v3", "debugmodel"), chunk_tokens=10)
    assert twice.model.layers[-1].moe is not None
