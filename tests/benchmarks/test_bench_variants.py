"""Variants by name and from the command line."""

from __future__ import annotations

import pytest

from benchmarks.variants import VARIANTS, choose, parse_variant


def test_names_are_in_the_order_of_the_command_line():
    assert [v.name for v in choose(["nitp", "stock", "ntp"], ["x:float8.recipe=tensorwise"])] == [
        "nitp",
        "stock",
        "ntp",
        "x",
    ]


def test_a_variant_of_ones_own_differs_from_nitp():
    found = parse_variant("nitp_float8:float8.recipe=tensorwise,float8.filter_fqns=lm_head,router")
    assert found.trainer == "nitp_titan"
    changes = ("--float8.recipe=tensorwise", "--float8.filter_fqns=lm_head,router")
    assert found.overrides == (*VARIANTS["nitp"].overrides, *changes)
    assert "float8.recipe=tensorwise" in found.meaning


def test_a_variant_of_ones_own_differs_from_another():
    found = parse_variant("b:training.seq_len=64,like=stock")
    assert (found.trainer, found.overrides) == ("torchtitan", ("--nitp.no-enable", "--training.seq_len=64"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no_colon", "expected NAME:key=value"),
        (":float8.recipe=tensorwise", "expected NAME:key=value"),
        ("x:recipe", "expected NAME:key=value"),
        ("x:recipe=tensorwise", "expected table.key, or like=NAME"),
        ("x:like=nope", "found 'nope', expected one of ntp, nitp"),
    ],
)
def test_what_is_no_variant(text, message):
    with pytest.raises(ValueError, match=message):
        parse_variant(text)


def test_wrong_choices():
    with pytest.raises(ValueError, match="found 'ntpp', expected one of ntp"):
        choose(["ntpp"])
    with pytest.raises(ValueError, match="found ntp twice"):
        choose(["ntp", "nitp"], ["ntp:like=nitp"])
    with pytest.raises(ValueError, match="found none"):
        choose([])
