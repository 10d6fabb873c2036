"""Which files of a machine are a source: links followed, nothing left out without a word."""

from pathlib import Path

import pytest

from data.errors import DataError
from tests.data.prepare.test_corpus import corpus, jsonl, texts_of


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    """Folder with a file, and a link to a folder of another disk with one more."""
    for folder, name in (("here", "a"), ("disk/part", "b")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{name}.jsonl").write_bytes(jsonl([name]))
    (tmp_path / "here" / "linked").symlink_to(tmp_path / "disk")
    return tmp_path / "here"


@pytest.mark.parametrize("pattern", ["", "/*", "/**", "/**/*.jsonl"])
def test_linked_folders_are_read(disks: Path, pattern: str) -> None:
    names = [f"{disks}{pattern}"] + [str(disks / "linked")] * (pattern == "/**/*.jsonl")
    assert texts_of(corpus(paths=names)) == ["a", "b"]


def test_a_link_to_its_own_folder_ends(disks: Path) -> None:
    (disks / "linked" / "part" / "loop").symlink_to(disks)
    assert texts_of(corpus(paths=[str(disks)])) == ["a", "b"]


def test_a_link_to_nothing_is_named(disks: Path) -> None:
    (disks / ".#a.jsonl").symlink_to("user@host.1")  # an editor's lock
    (disks / "gone.jsonl").symlink_to("/nowhere/gone.jsonl")
    for path in (str(disks), f"{disks}/*", str(disks / "gone.jsonl")):
        with pytest.raises(DataError, match=r"gone\.jsonl is a link to /nowhere/gone\.jsonl"):
            corpus(paths=[path])
    assert texts_of(corpus(paths=[str(disks)], include=["**/a.jsonl"])) == ["a"]


def test_a_folder_that_cannot_be_read_is_named(
    disks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    (disks / "lost+found").mkdir()
    iterdir = Path.iterdir
    for name in ("lost+found", "part"):
        monkeypatch.setattr(
            Path, "iterdir", lambda p, n=name: refuse(p) if p.name == n else iterdir(p)
        )
        if name == "lost+found":
            assert texts_of(corpus(paths=[str(disks)])) == ["a", "b"]
            continue
        with pytest.raises(DataError, match=r"cannot read .*/linked/part: Permission denied"):
            corpus(paths=[str(disks)])


def test_a_file_of_several_names_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(jsonl(["a"]))
    (folder / "latest.jsonl").symlink_to("a.jsonl")
    (folder / "linked.jsonl").hardlink_to(folder / "a.jsonl")
    (tmp_path / "other").symlink_to(folder)
    names = ["data/a.jsonl", "data/../data/a.jsonl", str(folder), "other", "other/*.jsonl"]
    assert texts_of(corpus(paths=names)) == ["a"]


def test_hidden_files_and_metadata_are_not_data(tmp_path: Path) -> None:
    names = ["a.jsonl", "_b.jsonl", "sub/__init__.jsonl"]
    others = [".a.jsonl", ".cache/a.jsonl", "_SUCCESS", "__MACOSX/a.jsonl", "README.md"]
    for name in (*names, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([name]))
    assert set(texts_of(corpus(paths=[str(tmp_path)]))) == set(names)
    everywhere = corpus(paths=[f"{tmp_path}/**"])
    assert set(texts_of(everywhere)) == set(names)
    assert len(corpus(paths=[str(tmp_path)], format="text").files) == len(names) + 1  # README.md
    hidden = corpus(paths=[str(tmp_path)], include=[".cache/*", "README.md"])
    assert texts_of(hidden) == [".cache/a.jsonl", "README.md"]
    assert texts_of(corpus(paths=[f"{tmp_path}/.*.jsonl"])) == [".a.jsonl"]
    assert texts_of(corpus(paths=[str(tmp_path / "_SUCCESS")])) == ["_SUCCESS"]
    with pytest.raises(DataError, match=r"nothing to read at .* \(hidden files and metad"):
        corpus(paths=[str(tmp_path)], include=["_*/*", "_SUCC*"])


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source 's': nothing to read at .*nowhere"):
        corpus(paths=[str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match="an empty folder"):
        corpus(paths=[str(tmp_path)])
