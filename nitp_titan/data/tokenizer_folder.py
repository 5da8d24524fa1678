"""A folder of a Hugging Face tokenizer, as pre-training reads it: the same for the run, the check and the export.

Standard library and `tokenizers`: the job checker reads it without torch. What a folder says about inference
(truncation, padding, chat templates) has no part in pre-training, and none of it is obeyed here.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from nitp_titan.data.errors import DataError
from nitp_titan.data.files import nearest_name

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""Where special tokens are named, the first that names one counts."""

_SPECIAL_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class SpecialToken:
    """The token that begins or ends a document."""

    text: str
    id: int
    source: str
    """Where it is named: a file's name, or a key of the job."""


@dataclass(frozen=True)
class TokenizerFolder:
    """What was read of a folder."""

    tokenizer: Tokenizer
    """Without truncation and padding."""
    bos: SpecialToken | None
    eos: SpecialToken | None
    reset: tuple[str, ...]
    """What tokenizer.json sets and pre-training does not obey: "truncation to 32 tokens", "padding"."""
    largest_id: int
    problems: dict[str, str]
    """"bos_token", "eos_token" -> what is wrong with the token that the job, or a file, names."""

    def notes(self, add_bos: bool | None = None, add_eos: bool | None = None) -> list[str]:
        """What becomes of documents, one line each, by `tokenizer.add_bos` and `add_eos`."""
        lines = [f"{what} of {TOKENIZER_FILE} is not obeyed: documents are read whole" for what in self.reset]
        if self.eos is None:
            special = [t.content for t in self.tokenizer.get_added_tokens_decoder().values() if t.special]
            such = ", such as " + ", ".join(json.dumps(token, ensure_ascii=False) for token in special[:3])
            return [
                *lines,
                "documents get no end-of-text token (EOS), and an export names none, since the tokenizer's files do "
                f"not: set tokenizer.eos_token to a token of the vocabulary{such if special else ''}",
            ]
        around = [("begin", self.bos, add_bos), ("end", self.eos, add_eos)]
        given = [f'{verb} with "{t.text}" ({t.id}, {t.source})' for verb, t, add in around if t and add is not False]
        names = " and ".join(given) or "get neither a begin nor an end token (tokenizer.add_bos, tokenizer.add_eos)"
        return [*lines, f"documents {names}"]


def read_folder(
    folder: str | Path,
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
    allow_special_in_text: bool = False,
    load: Callable[[str], Tokenizer] | None = None,
) -> TokenizerFolder:
    """Read a tokenizer.

    Args:
        folder: has a tokenizer.json, and may have a tokenizer_config.json and a special_tokens_map.json.
        bos_token, eos_token: the tokens that begin and end a document. None: those that the configuration files
            name, else those that tokenizer.json's own post-processor puts around a text.
        allow_special_in_text: text that reads as a special token is that token, rather than plain text.
        load: reads the folder's tokenizer where that need not be a tokenizer.json.

    Raises:
        DataError: naming the file, for one that cannot be read.
    """
    folder = Path(folder)
    path = folder / TOKENIZER_FILE
    try:
        tokenizer = load(str(folder)) if load else Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself
        place = path if path.exists() else folder
        raise DataError(f"{str(place)!r} is not a tokenizer: {error}") from error
    reset = []
    if tokenizer.truncation is not None:
        reset.append(f"truncation to {tokenizer.truncation['max_length']} tokens")
        tokenizer.no_truncation()
    if tokenizer.padding is not None:
        reset.append("padding")
        tokenizer.no_padding()
    configs = {name: read_config(folder / name) for name in CONFIG_FILES}
    tokenizer.add_special_tokens(_special_tokens(configs[CONFIG_FILES[0]], folder / CONFIG_FILES[0]))
    first, last = _around_a_text(tokenizer)
    problems: dict[str, str] = {}
    chosen = []
    for key, of_job, around in (("bos_token", bos_token, first), ("eos_token", eos_token, last)):
        named = [(of_job, f"tokenizer.{key}")]
        named += [(_text_of(config, key, folder / name), name) for name, config in configs.items()]
        named += [(around, f"post_processor of {TOKENIZER_FILE}")]
        text, source = next(((text, source) for text, source in named if text), ("", ""))
        number = tokenizer.token_to_id(text) if text else None
        if text and number is None:
            hint = nearest_name(text, [token.content for token in tokenizer.get_added_tokens_decoder().values()])
            problems[key] = f"found {json.dumps(text, ensure_ascii=False)}, which is no token of {str(path)!r}{hint}"
        chosen.append(SpecialToken(text, number, source) if number is not None else None)
    bos, eos = chosen
    # A token that only the job, or the post-processor, names may be an ordinary word of the vocabulary so far.
    tokenizer.add_special_tokens([AddedToken(t.text, special=True, normalized=False) for t in (bos, eos) if t])
    tokenizer.encode_special_tokens = not allow_special_in_text
    # Ids may have gaps: the largest one is what the embedding must have.
    largest_id = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    return TokenizerFolder(tokenizer, bos, eos, tuple(reset), largest_id, problems)


def read_config(path: Path) -> dict[str, Any]:
    """Return the contents of a folder's JSON file; empty where there is none.

    Raises:
        DataError: it is not JSON, or no object.
    """
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{str(path)!r} holds {type(config).__name__}, expected a JSON object")
    return config


def _text_of(config: dict[str, Any], key: str, path: Path) -> str | None:
    """The token of a key, if there is one.

    Raises:
        DataError: naming the file, for what is no token.
    """
    token = text_of_token(config.get(key))
    if token is not None and not isinstance(token, str):
        found = json.dumps(config[key])[:40]
        raise DataError(f"{str(path)!r}: {key} is {found}, expected a string, or an object with a string 'content'")
    return token or None


def text_of_token(value: Any) -> Any:
    """A token's text, of which a configuration file may make an object that says more."""
    return value.get("content", value) if isinstance(value, dict) else value


def _special_tokens(config: dict[str, Any], path: Path) -> list[AddedToken]:
    """The tokens that a tokenizer_config.json adds, in the order in which TorchTitan adds them."""
    named = [(text, config[key]) for key in _SPECIAL_KEYS if (text := _text_of(config, key, path))]
    listed = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        raise DataError(f"{str(path)!r}: added_tokens_decoder is {type(listed).__name__}, expected an object")
    entries = [token for token in listed.values() if isinstance(token, dict)]
    named += [(token["content"], token) for token in entries if isinstance(token.get("content"), str)]
    return [_added_token(text, token if isinstance(token, dict) else {"normalized": False}) for text, token in named]


def _added_token(text: str, options: dict[str, Any]) -> AddedToken:
    flags = {key: bool(options.get(key, False)) for key in ("single_word", "lstrip", "rstrip")}
    normalized, special = (bool(options.get(key, True)) for key in ("normalized", "special"))
    return AddedToken(text, normalized=normalized, special=special, **flags)


def _around_a_text(tokenizer: Tokenizer) -> tuple[str | None, str | None]:
    """The tokens that the post-processor puts first and last around a text."""
    if tokenizer.post_processor is None:
        return None, None
    first = last = None
    pending = [json.loads(tokenizer.post_processor.__getstate__())]
    while pending:
        processor = pending.pop(0)
        pending += processor.get("processors", [])
        if processor["type"] == "TemplateProcessing":
            names = [piece.get("SpecialToken", {}).get("id") for piece in processor["single"]]
            texts = {key: value["tokens"] for key, value in processor["special_tokens"].items()}
            first = texts[names[0]][0] if names and names[0] else first
            last = texts[names[-1]][-1] if names and names[-1] else last
        elif processor["type"] in ("BertProcessing", "RobertaProcessing"):
            first, last = processor["cls"][0], processor["sep"][0]
    return first, last


def documents_get(name: str, wanted: bool | None, token_id: int | None) -> bool:
    """Whether documents get a token: where there is one, unless it is not wanted.

    Args:
        name: "bos" or "eos".
        wanted: `tokenizer.add_bos` or `add_eos`.
        token_id: None where the tokenizer names no such token.

    Raises:
        DataError: what is wanted is not there.
    """
    if wanted and token_id is None:
        raise DataError(
            f"tokenizer.add_{name}: found true, and the tokenizer names no such token; set tokenizer.{name}_token"
        )
    return token_id is not None if wanted is None else wanted
