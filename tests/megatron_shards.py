"""megatron-core's own module of `.bin/.idx` files, with which ours are compared."""

import warnings
from typing import Any


def indexed_module() -> Any:
    """Returns megatron.core.datasets.indexed_dataset, without the warnings about GPU packages.

    The import takes seconds.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset
