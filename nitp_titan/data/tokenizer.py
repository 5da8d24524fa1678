"""A byte-level tokenizer that needs no files, for debug models and machines without a network.

A tokenizer that has `add_bos` and `add_eos` says by them whether documents get its begin and end tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torchtitan.components.tokenizer import BaseTokenizer

from nitp_titan.data.tokenizer_folder import documents_get

_NUM_BYTES = 256


class ByteTokenizer(BaseTokenizer):
    """UTF-8 bytes are the ids 0..255, `bos_id` is 256 and `eos_id` is 257.

    Called like TorchTitan's `HuggingFaceTokenizer`, so that either fits wherever a tokenizer is asked for.

    Args:
        config: whether documents get the two special ids.
        tokenizer_path: accepted because the trainer passes it to every tokenizer; nothing is read from it.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        add_eos: bool | None = None
        """Whether documents get the end token; None: they do."""

        add_bos: bool | None = None
        """Whether documents get the begin token; None: they do."""

    def __init__(self, config: Config | None = None, *, tokenizer_path: str = ""):
        super().__init__()
        self.bos_id: int = _NUM_BYTES
        self.eos_id: int = _NUM_BYTES + 1
        config = config or self.Config()
        self.add_bos = documents_get("bos", config.add_bos, self.bos_id)
        self.add_eos = documents_get("eos", config.add_eos, self.eos_id)

    def encode(self, text: str = "", *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Ids of the text's UTF-8 bytes, between `bos_id` and `eos_id` where asked.

        A lone surrogate, which UTF-8 cannot hold, becomes "?".
        """
        ids = list(text.encode("utf-8", errors="replace"))
        if add_bos:
            ids.insert(0, self.bos_id)
        if add_eos:
            ids.append(self.eos_id)
        return ids

    def decode(self, token_ids: Iterable[int] = (), **kwargs) -> str:
        """Text of the ids, which may be a list, an array or a tensor of one dimension.

        Special ids, and any id beyond them that an over-wide model vocabulary can produce, are dropped; bytes that
        are not UTF-8 (a character cut in two) become U+FFFD. `skip_special_tokens` and the like are ignored.
        """
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        return bytes(i for i in ids if 0 <= i < _NUM_BYTES).decode("utf-8", errors="replace")

    def get_vocab_size(self) -> int:
        """258: the bytes and the two special ids."""
        return _NUM_BYTES + 2

    @property
    def vocab_size(self) -> int:
        return self.get_vocab_size()
