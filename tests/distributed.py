"""The one helper that runs a test's worker on several processes.

A worker is a function at module level, `worker(rank, world_size, *args)`, called with a gloo
process group already up. Its return value travels back pickled, so it may hold tensors.

The processes are forked from one server that has imported PRELOADED and done nothing else: imports
take five seconds of CPU in a process that starts from nothing. Its environment is that of the
first call.
"""

import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

PRELOADED = ["data.prepare.worker_imports", "trainer.trainer"]
GRACE = 5.0  # seconds that the other ranks get to report, too, once one has failed


def _child(rank: int, world_size: int, folder: str, timeout: float, job: bytes, end: Connection):
    """Body of one process: group up, worker, group down, result or traceback into the pipe."""
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world_size)
        limit = timedelta(seconds=timeout)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=limit
        )
        try:
            worker, args = pickle.loads(job)
            result = pickle.dumps(worker(rank, world_size, *args))
        finally:
            dist.destroy_process_group()
        end.send((True, result))
    except BaseException:
        end.send((False, traceback.format_exc()))
    finally:
        end.close()


def server() -> ForkServerContext:
    """The context of processes that are forked from the server, which runs then."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()
    return context


def spawn(
    worker: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Run `worker(rank, world_size, *args)` on `world_size` gloo processes, one thread each.

    Returns what the workers returned, by rank. Raises AssertionError with the traceback of every
    rank that failed, or naming the ranks that gave no answer within `timeout` seconds. No process
    remains.
    """
    context = server()
    job = pickle.dumps((worker, args))
    answers: dict[int, tuple[bool, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = {}, []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_child, args=(rank, world_size, folder, timeout, job, sender), daemon=True
            )
            process.start()
            sender.close()
            ends[receiver] = rank
            processes.append(process)
        try:
            _collect(ends, answers, timeout)
        finally:
            for process in processes:
                process.join(1.0 if len(answers) == world_size else 0.0)
                if process.is_alive():
                    process.kill()
                    process.join()
    failed = [f"rank {rank}:\n{text}" for rank, (good, text) in sorted(answers.items()) if not good]
    silent = [str(rank) for rank in range(world_size) if rank not in answers]
    if silent:
        failed.append(f"no answer from rank {', '.join(silent)} of {world_size}")
    if failed:
        raise AssertionError("\n".join(failed))
    return [pickle.loads(answers[rank][1]) for rank in range(world_size)]


def _collect(
    ends: dict[Connection, int], answers: dict[int, tuple[bool, Any]], timeout: float
) -> None:
    """Fill `answers` from the pipes until all have spoken, one died, or the time is over."""
    open_ends = dict(ends)
    deadline = time.monotonic() + timeout
    failing = False
    while open_ends and (left := deadline - time.monotonic()) > 0:
        for end in wait(list(open_ends), timeout=left):
            assert isinstance(end, Connection)
            rank = open_ends.pop(end)
            try:
                answers[rank] = end.recv()
            except EOFError:
                answers[rank] = (False, "the process died without a word")
            if not answers[rank][0] and not failing:
                failing = True
                deadline = min(deadline, time.monotonic() + GRACE)


def free_port() -> int:
    """A TCP port of this machine that is free just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
