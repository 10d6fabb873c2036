"""Benchmarks of the data pipeline, compared with the alternatives, on text of this machine.

    python -m benchmarks.data FOLDER [prepare filters packing loader recipe roundtrip memory]

FOLDER is filled with what it lacks: 120 MB of real text (benchmarks/data/corpus.py), a tokenizer of
128K trained on 10 MB of it, and shards. Without names all parts run, which takes about twenty
minutes.

prepare     one core: prepare, datasets.map, datatrove, Megatron's tool, the tokenizer alone
filters     cost of each step of the filters, and what it removes
packing     real lengths at rows of 2048 and 4096: fill, cut documents, documents/s
loader      tokens/s with transforms off and on, first batch of a process at step 10^6
recipe      FIM rate, split rate and mixture shares of the produced rows against the configured
roundtrip   every document, token for token, restored from the rows of an epoch
memory      peak memory of prepare, filters included, at 10 MB and 1 GB of text
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.data import loader, prepare, roundtrip
from data import DataConfig, train_tokenizer
from data.prepare import prepare as prepare_shards

SOURCES = {"code": "code", "docs": "prose", "data": "prose"}


def open_folder(folder: Path) -> DataConfig:
    """Collects text, trains the tokenizer and prepares shards where they are missing."""
    corpus = folder / "corpus"
    if not list(corpus.glob("*.jsonl*")):
        collect = [sys.executable, "-m", "benchmarks.data.corpus", str(corpus)]
        subprocess.run(collect, check=True)
    config = DataConfig.model_validate(
        {
            "sources": [
                {"name": name, "paths": [str(corpus / f"{name}-*")], "domain": domain}
                for name, domain in SOURCES.items()
            ],
            "tokenizer": {"path": str(folder / "tokenizer"), "sample_bytes": 10_000_000},
            "shards": str(folder / "shards"),
            "seq_len": 4096,
            "global_batch_size": 64,
            "validation_fraction": 0.01,
        }
    )
    if not (folder / "tokenizer").exists():
        train_tokenizer(config)
    prepare_shards(config, progress=sys.stderr.isatty())
    return config


PARTS = {
    "prepare": prepare.side_by_side,
    "filters": prepare.filters,
    "packing": loader.packing,
    "loader": loader.loader,
    "recipe": roundtrip.recipe,
    "roundtrip": roundtrip.roundtrip,
    "memory": prepare.memory,
}


def main() -> None:
    """Runs the named parts."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    config = open_folder(options.folder)
    for name in options.parts or PARTS:
        print(f"== {name}", flush=True)
        PARTS[name](config)


if __name__ == "__main__":
    main()
