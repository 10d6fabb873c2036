"""What the processes of `prepare` work with: importing this imports all of it."""

import datasets  # noqa: F401

from data.indexed import indexed_module
from data.prepare import screening, write_part  # noqa: F401

indexed_module()
