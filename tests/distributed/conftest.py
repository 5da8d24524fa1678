"""What the tests of layouts share."""

from __future__ import annotations

import pytest

from tests.distributed.parity import References


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(tmp_path_factory.mktemp("one"))
