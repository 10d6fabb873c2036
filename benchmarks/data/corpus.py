"""Collects real text of this machine into .jsonl files, for the data benchmarks.

    python -m benchmarks.data.corpus FOLDER [--megabytes 120]

Three sources, each in several files, among them .gz and .zst: `code` (Python and C sources of the
interpreter and the installed packages), `docs` (their .md, .rst and .txt files, manual pages and
those in /usr/share/doc), and `data` (.json, .html, .xml, .po and the like). No text is repeated.
"""

import argparse
import gzip
import hashlib
import itertools
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = {
    "code": {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cuh", ".hpp", ".js", ".ts", ".pl", ".sh"},
    "docs": {".md", ".rst", ".txt", ".gz", ""},
    "data": {".json", ".html", ".xml", ".po", ".css", ".csv", ".yaml", ".toml", ".svg"},
}
_LARGEST = 2_000_000  # bytes of one file; larger ones are mostly generated tables
_SMALLEST = 200
_FILES = 3  # of one source


def texts(roots: list[Path], suffixes: set[str]) -> Iterator[str]:
    """Yields the UTF-8 texts below `roots` in a fixed order, without repeats."""
    digests: set[bytes] = set()
    for path in itertools.chain.from_iterable(sorted(root.rglob("*")) for root in roots):
        if path.suffix.lower() not in suffixes or path.is_symlink() or not path.is_file():
            continue
        try:
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
            text = content.decode("utf-8")
        except (OSError, EOFError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(content).digest()
        if _SMALLEST <= len(content) <= _LARGEST and "\0" not in text and digest not in digests:
            digests.add(digest)
            yield text


def write(source: str, documents: Iterator[str], folder: Path, limit: int) -> int:
    """Writes up to `limit` UTF-8 bytes of text, a third into each file; returns the bytes."""
    total = 0
    for part in range(_FILES):
        lines = []
        for text in documents:
            lines.append(json.dumps({"text": text}, ensure_ascii=False))
            total += len(text.encode())
            if total >= limit * (part + 1) // _FILES:
                break
        content = ("\n".join(lines) + "\n").encode()
        path = folder / f"{source}-{part}.jsonl"
        if part == 1:
            path, content = path.with_suffix(".jsonl.gz"), gzip.compress(content, 6, mtime=0)
        elif part == 2:
            import zstandard

            path, content = path.with_suffix(".jsonl.zst"), zstandard.compress(content)
        if lines:
            path.write_bytes(content)
    return total


def main() -> int:
    """Writes the files; exit code 1 where the machine has less text than `--megabytes`."""
    parser = argparse.ArgumentParser(description="Real text from this machine as .jsonl files.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=float, default=120)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    installed = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "/usr/share"]
    roots = [Path(root) for root in dict.fromkeys(installed)]
    left, written = options.megabytes * 1e6, 0
    for i, source in enumerate(("data", "docs", "code")):
        size = write(source, texts(roots, SUFFIXES[source]), options.folder, int(left / (3 - i)))
        print(f"{source}: {size / 1e6:.1f} MB", flush=True)
        left, written = left - size, written + size
    print(f"wrote {written / 1e6:.1f} MB of text into {options.folder}")
    if left > 1e6:
        print(f"this machine has no more than {written / 1e6:.1f} MB", file=sys.stderr)
    return 0 if left <= 1e6 else 1


if __name__ == "__main__":
    sys.exit(main())
