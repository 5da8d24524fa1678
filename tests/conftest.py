"""Settings of every test process."""

import os
from pathlib import Path

import pytest

# One thread each: the suite runs a process a core, and OpenMP's waiting threads slow each other down by an order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
# Runs under test are found by their own tb folder; weights and biases has no place there.
os.environ.setdefault("WANDB_MODE", "disabled")

from nitp_titan.runtime import prepare

prepare()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small text files, for runs."""
    from tests.helpers.trainers import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus"))
