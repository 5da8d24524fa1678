"""The NITP twin of every TorchTitan decoder against the stock model and an independent computation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torchtitan.models.deepseek_v3 import model_registry as deepseek_v3

from nitp_titan.nitp.config import NITPConfig
from nitp_titan.nitp.objective import Projector
from nitp_titan.titan.spec import backbone_config, nitp_model_spec
from tests.helpers.decoders import OWN, STOCK, PackedBatch, backbone, built, packed_batch

ALL = pytest.mark.parametrize(("module", "flavor"), STOCK + OWN, ids=["-".join(pair) for pair in STOCK + OWN])


def forward(model: torch.nn.Module, batch: PackedBatch, **kwargs) -> torch.Tensor:
    masks = model.get_attention_masks(positions=batch.positions)
    return model(batch.tokens, positions=batch.positions, attention_masks=masks, **kwargs)


def stock_states(model: torch.nn.Module, batch: PackedBatch, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream after ``layer`` blocks and the last hidden states of a stock model, through hooks."""
    seen: dict[str, torch.Tensor] = {}
    modules = [model.tok_embeddings, *model.layers.values()]
    handles = [
        modules[layer].register_forward_hook(lambda m, a, out: seen.__setitem__("z", out)),
        model.norm.register_forward_hook(lambda m, a, out: seen.__setitem__("h", out)),
    ]
    forward(model, batch)
    for handle in handles:
        handle.remove()
    return seen["z"], seen["h"]


def brute_force_cosine(p_BLD: torch.Tensor, z_BLD: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Eq. 3 with loops: pairs (t, t + 1) of one document with a label at t."""
    total = p_BLD.new_zeros(())
    for b, row in enumerate(batch.positions.tolist()):
        for t in range(len(row) - 1):
            if row[t + 1] == row[t] + 1 and batch.labels[b, t] != -100:
                total = total + 1 - F.cosine_similarity(p_BLD[b, t], z_BLD[b, t + 1], dim=0)
    return total


@ALL
def test_twin_has_the_stock_parameters_and_initial_values_and_a_projector(module, flavor):
    spec = backbone(module, flavor)
    stock, twin = built(spec), built(nitp_model_spec(spec, NITPConfig()))
    expected, found = stock.state_dict(), twin.state_dict()
    assert set(found) - set(expected) == {f"projector.w{i}.weight" for i in (1, 2, 3)}
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert sum(p.numel() for p in twin.projector.parameters()) == 12 * spec.model.dim**2


@ALL
def test_twin_without_labels_gives_the_stock_logits(module, flavor):
    spec = backbone(module, flavor)
    batch = packed_batch(spec.model.vocab_size)
    stock, twin = built(spec), built(nitp_model_spec(spec, NITPConfig()))
    assert torch.equal(forward(twin, batch), forward(stock, batch))


@ALL
def test_sums_and_gradients_are_those_of_an_independent_computation(module, flavor):
    nitp, spec = NITPConfig(target_layer=2), backbone(module, flavor)
    batch = packed_batch(spec.model.vocab_size)
    stock, twin = built(spec), built(nitp_model_spec(spec, nitp, chunk_tokens=7))
    projector = Projector(spec.model.dim)
    projector.load_state_dict(twin.projector.state_dict())

    z, h = stock_states(stock, batch, 2)
    ntp = F.cross_entropy(stock.lm_head(h).flatten(0, 1), batch.labels.flatten(), reduction="sum")
    cosine = brute_force_cosine(projector(h), z.detach(), batch)
    (ntp / 40 + 0.7 * cosine / 30).backward()

    sums = forward(twin, batch, labels=batch.labels)
    torch.testing.assert_close(sums, torch.stack([ntp, cosine]).unsqueeze(0), rtol=1e-5, atol=1e-4)
    (sums[0, 0] / 40 + 0.7 * sums[0, 1] / 30).backward()
    expected = {name: p.grad for name, p in stock.named_parameters()}
    expected |= {f"projector.{name}": p.grad for name, p in projector.named_parameters()}
    # bfloat16 in upstream's grouped experts rounds alike in both, but backward sums in another order.
    tolerance = 2e-2 if module != "nitp_titan" and ("moe" in flavor or module != "llama3") else 1e-4
    for name, parameter in twin.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None, name
            continue
        scale = expected[name].abs().max().clamp(min=1e-8)
        assert (parameter.grad - expected[name]).abs().max() / scale < tolerance, name


@pytest.mark.parametrize("layer", [0, 1, 6])
def test_target_layer_counts_blocks_from_the_embeddings(layer):
    spec = backbone("nitp_titan", "debug")
    batch = packed_batch(spec.model.vocab_size)
    twin = built(nitp_model_spec(spec, NITPConfig(target_layer=layer, projector="none")))
    z, h = stock_states(built(spec), batch, layer)
    nitp = forward(twin, batch, labels=batch.labels)[0, 1]
    torch.testing.assert_close(nitp, brute_force_cosine(h, z, batch), rtol=1e-5, atol=1e-5)


def gradients(nitp: NITPConfig) -> dict[str, torch.Tensor]:
    spec = backbone("nitp_titan", "debug")
    twin = built(nitp_model_spec(spec, nitp))
    batch = packed_batch(spec.model.vocab_size)
    forward(twin, batch, labels=batch.labels)[0, 1].backward()
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def test_stop_gradient_decides_whether_the_target_is_trained():
    # Without stop-gradient the loss also moves its target, the first block's output.
    stopped, open_ = (gradients(NITPConfig(target_layer=1, stop_gradient=stop)) for stop in (True, False))
    assert not torch.allclose(stopped["tok_embeddings.weight"], open_["tok_embeddings.weight"])
    assert torch.allclose(stopped["projector.w2.weight"], open_["projector.w2.weight"])


def test_generic_cosine_has_no_projector_and_no_target():
    spec = backbone("nitp_titan", "debug")
    batch = packed_batch(spec.model.vocab_size)
    twin = built(nitp_model_spec(spec, NITPConfig(loss="generic_cosine")))
    _, h = stock_states(built(spec), batch, 1)
    assert twin.projector is None
    expected = 0.0
    for row, labels in zip(h, batch.labels, strict=True):
        u = F.normalize(row[labels != -100], dim=-1)
        cosines = u @ u.T
        expected += (cosines.sum() - cosines.trace()) / (len(u) - 1)
    torch.testing.assert_close(forward(twin, batch, labels=batch.labels)[0, 1], expected, rtol=1e-4, atol=1e-4)


def test_inactive_branch_is_not_computed():
    spec = backbone("nitp_titan", "debug")
    batch = packed_batch(spec.model.vocab_size)
    twin = built(nitp_model_spec(spec, NITPConfig()))
    twin.nitp_active = False
    calls = []
    twin.projector.register_forward_hook(lambda *args: calls.append(args))
    sums = forward(twin, batch, labels=batch.labels)
    sums.sum().backward()
    assert sums[0, 1] == 0
    assert not calls
    assert all(p.grad is None for p in twin.projector.parameters())
    assert twin.lm_head.weight.grad is not None


@pytest.mark.parametrize("chunk_tokens", [1, 7, 48, 10_000])
def test_chunks_do_not_change_the_loss(chunk_tokens):
    spec = backbone("nitp_titan", "debug")
    batch = packed_batch(spec.model.vocab_size)
    twin = built(nitp_model_spec(spec, NITPConfig(), chunk_tokens=chunk_tokens))
    logits = forward(built(spec), batch)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    torch.testing.assert_close(forward(twin, batch, labels=batch.labels)[0, 0], expected)


def test_off_is_the_stock_spec_itself():
    spec = backbone("llama3", "debugmodel")
    assert nitp_model_spec(spec, NITPConfig(enable=False)) is spec


def test_the_given_spec_is_left_alone():
    spec = backbone("nitp_titan", "debug")
    before = copy.deepcopy(spec.model.to_dict())
    twin = nitp_model_spec(spec, NITPConfig())
    twin.model.layers[0].attention.rope = None
    assert spec.model.to_dict() == before


def test_adapter_of_the_twin_leaves_the_projector_out():
    spec = backbone("llama3", "debugmodel")
    twin = nitp_model_spec(spec, NITPConfig())
    stock_keys = spec.state_dict_adapter(spec.model, None).to_hf(built(spec).state_dict()).keys()
    twin_keys = twin.state_dict_adapter(twin.model, None).to_hf(built(twin).state_dict()).keys()
    assert twin_keys == stock_keys


def test_what_cannot_have_a_twin_is_refused():
    spec = backbone("nitp_titan", "debug")
    with pytest.raises(ValueError, match=r"target_layer: found 7, expected 0\.\.6"):
        nitp_model_spec(spec, NITPConfig(target_layer=7))
    with pytest.raises(ValueError, match="twin already"):
        nitp_model_spec(nitp_model_spec(spec, NITPConfig()), NITPConfig())
    with pytest.raises(ValueError, match="multi-token-prediction"):
        nitp_model_spec(deepseek_v3("debugmodel", num_mtp_layers=1), NITPConfig())


@pytest.mark.parametrize(("module", "flavor"), STOCK + OWN)
def test_the_backbones_configuration_comes_back(module, flavor):
    spec = backbone(module, flavor)
    found = backbone_config(nitp_model_spec(spec, NITPConfig()).model)
    assert type(found) is type(spec.model)
    assert len(found.layers) == len(spec.model.layers)
    assert not hasattr(found, "nitp")
    assert backbone_config(spec.model) is spec.model
