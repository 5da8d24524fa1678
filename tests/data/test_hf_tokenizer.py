"""nitp_titan.data.hf_tokenizer and nitp_titan.data.tokenizer_folder"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from nitp_titan.data.errors import DataError
from nitp_titan.data.hf_tokenizer import TextTokenizer
from nitp_titan.data.loader import TextDataLoader
from nitp_titan.data.tokenizer import ByteTokenizer
from nitp_titan.data.tokenizer_folder import read_folder
from tests.data.test_loader import take

BOS, EOS = "<|begin|>", "<|end|>"
CONFIG = {"bos_token": BOS, "eos_token": {"content": EOS, "lstrip": False, "__type": "AddedToken"}}


def bpe() -> Tokenizer:
    """Bytes, of which "th" is merged (256), and special tokens (257, 258)."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*characters, "th"])}, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer | None = None, **files) -> Path:
    """The folder of a tokenizer, with other files by their stems."""
    folder.mkdir(exist_ok=True)
    (tokenizer or bpe()).save(str(folder / "tokenizer.json"))
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def load(folder: Path, **options) -> TextTokenizer:
    return TextTokenizer.Config(**options).build(tokenizer_path=str(folder))


TEXT = "the other thing " * 50


@pytest.mark.parametrize("setting", ["truncation", "padding", "both"])
def test_what_inference_sets_is_not_obeyed(tmp_path, setting):
    tokenizer = bpe()
    if setting != "padding":
        tokenizer.enable_truncation(8)
    if setting != "truncation":
        tokenizer.enable_padding(length=2048, pad_id=3)
    ours = load(write(tmp_path / "a", tokenizer, tokenizer_config=CONFIG))
    assert (
        ours.encode(TEXT) == load(write(tmp_path / "b", tokenizer_config=CONFIG)).encode(TEXT) == bpe().encode(TEXT).ids
    )
    notes = read_folder(tmp_path / "a").notes()
    assert ("truncation to 8 tokens of tokenizer.json is not obeyed" in notes[0]) == (setting != "padding")
    assert any(note.startswith("padding of tokenizer.json") for note in notes) == (setting != "truncation")


TEMPLATES = [
    "{% generation %}x{% endgeneration %}",
    "{{ broken",
    "{% nonsense %}",
    3,
    [{"name": "a", "template": "{%"}],
    {},
]


@pytest.mark.parametrize("template", TEMPLATES, ids=str)
def test_no_chat_template_matters(tmp_path, template):
    write(tmp_path, tokenizer_config=CONFIG | {"chat_template": template})
    assert load(tmp_path).encode("the") == bpe().encode("the").ids


@pytest.mark.parametrize("content", [b"{% generation %}", b"\xff\xfe{{", None])
def test_no_file_of_a_chat_template_matters(tmp_path, content):
    write(tmp_path, tokenizer_config=CONFIG)
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(content) if content else path.mkdir()
    assert load(tmp_path).encode("the") == bpe().encode("the").ids


@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map", "job", "post-processor", "bert"])
def test_begin_and_end_come_from_the_first_place_that_names_them(tmp_path, file):
    tokenizer, options, files = bpe(), {}, {}
    if file == "job":
        files, options = (
            {"tokenizer_config": {"bos_token": EOS, "eos_token": BOS}},
            {"bos_token": BOS, "eos_token": EOS},
        )
    elif file == "post-processor":
        template = processors.TemplateProcessing(f"{BOS} $A {EOS}", special_tokens=[(BOS, 257), (EOS, 258)])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    elif file == "bert":
        tokenizer.post_processor = processors.BertProcessing((EOS, 258), (BOS, 257))
    else:
        files = {"special_tokens_map": {"eos_token": "th"}, file: CONFIG}
    ours = load(write(tmp_path, tokenizer, **files), **options)
    assert (ours.bos_id, ours.bos_token, ours.eos_id, ours.eos_token) == (257, BOS, 258, EOS)
    assert (ours.add_bos, ours.add_eos) == (True, True)
    plain = bpe().encode("the").ids
    assert ours.encode("the") == plain
    assert ours.encode("the", add_bos=True, add_eos=True) == [257, *plain, 258]


@pytest.mark.parametrize("config", [CONFIG, {"eos_token": EOS}, CONFIG | {"pad_token": "<|pad|>", "unk_token": None}])
def test_ids_are_torchtitans(tmp_path, config):
    added = {"300": {"content": "<|more|>", "special": True}, "301": {"content": "<tool>", "special": False}}
    write(tmp_path, tokenizer_config=config | {"added_tokens_decoder": added})
    ours, theirs = load(tmp_path, allow_special_in_text=True), HuggingFaceTokenizer(tokenizer_path=str(tmp_path))
    assert ours.get_vocab() == theirs.get_vocab()
    for text in (TEXT, f"a{EOS} b<|more|>\n<tool> <|pad|>", ""):
        for ends in ({"add_bos": True, "add_eos": True}, {"add_bos": False, "add_eos": False}):
            assert ours.encode(text, **ends) == theirs.encode(text, **ends)
            assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text))


def test_a_text_that_cannot_be_encoded_is_named(tmp_path):
    # A vocabulary of whole words whose unknown token is not among them.
    folder = write(tmp_path / "words", Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")))
    tokenizer = load(folder, add_bos=False, add_eos=False)
    assert tokenizer.encode("a") == [0]
    with pytest.raises(DataError, match="words cannot encode 'bbbbb"):
        tokenizer.encode("b" * 100)


@pytest.mark.parametrize("named_by", ["file", "job"])
def test_text_that_reads_as_a_special_token_is_text(tmp_path, named_by):
    tokenizer = bpe()
    tokenizer.add_tokens([AddedToken("<stop>", special=False)])  # only the job, or the file, makes it special
    config = CONFIG | ({"eos_token": "<stop>"} if named_by == "file" else {})
    options = {"eos_token": "<stop>"} if named_by == "job" else {}
    write(tmp_path, tokenizer, tokenizer_config=config)
    text = f"a{BOS}b{EOS} <stop>"
    characters = load(tmp_path, **options)
    assert characters.eos_id == 259
    ids = characters.encode(text)
    assert max(ids) < 257
    assert characters.decode(ids) == text
    tokens = load(tmp_path, allow_special_in_text=True, **options).encode(text)
    assert [i for i in tokens if i >= 257] == [257, 258, 259]


def batches(folder: Path, tokenizer, **options):
    (folder / "corpus").mkdir(exist_ok=True)
    (folder / "corpus" / "a.txt").write_text("ab")
    config = TextDataLoader.Config(dataset_path=str(folder / "corpus"), num_streams=1, prefetch=0, **options)
    loader = config.build(dp_world_size=1, dp_rank=0, tokenizer=tokenizer, seq_len=8, local_batch_size=1)
    inputs, labels = take(loader, 1)[0]
    return inputs["input"][0].tolist(), labels[0].tolist()


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("add_eos", [None, True, False])
@pytest.mark.parametrize("kind", ["huggingface", "byte"])
def test_documents_get_the_tokens_that_are_asked_for(tmp_path, add_bos, add_eos, kind):
    options = {"add_bos": add_bos, "add_eos": add_eos}
    tokenizer = (
        ByteTokenizer.Config(**options).build(tokenizer_path="")
        if kind == "byte"
        else load(write(tmp_path / "tokenizer", tokenizer_config=CONFIG), **options)
    )
    document = tokenizer.encode("ab")
    document = [tokenizer.bos_id] * (add_bos is not False) + document + [tokenizer.eos_id] * (add_eos is not False)
    inputs, labels = batches(tmp_path, tokenizer, infinite=False)
    assert inputs[: len(document) - 1] == document[:-1]
    assert labels[: len(document) - 1] == document[1:]
    assert set(labels[len(document) - 1 :]) == {-100}


def test_what_is_asked_for_and_not_there_is_refused(tmp_path):
    write(tmp_path)
    assert (load(tmp_path).add_bos, load(tmp_path).add_eos) == (False, False)
    for name in ("bos", "eos"):
        with pytest.raises(DataError, match=rf"tokenizer\.add_{name}: found true.*set tokenizer\.{name}_token"):
            load(tmp_path, **{f"add_{name}": True})
    with pytest.raises(
        DataError, match=r"tokenizer\.eos_token: found \"<\|edn\|>\".*tokenizer\.json.*mean '<\|end\|>'"
    ):
        load(tmp_path, eos_token="<|edn|>")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer": "{"}, r"tokenizer\.json' is not a tokenizer"),
        ({"tokenizer": "{}"}, r"tokenizer\.json' is not a tokenizer"),
        ({"tokenizer_config": "{"}, r"tokenizer_config\.json' is not JSON"),
        ({"tokenizer_config": "[]"}, r"tokenizer_config\.json' holds list, expected a JSON object"),
        ({"tokenizer_config": {"eos_token": 3}}, r"tokenizer_config\.json': eos_token is 3, expected a string"),
        (
            {"tokenizer_config": {"pad_token": {"a": 1}}},
            r"tokenizer_config\.json': pad_token is \{\"a\": 1\}, expected",
        ),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, r"tokenizer_config\.json': added_tokens_decoder is list"),
        ({"special_tokens_map": "no"}, r"special_tokens_map\.json' is not JSON"),
        ({"special_tokens_map": {"eos_token": "<no>"}}, r"found \"<no>\", which is no token of .*tokenizer\.json"),
    ],
)
def test_errors_name_the_file(tmp_path, files, message):
    write(tmp_path)
    for stem, content in files.items():
        (tmp_path / f"{stem}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_the_log_says_what_documents_get(tmp_path, caplog):
    def log(**options) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO, "nitp_titan.data"):
            load(tmp_path, **options)
        return "\n".join(record.getMessage() for record in caplog.records)

    write(tmp_path)
    assert "no end-of-text token (EOS)" in (said := log())
    assert f'set tokenizer.eos_token to a token of the vocabulary, such as "{BOS}", "{EOS}"' in said
    assert len(said.splitlines()) == 1
    assert log(eos_token=EOS) == f'documents end with "{EOS}" (258, tokenizer.eos_token)'
    write(tmp_path, tokenizer_config=CONFIG)
    begin, end = (f'"{token}" ({i}, tokenizer_config.json)' for token, i in ((BOS, 257), (EOS, 258)))
    assert log() == f"documents begin with {begin} and end with {end}"
    assert log(add_bos=False) == f"documents end with {end}"
    assert "get neither" in log(add_bos=False, add_eos=False)
