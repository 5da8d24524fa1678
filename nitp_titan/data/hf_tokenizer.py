"""The tokenizer of a Hugging Face folder, for pre-training: only text in, and only what documents need around it."""

import logging
from dataclasses import dataclass

from torchtitan.components.tokenizer import HuggingFaceTokenizer

from nitp_titan.data.errors import DataError, shortened
from nitp_titan.data.tokenizer_folder import documents_get, read_folder

logger = logging.getLogger(__name__)


class TextTokenizer(HuggingFaceTokenizer):
    """TorchTitan's tokenizer, of which nothing that a folder says about inference is in force.

    Truncation and padding are off, and no chat template is read, whatever it holds. What reads as a special token in a
    text is text. What is added to a text is `bos_id` and `eos_id` alone, and only where asked: not what the
    tokenizer's post-processor would add.

    Args:
        tokenizer_path: folder of the tokenizer's files.

    Raises:
        DataError: naming the file, for a folder that cannot be read or a token that is not in the vocabulary.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(HuggingFaceTokenizer.Config):
        eos_token: str | None = None
        """Ends a document; None: what the folder names."""

        bos_token: str | None = None
        """Begins a document; None: what the folder names."""

        add_eos: bool | None = None
        """Whether documents get the end token; None: where there is one."""

        add_bos: bool | None = None
        """Whether documents get the begin token; None: where there is one."""

        allow_special_in_text: bool = False
        """Text that reads as a special token is that token."""

    def __init__(self, config: Config | None = None, *, tokenizer_path: str):
        # Not TorchTitan's __init__, which obeys the folder.
        super(HuggingFaceTokenizer, self).__init__()
        config = config or self.Config()
        self.tokenizer_path = tokenizer_path
        read = read_folder(
            tokenizer_path,
            bos_token=config.bos_token,
            eos_token=config.eos_token,
            allow_special_in_text=config.allow_special_in_text,
            load=self._load_tokenizer_from_path,
        )
        self.largest_id = read.largest_id
        if read.problems:
            raise DataError("; ".join(f"tokenizer.{key}: {problem}" for key, problem in read.problems.items()))
        for note in read.notes(config.add_bos, config.add_eos):
            logger.log(logging.INFO if read.eos else logging.WARNING, note)
        self.tokenizer = read.tokenizer
        self.bos_token, self.bos_id = (read.bos.text, read.bos.id) if read.bos else (None, None)
        self.eos_token, self.eos_id = (read.eos.text, read.eos.id) if read.eos else (None, None)
        self.add_bos = documents_get("bos", config.add_bos, self.bos_id)
        self.add_eos = documents_get("eos", config.add_eos, self.eos_id)

    def encode(self, text: str = "", *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Ids of a text, between `bos_id` and `eos_id` where asked and where there are such."""
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # tokenizers raises Exception itself
            message = f"the tokenizer of {self.tokenizer_path} cannot encode {shortened(text)!r}: {error}"
            raise DataError(message) from error
        if add_bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids
