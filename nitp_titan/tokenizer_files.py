"""A tokenizer as the files that ``transformers.AutoTokenizer`` loads, with the ids of training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer

from nitp_titan.data.tokenizer import ByteTokenizer

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
# Without a class of its own transformers takes the one that the model's type is known for, with other rules.
_PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}


def write_tokenizer(tokenizer: BaseTokenizer, assets: Path, folder: Path) -> None:
    """Write a tokenizer's files.

    Args:
        tokenizer: what training encoded with.
        assets: folder that a ``HuggingFaceTokenizer`` was read from.
        folder: folder to write to.
    """
    if isinstance(tokenizer, ByteTokenizer):
        _write_byte_tokenizer(folder)
        return
    assert isinstance(tokenizer, HuggingFaceTokenizer), tokenizer
    for name in _COPIED:
        if (assets / name).is_file():
            shutil.copyfile(assets / name, folder / name)
    if not (folder / "tokenizer.json").exists():
        tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
    if not (folder / "tokenizer_config.json").exists():
        _write_config(folder, _PLAIN)


def _write_byte_tokenizer(folder: Path) -> None:
    """Write :class:`ByteTokenizer` as a byte-pair encoding that never merges."""
    specials = ["<bos>", "<eos>"]
    vocabulary = {token: i for i, token in enumerate([*_byte_characters(), *specials])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "clean_up_tokenization_spaces": False}
    # "<eos>" in a text is five bytes, as in training.
    _write_config(folder, _PLAIN | config | {"split_special_tokens": True})


def _byte_characters() -> list[str]:
    """The printable characters that stand for the 256 bytes in GPT-2's byte-level encoding."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
