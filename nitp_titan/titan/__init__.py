"""The seam to TorchTitan's models: a ``ModelSpec`` and its NITP twin."""
