"""nitp_titan: Next Implicit Token Prediction (arXiv 2605.24956) for LLM pre-training, on TorchTitan."""

__version__ = "0.1.0"
