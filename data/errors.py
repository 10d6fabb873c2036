"""The exception of the data pipeline."""


class DataError(ValueError):
    """Bad input to the data pipeline.

    The message is one sentence: what is wrong, where, and the remedy. The command line prints it
    without a traceback.
    """
