"""The training loop: what is ours of TorchTitan's trainer."""
