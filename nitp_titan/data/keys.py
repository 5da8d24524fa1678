"""The keys of ``[dataloader]`` and ``[validator.dataloader]``: one definition for job files and for the loader.

Free of torch. A docstring under a key is what ``nitp-titan check --keys`` prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


# Without slots, since the loader's configuration has TorchTitan's for another base, which has them.
@dataclass(kw_only=True)
class DataloaderKeys:
    """What is read, and how it is drawn from. A key that is added here is one of both tables and of the loader."""

    dataset: str = "text"
    """"text" (files under dataset_path), "python_stdlib" (on every machine), "c4", "c4_validation", or "hub:owner/name"
    (a Hugging Face data set)."""

    dataset_path: str | None = None
    """"text": a file, folder or glob of .txt, .jsonl (also .gz, .zst) and .parquet. "c4": another place of it."""

    text_field: str = "text"
    """Key or column of the text in .jsonl, .parquet and hub data sets."""

    split: str = "train"
    """Split of a hub data set."""

    seed: int = 0
    """Order of the documents."""

    num_streams: int = 64
    """Virtual streams that batches are drawn from; a multiple of the data-parallel degree. Another number: other
    batches."""

    streaming: bool = False
    """Read in order from files or the hub, without a copy on disk. TorchTitan's c4 always does."""

    shuffle_buffer: int = 1000
    """Documents shuffled at a time where they are read in order; in memory all of them are."""

    infinite: bool = True
    """Start over at the end of the data; if not, one pass in its own order, the end padded."""

    on_bad_text: Literal["error", "replace", "skip"] = "error"
    """A document that is not UTF-8: "error" refuses it, "replace" puts U+FFFD, "skip" leaves it out, both counted."""

    prefetch: int = 2
    """Batches prepared ahead by a thread; 0 = none."""
