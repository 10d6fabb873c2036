"""The exception of the data pipeline, and what is wrong with a file that it reads."""

from pydantic import ValidationError


class DataError(ValueError):
    """Bad input to the data pipeline.

    The message is one sentence: what is wrong, where, and the remedy. The command line prints it
    without a traceback.
    """


def first_problem(error: ValidationError) -> str:
    """Returns the key of the first wrong value of a file, and what is wrong with it."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    return ": ".join(filter(None, [".".join(map(str, first["loc"])), message]))
