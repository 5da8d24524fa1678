"""What ends a run beside bad input. Free of torch, so that the entry can name it before it imports torch."""

from __future__ import annotations


class NotFinite(Exception):
    """A run ends since its numbers are bad; the message is one sentence. Exit code 3."""

    exit_code = 3
