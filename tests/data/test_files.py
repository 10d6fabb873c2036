"""Files that appear whole or not at all."""

from pathlib import Path

import pytest

from data.errors import DataError
from data.files import write_atomically
from tests.full_disk import full_disk


def test_text_is_written_as_utf8(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_atomically(file, "é\r\n")
    assert file.read_bytes() == b"\xc3\xa9\r\n" and list(tmp_path.iterdir()) == [file]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "a.json"
    write_atomically(file, b"before")
    with (
        full_disk(4096),
        pytest.raises(DataError, match=r"cannot write .*a\.json: .* unchanged"),
    ):
        write_atomically(file, bytes(10_000))
    assert file.read_bytes() == b"before" and list(file.parent.iterdir()) == [file]
    with pytest.raises(DataError, match=r"cannot write .*b\.json: File exists"):
        write_atomically(file / "b.json", b"")
