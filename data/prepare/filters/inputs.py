"""What filters read beyond the documents."""

from pathlib import Path

from data.config import FiltersConfig
from data.prepare.filters.decontamination import files_of, open_texts
from data.prepare.filters.language import identifier
from data.prepare.find_files import SourceFile, stored_now


def filter_files(filters: FiltersConfig | None) -> list[SourceFile]:
    """The files that decide what the filters drop. Raises DataError for one that is not there."""
    files: list[SourceFile] = []
    if filters is not None and filters.language is not None:
        files.append(stored_now(Path(filters.language.model)))
    if filters is not None and filters.decontamination is not None:
        files += files_of(filters.decontamination)
    return files


def require_usable(filters: FiltersConfig) -> None:
    """Raises DataError where filters cannot work, before any document is read."""
    if filters.language is not None:
        identifier(filters.language)
    if filters.decontamination is not None:
        open_texts(filters.decontamination)
