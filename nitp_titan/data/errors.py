"""What is wrong with data that a user has named."""


class DataError(ValueError):
    """A corpus that cannot be found, opened or read; the message names the file and, where there is one, the line."""
