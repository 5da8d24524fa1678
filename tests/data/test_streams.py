"""nitp_titan.data.streams"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitp_titan.data.corpus import DocumentCorpus, ShardedCorpus
from nitp_titan.data.documents import ListDocuments
from nitp_titan.data.streams import IGNORE_INDEX, RankSequences, UnitOrder, make_source

BOS, EOS = 256, 257


def encode(text):
    return [BOS, *text.encode(), EOS]


def documents(lengths):
    """Documents that name themselves: no two begin alike."""
    return [(f"{i}:" + "abcdefghij" * (n // 10 + 1))[: max(n, 0)] for i, n in enumerate(lengths)]


def in_memory(texts):
    return DocumentCorpus("memory", ListDocuments([t.encode() for t in texts]))


def in_shards(shards):
    return ShardedCorpus("shards", len(shards), lambda i, start: iter(shards[i][start:]))


def rank_batches(
    corpus, D=1, r=0, *, B=2, L=8, S=4, seed=0, infinite=True, cursors=None, sequences=0, buffer=3, encode=encode
):
    source = make_source(corpus, seed=seed, num_streams=S, shuffle_buffer=buffer, infinite=infinite)
    owned = range(r, S, D) if infinite else range(1)
    return RankSequences(
        source,
        encode,
        seq_len=L,
        batch_size=B,
        num_streams=S if infinite else 1,
        dp_world_size=D,
        dp_rank=r,
        infinite=infinite,
        cursors=cursors or {v: (v, 0, 0) for v in owned},
        sequences=sequences,
    )


def sequences(corpus, count, D=1, B=2, **options):
    """The first `count` sequences of the job, in the order of n, from D ranks: (count, 3, L)."""
    rows = [[] for _ in range(D)]
    for r in range(D):
        batches = rank_batches(corpus, D, r, B=B, **options)
        while len(rows[r]) < count // D:
            batch = next(batches)
            rows[r] += list(np.stack([batch.inputs_BL, batch.labels_BL, batch.positions_BL], axis=1))
    return np.stack([rows[n % D][n // D] for n in range(count)])


def segments(sequence_3L):
    """(first position in the sequence, inputs, labels) of each piece of a document, by its positions."""
    inputs, labels, positions = sequence_3L
    starts = [0, *(t + 1 for t in range(len(positions) - 1) if positions[t + 1] != positions[t] + 1), len(positions)]
    return [(inputs[a:b].tolist(), labels[a:b].tolist()) for a, b in itertools.pairwise(starts)]


def rebuild(sequences_n3L):
    """Token lists of the documents of one stream, the last one perhaps unfinished, from its sequences."""
    rebuilt, current = [], None
    for sequence in sequences_n3L:
        assert sequence[2][0] == 0
        for inputs, labels in segments(sequence):
            assert inputs[1:] == labels[:-1]
            if current is not None:
                assert inputs[0] == current[-1]  # goes on with the label it stopped at
                current += labels
            else:
                assert inputs[0] == BOS
                current = inputs[:1] + labels
            if labels[-1] == EOS:
                rebuilt.append(current)
                current = None
    return rebuilt, current


CORPORA = {
    "documents": in_memory(documents([5, 0, 40, 17, 8, 3, 9, 25, 1, 12, 30])),
    "one": in_memory(documents([23])),
    "shards": in_shards([documents([7, 30, 0, 2, 15, 6]), documents([4]), [], *([documents([9, 8])] * 9)]),
}


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("D", [1, 2, 4, 8])
@pytest.mark.parametrize("B", [1, 2, 4])
def test_global_batch_does_not_depend_on_ranks_or_micro_batches(name, D, B):
    reference = sequences(CORPORA[name], 96, D=1, B=1, S=8)
    assert np.array_equal(sequences(CORPORA[name], 96, D=D, B=B, S=8), reference)


def test_seed_matters():
    a, b = (sequences(CORPORA["documents"], 16, seed=seed) for seed in (0, 1))
    assert not np.array_equal(a, b)


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("D", [1, 2])
def test_resume_after_every_batch(name, D):
    for r in range(D):
        options = {"D": D, "r": r, "L": 5, "B": 3}
        batches = rank_batches(CORPORA[name], **options)
        cursors, drawn = {v: (v, 0, 0) for v in range(r, 4, D)}, []
        states = [(dict(cursors), 0)]
        for batch in itertools.islice(batches, 30):
            cursors |= batch.cursors
            states.append((dict(cursors), batch.sequences))
            drawn.append(batch)
        for at, (cursors, n) in enumerate(states[:-1]):
            resumed = rank_batches(CORPORA[name], **options, cursors=cursors, sequences=n)
            for expected in drawn[at : at + 6]:
                batch = next(resumed)
                assert np.array_equal(batch.inputs_BL, expected.inputs_BL)
                assert np.array_equal(batch.labels_BL, expected.labels_BL)
                assert np.array_equal(batch.positions_BL, expected.positions_BL)
                assert batch.cursors == expected.cursors


def test_cursor_is_in_the_middle_of_a_document():
    batch = next(rank_batches(in_memory(documents([40])), B=4, L=8))
    assert batch.cursors == {v: (v, 0, 8) for v in range(4)}


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any),
    L=st.integers(1, 33),
    S=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 3),
)
def test_packing(lengths, L, S, seed):
    """Each stream's sequences are its documents, whole and in order; an epoch has each document exactly once."""
    texts = [t for t in documents(lengths) if t]
    corpus = in_memory(texts)
    expected = sorted(encode(t) for t in texts)
    per_stream = sum(len(t) + 1 for t in texts) * 2 // L + 2
    drawn = sequences(corpus, per_stream * S, B=S, L=L, S=S, seed=seed)
    by_q = {}
    for v in range(S):
        rebuilt, rest = rebuild(drawn[v::S])
        for k, tokens in enumerate(rebuilt):
            assert tokens in expected
            by_q[v + k * S] = tokens
        assert rest is None or any(t[: len(rest)] == rest for t in expected)
    epoch = [by_q[q] for q in range(len(texts)) if q in by_q]
    if len(epoch) == len(texts):
        assert sorted(epoch) == expected
    else:  # streams with longer documents are behind: still none of them twice
        assert all(epoch.count(tokens) <= expected.count(tokens) for tokens in epoch)
    assert S > 1 or len(epoch) == len(texts)


def test_positions_restart_where_a_document_goes_on():
    drawn = sequences(in_memory(["abcdefghijk"]), 2, S=1, B=1, L=7)
    assert drawn[0, 2].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert drawn[1, 2].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert drawn[1, 0].tolist() == [*b"ghijk", BOS, ord("a")]
    assert drawn[1, 1].tolist() == [*b"hijk", EOS, *b"ab"]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any),
    L=st.integers(1, 33),
    D=st.integers(1, 5),
    B=st.integers(1, 4),
    sharded=st.booleans(),
)
def test_one_pass_sees_everything_once(lengths, L, D, B, sharded):
    texts = documents(lengths)
    corpus = in_shards([texts[::2], texts[1::2], []]) if sharded else in_memory(texts)
    in_order = [t for t in (texts[::2] + texts[1::2] if sharded else texts) if t]
    by_rank = [list(rank_batches(corpus, D, r, B=B, L=L, infinite=False)) for r in range(D)]
    assert len({len(batches) for batches in by_rank}) == 1
    rows = [
        [row for b in batches for row in zip(b.inputs_BL, b.labels_BL, b.positions_BL, strict=True)]
        for batches in by_rank
    ]
    drawn = [rows[n % D][n // D] for n in range(sum(map(len, rows)))]
    labels = [int(x) for _, row, _ in drawn for x in row if x != IGNORE_INDEX]
    inputs = [int(x) for tokens, row, _ in drawn for x, y in zip(tokens, row, strict=True) if y != IGNORE_INDEX]
    assert labels == [x for t in in_order for x in encode(t)[1:]]
    assert inputs == [x for t in in_order for x in encode(t)[:-1]]
    assert len(drawn) == math.ceil(len(labels) / L / (D * B)) * D * B  # nothing more than the last batch needs
    for tokens, row, positions in drawn:
        padding = row == IGNORE_INDEX
        if padding.any():
            first = int(padding.argmax())
            assert padding[first:].all()
            assert positions[first:].tolist() == list(range(L - first))
            assert not tokens[first:].any()


def test_one_pass_resumes():
    corpus, options = CORPORA["shards"], {"B": 2, "L": 4, "infinite": False, "D": 2, "r": 1}
    whole = list(rank_batches(corpus, **options))
    for at, batch in enumerate(whole):
        rest = list(rank_batches(corpus, **options, cursors=batch.cursors, sequences=batch.sequences))
        assert [b.inputs_BL.tolist() for b in rest] == [b.inputs_BL.tolist() for b in whole[at + 1 :]]


@pytest.mark.parametrize("buffer", [0, 1, 2, 5, 100])
def test_shards_are_shuffled_in_blocks_and_complete(buffer):
    shards = [[f"{s}.{i}" for i in range(7)] for s in range(3)]
    source = make_source(in_shards(shards), seed=1, num_streams=1, shuffle_buffer=buffer, infinite=True)
    epochs = [[text for _, _, text in itertools.islice(source.read(3 * e, 0), 21)] for e in range(2)]
    for texts in epochs:
        assert sorted(texts) == sorted(itertools.chain(*shards))
        assert all(len({t[0] for t in texts[i : i + 7]}) == 1 for i in (0, 7, 14))
        assert (texts[:7] == sorted(texts[:7])) == (buffer < 2)
    assert epochs[0] != epochs[1]
    for q, index, text in itertools.islice(source.read(0, 0), 21):
        assert next(source.read(q, index)) == (q, index, text)


def test_order_is_a_permutation_each_epoch():
    order = UnitOrder(10, seed=3)
    epochs = [[order[q] for q in range(e * 10, e * 10 + 10)] for e in range(50)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 50
    assert [UnitOrder(10, seed=3)[q] for q in range(500)] == list(itertools.chain(*epochs))


def test_order_of_a_large_corpus_keeps_few_epochs(monkeypatch):
    monkeypatch.setattr("nitp_titan.data.streams._CACHED_ORDER", 20)
    order = UnitOrder(10, seed=0)
    values = [order[q] for q in [*range(0, 200, 7), *range(0, 200, 7)]]
    assert len(order._epochs) <= 4
    assert values[:29] == values[29:]


def test_one_big_document_gives_each_stream_other_text():
    text = "\n".join(f"line {i} of the only file" for i in range(20_000))
    drawn = sequences(in_memory([text]), 16, S=16, L=64, B=16)
    assert len({tuple(s) for s in drawn[:, 0].tolist()}) == 16


def test_a_long_document_takes_linear_time():
    text = "0123456789" * 200_000
    calls = []

    def counting(t):
        calls.append(len(t))
        return encode(t)

    batches = rank_batches(in_memory([text]), S=1, B=1, L=64, encode=counting)
    for _ in itertools.islice(batches, 2_000_000 // 64):
        pass
    assert calls == [2_000_000]  # tokenised once


def test_gives_up_on_a_corpus_without_tokens(monkeypatch):
    monkeypatch.setattr("nitp_titan.data.streams._MAX_USELESS", 50)
    with pytest.raises(ValueError, match="fewer than two tokens"):
        next(rank_batches(in_memory(["a", "b"]), encode=lambda text: [1]))
    with pytest.raises(ValueError, match="has no documents"):
        next(rank_batches(in_shards([[], [], [], []])))
