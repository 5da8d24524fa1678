"""``--table.key value`` words, as settings of a job."""

from __future__ import annotations

import re
from typing import Any

from nitp_titan.job.draft import Layer, Setting
from nitp_titan.job.errors import COMMAND_LINE, Problem, nearest, quote
from nitp_titan.job.keys.schema import Key, all_tables, from_words
from nitp_titan.job.keys.types import describe, is_list
from nitp_titan.job.reading.file import Bad, _hint, _mismatch


def split_command_line(words: list[str]) -> tuple[list[str], list[str]]:
    """Tell ``--table.key value`` options from other arguments.

    Returns:
        The options' words, and the others' in their order.
    """
    options: list[str] = []
    others: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not re.match(r"--[A-Za-z_][\w-]*\.", word):
            others.append(word)
            continue
        options.append(word)
        key, _ = _find_key(word.removeprefix("--").partition("=")[0])
        if "=" in word:
            continue
        limit = len(words) if key is None or is_list(key.type) else 1
        while limit and position < len(words) and not words[position].startswith("--"):
            if key is not None and key.flag and words[position].lower() not in ("true", "false", "none"):
                break
            options.append(words[position])
            position, limit = position + 1, limit - 1
    return options, others


def read_command_line(words: list[str]) -> tuple[Layer, Bad, list[Problem]]:
    """Read ``--table.key value`` options: ``--table.key=value``, ``--table.flag``, ``--table.no-flag``, lists as
    several words or with commas. The last of several for one key counts.

    Returns:
        Their settings, the keys whose value is wrong, and everything that is wrong with them.
    """
    layer: Layer = {}
    bad: Bad = set()
    problems: list[Problem] = []
    for option, values in _options(words):
        if not option.startswith("--"):
            problems.append(Problem(COMMAND_LINE, quote(option), "found a word without an option before it"))
            continue
        key, negated = _find_key(option.removeprefix("--"))
        if key is None:
            problems.append(_unknown_option(option))
            continue
        try:
            if negated or (key.flag and not values):
                if values:
                    raise ValueError
                value: Any = not negated
            elif not values:
                problems.append(Problem(COMMAND_LINE, option, f"no value, expected {describe(key.type)}"))
                continue
            else:
                value = from_words(key, values)
        except (ValueError, TypeError):
            found = quote(" ".join(values))
            bad.add((key.table, key.name))
            expected = ("found " + found + ", expected no value", "") if negated else _mismatch(key, values[0], found)
            problems.append(Problem(COMMAND_LINE, option, *expected))
        else:
            bad.discard((key.table, key.name))
            layer[key.table, key.name] = Setting(value, "command line")
    return layer, bad, problems


def _options(words: list[str]) -> list[tuple[str, list[str]]]:
    """Group the words into (option, values)."""
    options: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            options.append((name, [value] if equals else []))
        elif options:
            options[-1][1].append(word)
        else:
            options.append((word, []))
    return options


def _find_key(name: str) -> tuple[Key | None, bool]:
    """Return the key of ``table.key`` or ``table.no-key``, and whether it is the latter."""
    table, _, key_name = name.replace("-", "_").rpartition(".")
    keys = all_tables().get(table, {})
    if key_name in keys:
        return keys[key_name], False
    flag = keys.get(key_name.removeprefix("no_"))
    return (flag, True) if flag is not None and flag.flag and key_name.startswith("no_") else (None, False)


def _unknown_option(option: str) -> Problem:
    table, dot, name = option.removeprefix("--").replace("-", "_").rpartition(".")
    if not dot:
        owners = [f'"--{t}.{name}"' for t, keys in all_tables().items() if name in keys]
        hint = "did you mean " + " or ".join(owners) + "?" if owners else ""
        return Problem(COMMAND_LINE, option, "unknown option, expected --table.key", hint)
    if table not in all_tables():
        match = nearest(table, all_tables())
        hint = f'did you mean "--{match}.{name}"?' if match else f"the tables are {', '.join(all_tables())}"
        return Problem(COMMAND_LINE, option, f"unknown table {quote(table)}", hint)
    match = nearest(name, all_tables()[table])
    hint = f'did you mean "--{table}.{match}"?' if match else _hint(table, name)
    return Problem(COMMAND_LINE, option, f"unknown key of [{table}]", hint)


CONFIG_FILE = "--job.config_file"


def split_config_file(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Take ``--job.config_file FILE`` (or ``=FILE``; the last counts) out of the arguments; return it and the rest."""
    file, rest, words = None, [], iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name.replace("-", "_") == CONFIG_FILE.replace("-", "_"):
            file = value if equals else next(words, None)
        else:
            rest.append(word)
    return file or None, rest
