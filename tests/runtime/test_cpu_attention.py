"""Attention on a CPU against flex attention (whose forward pass a CPU has) and a loop."""

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torchtitan.models.common.attention import FlexAttention, get_causal_mask_mod, get_document_mask_mod

from nitp_titan.runtime.shims.cpu_attention import dense_attention_mask, masked_attention
from tests.helpers.ranks import run_on_ranks


def document_causal(positions_BL):
    document, causal = get_document_mask_mod(positions_BL), get_causal_mask_mod()
    return lambda b, h, q, k: document(b, h, q, k) & causal(b, h, q, k)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((5, 1, 10), (16,))])
    q, k, v = (torch.randn(2, 16, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    return positions, q, k, v


def test_mask_is_causal_within_documents(inputs):
    positions, *_ = inputs
    mask = dense_attention_mask(document_causal(positions), 2, None, 16, 16, device="cpu", BLOCK_SIZE=128)
    documents = [[0] * 5 + [1] + [2] * 10, [0] * 16]
    for b, row in enumerate(documents):
        for i in range(16):
            for j in range(16):
                assert mask[b, 0, i, j] == (j <= i and row[i] == row[j])


@pytest.mark.parametrize("scale", [None, 0.5])
def test_values_are_flex_attentions(inputs, scale):
    positions, q, k, v = inputs
    mask_mod = document_causal(positions)
    mask = dense_attention_mask(mask_mod, 2, None, 16, 16)
    out = masked_attention(None, q, k, v, attention_masks=mask, scale=scale, enable_gqa=True)
    blocks = create_block_mask(mask_mod, 2, None, 16, 16, device="cpu")
    heads_first = [x.detach().transpose(1, 2) for x in (q, k, v)]
    expected = flex_attention(*heads_first, block_mask=blocks, scale=scale, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_out_transform_gets_flex_attentions_log_sum_exp(inputs):
    positions, q, k, v = (x.detach() for x in inputs)
    mask_mod = document_causal(positions)
    mask = dense_attention_mask(mask_mod, 2, None, 16, 16)
    seen = {}
    transform = lambda out, lse: seen.setdefault("lse", lse) is not None and out  # noqa: E731
    out = masked_attention(None, q, k, v, attention_masks=mask, enable_gqa=True, out_transform=transform)
    blocks = create_block_mask(mask_mod, 2, None, 16, 16, device="cpu")
    expected, aux = flex_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), block_mask=blocks, enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))
    torch.testing.assert_close(seen["lse"], aux.lse.transpose(1, 2))


def test_score_mod_is_refused(inputs):
    _, q, k, v = inputs
    with pytest.raises(NotImplementedError, match="score_mod"):
        masked_attention(None, q, k, v, attention_masks=torch.ones(2, 1, 16, 16).bool(), score_mod=lambda s, *_: s)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has flex attention")
def test_torchtitans_attention_uses_it_here():
    assert FlexAttention.forward is masked_attention


def sharded_attention(balancer: str | None) -> torch.Tensor:
    """A context rank's attention as TorchTitan calls it; its rows put back where they came from."""
    from torch.distributed.device_mesh import init_device_mesh
    from torchtitan.distributed.context_parallel import apply_cp_to_forward, prepare_context_parallel_input

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    positions, q, k, v = _qkv()
    mask = dense_attention_mask(document_causal(positions), 2, None, 16, 16)
    rows = torch.arange(16).expand(2, 16)
    extra = {"positions": positions, "attention_masks": mask}
    mine, _, extra = prepare_context_parallel_input(rows, rows, extra, mesh, torch.device("cpu"), balancer)
    module = FlexAttention.Config().build()
    apply_cp_to_forward([module], mesh)
    index = mine[0]
    shards = (x[:, index] for x in (q, k, v))
    out = module(*shards, attention_masks=extra["attention_masks"], enable_gqa=True)
    whole = torch.zeros_like(q)
    whole[:, index] = out
    return whole


def _qkv() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((5, 1, 10), (16,))])
    return positions, *(torch.randn(2, 16, heads, 8) for heads in (4, 2, 2))


@pytest.mark.parametrize("balancer", ["headtail", None])
def test_context_ranks_together_compute_the_whole(balancer):
    positions, q, k, v = _qkv()
    mask = dense_attention_mask(document_causal(positions), 2, None, 16, 16)
    expected = masked_attention(None, q, k, v, attention_masks=mask, enable_gqa=True)
    torch.testing.assert_close(sum(run_on_ranks(2, sharded_attention, balancer)), expected)
