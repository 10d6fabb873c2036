"""Imports everything that the processes of `prepare` need, once for all of them."""

from data.prepare import filter_pass, write_part  # noqa: F401
