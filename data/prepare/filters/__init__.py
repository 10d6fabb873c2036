"""The filters of single documents, and the masking of personal information before them."""

from data.prepare.filters.inputs import filter_files, require_usable
from data.prepare.filters.pii import Masker
from data.prepare.filters.rules import (
    EXACT,
    KEPT,
    LENGTH,
    NEAR,
    ORDER,
    REASONS,
    TEMPLATE,
    Rules,
)

__all__ = [
    "EXACT",
    "KEPT",
    "LENGTH",
    "NEAR",
    "ORDER",
    "REASONS",
    "TEMPLATE",
    "Masker",
    "Rules",
    "filter_files",
    "require_usable",
]
