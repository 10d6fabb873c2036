"""The same shards from every engine, with a worker killed in the middle of each run.

    python -m benchmarks.data.engines FOLDER [--scale 1.0] [--parts bytes cost]

FOLDER is filled with 360 MB of this machine's own text (benchmarks/data/planted.py) and a tokenizer
of 32K. A cluster of Slurm with two nodes and one of Ray are started on this machine, with a core in
each node; `apt-get install slurm-wlm munge` installs the programs.

bytes   shards from one and two local processes, Slurm and Ray, each with a kill; what was dropped
cost    time of two local processes, of Slurm and of Ray, without kills and without filters
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from benchmarks.data.planted import Planted, describe, number_of, write_planted
from data import DataConfig, train_tokenizer
from data.files import sha256_of
from data.indexed import open_shard
from data.manifest import Manifest
from data.prepare import prepare
from data.text import Tokenizer
from tests.slurm_cluster import SlurmCluster

_NUMBER_TOKENS = 24  # enough for the beginning of a document with its number


def open_folder(folder: Path, scale: float) -> tuple[DataConfig, Planted]:
    """Writes the corpus and trains the tokenizer where they are missing."""
    corpus, listing = folder / "corpus", folder / "planted.json"
    if not listing.exists():
        corpus.mkdir(parents=True, exist_ok=True)
        names = [sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), "/usr/include"]
        roots = [Path(name) for name in [*names, "/usr/share"]]
        planted = write_planted(corpus, roots, 200 * scale, 100 * scale, 60 * scale)
        listing.write_text(json.dumps(asdict(planted)))
    planted = Planted(**json.loads(listing.read_text()))
    sources = [
        {"name": name, "paths": [str(corpus / f"{name}*")], "domain": "code"}
        for name in ("line", "packed", "code", "planted")
    ]
    fields = {
        "sources": sources,
        "tokenizer": {"path": str(folder / "tokenizer"), "vocab_size": 32768},
        "shards": str(folder / "shards"),
        "seq_len": 4096,
        "global_batch_size": 64,
        "max_bad_record_fraction": 0.2,
    }
    fields["tokenizer"] |= {"sample_bytes": 10_000_000}  # type: ignore[operator]
    config = DataConfig.model_validate(fields)
    if not (folder / "tokenizer").exists():
        train_tokenizer(config)
    return config, planted


def _child(config: DataConfig) -> None:
    os.setpgrp()
    prepare(config)


def run(config: DataConfig, kill: Callable[[Path, int], None] | None = None) -> float:
    """Prepares in a new process, again until it succeeds; returns seconds."""
    shutil.rmtree(config.shards, ignore_errors=True)
    begin = time.monotonic()
    for attempt in range(2):
        process = multiprocessing.get_context("spawn").Process(target=_child, args=(config,))
        process.start()
        if kill is not None and attempt == 0:
            assert process.pid is not None
            kill(Path(config.shards), process.pid)
        process.join()
        if process.exitcode == 0:
            return time.monotonic() - begin
    raise SystemExit(f"{config.shards} failed")


def kill_worker(shards: Path, driver: int) -> None:
    """Kills a process in the middle of tokenising: a worker, or the only process."""
    while not list(shards.glob(".unfinished-*/line-00000.verdicts.npy")):
        time.sleep(0.1)
    time.sleep(20)
    for log in shards.glob(".unfinished-*/logs/*.log"):
        begun = re.search(r"process (\d+): begins", log.read_text().splitlines()[-1])
        if begun:
            print(f"killed process {begun[1]}, at {log.stem}", flush=True)
            os.kill(int(begun[1]), signal.SIGKILL)
            return
    print(f"killed the command, process {driver}", flush=True)
    os.kill(driver, signal.SIGKILL)


def hashes(config: DataConfig) -> dict[str, str]:
    """The SHA-256 of each file of the shards."""
    root = Path(config.shards)
    return {str(p.relative_to(root)): sha256_of(p) for p in root.rglob("*") if p.is_file()}


def numbers(config: DataConfig) -> list[int]:
    """The numbers of the documents in the shards."""
    tokenizer, manifest = Tokenizer(config.tokenizer.path), Manifest.load(config.shards)
    found = []
    for shard in manifest.shards:
        prefix = Path(config.shards) / manifest.folder / shard.name
        for ids in open_shard(prefix, shard.documents, shard.tokens):
            found.append(number_of(tokenizer.decode(ids[1:_NUMBER_TOKENS].tolist())))
    return found


@contextmanager
def clusters(folder: Path) -> Iterator[str]:
    """Slurm, which commands of this process find, and Ray, whose address it yields."""
    from ray.cluster_utils import Cluster

    place = folder / "slurm-cluster"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    slurm = SlurmCluster(place, ("n1", "n2"), cpus=1)
    os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # noqa: SIM112
    node = {"num_cpus": 1, "object_store_memory": 10**8}
    ray = Cluster(initialize_head=True, head_node_args={"include_dashboard": False} | node)
    try:
        ray.add_node(**node)
        slurm.start()
        os.environ |= {name: slurm.environment[name] for name in ("PATH", "SLURM_CONF")}
        yield ray.address
    finally:
        slurm.stop()
        ray.shutdown()


def main() -> int:
    """Exit code 1 where shards differ."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.data.engines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--parts", nargs="*", default=["bytes", "cost"])
    options = parser.parse_args()
    config, planted = open_folder(options.folder, options.scale)
    size = sum(file.stat().st_size for file in (options.folder / "corpus").iterdir())
    print(f"{size / 1e6:.0f} MB in files", flush=True)
    same = True
    with clusters(options.folder) as address:
        engines = {
            "local 1": {"prepare_workers": 1},
            "local 2": {"prepare_workers": 2},
            "slurm": {"engine": "slurm", "slurm": {"gigabytes_per_cpu": 3}, "prepare_workers": 2},
            "ray": {"engine": "ray", "ray": {"address": address}, "prepare_workers": 2},
        }
        for part in options.parts:
            print(f"== {part}", flush=True)
            results = {}
            for name, fields in engines.items():
                if part == "cost" and name == "local 1":
                    continue
                filters = {"filters": {} if part == "bytes" else None}
                place = {"shards": str(options.folder / name.replace(" ", "-"))}
                config = config.model_validate(config.model_dump() | place | filters | fields)
                seconds = run(config, kill_worker if part == "bytes" else None)
                results[name] = hashes(config)
                load = os.getloadavg()[1]
                print(f"{name}: {seconds:.0f} s, load {load:.1f} over 5 minutes", flush=True)
                config = config.model_copy(update={"engine": "local"})
            equal = len({json.dumps(result, sort_keys=True) for result in results.values()}) == 1
            print(f"the same bytes of {len(results['ray'])} files: {equal}", flush=True)
            same = same and equal
            if part == "bytes":
                print(describe(planted, numbers(config)), flush=True)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
