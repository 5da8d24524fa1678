"""What these tests ask of the machine."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def cpu_products() -> None:
    """Skip a test where this CPU is one for which oneDNN has no float8 product."""
    ones, scale = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(())
    try:
        torch._scaled_mm(ones, ones.t(), scale, scale, out_dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"this CPU has no float8 product: {error}")
