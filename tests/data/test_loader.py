"""nitp_titan.data.loader"""

import dataclasses
import gc
import itertools
import json
import threading

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.loss import IGNORE_INDEX

from nitp_titan.data import streams
from nitp_titan.data.loader import TextDataLoader
from nitp_titan.data.tokenizer import ByteTokenizer

L, S = 16, 8


@pytest.fixture
def folder(tmp_path):
    for k in range(9):  # of 1 to 5 documents each
        lines = [json.dumps({"text": f"document {k}.{i} " + "abc " * (7 * k + i)}) for i in range(k % 5 + 1)]
        (tmp_path / f"{k}.jsonl").write_text("\n".join(lines))
    return tmp_path


def make(folder, D=1, r=0, *, B=2, seq_len=L, **options):
    config = TextDataLoader.Config(**{"dataset_path": str(folder), "num_streams": S, "shuffle_buffer": 2} | options)
    return config.build(
        dp_world_size=D,
        dp_rank=r,
        tokenizer=ByteTokenizer(),
        seq_len=seq_len,
        local_batch_size=B,
        snapshot_every_n_steps=10,
    )


def take(loader, count):
    return list(itertools.islice(loader, count))


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x[0][k], y[0][k]) and torch.equal(x[1], y[1])
        for x, y in zip(a, b, strict=True)
        for k in ("input", "positions")
    )


def same_state(a, b):
    flat_a, flat_b = ({**s, **s["streams"]} for s in (a, b))
    return flat_a.keys() == flat_b.keys() and all(torch.equal(flat_a[k], flat_b[k]) for k in flat_a if k != "streams")


def collect(iterator, got):
    for item in iterator:
        got.append(item)


def global_rows(batches_by_rank):
    """Inputs in the order of n."""
    rows = [torch.cat([batch[0]["input"] for batch in batches]) for batches in batches_by_rank]
    return torch.stack(rows, dim=1).flatten(0, 1)


def test_yields_what_the_trainer_expects(folder):
    inputs, labels = next(iter(make(folder)))
    assert inputs.keys() == {"input", "positions"}
    for tensor in (*inputs.values(), labels):
        assert tensor.shape == (2, L)
        assert tensor.dtype == torch.int64
        assert tensor.device.type == "cpu"
    assert streams.IGNORE_INDEX == IGNORE_INDEX


@pytest.mark.parametrize("streaming", [False, True])
def test_global_batch_is_that_of_one_rank(folder, streaming):
    reference = global_rows([take(make(folder, B=1, streaming=streaming), 96)])
    for D, B in [(2, 4), (4, 1), (8, 2), (1, 16)]:
        ranks = [take(make(folder, D, r, B=B, streaming=streaming), 96 // D // B) for r in range(D)]
        assert torch.equal(global_rows(ranks), reference)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_state_is_of_what_was_yielded_and_resumes_at_every_step(folder, streaming, prefetch):
    options = {"streaming": streaming, "B": 3}
    expected = take(make(folder, prefetch=0, **options), 40)
    loader, plain = make(folder, prefetch=prefetch, **options), make(folder, prefetch=0, **options)
    iterator, reference = iter(loader), iter(plain)
    for at in range(30):
        state = loader.state_dict()
        assert same_state(state, plain.state_dict())
        resumed = make(folder, prefetch=prefetch, **options)
        resumed.load_state_dict(state)
        assert equal(take(resumed, 5), expected[at : at + 5])
        assert equal([next(iterator)], [next(reference)])


def test_every_iterator_goes_on_from_the_loaders_position(folder):
    expected = take(make(folder), 12)
    loader = make(folder)
    state = loader.state_dict()
    first = iter(loader)
    got = [next(first), next(first)]
    second = iter(loader)
    got += [next(second), next(first), next(second)]
    assert equal(got, expected[:5])
    loader.load_state_dict({})
    assert equal([next(second)], expected[5:6])
    loader.load_state_dict(state)  # under a running iterator
    assert equal([next(second), next(first)], expected[:2])


def test_checkpoint_round_trip_through_dcp(folder, tmp_path):
    loader = make(folder, B=3)
    take(loader, 7)
    dcp.save({"dataloader": loader}, checkpoint_id=tmp_path / "checkpoint")
    resumed = make(folder, B=3)
    iterator = iter(resumed)
    next(iterator)
    dcp.load({"dataloader": resumed}, checkpoint_id=tmp_path / "checkpoint")
    assert same_state(resumed.state_dict(), loader.state_dict())
    assert equal([next(iterator) for _ in range(5)], take(loader, 5))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (2, 1), (1, 8)])
def test_resume_on_another_number_of_ranks(folder, tmp_path, streaming, before, after):
    """What DCP does with ranks: keys of all of them in one checkpoint, of which each asks for its own."""
    reference = global_rows([take(make(folder, B=1, streaming=streaming), 96)])
    old = [make(folder, before, r, B=8 // before, streaming=streaming) for r in range(before)]
    for loader in old:
        take(loader, 5)
    merged = old[0].state_dict()
    for loader in old[1:]:
        state = loader.state_dict()
        assert all(torch.equal(state[k], merged[k]) for k in merged if k != "streams")
        assert not state["streams"].keys() & merged["streams"].keys()
        merged["streams"] |= state["streams"]
    assert len(merged["streams"]) == S
    dcp.save({"dataloader": merged}, checkpoint_id=tmp_path / "checkpoint")
    new = [make(folder, after, r, B=8 // after, streaming=streaming) for r in range(after)]
    for loader in new:
        dcp.load({"dataloader": loader}, checkpoint_id=tmp_path / "checkpoint")
    assert torch.equal(global_rows([take(loader, 7) for loader in new]), reference[40:])


def test_resume_when_the_step_is_no_multiple_of_the_ranks(folder):
    reference = global_rows([take(make(folder, B=1), 19)])
    old = make(folder, B=3)
    take(old, 1)
    rows = {}
    for r in range(4):
        new = make(folder, 4, r, B=2)
        new.load_state_dict(old.state_dict())
        numbers = [n for n in range(3, 19) if n % 4 == r]
        rows |= dict(zip(numbers, torch.cat([b[0]["input"] for b in take(new, 2)]), strict=True))
    assert torch.equal(torch.stack([rows[n] for n in range(3, 19)]), reference[3:])


def test_resume_with_other_data_is_refused(folder):
    state = make(folder).state_dict()
    for options, message in [
        ({"seed": 5}, r"seed \(was 0, is 5\)"),
        ({"num_streams": 4}, r"num_streams \(was 8, is 4\)"),
        ({"num_streams": 16}, r"num_streams \(was 8, is 16\)"),
        ({"seq_len": 8}, r"seq_len \(was 16, is 8\)"),
        ({"streaming": True}, r"shards \(was None, is 9\)"),
        ({"infinite": False}, r"num_streams \(was 8, is 1\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(folder, **options).load_state_dict(state)
    with pytest.raises(ValueError, match=r"infinite \(was 0, is 1\)"):
        make(folder, num_streams=1).load_state_dict(make(folder, infinite=False).state_dict())
    with pytest.raises(ValueError, match=r"shuffle_buffer \(was 7, is 8\)"):
        make(folder, streaming=True, shuffle_buffer=8).load_state_dict(
            make(folder, streaming=True, shuffle_buffer=7).state_dict()
        )
    # In memory nothing depends on it.
    make(folder, shuffle_buffer=8).load_state_dict(make(folder, shuffle_buffer=7).state_dict())
    (folder / "new.txt").write_text("more")
    with pytest.raises(ValueError, match=r"documents \(was 25, is 26\)"):
        make(folder).load_state_dict(state)
    state["streams"].pop("3")
    (folder / "new.txt").unlink()
    with pytest.raises(ValueError, match=r"streams \[3\]"):
        make(folder).load_state_dict(state)


@pytest.mark.parametrize("num_streams", [4, 16])
def test_dcp_names_a_changed_number_of_streams(folder, tmp_path, num_streams):
    dcp.save({"dataloader": make(folder)}, checkpoint_id=tmp_path / "checkpoint")
    with pytest.raises(CheckpointException, match=r"\[8\]\) and current.* for dataloader\.num_streams"):
        dcp.load({"dataloader": make(folder, num_streams=num_streams)}, checkpoint_id=tmp_path / "checkpoint")


def test_state_holds_nothing_but_tensors(folder):
    state = make(folder, 4, 1).state_dict()
    assert state["streams"].keys() == {"1", "5"}
    tensors = [*state["streams"].values(), *(v for k, v in state.items() if k != "streams")]
    assert all(t.dtype == torch.int64 for t in tensors)


@pytest.mark.parametrize("D", [1, 3])
def test_one_pass(folder, D):
    config = dataclasses.replace(TextDataLoader.Config(dataset_path=str(folder)), infinite=False)  # as upstream does
    loaders = [
        config.build(dp_world_size=D, dp_rank=r, tokenizer=ByteTokenizer(), seq_len=L, local_batch_size=4)
        for r in range(D)
    ]
    by_rank = [list(loader) for loader in loaders]
    assert len({len(batches) for batches in by_rank}) == 1
    tokens = sum(int((labels != IGNORE_INDEX).sum()) for batches in by_rank for _, labels in batches)
    texts = [json.loads(line)["text"] for path in folder.glob("*") for line in path.read_text().splitlines()]
    assert tokens == sum(len(t) + 1 for t in texts)
    assert equal(list(loaders[0]), by_rank[0])  # again from the start


def test_one_pass_over_less_than_a_sequence(tmp_path):
    (tmp_path / "a.txt").write_text("hi")
    for r in range(2):
        ((inputs, labels),) = make(tmp_path, 2, r, infinite=False)
        assert inputs["input"].shape == (2, L)
        assert int((labels != IGNORE_INDEX).sum()) == (3 if r == 0 else 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"D": 3}, r"num_streams = 8 .* 3 data-parallel.*nearest multiple is 6 or 9"),
        ({"D": 16}, r"num_streams = 8 .*nearest multiple is 16"),
        ({"seed": -1}, r"dataloader\.seed = -1"),
        ({"num_streams": 0}, r"dataloader\.num_streams = 0"),
        ({"prefetch": -1}, r"dataloader\.prefetch = -1"),
        ({"dataset": "txt"}, r"unknown dataset 'txt'.*did you mean 'text'"),
        ({"streaming": True, "num_streams": 16}, r"9 shards.*set dataloader\.num_streams = 9 or.*streaming = false"),
        ({"streaming": True, "num_streams": 16, "D": 4}, r"num_streams = 8 or a lower multiple of 4"),
        ({"streaming": True, "num_streams": 16, "D": 16}, r"16: set dataloader\.streaming = false"),
    ],
)
def test_bad_options(folder, options, message):
    with pytest.raises(ValueError, match=message):
        make(folder, **options)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_of_the_tokenizer_reach_the_consumer(folder, prefetch, monkeypatch):
    loader = make(folder, prefetch=prefetch)
    expected = take(make(folder), 8)
    encode, calls = ByteTokenizer.encode, itertools.count()

    def fails_once(self, *args, **kwargs):
        if next(calls) == 5:
            raise KeyError("in encode")
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(ByteTokenizer, "encode", fails_once)
    loader = make(folder, prefetch=prefetch)
    iterator, got = iter(loader), []
    with pytest.raises(KeyError, match="in encode") as error:
        collect(iterator, got)
    assert "fails_once" in [frame.name for frame in error.traceback]
    got += [next(iterator) for _ in range(8 - len(got))]  # the failed batch is tried again
    assert equal(got, expected)


def test_no_thread_is_left(folder):
    def threads():
        gc.collect()
        return sum(t.name == "nitp-prefetch" for t in threading.enumerate())

    loader = make(folder)
    iterator = iter(loader)
    next(iterator)
    assert threads() == 1
    other = iter(loader)
    next(other)
    assert threads() == 1
    loader.load_state_dict(loader.state_dict())
    assert threads() == 0
    next(other)
    del iterator, other
    assert threads() == 0
