"""nitp_titan.data.prefetch"""

import gc
import itertools
import subprocess
import sys
import threading
import time
import traceback

import pytest

from nitp_titan.data.prefetch import Prefetcher


def threads():
    return [t for t in threading.enumerate() if t.name == "nitp-prefetch"]


@pytest.mark.parametrize("depth", [1, 3])
def test_same_items_and_a_clean_end(depth):
    prefetcher = Prefetcher(iter(range(10)), depth)
    assert list(prefetcher) == list(range(10))
    assert list(prefetcher) == []
    prefetcher.close()
    assert not threads()


def test_is_ahead_by_no_more_than_depth():
    taken = []
    prefetcher = Prefetcher((taken.append(i) or i for i in range(100)), 2)
    assert next(prefetcher) == 0
    time.sleep(0.3)
    assert 2 <= len(taken) <= 4  # the queue and the one that waits for room in it
    prefetcher.close()


def items_that_fail():
    yield 1
    raise KeyError("deep inside")


def test_exception_comes_with_its_traceback():
    prefetcher = Prefetcher(items_that_fail(), 2)
    assert next(prefetcher) == 1
    for _ in range(2):
        with pytest.raises(KeyError, match="deep inside") as error:
            next(prefetcher)
        assert "items_that_fail" in "".join(traceback.format_tb(error.value.__traceback__))


@pytest.mark.parametrize("end", [lambda p: p.close(), lambda p: None])
def test_thread_ends_with_the_iterator(end):
    prefetcher = Prefetcher(itertools.count(), 2)
    next(prefetcher)
    assert len(threads()) == 1
    end(prefetcher)
    del prefetcher
    gc.collect()
    assert not threads()


def test_closed_is_at_its_end():
    prefetcher = Prefetcher(itertools.count(), 2)
    prefetcher.close()
    assert list(prefetcher) == []


def test_process_ends_though_the_thread_waits():
    code = (
        "import itertools; from nitp_titan.data.prefetch import Prefetcher\n"
        "p = Prefetcher(itertools.count(), 2); print(next(p))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")
