"""A training checkpoint as a Hugging Face folder."""
