"""The records of datasets of the Hugging Face hub."""

import logging
from collections.abc import Iterator

from data.config import SourceConfig
from data.errors import DataError
from data.prepare.readers.compressed import register_formats
from data.prepare.readers.record import Record


def read_dataset(source: SourceConfig) -> Iterator[Record]:
    """The records of a dataset of the Hugging Face hub, streamed by `datasets`."""
    import datasets

    # The library also logs what it raises, which is reported once.
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    register_formats()
    try:
        records = datasets.load_dataset(
            source.dataset,
            source.dataset_subset,
            split=source.dataset_split,
            revision=source.dataset_revision,
            streaming=True,
        )
    except DataError:
        raise
    except Exception as error:  # hub, network and builder errors share no base class
        raise DataError(
            f"source {source.name!r}: cannot open the dataset {source.dataset!r}: "
            f"{_one_line(error)}"
        ) from error
    iterator = iter(records)
    number = 0
    while True:
        place = f"record {number} of {source.dataset}"
        try:
            value = next(iterator)
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:  # pyarrow, json, gzip and datasets each have their own
            raise DataError(f"cannot read {place}: {_one_line(error)}") from error
        yield Record(place, number, value)
        number += 1


def _one_line(error: BaseException) -> str:
    """The innermost cause, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())
