"""A checkpoint on disk: how it is written, found and read."""
