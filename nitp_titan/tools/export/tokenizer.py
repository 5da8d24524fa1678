"""A tokenizer as the files that ``transformers.AutoTokenizer`` loads, with the ids of training.

transformers 5 rebuilds what a named class of its own is known for (``Qwen2Tokenizer`` its pre-tokenizer, GPT-2's has no
normalizer) and leaves ``tokenizer.json``'s. The plain class of 4 and 5 computes what that file says, so that every
tokenizer leaves under it, as it was in training: with the special tokens that training matched, and the BOS.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torchtitan.components.tokenizer import BaseTokenizer

from nitp_titan.data.hf_tokenizer import TextTokenizer
from nitp_titan.data.tokenizer import ByteTokenizer
from nitp_titan.data.tokenizer_folder import CONFIG_FILES, read_config, text_of_token

# Without a class of its own transformers takes the one that the model's type is known for, with other rules.
_PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}

# Of a tokenizer_config.json: what changes no ids. "add_prefix_space", say, would.
_KEPT = ("model_max_length", "clean_up_tokenization_spaces", "chat_template")
_NAMED = ("unk_token", "sep_token", "cls_token", "mask_token", "pad_token")
_CHAT_TEMPLATE = "chat_template.jinja"

_PROBES = (
    "The quick brown fox, twice: 12345 + 67 = 12412.",
    "  two  spaces,\ttabs\n\n and lines \r\n",
    "naïve e\u0301 ﬁ \uff26\uff55 漢字かな العربية 👩\u200d🚀",
    "don't CamelCase snake_case x+=1; // http://a.b/c?d=e",
    "",
)


class TokenizerError(ValueError):
    """A tokenizer that the plain class cannot be; the message says why."""


def write_tokenizer(tokenizer: BaseTokenizer, assets: Path, folder: Path) -> int | None:
    """Write a tokenizer's files.

    Args:
        tokenizer: what training encoded with.
        assets: folder that a ``TextTokenizer`` was read from.
        folder: folder to write to.

    Returns:
        The id that pads: of the tokenizer's own padding token, else of its EOS; None where it has neither.

    Raises:
        TokenizerError: what was written gives other ids than training.
        DataError: a file of the folder can no longer be read.
    """
    if isinstance(tokenizer, ByteTokenizer):
        _write_byte_tokenizer(tokenizer, folder)
        return tokenizer.eos_id
    assert isinstance(tokenizer, TextTokenizer), tokenizer
    given = read_config(assets / CONFIG_FILES[0])
    backend = tokenizer.tokenizer
    # Those that are in the vocabulary, as training has matched them; as text, since their flags are in tokenizer.json.
    named = {
        key: token
        for key in _NAMED
        if (token := text_of_token(given.get(key))) and backend.token_to_id(token) is not None
    }
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    named |= {key: backend.id_to_token(i) for key, i in ids.items() if i is not None}
    if "pad_token" not in named and "eos_token" in named:
        named["pad_token"] = named["eos_token"]
    config = _PLAIN | named | {key: given[key] for key in _KEPT if key in given}
    # Text that reads as a special token was text in training, but is the token in what is exported: a chat template
    # of a later training writes its tokens as text.
    if (assets / _CHAT_TEMPLATE).is_file():
        shutil.copyfile(assets / _CHAT_TEMPLATE, folder / _CHAT_TEMPLATE)
    _write(backend, _ids_of(tokenizer), config, tokenizer.bos_id, folder)
    pad = named.get("pad_token")
    return backend.token_to_id(pad) if pad else None


def _write_byte_tokenizer(ours: ByteTokenizer, folder: Path) -> None:
    """Write :class:`ByteTokenizer` as a byte-pair encoding that never merges."""
    specials = ["<bos>", "<eos>"]
    vocabulary = {token: i for i, token in enumerate([*_byte_characters(), *specials])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>", "clean_up_tokenization_spaces": False}
    # "<eos>" in a text is five bytes, as in training.
    config |= {"split_special_tokens": True}
    _write(tokenizer, _ids_of(ours), _PLAIN | config, ours.bos_id, folder)


def _ids_of(tokenizer: Any) -> dict[str, list[int]]:
    """Return the ids of some texts as training begins a document with them, its EOS left out."""
    add_bos = getattr(tokenizer, "add_bos", True)
    return {text: tokenizer.encode(text, add_bos=add_bos, add_eos=False) for text in _PROBES}


def _write(
    tokenizer: Tokenizer, trained: dict[str, list[int]], config: dict[str, Any], bos_id: int | None, folder: Path
) -> None:
    """Write ``tokenizer.json`` and its configuration, with a BOS where training sets one.

    Raises:
        TokenizerError: the ids of a text are not those of training.
    """
    split = bool(config.get("split_special_tokens"))
    written = _copy(tokenizer, split)
    if not _gives(written, trained):
        _set_around(written, trained)
    if bos_id is not None:
        # Said for those who read it. transformers 5 does what tokenizer.json does, and 4 knows no other way.
        config = config | {"add_bos_token": trained[""][:1] == [bos_id]}
    written.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    again = _copy(Tokenizer.from_file(str(folder / "tokenizer.json")), split)
    for text, ids in trained.items():
        if (found := again.encode(text).ids) != ids:
            raise TokenizerError(f"the exported tokenizer gives {found} for {text!r}, expected {ids} as in training")


def _set_around(tokenizer: Tokenizer, trained: dict[str, list[int]]) -> None:
    """Have the file itself set what training puts around a text.

    Raises:
        TokenizerError: training does not keep the text's own ids together.
    """
    text, ids = next(iter(trained.items()))
    content = tokenizer.encode(text, add_special_tokens=False).ids
    start = next((i for i in range(len(ids)) if ids[i : i + len(content)] == content), None)
    if start is None:
        raise TokenizerError(f"the exported tokenizer gives {content} for {text!r}, expected {ids} as in training")
    before, after = (
        [(tokenizer.id_to_token(i), i) for i in part] for part in (ids[:start], ids[start + len(content) :])
    )
    first, second = (
        [
            *(f"{token}:{part}" for token, _ in before),
            f"${'AB'[part]}:{part}",
            *(f"{token}:{part}" for token, _ in after),
        ]
        for part in (0, 1)
    )
    try:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=first, pair=first + second, special_tokens=list(dict(before + after).items())
        )
    except Exception as error:  # tokenizers raises Exception itself
        raise TokenizerError(f"the exported tokenizer cannot set {before + after} around a text: {error}") from error


def _copy(tokenizer: Tokenizer, split_special_tokens: bool) -> Tokenizer:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = split_special_tokens
    return copy


def _gives(tokenizer: Tokenizer, trained: dict[str, list[int]]) -> bool:
    return all(tokenizer.encode(text).ids == ids for text, ids in trained.items())


def _byte_characters() -> list[str]:
    """The printable characters that stand for the 256 bytes in GPT-2's byte-level encoding."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
