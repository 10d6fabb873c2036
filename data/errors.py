"""The one exception of this folder."""


class DataError(ValueError):
    """Bad input to the data pipeline.

    The message is one sentence for a person: what is wrong, where, and what would be right. The
    command line prints it alone, without a traceback.
    """
