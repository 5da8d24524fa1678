"""Text that is not UTF-8: one rule for every reader, and a count of what it met."""

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Literal, get_args

from nitp_titan.data.errors import DataError, printable

logger = logging.getLogger(__name__)

OnBadText = Literal["error", "replace", "skip"]
ON_BAD_TEXT: tuple[str, ...] = get_args(OnBadText)

BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"
"""A byte-order mark, which begins a text without being part of it."""

_TOLD = 5  # places that are logged one by one; then those whose number is a power of ten
_SURROGATE = re.compile("[\ud800-\udfff]")


class BadText:
    """Makes text of what a reader finds, by `dataloader.on_bad_text`.

    Args:
        rule: of a document that is not UTF-8 (a lone surrogate in JSON, which UTF-8 cannot hold, included). "error"
            refuses it, "replace" puts U+FFFD in the place of each bad part, "skip" makes it an empty document, so that
            the numbers of the others stay put.
        log: log the places. One object sees what one process reads, so a place that is read again is counted again.
    """

    def __init__(self, rule: OnBadText = "error", *, log: bool = True):
        self.rule = rule
        self.count = 0
        """Documents so far that were not UTF-8."""
        self.place = ""
        """The last of them, for messages."""
        self._log = log

    def document(self, found: bytes | str, where: str) -> str:
        """The text of a document, without a byte-order mark at its start; "" for one that is skipped.

        Args:
            found: UTF-8, or a string that may hold lone surrogates.
            where: file and row, for messages.

        Raises:
            DataError: starting with `where`; the rule is "error".
        """
        text = self.decode(found, where)
        return "" if text is None else text.removeprefix(BOM)

    def decode(self, found: bytes | str, where: str) -> str | None:
        """As `document`, byte-order mark and all; None for what is skipped."""
        try:
            if isinstance(found, bytes):
                return found.decode()
            if not found.isascii():
                found.encode()
            return found
        except UnicodeError as error:
            self._meet(f"{where} is not UTF-8: {_reason(found, error)}", where)
        if self.rule == "skip":
            return None
        if isinstance(found, bytes):
            return found.decode(errors="replace")
        return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", found)

    @contextlib.contextmanager
    def forgetting(self) -> Iterator[None]:
        """Neither count nor log what is read inside, since it is read again."""
        count, log = self.count, self._log
        self._log = False
        yield
        self.count, self._log = count, log

    def _meet(self, message: str, where: str) -> None:
        if self.rule == "error":
            raise DataError(f'{message}; dataloader.on_bad_text = "replace" or "skip" goes on')
        self.count += 1
        self.place = where
        if self._log and (self.count <= _TOLD or str(self.count).strip("0") == "1"):
            logger.warning(printable(f"{message}; {done_with(self.rule)} ({self.count} so far)"))


def done_with(rule: OnBadText) -> str:
    """What `replace` and `skip` do, for messages."""
    return "the document is skipped" if rule == "skip" else "the bad parts are replaced by U+FFFD"


def _reason(found: bytes | str, error: UnicodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        utf16 = " (it begins as UTF-16 does)" if found[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        return f"{error.reason} at byte {error.start}{utf16}"
    assert isinstance(error, UnicodeEncodeError)
    return f"a lone surrogate at character {error.start}"
