"""Masks with a torch whose ``create_block_mask`` lacks an option that TorchTitan's decoders give it."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import flex_attention
from torchtitan.models.common.attention import get_causal_mask_mod, get_document_mask_mod

from nitp_titan.runtime.shims import flex_masks
from nitp_titan.runtime.shims.flex_masks import SHIMS, always_separate

MISSING = "separate_full_blocks"


def test_mask_is_torchs_without_the_option():
    asked = []

    def older(mask_mod, *args, **options):
        asked.append(options)
        return flex_attention.create_block_mask(mask_mod, *args, **options)

    positions = torch.arange(256).expand(2, 256) % 100
    mask_mod = flex_attention.and_masks(get_causal_mask_mod(), get_document_mask_mod(positions))
    sizes = (mask_mod, 2, None, 256, 256)
    found = always_separate(older)(*sizes, device="cpu", BLOCK_SIZE=128, **{MISSING: True})
    assert asked == [{"device": "cpu", "BLOCK_SIZE": 128}]
    expected = flex_attention.create_block_mask(*sizes, device="cpu", BLOCK_SIZE=128)
    assert torch.equal(found.to_dense(), expected.to_dense())
    with pytest.raises(NotImplementedError, match="batch-invariant"):
        always_separate(older)(*sizes, **{MISSING: False})


@pytest.mark.parametrize(("knows", "gpu", "needed"), [(True, True, False), (False, True, True), (False, False, False)])
def test_it_is_needed_on_a_gpu_where_torch_lacks_the_option(monkeypatch, knows, gpu, needed):
    def older(mask_mod, B, H, Q_LEN, KV_LEN, device=None, BLOCK_SIZE=128, _compile=False): ...

    def newer(
        mask_mod, B, H, Q_LEN, KV_LEN, device=None, BLOCK_SIZE=128, _compile=False, separate_full_blocks=True
    ): ...

    monkeypatch.setattr(flex_attention, "create_block_mask", newer if knows else older)
    monkeypatch.setattr(flex_masks, "on_cpu", lambda: not gpu)
    assert [shim.applies() for shim in SHIMS] == [needed]


def test_decoders_create_their_masks_where_the_shim_is():
    """In a process without a CPU's attention: what a decoder asks for arrives at what the shim replaces."""
    code = """
import torch
from nitp_titan.runtime.shims import flex_masks
from torchtitan.models.common import attention, decoder
seen = []
attention._compiled_create_block_mask = lambda *args, **options: seen.append(sorted(options)) or "mask"
flex_masks._patch()
from torchtitan.models.llama3 import model_registry
config = model_registry("debugmodel", attn_backend="flex").model
with torch.device("meta"):
    model = config.build()
print(model.get_attention_masks(positions=torch.arange(64)[None]), seen)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip().splitlines()[-1] == "mask [['BLOCK_SIZE', 'device']]"


def test_torchtitan_still_asks_for_it():
    """When it does not, the shim can go."""
    from torchtitan.models.common import decoder

    assert MISSING in inspect.getsource(decoder.Decoder._create_flex_attention_mask)
