"""The exception of this folder."""


class OptimError(ValueError):
    """Bad input to the optimizer; the message says what, where, and what would be right."""
