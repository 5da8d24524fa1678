"""Losses and gradients of a debug model on whatever device is there: ``python -m tests.device_run FLAVOR FILE``.

A process trains on one kind of device, since the CPU's shims take flex attention's place: a comparison needs two.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

from nitp_titan.runtime import prepare


def losses_and_gradients(flavor: str, device: str) -> dict[str, torch.Tensor]:
    """Return, on the CPU, both loss sums and every gradient of a debug model in fp32 with NITP, for a packed batch.

    "waits" has how often that waited for the device, which a step must not do.
    """
    from nitp_titan.decoder import nitp_model_spec
    from nitp_titan.nitp_config import NITPConfig
    from tests.decoders import backbone, built, packed_batch

    spec = nitp_model_spec(backbone("nitp_titan", flavor), NITPConfig(), chunk_tokens=96)
    model = built(spec).to(device)  # the same weights everywhere: a CPU's generator draws them
    documents = ((100, 1, 90, 65), (256,))
    tokens, positions, labels = (x.to(device) for x in packed_batch(spec.model.vocab_size, documents=documents))
    masks = model.get_attention_masks(positions=positions)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
    for _ in range(2):  # the first compiles attention, and may wait as it tries kernels
        model.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sums = model(tokens, positions=positions, attention_masks=masks, labels=labels)[0]
            sums.sum().backward()
    waits = sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
    found = {"ntp": sums[0].detach(), "nitp": sums[1].detach()}
    found |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: value.cpu() for name, value in found.items()} | {"waits": torch.tensor(waits)}


def main(flavor: str, file: str) -> None:
    prepare()
    torch.save(losses_and_gradients(flavor, "cuda" if torch.cuda.is_available() else "cpu"), Path(file))


if __name__ == "__main__":
    main(*sys.argv[1:])
