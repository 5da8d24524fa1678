"""TorchTitan's data loader component over fixed virtual streams; see `streams` for what a batch contains."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer

from nitp_titan.data.bad_text import ON_BAD_TEXT
from nitp_titan.data.corpus import DocumentCorpus, ShardedCorpus, open_corpus
from nitp_titan.data.errors import DataError
from nitp_titan.data.keys import DataloaderKeys
from nitp_titan.data.prefetch import Prefetcher
from nitp_titan.data.streams import Batch, Cursor, RankSequences, Source, make_source

Item = tuple[dict[str, torch.Tensor], torch.Tensor]


ADDED_LATER = ("infinite", "shuffle_buffer")
"""Parts of a loader's state that older checkpoints lack; they are taken to be the job's."""


class TextDataLoader(BaseDataLoader):
    """Packed text for one data-parallel rank, the same global batch whatever the number of ranks.

    Yields `({"input": (B, L) int64, "positions": (B, L) int64}, labels (B, L) int64)` on the CPU. The position is the
    loader's: every iterator goes on where the last batch was yielded. Only a loader of one pass (`infinite` False)
    that has come to its end starts again with the next `iter`.

    Its state describes what was yielded, not what was prepared ahead. It is plain tensors, one per stream, which
    DCP saves once and loads in place, so that a checkpoint of D ranks resumes on any D' that divides `num_streams`.

    Raises:
        DataError: a bad option, a corpus that cannot be opened, or more streams than the corpus or the ranks allow.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(DataloaderKeys, BaseDataLoader.Config):
        pass

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
        seq_len: int,
        local_batch_size: int,
        snapshot_every_n_steps: int | None = None,
        **kwargs,
    ):
        _check_options(config, dp_world_size)
        self.config = config
        self._corpus = open_corpus(
            config.dataset,
            config.dataset_path,
            text_field=config.text_field,
            split=config.split,
            streaming=config.streaming,
            on_bad_text=config.on_bad_text,
        )
        # One pass needs one stream: every rank draws all of it, see RankSequences.
        self._num_streams = config.num_streams if config.infinite else 1
        if isinstance(self._corpus, ShardedCorpus) and self._corpus.size < self._num_streams:
            raise DataError(_too_few_shards(self._corpus, self._num_streams, dp_world_size))
        self._sequences_of_rank = partial(
            RankSequences,
            encode=partial(
                tokenizer.encode,
                # A tokenizer of somebody else's adds what it has.
                add_bos=getattr(tokenizer, "add_bos", True),
                add_eos=getattr(tokenizer, "add_eos", True),
            ),
            seq_len=seq_len,
            batch_size=local_batch_size,
            num_streams=self._num_streams,
            dp_world_size=dp_world_size,
            dp_rank=dp_rank,
            infinite=config.infinite,
        )
        # What must not change between a checkpoint and its resumption, by name.
        self._fixed = {
            "seed": config.seed,
            "seq_len": seq_len,
            "vocab_size": tokenizer.get_vocab_size(),
            # Two loaders of one stream count its places otherwise, each in its own order.
            "infinite": int(config.infinite),
        }
        if isinstance(self._corpus, ShardedCorpus):
            # Documents are counted within a block of so many, which is shuffled.
            self._fixed |= {"shards": self._corpus.size, "shuffle_buffer": config.shuffle_buffer}
        else:
            self._fixed["documents"] = self._corpus.size
        owned = range(dp_rank, self._num_streams, dp_world_size) if config.infinite else range(1)
        self._start: dict[int, Cursor] = {v: (v, 0, 0) for v in owned}
        self._sequences = 0
        self._cursors = dict(self._start)
        self._exhausted = False
        self._current: weakref.ref[_BatchIterator] | None = None

    def __iter__(self) -> Iterator[Item]:
        if self._exhausted:
            self._sequences, self._cursors, self._exhausted = 0, dict(self._start), False
        iterator = _BatchIterator(self)
        self._make_current(iterator)
        return iterator

    def state_dict(self) -> dict[str, Any]:
        """Where the yielded batches end: int64 tensors, in a layout that is the same at every step.

        `sequences`: sequences of the whole job so far; `streams`: (q, index, offset) of this rank's streams by number.
        """
        return {
            # First, and as a shape: DCP compares shapes before anything else, and says which one differs, where
            # other keys would only be missing from the checkpoint.
            "num_streams": torch.zeros(self._num_streams, dtype=torch.int64),
            **{name: torch.tensor(value) for name, value in self._fixed.items()},
            "sequences": torch.tensor(self._sequences),
            "streams": {str(v): torch.tensor(cursor) for v, cursor in self._cursors.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the batches of `state_dict`; iterators that exist go on from there too. Empty: no change.

        Raises:
            DataError: naming what differs, if the state is that of other data.
        """
        if not state_dict:
            return
        then = {"num_streams": len(state_dict.get("num_streams", ()))}
        now = {"num_streams": self._num_streams, **self._fixed}
        assumed = {name: self._fixed[name] for name in ADDED_LATER if name in self._fixed}
        then |= {name: int(state_dict[name]) if name in state_dict else assumed.get(name) for name in self._fixed}
        changed = [f"{name} (was {then[name]}, is {now[name]})" for name in now if then[name] != now[name]]
        if changed:
            raise DataError(
                "the data loader cannot resume from this checkpoint, as its data changed: "
                f"{', '.join(changed)}. Restore it, or start the data afresh with "
                "checkpoint.exclude_from_loading = ['dataloader']"
            )
        missing = [v for v in self._cursors if str(v) not in state_dict["streams"]]
        if missing:
            raise DataError(f"the checkpoint lacks the state of data streams {missing}: was it saved by every rank?")
        self._cursors = {v: tuple(state_dict["streams"][str(v)].tolist()) for v in self._cursors}
        self._sequences = int(state_dict["sequences"])
        self._exhausted = False
        self._make_current(None)

    def position(self) -> str:
        """Return in words where the next batches come from, as this rank's streams tell, which go on side by side."""
        units = self._source().units
        (first, place), (last, end) = (divmod(choice(self._cursors.values())[0], units) for choice in (min, max))
        where = f"{'document' if isinstance(self._corpus, DocumentCorpus) else 'shard'} {place + 1:,}"
        if (first, place) != (last, end):
            where += f" to {end + 1:,}" + f" of epoch {last + 1}" * (last > first)
        return f"{self._sequences:,} sequences drawn, epoch {first + 1}, {where} of {units:,}"

    def _make_current(self, iterator: "_BatchIterator | None") -> None:
        """Let `iterator` alone draw batches; any other forgets what it prepared."""
        previous = self._current() if self._current else None
        if previous is not None and previous is not iterator:
            previous.stop()
        self._current = weakref.ref(iterator) if iterator is not None else None

    def _batches(self) -> Iterator[tuple[Batch, Item]]:
        """Batches from the current position on, independent of this object."""
        batches = self._sequences_of_rank(self._source(), cursors=dict(self._cursors), sequences=self._sequences)
        return ((batch, _to_tensors(batch)) for batch in batches)

    def _source(self) -> Source:
        return make_source(
            self._corpus,
            seed=self.config.seed,
            num_streams=self._num_streams,
            shuffle_buffer=self.config.shuffle_buffer,
            infinite=self.config.infinite,
        )


class _BatchIterator:
    """Yields a loader's batches, and moves the loader's position as it does."""

    def __init__(self, loader: TextDataLoader):
        self._loader = loader
        self._batches: Iterator[tuple[Batch, Item]] | None = None

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        loader = self._loader
        if self._batches is None:
            loader._make_current(self)
            batches = loader._batches()
            self._batches = Prefetcher(batches, loader.config.prefetch) if loader.config.prefetch else batches
        try:
            batch, item = next(self._batches)
        except BaseException as error:
            # After an error the next call tries that batch again, where a generator would claim to be at its end.
            self.stop()
            loader._exhausted = isinstance(error, StopIteration)
            raise
        loader._cursors |= batch.cursors
        loader._sequences = batch.sequences
        return item

    def stop(self) -> None:
        """Drop what was prepared ahead; the next batch is drawn from the loader's position."""
        if isinstance(self._batches, Prefetcher):
            self._batches.close()
        self._batches = None


def _to_tensors(batch: Batch) -> Item:
    inputs = {"input": torch.from_numpy(batch.inputs_BL), "positions": torch.from_numpy(batch.positions_BL)}
    return inputs, torch.from_numpy(batch.labels_BL)


def _check_options(config: TextDataLoader.Config, dp_world_size: int) -> None:
    if config.on_bad_text not in ON_BAD_TEXT:
        raise DataError(f"dataloader.on_bad_text = {config.on_bad_text!r}: expected one of {', '.join(ON_BAD_TEXT)}")
    for name, least in (("seed", 0), ("num_streams", 1), ("shuffle_buffer", 0), ("prefetch", 0)):
        if getattr(config, name) < least:
            raise DataError(f"dataloader.{name} = {getattr(config, name)}: expected at least {least}")
    if config.infinite and config.num_streams % dp_world_size:
        below = config.num_streams // dp_world_size * dp_world_size
        choices = " or ".join(str(n) for n in (below, below + dp_world_size) if n)
        raise DataError(
            f"dataloader.num_streams = {config.num_streams} cannot be shared out to {dp_world_size} data-parallel "
            f"ranks: the nearest multiple is {choices}"
        )


def _too_few_shards(corpus: ShardedCorpus, num_streams: int, dp_world_size: int) -> str:
    most = corpus.size // dp_world_size * dp_world_size
    lower = f"set dataloader.num_streams = {most} or a lower multiple of {dp_world_size}, " if most else ""
    return (
        f"dataset {corpus.name} has {corpus.size} shards, fewer than dataloader.num_streams = {num_streams}: "
        f"{lower}{'or ' if lower else ''}set dataloader.streaming = false"
    )
