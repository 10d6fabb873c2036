"""What the processes of `prepare` work with: importing this imports all of it."""

import datasets  # noqa: F401

from data import prepare_unit, screening  # noqa: F401
from data.indexed import indexed_module

indexed_module()
