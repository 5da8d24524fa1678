"""(major, minor) of versions."""

from __future__ import annotations

import pytest

from nitp_titan.runtime.versions import release


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.13.0+cpu", (2, 13)), ("2.15.0.dev20260801", (2, 15)), ("2.9", (2, 9)), ("0.3.1", (0, 3)), ("main", (0, 0))],
)
def test_release(version, expected):
    assert release(version) == expected
