"""The types of keys: how they are written, read and described."""

from __future__ import annotations

import types
import typing
from typing import Any, Literal, Union


def parse_type(expression: str) -> Any:
    """Return the type that a snapshot's expression stands for."""
    return eval(expression, {"Any": Any, "Literal": Literal, "NoneType": type(None)})


def render_type(tp: Any) -> str:
    """Return an expression that :func:`parse_type` turns back into ``tp``."""
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if tp is type(None):
        return "None"
    if origin in (Union, types.UnionType):
        return " | ".join(render_type(arg) for arg in args)
    if origin is Literal:
        return f"Literal[{', '.join(repr(arg) for arg in args)}]"
    if origin is not None:
        return f"{origin.__name__}[{', '.join(render_type(arg) for arg in args)}]"
    return "Any" if tp is Any else tp.__name__


def choices(tp: Any) -> list[Any]:
    """Return the values that a Literal admits (also an optional one); empty for every other type."""
    if typing.get_origin(tp) is Literal:
        return list(typing.get_args(tp))
    return [value for arg in typing.get_args(tp) for value in choices(arg)] if _is_union(tp) else []


def is_list(tp: Any) -> bool:
    """Whether a command-line option of this type takes several words."""
    return typing.get_origin(tp) is list or (_is_union(tp) and any(is_list(arg) for arg in typing.get_args(tp)))


def _is_union(tp: Any) -> bool:
    return typing.get_origin(tp) in (Union, types.UnionType)


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", dict: "a table"}


def describe(tp: Any) -> str:
    """Return a type as a phrase for "expected ..."."""
    from nitp_titan.job.errors import one_of, quote

    if literal := choices(tp):
        return one_of(literal) if len(literal) > 1 else quote(literal[0])
    if _is_union(tp):
        args = typing.get_args(tp)
        names = [describe(arg) for arg in args if arg is not type(None) and not (arg is int and float in args)]
        return " or ".join(names + ['"none"'] * (type(None) in args))
    if typing.get_origin(tp) is list:
        inner = describe(typing.get_args(tp)[0])
        return f"a list, each {inner}" if inner != "a string" else "a list of strings"
    if typing.get_origin(tp) is tuple:
        return "[" + ", ".join(describe(arg) for arg in typing.get_args(tp)) + "]"
    return _NAMES.get(typing.get_origin(tp) or tp, str(tp))
