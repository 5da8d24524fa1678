"""Fixed virtual streams: a step's global batch depends on the seed and the step alone.

The sequences of the whole job are numbered n = 0, 1, 2, ... Sequence n is the next one of stream n mod S, S being
`num_streams`. Rank r of D data-parallel ranks takes the n with n mod D == r in increasing order; as D divides S, all
sequences of stream v go to rank v mod D, which alone keeps that stream's cursor. So D, and the split of a step into
micro-batches, decide who computes a sequence, never what is in it.

A stream reads *units* (documents of a map-style corpus, shards of a sharded one) from one infinite order that all
streams share: q = 0, 1, 2, ..., a new permutation of all units each epoch. Stream v takes q = v, v + S, v + 2S, ...

A cursor is three integers (q, index, offset): the unit, the document in it (always 0 for a map-style corpus) and the
first unconsumed token of that document. Resuming tokenises that document again; nothing else needs saving.

Packing is that of TorchTitan's `HuggingFaceTextDataset`: documents follow each other in a sequence, inputs are
tokens[:-1] and labels tokens[1:] of each, and positions count from 0 in each document and again from 0 in the next
sequence where a document goes on. t and t+1 are of one document exactly when positions[t+1] == positions[t] + 1.

Shapes: B sequences of a batch, L tokens of a sequence. NumPy only.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np

from nitp_titan.data.corpus import Corpus, DocumentCorpus, ShardedCorpus
from nitp_titan.data.documents import Documents, cut_long_documents
from nitp_titan.data.errors import DataError

IGNORE_INDEX = -100
"""Label of padding, as `torchtitan.components.loss.IGNORE_INDEX`."""

Cursor = tuple[int, int, int]
"""(q, index, offset) of the first unconsumed token."""

_MAX_USELESS = 100_000  # documents in a row without a token to train on, before giving up
_CACHED_ORDER = 1 << 22  # entries of permutations kept: many epochs of a small corpus are in use at a time


class UnitOrder:
    """The infinite order of units: q -> unit. Epoch e = q // size is a permutation seeded by (seed, e)."""

    def __init__(self, size: int, seed: int):
        self.size = size
        self._seed = seed
        self._epochs: dict[int, np.ndarray] = {}

    def __getitem__(self, q: int) -> int:
        epoch, place = divmod(q, self.size)
        order = self._epochs.pop(epoch, None)
        if order is None:
            while len(self._epochs) >= max(4, _CACHED_ORDER // self.size):
                self._epochs.pop(next(iter(self._epochs)))  # the least recently used: see the next line
            order = np.arange(self.size, dtype=np.uint32 if self.size < 1 << 32 else np.int64)
            np.random.default_rng([self._seed, epoch]).shuffle(order)
        self._epochs[epoch] = order
        return int(order[place])


class Source(Protocol):
    """Documents of one stream from a place on."""

    units: int
    """How many there are in an epoch."""

    def read(self, q: int, index: int) -> Iterator[tuple[int, int, str]]:
        """(q, index, text) of the document at (q, index) and all after it."""
        ...

    def after(self, q: int, index: int) -> tuple[int, int]:
        """The place that follows a document's."""
        ...


class DocumentSource:
    """A map-style corpus. `stride` is the number of streams."""

    def __init__(self, documents: Documents, seed: int, stride: int):
        self.units = len(documents)
        self._documents = documents
        self._order = UnitOrder(len(documents), seed)
        self._stride = stride

    def read(self, q: int, index: int) -> Iterator[tuple[int, int, str]]:
        while True:
            yield q, 0, self._documents[self._order[q]]
            q += self._stride

    def after(self, q: int, index: int) -> tuple[int, int]:
        return q + self._stride, 0


class ShardSource:
    """A sharded corpus: shards in a shuffled order, documents shuffled in blocks of `shuffle_buffer`.

    The block shuffle is ours, as the shuffle buffer of `datasets` is refilled with other documents on resume: here
    the documents of a block are permuted by (seed, q, block), so that a place in it says all.
    """

    def __init__(self, corpus: ShardedCorpus, seed: int, stride: int, shuffle_buffer: int):
        self.units = corpus.size
        self._corpus = corpus
        self._order = UnitOrder(corpus.size, seed)
        self._seed = seed
        self._stride = stride
        self._block = max(shuffle_buffer, 1)

    def read(self, q: int, index: int) -> Iterator[tuple[int, int, str]]:
        empty = 0
        while True:
            found = index > 0
            block, place = divmod(index, self._block)
            texts = self._corpus.read(self._order[q], block * self._block)
            while texts_of_block := list(islice(texts, self._block)):
                found = True
                order = np.random.default_rng([self._seed, q, block]).permutation(len(texts_of_block))
                for i in range(place, len(order)):
                    yield q, block * self._block + i, texts_of_block[order[i]]
                block, place = block + 1, 0
            empty = 0 if found else empty + 1
            if empty > self._corpus.size:
                raise DataError(f"dataset {self._corpus.name} has no documents: {empty} shards in a row were empty")
            q, index = q + self._stride, 0

    def after(self, q: int, index: int) -> tuple[int, int]:
        return q, index + 1


class OnePassSource:
    """Every document of a corpus once, in the corpus's own order."""

    def __init__(self, corpus: Corpus):
        self.units = corpus.size
        self._corpus = corpus

    def read(self, q: int, index: int) -> Iterator[tuple[int, int, str]]:
        for unit in range(q, self._corpus.size):
            if isinstance(self._corpus, DocumentCorpus):
                texts = iter([self._corpus.documents[unit]] if index == 0 else [])
            else:
                texts = self._corpus.read(unit, index)
            for i, text in enumerate(texts, index):
                yield unit, i, text
            index = 0

    def after(self, q: int, index: int) -> tuple[int, int]:
        return q, index + 1


def make_source(corpus: Corpus, *, seed: int, num_streams: int, shuffle_buffer: int, infinite: bool) -> Source:
    """The source of the streams of a job; that of its only stream where `infinite` is False."""
    if not infinite:
        return OnePassSource(corpus)
    if isinstance(corpus, DocumentCorpus):
        return DocumentSource(cut_long_documents(corpus.documents, num_streams), seed, num_streams)
    return ShardSource(corpus, seed, num_streams, shuffle_buffer)


class Stream:
    """Packs the documents of a source into sequences.

    Args:
        encode: text -> token ids, beginning and end of document included.
        cursor: where to start; afterwards where the next sequence starts.
    """

    def __init__(self, source: Source, encode: Callable[[str], Sequence[int]], cursor: Cursor):
        self.cursor = cursor
        self._source = source
        self._encode = encode
        self._documents: Iterator[tuple[int, int, str]] | None = None  # opened when the stream is first drawn from
        self._tokens: np.ndarray | None = None  # of the document at the cursor; None: take the next one

    def fill(self, inputs_L: np.ndarray, labels_L: np.ndarray, positions_L: np.ndarray) -> int:
        """Write the next sequence, and return how many tokens it has: fewer than L only at the end of a source.

        Raises:
            DataError: document after document has fewer than two tokens.
        """
        length, filled = len(inputs_L), 0
        while filled < length and self._next_document():
            q, index, offset = self.cursor
            tokens = self._tokens
            n = min(length - filled, len(tokens) - 1 - offset)
            part = slice(filled, filled + n)
            inputs_L[part] = tokens[offset : offset + n]
            labels_L[part] = tokens[offset + 1 : offset + 1 + n]
            positions_L[part] = np.arange(n)
            filled += n
            if offset + n == len(tokens) - 1:
                self._tokens = None
                self.cursor = (*self._source.after(q, index), 0)
            else:
                self.cursor = (q, index, offset + n)
        return filled

    def _next_document(self) -> bool:
        """Have unconsumed tokens at the cursor; False at the end of the source."""
        if self._tokens is not None:
            return True
        at_q, at_index, offset = self.cursor
        if self._documents is None:
            self._documents = self._source.read(at_q, at_index)
        for useless, (q, index, text) in enumerate(self._documents):
            # An empty text would otherwise become a document of a beginning and an end.
            tokens = np.asarray(self._encode(text), dtype=np.int64) if text else ()
            # The saved offset is that of one document: what follows it is read from its first token.
            start = offset if (q, index) == (at_q, at_index) else 0
            if len(tokens) - 1 > start:
                self._tokens = tokens
                self.cursor = (q, index, start)
                return True
            if useless > _MAX_USELESS:
                raise DataError(f"no text to train on: {useless} documents in a row have fewer than two tokens")
        return False


@dataclass(frozen=True)
class Batch:
    """What one rank draws at a time, and where that leaves it."""

    inputs_BL: np.ndarray
    labels_BL: np.ndarray
    positions_BL: np.ndarray
    cursors: dict[int, Cursor]
    """Where the streams that were drawn from stand now."""
    sequences: int
    """Sequences of the whole job up to and with this batch of every rank."""


class RankSequences:
    """The batches of one rank: an iterator of `Batch`.

    Infinite: job-wide sequences `sequences`, `sequences` + 1, ... from `num_streams` streams, of which this rank has
    `cursors`.

    One pass (`infinite` False): a single stream, drawn by every rank, of which a rank keeps its own sequences. So a
    corpus of any size is seen whole and exactly once, by any number of ranks, and all ranks have equally many batches
    (with fewer on one of them the others would wait for ever in a collective). What is missing from the last
    sequence and from the last batch is padding: token 0, label `IGNORE_INDEX`. The price is that every rank
    tokenises the whole corpus.
    """

    def __init__(
        self,
        source: Source,
        encode: Callable[[str], Sequence[int]],
        *,
        seq_len: int,
        batch_size: int,
        num_streams: int,
        dp_world_size: int,
        dp_rank: int,
        infinite: bool,
        cursors: dict[int, Cursor],
        sequences: int,
    ):
        self._streams = {v: Stream(source, encode, cursor) for v, cursor in cursors.items()}
        self._num_streams = num_streams
        self._shape = (batch_size, seq_len)
        self._world_size, self._rank = dp_world_size, dp_rank
        self._infinite = infinite
        self._sequences = sequences

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self._sequences
        self._sequences += self._shape[0] * self._world_size
        inputs_BL, positions_BL = (np.zeros(self._shape, dtype=np.int64) for _ in range(2))
        labels_BL = np.full(self._shape, IGNORE_INDEX, dtype=np.int64)
        drawn, row = set(), 0
        for n in range(first, self._sequences):
            mine = n % self._world_size == self._rank
            if mine or not self._infinite:
                v = n % self._num_streams
                if mine:
                    inputs_L, labels_L, positions_L = inputs_BL[row], labels_BL[row], positions_BL[row]
                else:  # another rank's: only the cursor matters
                    inputs_L = labels_L = positions_L = np.empty(self._shape[1], dtype=np.int64)
                filled = self._streams[v].fill(inputs_L, labels_L, positions_L)
                if not filled and n == first:
                    raise StopIteration
                positions_L[filled:] = np.arange(self._shape[1] - filled)  # padding is a document of its own
                drawn.add(v)
            row += mine
        return Batch(
            inputs_BL, labels_BL, positions_BL, {v: self._streams[v].cursor for v in sorted(drawn)}, self._sequences
        )
