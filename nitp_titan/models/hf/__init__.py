"""Hugging Face counterparts of decoders: architectures, and what their ``config.json`` says."""
