"""Tokens per second of shards in object storage, by the size of the cache of their blocks.

    python -m benchmarks.data.cache FOLDER [--steps 10]

FOLDER gets 27M random tokens (108 MB), which moto's server has on loopback. For each limit a new
cache is filled by two steps of 262,144 tokens, documents in random order; then `--steps` more are
timed, on one thread of one process. The rate is reported with the largest excess of the cache's
folder over its limit, sampled every 20 ms: the oldest blocks are removed once it is exceeded.
"""

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.data.loader import lengths_of, shards
from data.config import DataConfig
from data.rows.loader import Loader
from data.storage import as_path
from tests.s3 import start_server

DOCUMENTS = 30_000
FILLING_STEPS = 2
SHARES = (2.0, 0.5, 0.25, 0.16)
"""Limits of the cache, as shares of the shards' bytes."""


def size_of(folder: Path) -> int:
    """Returns the bytes of all files below a folder, some of which may vanish meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


class LargestSize:
    """Samples a folder's size in a thread; `value` is the largest so far. [bytes]"""

    def __init__(self, folder: Path) -> None:
        self.folder, self.value = folder, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.value = max(self.value, size_of(self.folder))

    def __enter__(self) -> "LargestSize":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def read(config: DataConfig, steps: int) -> float:
    """Returns the tokens per second of the steps after those that fill the cache."""
    loader = Loader(config, 0)
    tokens, start = 0, 0.0
    for step in range(FILLING_STEPS + steps):
        if step == FILLING_STEPS:
            tokens, start = 0, time.perf_counter()
        tokens += sum(sum(map(sum, batch.lengths)) for batch in loader.at(step))
    return tokens / (time.perf_counter() - start)


def config_with(fields: dict[str, object]) -> DataConfig:
    """Returns the settings of rows of 4,096 tokens, 64 of them in a step."""
    rows = {"seq_len": 4096, "global_batch_size": 64, "transforms": {"fim_rate": 0.0}}
    return DataConfig.model_validate({**rows, "prefetch": 0, **fields})


def main() -> int:
    """Prints a row for local files and for each size of the cache; 1 where one grew too large."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    local: Path = options.folder / "shards"
    if not (local / "manifest.json").exists():
        shutil.rmtree(local, ignore_errors=True)
        local.mkdir(parents=True)
        fields = shards(local, lengths_of(DOCUMENTS))
        (options.folder / "fields.json").write_text(json.dumps(fields))
    fields = json.loads((options.folder / "fields.json").read_text())
    nbytes = size_of(local)
    rate = read(config_with(fields), options.steps)
    print(f"local files, {nbytes / 1e6:.0f} MB: {rate:,.0f} tokens/s", flush=True)
    too_large = 0
    with start_server() as server, tempfile.TemporaryDirectory() as temporary:
        remote = as_path(f"{server.make_bucket('shards')}/shards")
        for path in (path for path in local.rglob("*") if path.is_file()):
            as_path(f"{remote}/{path.relative_to(local)}").write(path.read_bytes())
        for share in SHARES:
            folder = Path(temporary, f"cache-{share}")
            limit = int(share * nbytes)
            cache = {"folder": str(folder), "max_bytes": limit}
            with LargestSize(folder) as largest:
                rate = read(
                    config_with({**fields, "shards": str(remote), "cache": cache}), options.steps
                )
            over = largest.value / limit
            too_large += over > 1 + 1 / 64 + 2e6 / limit
            print(
                f"a cache of {share:.0%} of the shards, {limit / 1e6:.0f} MB: {rate:,.0f} "
                f"tokens/s; its folder took {largest.value / 1e6:.1f} MB at most, "
                f"{over:.1%} of the limit",
                flush=True,
            )
    return int(too_large > 0)


if __name__ == "__main__":
    sys.exit(main())
