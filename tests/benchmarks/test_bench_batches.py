"""The batches of a benchmark are packed as the data loader packs."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.batches import FixedBatches, NoTokenizer, packed_batch


def batch_of(seed: int = 0, **changes: int):
    sizes = {"sequences": 3, "seq_len": 200, "vocab_size": 50, "mean_document": 20} | changes
    return packed_batch(torch.Generator().manual_seed(seed), **sizes)


def loader(rank: int = 0, **config: int) -> FixedBatches:
    return FixedBatches(FixedBatches.Config(vocab_size=50, **config), dp_rank=rank, seq_len=40, local_batch_size=2)


def test_positions_restart_and_labels_are_next_tokens():
    inputs, labels = batch_of()
    tokens, positions = inputs["input"].tolist(), inputs["positions"].tolist()
    starts = 0
    for row_tokens, row_positions, row_labels in zip(tokens, positions, labels.tolist(), strict=True):
        assert row_positions[0] == 0
        for t in range(199):
            assert row_positions[t + 1] in (0, row_positions[t] + 1)
            if row_positions[t + 1]:
                assert row_labels[t] == row_tokens[t + 1]
            starts += row_positions[t + 1] == 0
    assert starts
    assert {int(labels.min()) >= 0, int(labels.max()) < 50} == {True}


def test_documents_have_the_mean_length_asked_for():
    positions = batch_of(sequences=200, mean_document=20)[0]["positions"]
    documents = int((positions == 0).sum())
    # Exponential, rounded up, cut at the sequence's end: about 10 % shorter.
    assert 17 < positions.numel() / documents < 22


def test_whole_sequences():
    inputs, labels = batch_of(mean_document=0)
    assert torch.equal(inputs["positions"], torch.arange(200).expand(3, 200))
    assert torch.equal(labels[:, :-1], inputs["input"][:, 1:])


def test_batches_repeat_and_are_not_touched_by_the_trainer():
    drawn = list(itertools.islice(loader(batches=3), 6))
    for (inputs, labels), (again, labels_again) in zip(drawn[:3], drawn[3:], strict=True):
        assert inputs is not again
        assert torch.equal(inputs["input"], again["input"])
        assert torch.equal(labels, labels_again)
    assert not torch.equal(drawn[0][0]["input"], drawn[1][0]["input"])
    first = next(iter(loader()))
    first[0]["input"] = torch.zeros(1)
    assert torch.equal(next(iter(loader()))[0]["input"], drawn[0][0]["input"])


def test_ranks_read_different_data_and_every_variant_the_same():
    first, again, other = (next(iter(loader(rank)))[0]["input"] for rank in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_there_is_no_tokenizer():
    tokenizer = NoTokenizer.Config(vocab_size=77).build(tokenizer_path="nowhere")
    assert tokenizer.get_vocab_size() == 77
    with pytest.raises(NotImplementedError):
        tokenizer.encode("text")
