"""What a rank hands to collectives, counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators, and which of their arguments a rank sends: all but their outputs.
_SENDS = {
    "c10d.alltoall_base_": slice(1, 2),
    "c10d.allreduce_": slice(0, 1),
    "c10d._allgather_base_": slice(1, 2),
    "c10d._reduce_scatter_base_": slice(1, 2),
    "c10d.send": slice(0, 1),
    "_c10d_functional.all_to_all_single": slice(0, 1),
    "_c10d_functional.all_reduce": slice(0, 1),
    "_c10d_functional.all_reduce_": slice(0, 1),
    "_c10d_functional.all_gather_into_tensor": slice(0, 1),
    "_c10d_functional.reduce_scatter_tensor": slice(0, 1),
}
_NO_PAYLOAD = {"barrier", "wait_tensor", "_wrap_tensor_autograd", "recv_", "monitored_barrier_", "recv_any_source_"}


class Traffic(TorchDispatchMode):
    """Inside, adds up the bytes that this rank gives to each kind of collective, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        namespace, name, *_ = str(func).split(".")
        if namespace in ("c10d", "_c10d_functional") and name not in _NO_PAYLOAD:
            sent = _SENDS.get(f"{namespace}.{name}")
            assert sent is not None, f"an operator that is not counted: {func}"
            tensors = [x for x in tree_leaves(args[sent]) if isinstance(x, torch.Tensor)]
            self.bytes[name] += sum(x.numel() * x.element_size() for x in tensors)
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))
