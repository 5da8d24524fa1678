"""Tokenizers as transformers loads them from an export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from nitp_titan.data.hf_tokenizer import TextTokenizer
from nitp_titan.data.tokenizer import ByteTokenizer
from nitp_titan.tools.export.tokenizer import TokenizerError, write_tokenizer
from tests.helpers.tokenizers_of_others import KINDS, TEXTS, write_kind

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
    assert byte_tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    assert byte_tokenizer(text)["input_ids"] == ByteTokenizer().encode(text, add_bos=True)
    assert byte_tokenizer.decode(ids) == text


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 319)))
def test_any_ids_are_decoded_alike(byte_tokenizer, ids):
    assert byte_tokenizer.decode(ids, skip_special_tokens=True) == ByteTokenizer().decode(ids)


def test_byte_tokenizers_special_tokens(byte_tokenizer):
    assert (byte_tokenizer.bos_token_id, byte_tokenizer.eos_token_id, len(byte_tokenizer)) == (256, 257, 258)
    assert byte_tokenizer.pad_token_id == 257
    # In a text they are text, as in training.
    for text in ("<eos>", "a<bos> b", "<0x41>", " \t\r\n ", "É\u0301 ﬁ 👩‍🚀"):
        assert byte_tokenizer(text)["input_ids"] == [256, *text.encode()]


ALLOWING = TextTokenizer.Config(allow_special_in_text=True)


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
    # As transformers reads a text that names a special token.
    ours = TextTokenizer(ALLOWING, tokenizer_path=str(assets))
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
    ours = TextTokenizer(tokenizer_path=str(assets))
    (tmp_path / "out").mkdir()
    write_tokenizer(ours, assets, tmp_path / "out")
    assert loaded(tmp_path / "out")("the other")["input_ids"] == ours.encode("the other")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["llama", "ernie4_5_moe", "qwen3"])
def test_the_ids_are_those_of_training_whatever_class_is_named(kind, model_type, tmp_path):
    assets = write_kind(kind, tmp_path / "assets")
    # As transformers reads a text that names a special token.
    ours = TextTokenizer(ALLOWING, tokenizer_path=str(assets))
    (tmp_path / "out").mkdir()
    pad = write_tokenizer(ours, assets, tmp_path / "out")
    theirs = loaded(tmp_path / "out", model_type)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text, add_bos=True, add_eos=False), text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, pad)
    own_pad = (KINDS[kind][1] or {}).get("pad_token")
    assert theirs.pad_token_id == (theirs.convert_tokens_to_ids(own_pad) if own_pad else ours.eos_id)
    # Nothing else says how to tokenize.
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    again = TextTokenizer(ALLOWING, tokenizer_path=str(tmp_path / "out"))
    assert (again.bos_id, again.eos_id) == (ours.bos_id, ours.eos_id)
    assert all(again.encode(text, add_bos=True) == ours.encode(text, add_bos=True) for text in TEXTS)


def test_a_bos_that_training_leaves_out_is_not_set(tmp_path):
    assets = write_kind("digits with a BOS, as Llama", tmp_path / "assets")

    config = TextTokenizer.Config(add_bos=False, allow_special_in_text=True)
    ours = TextTokenizer(config, tokenizer_path=str(assets))
    (tmp_path / "out").mkdir()
    write_tokenizer(ours, assets, tmp_path / "out")
    theirs = loaded(tmp_path / "out")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.bos_token_id == ours.bos_id == 0
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["add_bos_token"] is False


def test_a_special_tokens_text_is_the_token_in_what_is_exported(assets, tmp_path):
    """It was text in training, but later trainings write the tokens of their chat templates as text."""
    (assets / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    ours = TextTokenizer(tokenizer_path=str(assets))
    assert len(ours.encode("a<|end|>")) == len("a<|end|>")
    (tmp_path / "out").mkdir()
    write_tokenizer(ours, assets, tmp_path / "out")
    assert loaded(tmp_path / "out")("a<|end|>")["input_ids"] == [*ours.encode("a"), ours.eos_id]


def test_truncation_and_padding_stay_behind(assets, tmp_path):
    tokenizer = Tokenizer.from_file(str(assets / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9, pad_token="<|end|>", pad_id=257)
    tokenizer.save(str(assets / "tokenizer.json"))
    (tmp_path / "out").mkdir()
    write_tokenizer(TextTokenizer(tokenizer_path=str(assets)), assets, tmp_path / "out")
    theirs = loaded(tmp_path / "out")
    assert len(theirs("abcdefgh")["input_ids"]) == 8
    assert len(theirs("ab")["input_ids"]) == 2


def test_a_chat_template_goes_along(assets, tmp_path):
    (assets / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    (assets / "tokenizer_config.json").write_text('{"model_max_length": 77, "eos_token": "<|end|>"}')
    (tmp_path / "out").mkdir()
    write_tokenizer(TextTokenizer(tokenizer_path=str(assets)), assets, tmp_path / "out")
    theirs = loaded(tmp_path / "out")
    assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    assert theirs.model_max_length == 77


def test_other_ids_than_trainings_are_refused(assets, tmp_path):
    class Shouting(TextTokenizer):
        def encode(self, text, **options):
            return super().encode(text.upper(), **options)

    (tmp_path / "out").mkdir()
    with pytest.raises(TokenizerError, match=r"the exported tokenizer gives .* for 'The quick"):
        write_tokenizer(Shouting(tokenizer_path=str(assets)), assets, tmp_path / "out")


def test_what_training_did_not_obey_is_not_exported(assets, tmp_path):
    stored = Tokenizer.from_file(str(assets / "tokenizer.json"))
    stored.enable_truncation(4)
    stored.enable_padding(length=64)
    stored.save(str(assets / "tokenizer.json"))
    ours = TextTokenizer(tokenizer_path=str(assets))
    (tmp_path / "out").mkdir()
    write_tokenizer(ours, assets, tmp_path / "out")
    text = "the other thing " * 40 + "é漢"
    assert loaded(tmp_path / "out")(text)["input_ids"] == ours.encode(text)
    exported = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert exported.encode(text).ids == ours.encode(text)
    assert (exported.truncation, exported.padding) == (None, None)


@pytest.mark.parametrize("files", [{}, {"tokenizer_config": {"eos_token": None}}, {"special_tokens_map": {}}])
def test_the_jobs_tokens_are_exported(assets, tmp_path, files):
    for stem, content in files.items():
        (assets / f"{stem}.json").write_text(json.dumps(content | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    ours = TextTokenizer(TextTokenizer.Config(eos_token="<|end|>", bos_token="th"), tokenizer_path=str(assets))
    (tmp_path / "out").mkdir()
    write_tokenizer(ours, assets, tmp_path / "out")
    theirs = loaded(tmp_path / "out")
    assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.eos_id, ours.bos_id) == (257, 256)
