"""The page that compares two preparations."""

from pathlib import Path

from data.manifest import Example, FilterStats, Manifest, Shard
from trainer.report.data_compare import render, write_comparison


def made_up(sources: int, seed: int) -> Manifest:
    """A manifest of many sources; every third differs by the seed, one exists for each seed."""
    shards, dropped = [], {}
    for number in [*range(sources), 10**6 + seed]:
        name = f"source-{number:04d}"
        tokens = 10_000 * (number % 97 + 1) + (seed * 777 * (number % 3 == 0))
        for split, part in (("train", tokens), ("validation", tokens // 100)):
            shards.append(
                Shard(
                    source=name, domain="prose", split=split, name=f"{name}-{split}-00000",
                    documents=part // 50, tokens=part, bytes=part * 4,
                )
            )  # fmt: skip
        example = Example(text=f"<b>text {number} of {seed if number % 5 else 0}", detail="short")
        dropped[name] = {
            "length": FilterStats(documents=number % 7 + seed, bytes=1000, examples=(example,))
        }
    return Manifest(
        digest=f"{seed}" * 16, folder="x", tokenizer_hash="x", vocab_size=1000, bos_id=0, eos_id=1,
        pad_id=2, empty_documents={}, dropped=dropped, shards=tuple(shards),
        settings={"data.validation_fraction": seed / 100, "data.sources": []},
    )  # fmt: skip


def test_changes_come_first_and_everything_is_there(tmp_path: Path) -> None:
    for seed, name in ((1, "a"), (2, "b")):
        made_up(1000, seed).save(tmp_path / name)
    path = write_comparison(tmp_path / "a", tmp_path / "b")
    assert path == tmp_path / "a" / "compare.html"
    page = path.read_text()
    assert len(page) < 2_000_000 and "<b>text" not in page, "text is escaped"
    summary, rest = page.split("<h2>Largest changes</h2>")
    assert "source-1000001" in summary and "source-1000002" in summary
    assert "data.validation_fraction" in summary
    largest, rest = rest.split("<h2>What the filters left out</h2>")
    assert largest.count("<tr>") == 21 and "source-1000001 (only A)" in largest
    filters, rest = rest.split("<h2>Documents that only one left out</h2>")
    assert "+1,002 (+25.1%)" in filters  # each of 1000 sources one more, the own ones two
    examples, everything = rest.split("<h2>All sources</h2>")
    assert "text 1 of 1" in examples and "text 0 of 0" not in examples
    assert everything.count("<tr>") == 1003


def test_equal_preparations() -> None:
    page = render("a", "b", made_up(3, 1), made_up(3, 1))
    assert "0 of 4 sources differ" in page and page.count("The same.") == 1
