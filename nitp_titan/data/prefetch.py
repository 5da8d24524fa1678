"""Prepare items ahead in one background thread."""

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.1  # how soon a thread that waits for room in the queue sees that nobody wants its items
_JOIN_SECONDS = 5.0


class Prefetcher(Generic[T]):
    """An iterator over `items`, of which a background thread prepares up to `depth` ahead.

    An exception of `items` is raised where the consumer asks for that item, with its own traceback. The thread ends
    when the iterator is closed, dropped or exhausted, and with the process.
    """

    def __init__(self, items: Iterator[T], depth: int):
        ready: queue.Queue = queue.Queue(maxsize=depth)
        stop = threading.Event()
        # The thread must not refer to `self`: it would keep alive what it should end with.
        thread = threading.Thread(target=_produce, args=(items, ready, stop), name="nitp-prefetch", daemon=True)
        self._ready = ready
        self._ended: BaseException | None = None
        # Also called at interpreter exit, before a thread in C code could find the interpreter gone.
        self._finalizer = weakref.finalize(self, _end, stop, thread)
        thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._ended is None:
            if not self._finalizer.alive:
                raise StopIteration
            item, self._ended = self._ready.get()
            if self._ended is None:
                return item
        raise self._ended

    def close(self) -> None:
        """End the thread; what it has prepared is lost."""
        self._finalizer()


def _produce(items: Iterator, ready: queue.Queue, stop: threading.Event) -> None:
    """Put (item, None) for each item, then (None, the exception that ended them)."""
    while not stop.is_set():
        try:
            entry = (next(items), None)
        except BaseException as error:
            entry = (None, error)
        while not stop.is_set():
            try:
                ready.put(entry, timeout=_POLL_SECONDS)
                break
            except queue.Full:
                continue
        if entry[1] is not None:
            return


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    # The garbage collector may run this in the thread itself, which cannot wait for its own end.
    if thread is not threading.current_thread():
        thread.join(timeout=_JOIN_SECONDS)
