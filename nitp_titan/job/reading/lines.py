"""Where the keys of a TOML text stand, for the line number of a problem."""

from __future__ import annotations

import re

_TRIPLE = re.compile(r'"""|\'\'\'')
_KEY_PART = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_KEY = rf"{_KEY_PART}(?:\s*\.\s*{_KEY_PART})*"
_HEADER_LINE = re.compile(rf"\s*\[\[?\s*({_KEY})\s*\]")
_KEY_LINE = re.compile(rf"\s*({_KEY})\s*=")


def lines_of_keys(text: str) -> dict[tuple[str, ...], int]:
    """Return path of a key or table -> its line; tomli reads values only.

    A line-by-line scan of a text that tomli has accepted: it may miss keys inside inline tables, whose line is then
    their table's.
    """
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    closing = ""  # the quotes that end the multi-line string that the scan is in
    for number, line in enumerate(text.splitlines(), start=1):
        rest = line
        if closing:
            if closing not in line:
                continue
            rest, closing = line.partition(closing)[2], ""
        elif match := _HEADER_LINE.match(line):
            table = _parts(match[1])
            lines.setdefault(table, number)
        elif match := _KEY_LINE.match(line):
            path = table + _parts(match[1])
            for n in range(len(table) + 1, len(path) + 1):
                lines.setdefault(path[:n], number)
        while match := _TRIPLE.search(rest):
            rest = rest[match.end() :]
            if match[0] not in rest:
                closing = match[0]
                break
            rest = rest.partition(match[0])[2]
    return lines


def _parts(key: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in re.findall(_KEY_PART, key))
