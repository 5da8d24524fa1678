"""Importing this makes a process ready to train: TorchTitan on this machine, and our trainer."""

import torch

from nitp_titan.runtime import prepare

torch.set_num_threads(1)
prepare()

import nitp_titan.training.trainer  # noqa: E402, F401
