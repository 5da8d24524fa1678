"""A configuration as another class's."""

from __future__ import annotations

import dataclasses

import pytest

from nitp_titan.titan.retyped import retyped


@dataclasses.dataclass(kw_only=True, slots=True)
class Plain:
    width: int
    names: list[str]


@dataclasses.dataclass(kw_only=True, slots=True)
class Derived(Plain):
    depth: int


def test_values_go_along_unless_they_are_changed():
    plain = Plain(width=3, names=["a"])
    found = retyped(plain, Derived, depth=2, width=4)
    assert type(found) is Derived
    assert (found.width, found.depth) == (4, 2)
    assert found.names is plain.names
    assert plain == Plain(width=3, names=["a"])


def test_no_value_is_lost():
    with pytest.raises(TypeError, match="depth"):
        retyped(Derived(width=3, names=[], depth=2), Plain)
