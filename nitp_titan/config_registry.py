"""What TorchTitan's own entry finds: ``--module nitp_titan --config nitp_debug`` and a function for every flavor.

    python -m torchtitan.train --module nitp_titan --config nitp_debug --nitp.weight 0.5

needs torch >= 2.14 and a GPU, as TorchTitan does; under ``nitp_titan.runtime.prepare()`` the configurations build
anywhere. Each is the job of its flavor alone, as ``nitp-titan check`` would explain it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nitp_titan.job import load_job
from nitp_titan.models.flavors import FLAVORS


def _config_function(flavor: str, name: str) -> Callable[[], Any]:
    def config():
        from nitp_titan.job.build import build_trainer_config

        config = build_trainer_config(load_job(None, ["--model.flavor", flavor], world_size=1))
        # Upstream's "local batch size times data-parallel degree": the number of ranks is not known here.
        config.training.global_batch_size = -1
        return config

    config.__name__ = config.__qualname__ = name
    config.__doc__ = f"Return the ``NITPTrainer.Config`` of flavor {flavor}."
    return config


def function_name(flavor: str) -> str:
    """The registry function of a flavor: nitp_debug, nitp_9b_a1b."""
    return "nitp_" + flavor.lower().replace("-", "_").replace(".", "p")


for _flavor in FLAVORS:
    globals()[function_name(_flavor)] = _config_function(_flavor, function_name(_flavor))
