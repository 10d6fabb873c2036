"""A corpus of this machine's own text with planted duplicates and bad records.

Every document begins with a line that numbers it, so that shards show which documents they hold.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import zstandard

from benchmarks.data.corpus import SUFFIXES, texts
from data.config import FiltersConfig, SourceConfig
from data.prepare.corpus import Document
from data.prepare.filters import KEPT, Rules
from data.prepare.signatures import (
    NEAR_ROWS,
    NEAR_SLOTS,
    TEMPLATE_ROWS,
    TEMPLATE_SLOTS,
    signatures,
)

TEMPLATES = 5
_FRAME_BYTES = 8_000_000
_WORD = re.compile(r"[^\W_]+")
_NAMES = ["Ada", "Bela", "Chen", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivo", "Jun"]
_BAD = ['{"text": null}', '{"broken": ', '{"text": "\\ud800"}', "[1, 2]", '{"other": "x"}']


def numbered(number: int, text: str) -> str:
    """A document with its number, which `number_of` reads."""
    return f"Document {number:07d}\n{text}"


def number_of(text: str) -> int:
    """The number of a document, from its beginning."""
    return int(text[len("Document ") :][:7])


@dataclass
class Planted:
    """Numbers of documents: those to be kept, and the copies to be dropped, by kind."""

    kept: list[int] = field(default_factory=list)
    copies: dict[str, list[int]] = field(
        default_factory=lambda: {"exact": [], "near": [], "template": []}
    )
    bad: int = 0


def distinct(documents: Iterable[str]) -> Iterator[str]:
    """Those that the filters keep and that share no band of a signature with an earlier one.

    So every document that is dropped later was planted.
    """
    source = SourceConfig(name="x", paths=("x",), domain="code")
    rules = Rules(FiltersConfig(), source)
    bands: set[tuple[str, int, bytes]] = set()
    for text in documents:
        if rules.judge(Document(text))[0] != KEPT:
            continue
        (row,) = signatures([text])
        keys = [
            (name, start, row[name][start : start + rows].tobytes())
            for name, slots, rows in (
                ("near", NEAR_SLOTS, NEAR_ROWS),
                ("template", TEMPLATE_SLOTS, TEMPLATE_ROWS),
            )
            for start in range(0, slots, rows)
        ]
        if bands.isdisjoint(keys):
            bands.update(keys)
            yield text


def write_planted(
    folder: Path, roots: list[Path], line: float, packed: float, code: float
) -> Planted:
    """Writes the sources `line`, `packed`, `code` and `planted`; returns what is in them.

    Arguments:
        line: megabytes of one file with all its records on one line.
        packed: megabytes of one .zst file of several frames, before compression.
        code: megabytes of four files of JSON lines.
    """
    planted = Planted()
    rng = random.Random(0)
    stream = distinct(
        numbered(i, text)
        for i, text in enumerate(texts(roots, SUFFIXES["code"] | SUFFIXES["docs"]))
    )
    long: list[str] = []

    def take(megabytes: float) -> list[str]:
        chosen, size = [], 0
        for text in stream:
            chosen.append(json.dumps({"text": text}, ensure_ascii=False))
            planted.kept.append(number_of(text))
            if len(_WORD.findall(text)) > 400 and rng.random() < 0.2:
                long.append(text)
            size += len(chosen[-1].encode()) + 1
            if size >= megabytes * 1e6:
                return chosen
        raise SystemExit(f"this machine has no more than {size / 1e6:.0f} MB for a source")

    (folder / "line.json").write_text("[" + ", ".join(take(line)) + "]")
    compressor = zstandard.ZstdCompressor()
    content = "".join(f"{record}\n" for record in take(packed)).encode()
    with (folder / "packed.jsonl.zst").open("wb") as file:
        for start in range(0, len(content), _FRAME_BYTES):
            file.write(compressor.compress(content[start : start + _FRAME_BYTES]))
    records = {"code": take(code), "planted": _copies(rng, long, planted)}
    for name, lines in records.items():
        for i in range(4):
            (folder / f"{name}-{i}.jsonl").write_text("".join(f"{r}\n" for r in lines[i::4]))
    return planted


def _copies(rng: random.Random, originals: list[str], planted: Planted) -> list[str]:
    """Records of copies of documents, pages of templates, and bad records."""
    rng.shuffle(originals)
    documents = originals[:300]
    planted.copies["exact"] += [number_of(text) for text in documents]
    for i, text in enumerate(originals[300:600]):
        body = text.partition("\n")[2]
        words = list(_WORD.finditer(body))
        for word in sorted(rng.sample(words, max(1, len(words) // 500)), key=lambda w: -w.start()):
            body = f"{body[: word.start()]}changed{body[word.end() :]}"
        number = 8_000_000 + i
        documents.append(numbered(number, body))
        planted.copies["near"].append(number)
    for template in range(TEMPLATES):
        body = " ".join(rng.choices(_NAMES, k=3)) + " "
        body += " ".join(f"word{rng.randrange(10**6):06x}"[:9] for _ in range(150))
        for page in range(60):
            number = 9_000_000 + template * 1000 + page
            values = f"{rng.choice(_NAMES)} paid {rng.randrange(10**6)} in {rng.randrange(3000)}. "
            documents.append(numbered(number, values + body + f" {rng.randrange(10**9)}"))
            planted.copies["template"].append(number)
    planted.bad = 50
    bad = [_BAD[i % len(_BAD)] for i in range(planted.bad)]
    return [json.dumps({"text": text}, ensure_ascii=False) for text in documents] + bad


def describe(planted: Planted, numbers: list[int]) -> str:
    """What became of the planted copies and of the other documents.

    Arguments:
        numbers: of the documents in the shards.
    """
    counts = Counter(numbers)
    lost = sum(counts[number] == 0 for number in planted.kept)
    dropped = {
        "exact": sum(counts[number] == 1 for number in planted.copies["exact"]),
        "near": sum(counts[number] == 0 for number in planted.copies["near"]),
        "template": sum(counts[number] == 0 for number in planted.copies["template"]),
    }
    to_drop = {kind: len(copies) for kind, copies in planted.copies.items()}
    to_drop["template"] -= TEMPLATES  # the first page of each is kept
    lines = [f"{kind}: {dropped[kind]} of {to_drop[kind]} dropped" for kind in dropped]
    count = sum(dropped.values())
    recall, precision = count / sum(to_drop.values()), count / (count + lost)
    lines.append(f"other documents: {lost} of {len(planted.kept)} lost")
    return "; ".join([*lines, f"recall {recall:.4f}, precision {precision:.4f}"])
