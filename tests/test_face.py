"""The package's public names: there, light, loaded when asked for; and the example that uses them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import nitp_titan

ROOT = Path(__file__).parent.parent
WITH_TORCHTITAN = {"nitp_model_spec", "prepare"}


def loaded_by(code: str) -> set[str]:
    """The modules of a fresh process that has run this."""
    program = f"{code}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_every_public_name_is_there():
    for name in nitp_titan.__all__:
        assert callable(getattr(nitp_titan, name)), name
        assert name in dir(nitp_titan)
    with pytest.raises(AttributeError, match="has no attribute 'projector'"):
        nitp_titan.projector  # noqa: B018


def test_the_package_is_light_and_the_method_free_of_torchtitan():
    assert "torch" not in loaded_by("import nitp_titan")
    names = ", ".join(sorted(set(nitp_titan.__all__) - WITH_TORCHTITAN))
    found = loaded_by(f"from nitp_titan import {names}")
    assert "torch" in found
    assert "torchtitan" not in found


def test_what_is_installed_says_that_it_is_typed():
    assert (ROOT / "nitp_titan" / "py.typed").is_file()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
def test_the_example_learns(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(ROOT / "examples")
    import huggingface_llama  # pyrefly: ignore [missing-import]

    losses = huggingface_llama.main()
    assert len(losses) == huggingface_llama.STEPS
    assert losses[-1][0] < losses[0][0] / 2
    assert losses[-1][1] < losses[0][1] / 2
