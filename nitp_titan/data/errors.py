"""What is wrong with data that a user has named."""


def printable(text: str) -> str:
    """Return a text that any stream can take: bytes of a path that are not UTF-8 as "\\udce9"."""
    return text.encode("utf-8", "backslashreplace").decode()


def shortened(text: str, characters: int = 60) -> str:
    """Return the beginning of a text that is too long for a message."""
    return text if len(text) <= characters else f"{text[:characters]}..."


class DataError(ValueError):
    """A corpus that cannot be found, opened or read; the message names the file and, where there is one, the line."""

    def __init__(self, message: str):
        super().__init__(printable(message))
