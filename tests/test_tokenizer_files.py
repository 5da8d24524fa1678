"""Tokenizers as transformers loads them from an export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from transformers import AutoTokenizer

from nitp_titan.data.tokenizer import ByteTokenizer
from nitp_titan.tokenizer_files import write_tokenizer

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))


def loaded(folder: Path, model_type: str = "ernie4_5_moe"):
    """Beside the model's configuration, which has a say in the tokenizer's class."""
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["llama", "ernie4_5_moe", "qwen3", "deepseek_v3"])
def byte_tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_tokenizer(ByteTokenizer(), Path(), folder)
    return loaded(folder, request.param)


@settings(deadline=None, max_examples=50)
@given(TEXT)
def test_bytes_have_their_own_ids(byte_tokenizer, text):
    ids = ByteTokenizer().encode(text)
    assert byte_tokenizer(text)["input_ids"] == ids
    assert byte_tokenizer.decode(ids) == text


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 319)))
def test_any_ids_are_decoded_alike(byte_tokenizer, ids):
    assert byte_tokenizer.decode(ids, skip_special_tokens=True) == ByteTokenizer().decode(ids)


def test_byte_tokenizers_special_tokens(byte_tokenizer):
    assert (byte_tokenizer.bos_token_id, byte_tokenizer.eos_token_id, len(byte_tokenizer)) == (256, 257, 258)
    # In a text they are text, as in training.
    for text in ("<eos>", "a<bos> b", "<0x41>", " \t\r\n ", "É\u0301 ﬁ 👩‍🚀"):
        assert byte_tokenizer(text)["input_ids"] == list(text.encode())


@pytest.fixture
def assets(tmp_path) -> Path:
    """Files of a byte-pair encoding that merges "th"."""
    folder = tmp_path / "assets"
    folder.mkdir()
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*characters, "th"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("config", [None, {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}])
def test_a_tokenizers_files_go_along(assets, tmp_path, config):
    if config:
        (assets / "tokenizer_config.json").write_text(json.dumps(config))
    (assets / "model.safetensors").touch()
    ours = HuggingFaceTokenizer(tokenizer_path=str(assets))
    (tmp_path / "out").mkdir()
    write_tokenizer(ours, assets, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    theirs = loaded(tmp_path / "out")
    for text in ("the other thing", " é 漢字<|end|>x", "a\n\n  b"):
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.eos_token_id == ours.eos_id == (257 if config else None)


def test_a_vocabulary_without_tokenizer_json_becomes_one(assets, tmp_path):
    saved = json.loads((assets / "tokenizer.json").read_text())
    (assets / "tokenizer.json").unlink()
    (assets / "vocab.json").write_text(json.dumps(saved["model"]["vocab"]))
    (assets / "merges.txt").write_text("#version: 0.2\nt h\n")
    ours = HuggingFaceTokenizer(tokenizer_path=str(assets))
    (tmp_path / "out").mkdir()
    write_tokenizer(ours, assets, tmp_path / "out")
    assert loaded(tmp_path / "out")("the other")["input_ids"] == ours.encode("the other")
