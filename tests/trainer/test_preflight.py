"""What must be equal on all ranks before training, and the one sentence where it is not."""

import errno
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import spawn
from trainer import preflight as checks
from trainer.config import load_config
from trainer.formatting import where
from trainer.kernels import Platform, RankKernels
from trainer.parallel.grid import Degrees, Grid
from trainer.planning.static_memory import memory_parts, snapshot_memory
from trainer.preflight import Facts, code_digest, preflight
from trainer.process.errors import USER_ERRORS, PreflightError
from trainer.process.host_memory import HostMemory

RANKS = 3
KERNELS = RankKernels(Platform("cpu"))


def other_torch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "__version__", "2.12.0")


def other_code(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checks, "code_digest", lambda root: "0" * 64)


def little_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checks.DeviceInfo, "of", lambda device: checks.DeviceInfo("a device", 2**10))


def no_compiler(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checks, "missing_compiler", lambda device: "a C++ compiler")


def other_shards(patch: pytest.MonkeyPatch) -> None:
    manifest = Path("shards/manifest.json")
    manifest.write_text(manifest.read_text() + " ")


def no_shards(patch: pytest.MonkeyPatch) -> None:
    Path("shards/manifest.json").unlink()


def no_tokenizer(patch: pytest.MonkeyPatch) -> None:
    shutil.rmtree("tokenizer")


def nothing(patch: pytest.MonkeyPatch) -> None:
    """Equal on all ranks, or different by the config alone."""


# What ranks 1 and 2 have, which are on another host than rank 0.
CASES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "same": nothing,
    "config": nothing,
    "own folder": nothing,
    "unwritable": nothing,
    "torch": other_torch,
    "code": other_code,
    "memory": little_memory,
    "compiler": no_compiler,
    "other shards": other_shards,
    "no shards": no_shards,
    "no tokenizer": no_tokenizer,
}


def verdict(path: Path, overrides: list[str]) -> str:
    """Preflight's message on this rank; empty if the run may start."""
    grid = Grid.build(Degrees(dist.get_world_size()), torch.device("cpu"))
    try:
        preflight(load_config(path, overrides), grid, folder_timeout=0.5)
    except PreflightError as error:
        return str(error)
    return ""


def all_verdicts(rank: int, world_size: int, tiny: Path, folder: Path) -> dict[str, str]:
    """Every case, each rank with its own working directory and so its own data."""
    actual = {}
    (folder / "unwritable").write_text("a file where the run folder should be")
    for case, change in CASES.items():
        directory = folder / f"{case}, rank {rank}"
        for name in ("shards", "tokenizer"):
            shutil.copytree(tiny.parent / name, directory / name)
        run = "run" if case == "own folder" else folder / ("unwritable" if case[0] == "u" else "x")
        overrides = [f"run_dir={run}", "data.shards=shards", "data.tokenizer.path=tokenizer"]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(directory)
            patch.setattr(socket, "gethostname", lambda: "b" if rank else "a")
            overrides += ["kernels=compile"] * (case == "compiler")
            if rank:
                change(patch)
                overrides += ["optim.schedule.warmup_steps=3"] * (case == "config")
            actual[case] = verdict(tiny, overrides)
    return actual


@pytest.fixture(scope="module")
def verdicts(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("preflight")
    by_rank = spawn(all_verdicts, RANKS, tiny, folder)
    assert by_rank[0] == by_rank[1] == by_rank[2]  # no rank trains on, or waits
    assert not list(folder.rglob(".preflight-*"))
    return by_rank[0]


def test_equal_ranks_may_train(verdicts: dict[str, str]) -> None:
    assert verdicts["same"] == ""


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("code", ("the code (data, model, optim, trainer)", "0000000000000000")),
        ("torch", ("the version of torch", f"{torch.__version__} and 2.12.0")),
        ("config", ("the resolved config", "optim.schedule.warmup_steps is 2 and 3")),
        ("other shards", ("data.shards = shards",)),
        ("no shards", ("data.shards = shards", "and missing")),
        ("no tokenizer", ("data.tokenizer.path = tokenizer", "and missing")),
    ],
)
def test_a_difference_is_named_with_its_ranks(
    verdicts: dict[str, str], case: str, parts: tuple[str, ...]
) -> None:
    text = verdicts[case]
    assert text.startswith("rank 0 on a and ranks 1, 2 on b differ in ")
    for part in parts:
        assert part in text
    assert "\n" not in text


def test_the_run_folder_is_one(verdicts: dict[str, str]) -> None:
    text = verdicts["own folder"]
    assert "run_dir = run is not the same folder on rank 0 on a and ranks 1, 2 on b" in text
    assert "rank 0 on a cannot write into run_dir = " in verdicts["unwritable"]


def test_memory_names_fields_and_numbers(verdicts: dict[str, str]) -> None:
    text = verdicts["memory"]
    assert "GiB on a process, while rank 1 on b has 0.00 GiB" in text
    assert "parallel.tensor" in text and "parallel.pipeline" in text


def test_a_compiler_is_there_for_all(verdicts: dict[str, str]) -> None:
    text = verdicts["compiler"]
    assert "kernels = compile needs a C++ compiler, and there is none for ranks 1, 2 on b;" in text


def test_a_model_too_large_for_one_process_is_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    half = HostMemory.read().total // 2
    assert checks.DeviceInfo.of(torch.device("cpu")).memory == half
    preflight(load_config(tiny), Grid.single(torch.device("cpu")))
    large = load_config(tiny, ["model.n_routed_experts=4096", "model.moe_intermediate_size=65536"])
    with pytest.raises(PreflightError, match=f"has {half / 2**30:,.2f} GiB"):
        preflight(large, Grid.single(torch.device("cpu")))


def test_what_others_use_is_a_warning(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, grid = load_config(tiny), Grid.single(torch.device("cpu"))
    needed = sum(memory_parts(config, Degrees(1)).values())
    monkeypatch.setattr(checks, "available_memory", lambda device: needed)
    assert preflight(config, grid)[0] == []
    monkeypatch.setattr(checks, "available_memory", lambda device: needed - 1)
    (warning,) = preflight(config, grid)[0]
    assert warning.startswith("weights, gradients and optimizer states take 0.00 GiB on a process")
    assert "GiB available now" in warning


def test_memory_of_deepspeed_is_not_counted_by_the_native_formula(tiny: Path) -> None:
    large = ["model.n_routed_experts=4096", "model.moe_intermediate_size=65536"]
    block = 'deepspeed={"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3}}'
    overrides = [*large, "engine=deepspeed", block, "optim.matrix_optimizer=adamw"]
    preflight(load_config(tiny, overrides), Grid.single(torch.device("cpu")))


def test_snapshots_are_counted_where_they_are(tiny: Path) -> None:
    config = load_config(tiny, ["stability.spikes={}"])
    held, rest = snapshot_memory(config, Degrees(1)), sum(memory_parts(config, Degrees(1)).values())

    def check(device: str, memory: int, host_memory: int) -> None:
        facts = [Facts(0, "a", {}, memory, host_memory, memory, KERNELS, (None, ""))]
        checks._check_memory(facts, config, torch.device(device))

    check("cpu", rest + held, rest + held)
    locked = snapshot_memory(config, Degrees(1), page_locked=True)
    check("cuda", rest, locked)
    for device, memory, host_memory, what in (
        ("cpu", rest + held - 1, rest + held - 1, "with the snapshots of stability.spikes, take"),
        ("cuda", rest - 1, locked, "^weights, gradients and optimizer states take"),
        (
            "cuda",
            rest,
            locked - 1,
            "^the snapshots of stability.spikes, which are on the host, take",
        ),
    ):
        with pytest.raises(PreflightError, match=what):
            check(device, memory, host_memory)


def test_the_code_is_its_names_and_contents(tmp_path: Path) -> None:
    for package in checks.PACKAGES:
        (tmp_path / package / "inner").mkdir(parents=True)
    file = tmp_path / "model/inner/a.py"
    file.write_text("x = 1\n")
    first = code_digest(tmp_path)
    (tmp_path / "model/inner/notes.txt").write_text("not code")
    assert code_digest(tmp_path) == first
    file.write_text("x = 2\n")
    second = code_digest(tmp_path)
    file.rename(file.with_name("b.py"))
    assert len({first, second, code_digest(tmp_path)}) == 3


def test_many_hosts_make_no_long_sentence() -> None:
    many = [
        Facts(rank, f"host{rank // 16}", {}, 0, 0, 0, KERNELS, (None, "")) for rank in range(16 * 9)
    ]
    text = where(many)
    assert text.startswith("ranks 0, 1, 2, 3, 4, 5, 6, 7, … on host0, ranks 16, 17")
    assert text.endswith("on host3 and those on 5 more hosts")
    assert where(many[:1]) == "rank 0 on host0"
    assert PreflightError in USER_ERRORS


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOENT, errno.EACCES])
def test_a_file_server_that_is_away_is_no_difference(
    tiny: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that does not see a file differs from the others; one whose server is away fails."""

    read = checks.sha256_of

    def unreadable(path: Path) -> str:
        if path.suffix == ".py":
            return read(path)
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(checks, "sha256_of", unreadable)
    config = load_config(tiny)
    if number in (errno.EIO, errno.ESTALE):
        with pytest.raises(OSError, match=os.strerror(number)):
            checks._digests(config)
    else:
        assert list(checks._digests(config).values()).count(checks.MISSING) == 2
