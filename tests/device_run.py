"""Losses and gradients of a debug model on whatever device is there.

    python -m tests.device_run FLAVOR FILE [--dtype bfloat16] [--compile]

A process trains on one kind of device, since the CPU's shims take flex attention's place: a comparison needs two.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch

from nitp_titan.runtime import prepare


def compile_as_a_run_does(model: Any) -> None:
    """Compile blocks, projector and losses, as ``[compile]`` does, without FSDP."""
    from torchtitan.config import CompileConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed.compile import apply_compile

    alone = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, world_size=1)
    apply_compile(model, compile_config=CompileConfig(enable=True), parallel_dims=alone)
    model.projector.compile(backend="inductor", fullgraph=True)
    model.lm_head.compile_loss("inductor")
    model.compile_nitp_loss("inductor")


def losses_and_gradients(flavor: str, device: str, dtype: torch.dtype, *, compile: bool) -> dict[str, torch.Tensor]:
    """Return, on the CPU, both loss sums and every gradient of a debug model with NITP, for a packed batch.

    "waits" has how often that waited for the device, which a step must not do.
    """
    from nitp_titan.nitp.config import NITPConfig
    from nitp_titan.titan.spec import nitp_model_spec
    from tests.helpers.decoders import backbone, built, packed_batch

    spec = nitp_model_spec(backbone("nitp_titan", flavor), NITPConfig(), chunk_tokens=96)
    model = built(spec).to(device)  # the same weights everywhere: a CPU's generator draws them
    for parameter in model.parameters():  # buffers, such as rotary angles, stay in fp32
        parameter.data = parameter.data.to(dtype)
    if compile:
        compile_as_a_run_does(model)
    documents = ((100, 1, 90, 65), (256,))
    tokens, positions, labels = (x.to(device) for x in packed_batch(spec.model.vocab_size, documents=documents))
    masks = model.get_attention_masks(positions=positions)
    for last in (False, True):  # the first compiles, and may wait as it tries kernels
        model.zero_grad()
        if last and device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sums = model(tokens, positions=positions, attention_masks=masks, labels=labels)[0]
            sums.sum().backward()
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    print(*waits, sep="\n")
    found = {"ntp": sums[0].detach(), "nitp": sums[1].detach()}
    found |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: value.cpu() for name, value in found.items()} | {"waits": torch.tensor(len(waits))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flavor")
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    prepare()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    torch.save(losses_and_gradients(options.flavor, device, dtype, compile=options.compile), options.file)


if __name__ == "__main__":
    main()
