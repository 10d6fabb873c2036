"""The exception that this package raises."""


class OptimError(ValueError):
    """Bad input to the optimizer; the message names it and what would be right."""
