"""What coming steps read is fetched ahead: the same rows, few requests, memory that is released."""

import subprocess
import sys
import time
from concurrent.futures import wait
from pathlib import Path

import pytest

from data.block_cache import BLOCK_BYTES
from data.config import DataConfig
from data.rows import fetch
from data.rows.loader import Loader
from data.storage import StoragePath, as_path
from tests.data.rows.test_loader import changed, rows_of
from tests.s3 import S3Server


@pytest.fixture(scope="module")
def root(s3: S3Server, config: DataConfig) -> StoragePath:
    """The shards of `config` in a bucket."""
    s3.set_faults()
    root = as_path(f"{s3.make_bucket('fetch')}/shards")
    assert isinstance(root, StoragePath)
    for path in Path(config.shards).rglob("*"):
        if path.is_file():
            (root / path.relative_to(config.shards).as_posix()).upload(path)
    return root


@pytest.mark.parametrize("fits", [True, False])
def test_rows_are_those_of_local_shards(
    config: DataConfig, root: StoragePath, tmp_path: Path, s3: S3Server, fits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In the order of a run, after a jump, with windows smaller than a step's look-ahead."""
    monkeypatch.setattr(fetch, "_GAP_BYTES", 100)
    monkeypatch.setattr(fetch, "_REQUEST_BYTES", 10_000)
    transforms = {"fim_rate": 0.5, "fim_domains": ["prose"]}
    local = Loader(changed(config, transforms=transforms, packing_window=40), 3)
    cache = {"folder": str(tmp_path / "cache"), "ahead_bytes": 1 << 20}
    fields = {"shards": str(root), "cache": cache, "transforms": transforms, "packing_window": 40}
    remote = Loader(changed(config, **fields), 3)
    assert remote._fetcher is not None
    remote._fetcher._fits = fits
    for step in [*range(local.num_steps + 3), 2, 3, 1000, 1001]:
        assert rows_of(remote.at(step)) == rows_of(local.at(step)), step
    fetcher, objects = remote._fetcher, remote.sources[0].source._opened.values()
    staged = sum(len(opened.file.staged) for opened in objects)  # type: ignore[attr-defined]
    assert staged <= sum(len(chunk.ranges) for chunk in fetcher._chunks)
    assert fits == (staged == 0)
    for chunk in fetcher._chunks:
        wait([future for futures in chunk.requests.values() for future in futures])
    blocks = list((tmp_path / "cache" / "blocks").rglob("0*"))
    assert bool(blocks) == fits, "a cache that is too small is not written"


def test_what_is_fetched_ahead_does_not_keep_a_process(
    config: DataConfig, root: StoragePath, tmp_path: Path, s3: S3Server
) -> None:
    fields = changed(config, shards=str(root), cache={"folder": str(tmp_path / "cache")})
    Loader(fields, 3)  # makes the tables
    code = (
        "import sys; from data.config import DataConfig; from data.rows.loader import Loader\n"
        "loader = Loader(DataConfig.model_validate_json(sys.argv[1]), 3)\n"
        "loader._fetcher._fits = False; loader.at(0); print('made', flush=True)"
    )
    s3.set_faults({"method": "GET", "path": r"\.bin", "slow": 60, "skip": 1})
    command = [sys.executable, "-c", code, fields.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "made\n"
        began = time.monotonic()
        assert process.wait(50) == 0 and time.monotonic() - began < 40
    s3.set_faults()


def test_requests_run_at_once_and_failures_cost_only_time(
    config: DataConfig, root: StoragePath, tmp_path: Path, s3: S3Server
) -> None:
    cache = {"folder": str(tmp_path / "cache")}
    remote = Loader(changed(config, shards=str(root), cache=cache), 3)
    assert remote._fetcher is not None
    remote._fetcher._fits = False
    faults = [{"method": "GET", "path": r"\.bin", "status": 503, "times": 2},
              {"method": "GET", "path": r"\.bin", "cut": 0, "times": 2}]  # fmt: skip
    s3.set_faults(*faults)
    local = Loader(config, 3)
    before = len(s3.requests())
    for step in range(6):
        assert rows_of(remote.at(step)) == rows_of(local.at(step))
    assert sum(s3.applied()) > 0
    made = [request for request in s3.requests()[before:] if ".bin" in request]
    size = sum(source.source.num_bytes for source in remote.sources)
    assert size < BLOCK_BYTES and len(made) <= 12, "near documents are fetched together"
    s3.set_faults()
