"""Tokens per second of shards in object storage, by the size of the cache of their blocks.

    python -m benchmarks.data.cache FOLDER [--steps 10] [--delay 0.02] [--step-seconds 0.5]

FOLDER gets 27M random tokens (108 MB) in 54 shards, which moto's server has on loopback, where it
answers each request `--delay` seconds late. (It copies the whole object for a range of it, so that
larger ones would measure that.) For each limit a new cache is filled by two steps of 262,144
tokens, documents in random order; then `--steps` more are timed, on one thread of one process. The
rate is reported with the largest size of the cache's folder, sampled every 20 ms. Then a run is
imitated that takes `--step-seconds` for each step and reads ahead (`data.prefetch: 2`), as one of 8
ranks of nano.yaml's batch, 16 rows of 4096 tokens a step: for how long each step after the first
waits for its rows, without faults and with 503s and cut connections.
"""

import argparse
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.data.loader import lengths_of
from benchmarks.data.many_shards import make_shards
from benchmarks.data.objects import started_with
from data.config import DataConfig
from data.rows.loader import Loader
from data.rows.prefetch import Prefetcher

DOCUMENTS, SHARDS, VOCAB_SIZE = 30_000, 54, 129_280
RANKS = 8
PACED_STEPS = 30
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


def longest_wait(config: DataConfig, steps: int, seconds: float) -> tuple[float, float]:
    """Returns the wait for the first step and the longest of the others, of paced steps."""
    loader = Loader(config, 0, 0, RANKS)
    prefetcher = Prefetcher(loader.at, 2, steps)
    waits = []
    for step in range(steps):
        start = time.perf_counter()
        prefetcher.at(step)
        waits.append(time.perf_counter() - start)
        time.sleep(seconds)
    prefetcher.close()
    return waits[0], max(waits[1:])


def config_with(fields: dict[str, object]) -> DataConfig:
    """Returns the settings of rows of 4,096 tokens, 64 of them in a step."""
    rows = {"seq_len": 4096, "global_batch_size": 64, "transforms": {"fim_rate": 0.0}}
    return DataConfig.model_validate({**rows, "prefetch": 0, **fields})


def main() -> int:
    """Prints a row for local files and for each size of the cache; 1 where one grew too large."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--delay", type=float, default=0.02)
    parser.add_argument("--step-seconds", type=float, default=0.5)
    options = parser.parse_args()
    local: Path = options.folder / "shards"
    if not (local / "manifest.json").exists():
        shutil.rmtree(local, ignore_errors=True)
        made = np.array_split(lengths_of(DOCUMENTS), SHARDS)
        make_shards(local, [part.tolist() for part in made], VOCAB_SIZE)
    fields = {
        "sources": [{"name": "text", "paths": ["-"]}],
        "shards": str(local),
        "tokenizer": {"path": str(local), "vocab_size": VOCAB_SIZE},
    }
    nbytes = size_of(local)
    rate = read(config_with(fields), options.steps)
    print(f"local files, {nbytes / 1e6:.0f} MB: {rate:,.0f} tokens/s", flush=True)
    late = {"path": "/", "slow": options.delay, "times": 10**9}
    faults = [
        {"path": r"\.bin", "status": 503, "times": 5, "skip": 3},
        {"path": r"\.bin", "cut": 0, "times": 5, "skip": 5},
    ]
    too_large = 0
    with started_with(local, "shards") as server, tempfile.TemporaryDirectory() as temporary:
        server.set_faults(late)
        for share in SHARES:
            folder = Path(temporary, f"cache-{share}")
            limit = max(int(share * nbytes), 1 << 24)
            remote = {**fields, "shards": f"s3://shards/{local.name}"}
            config = config_with({**remote, "cache": {"folder": str(folder), "max_bytes": limit}})
            paced = config.model_copy(update={"global_batch_size": 16 * RANKS})
            with LargestSize(folder) as largest:
                rate = read(config, options.steps)
            over = largest.value / limit
            too_large += over > 1
            print(
                f"a cache of {share:.0%} of the shards, {limit / 1e6:.0f} MB: {rate:,.0f} "
                f"tokens/s; its folder took {largest.value / 1e6:.1f} MB at most, "
                f"{over:.1%} of the limit",
                flush=True,
            )
            for label, some in (("", []), (", with 503s and cut connections", faults)):
                server.set_faults(*some, late)
                shutil.rmtree(folder)
                first, longest = longest_wait(paced, PACED_STEPS, options.step_seconds)
                print(
                    f"  steps of {options.step_seconds} s{label}: the first waits {first:.2f} s, "
                    f"the others {longest:.3f} s at most; {server.applied()[:-1]} faults",
                    flush=True,
                )
    return int(too_large > 0)


if __name__ == "__main__":
    sys.exit(main())
