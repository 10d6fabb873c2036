"""The data pipeline's figures, side by side with the alternatives, on this machine's own text.

    python -m benchmarks.data.data FOLDER [prepare filters packing loader recipe roundtrip memory]

FOLDER gets what is missing there: 120 MB of real text (benchmarks/data/corpus.py), a tokenizer of 128K
trained on 10 MB of it, and shards. Without names all parts run, which takes some twenty minutes.

prepare     one core: prepare, datasets.map, Megatron's route, the same tokenizer; then all cores
filters     what each phase of the filters costs and removes
packing     real lengths at rows of 2048 and 4096: fill, cut documents, documents/s
loader      tokens/s with transforms off and on, a process's first batch at step 10^6
recipe      FIM rate, split share and mixture shares of the produced stream beside the configured
roundtrip   every document, token for token, back from the rows of an epoch
memory      the most memory of prepare, filters included, at 10 MB and 1 GB of text
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.data import data_loader, data_prepare, data_roundtrip
from data.config import DataConfig
from data.prepare.run import prepare
from data.prepare.tokenizer_training import train_tokenizer

SOURCES = {"code": "code", "docs": "prose", "data": "prose"}


def open_folder(folder: Path) -> DataConfig:
    """Collect text, train the tokenizer and prepare shards where they are not there yet."""
    corpus = folder / "corpus"
    if not list(corpus.glob("*.jsonl*")):
        collect = [sys.executable, str(Path(__file__).with_name("corpus.py")), str(corpus)]
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
    prepare(config, progress=sys.stderr.isatty())
    return config


PARTS = {
    "prepare": data_prepare.side_by_side,
    "filters": data_prepare.filters,
    "packing": data_loader.packing,
    "loader": data_loader.loader,
    "recipe": data_roundtrip.recipe,
    "roundtrip": data_roundtrip.roundtrip,
    "memory": data_prepare.memory,
}


def main() -> None:
    """Run the parts that were named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
