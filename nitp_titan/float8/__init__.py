"""Matrix products in float8, through torchao and TorchTitan's converters of a model's configuration.

``config.py`` is the ``[float8]`` table, ``gain.py`` when float8 pays, ``plan.py`` which layers are converted: all free
of torch. ``converter.py`` converts a model's configuration, ``experts.py`` has the experts' products.
"""
