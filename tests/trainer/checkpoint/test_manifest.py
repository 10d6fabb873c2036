"""The manifest of a checkpoint lists files of its own folder."""

from pathlib import Path

import pytest

from trainer.checkpoint import manifest


@pytest.mark.parametrize("outside", ["../a.safetensors", "/a.safetensors"])
def test_a_file_outside_the_folder_is_refused(tmp_path: Path, outside: str) -> None:
    files: dict[str, manifest.FileRecord] = {outside: {"size": 0, "sha256": "0"}}
    manifest.write(tmp_path, files)
    none, problem = manifest.read(tmp_path)
    assert not none and problem is not None and f"{outside!r} should be a relative" in problem
