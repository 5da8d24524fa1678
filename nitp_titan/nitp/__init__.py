"""The method in plain torch: nothing here imports TorchTitan."""
