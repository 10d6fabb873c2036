"""A demo corpus without a download: text of the Python installation and its packages.

Code is the standard library's source; prose is its documentation topics and the descriptions of the
installed packages. The same environment gives the same files, byte for byte.
"""

import json
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from data.errors import DataError
from data.files import write_atomically

MAX_CODE_BYTES = 18_000_000
MAX_PROSE_BYTES = 6_000_000
_MIN_CHARACTERS = 200
# Skipped as code: tests, generated character tables, and the topics, which are prose.
_SKIPPED_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data")
)


def build_demo_corpus(folder: str | Path) -> tuple[Path, Path]:
    """Writes code.jsonl and prose.jsonl, lines of {"name", "text"}, into `folder`; returns both.

    Equal texts appear once; texts that are not UTF-8 are skipped. A file that already has the right
    content is not written again. Raises DataError where the installation has no source files.
    """
    folder = Path(folder)
    code = _limit(_distinct(_standard_library()), MAX_CODE_BYTES)
    prose = _limit(_distinct([*_topics(), *_descriptions()]), MAX_PROSE_BYTES)
    paths = []
    for name, documents in (("code.jsonl", code), ("prose.jsonl", prose)):
        if not documents:
            raise DataError(f"this Python installation holds no text for {name}.")
        lines = [json.dumps({"name": n, "text": t}, ensure_ascii=False) for n, t in documents]
        content = ("\n".join(lines) + "\n").encode()
        paths.append(folder / name)
        if not paths[-1].is_file() or paths[-1].read_bytes() != content:
            write_atomically(paths[-1], content)
    return paths[0], paths[1]


def _standard_library() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(name.parts):
            yield from _read(path, str(name))


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics/{name}", topics[name]


def _descriptions() -> Iterator[tuple[str, str]]:
    """Each installed package's long description and the documents installed with its code."""
    for package in sorted(metadata.distributions(), key=lambda d: (d.name or "").lower()):
        # The description is a header or the body, depending on the version of Python.
        fields = package.metadata.json
        text = fields.get("description")
        if isinstance(text, str):
            yield f"packages/{package.name}", text
        for file in sorted(package.files or [], key=str):
            if file.suffix.lower() in (".md", ".rst") and ".dist-info" not in str(file):
                yield from _read(Path(str(package.locate_file(file))), str(file))


def _read(path: Path, name: str) -> Iterator[tuple[str, str]]:
    try:
        yield name, path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return  # listed but absent, or in another encoding


def _distinct(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    texts: set[str] = set()
    for name, text in documents:
        text = text.replace("\r\n", "\n")
        try:
            text.encode()
        except UnicodeEncodeError:
            continue
        if len(text.strip()) >= _MIN_CHARACTERS and text not in texts:
            texts.add(text)
            yield name, text


def _limit(documents: Iterable[tuple[str, str]], limit: int) -> list[tuple[str, str]]:
    """The documents that fit into `limit` UTF-8 bytes in all; those that do not are skipped."""
    chosen, total = [], 0
    for name, text in documents:
        size = len(text.encode())
        if total + size <= limit:
            chosen.append((name, text))
            total += size
    return chosen
