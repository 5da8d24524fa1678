"""Small tokenizers with the rules of well-known ones, under class names whose rules are others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = (
    "ga 12345 mulo 99999 + 67",
    "The other thing, don't: CamelCase x+=1",
    " two  spaces\n\n\tand é e\u0301 \uff26\uff55 ﬁ 漢字 👩\u200d🚀",
    "a<end>b <pad>  <mask> c</s>",
    "",
)
_CORPUS = ["the other thing 1234 12 99 + 67 don't mulo ga", "CamelCase x+=1 spaces and tabs é 漢字"] * 4
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def _byte_pairs(pre_tokenizer: Any, specials: list[Any], *, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=_BYTES, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _gpt2(**options: Any) -> Tokenizer:
    return _byte_pairs(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<end>"], **options)


def _digits(*specials: Any) -> Tokenizer:
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    return _byte_pairs(pre_tokenizers.Sequence(steps), list(specials) or ["<end>"])


def _with_bos() -> Tokenizer:
    tokenizer = _digits("<s>", "</s>", "<pad>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def _roberta() -> Tokenizer:
    tokenizer = _digits("<s>", "</s>", AddedToken("<mask>", lstrip=True, special=True))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def _metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]", "<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


KINDS: dict[str, tuple[Callable[[], Tokenizer], dict[str, Any] | None]] = {
    "no configuration": (_gpt2, None),
    "GPT-2's as Qwen2": (_gpt2, {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<end>"}),
    "GPT-2's as Qwen2, BOS is EOS": (
        _gpt2,
        {"tokenizer_class": "Qwen2Tokenizer", "bos_token": "<end>", "eos_token": "<end>"},
    ),
    "normalized, as GPT-2": (
        lambda: _gpt2(normalizer=normalizers.NFKC()),
        {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<end>", "bos_token": "<end>", "add_prefix_space": True},
    ),
    "digits, as GPT-NeoX": (_digits, {"tokenizer_class": "GPTNeoXTokenizer", "eos_token": "<end>"}),
    "digits, as Cohere": (
        lambda: _digits("<s>", "</s>", "<pad>"),
        {"tokenizer_class": "CohereTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    ),
    "digits with a BOS, as Llama": (
        _with_bos,
        {"tokenizer_class": "LlamaTokenizer", "bos_token": {"content": "<s>"}, "eos_token": "</s>"},
    ),
    "digits with two ends, as Roberta": (
        _roberta,
        {"tokenizer_class": "RobertaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"},
    ),
    "metaspace, as GPT-2": (
        _metaspace,
        {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    ),
    "word pieces with a BOS, as Qwen2": (
        _word_pieces,
        {"tokenizer_class": "Qwen2Tokenizer", "bos_token": "<s>", "unk_token": "[UNK]", "add_bos_token": False},
    ),
    "specials that only the configuration has": (
        _gpt2,
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "</s>",
            "added_tokens_decoder": {"401": {"content": "<mask>", "lstrip": True, "special": True}},
        },
    ),
}
"""Kind -> tokenizer.json's, and tokenizer_config.json's contents."""


def write_kind(kind: str, folder: Path) -> Path:
    """Write a tokenizer's files; return the folder."""
    make, config = KINDS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    make().save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
