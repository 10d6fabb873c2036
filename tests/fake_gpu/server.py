"""A process that has loaded the guard before torch; it forks one child for each function."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import sys
import traceback

from tests.fake_gpu.guard import load
from tests.fake_gpu.pipes import receive, send


def answer(job: bytes) -> bytes:
    """Body of a child: the function's result, or a traceback."""
    from tests.fake_gpu.setup import fake_gpu

    try:
        module, name, args, setup = pickle.loads(job)
        function = getattr(importlib.import_module(module), name)
        with fake_gpu(**setup) as gpu:
            result = function(gpu, *args)
        return pickle.dumps((True, result))
    except BaseException as error:
        return pickle.dumps((False, explained(error)))


def explained(error: BaseException) -> str:
    """The project's lines that led to an error and to its causes."""
    text = "" if error.__cause__ is None else f"{explained(error.__cause__)}\n\nand so\n\n"
    frames = traceback.extract_tb(error.__traceback__)
    lines = traceback.format_list([f for f in frames if "/site-packages/" not in f.filename])
    message = f"{type(error).__name__}: {error}".split("\n\n")[0]  # torch adds all its backends
    return f"{text}{''.join(lines)}{message}"


def serve() -> None:
    """Answers each job from a forked child, so that no job sees what another has left."""
    load()  # before torch
    import trainer.trainer  # noqa: F401

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the trainer prints
    context = multiprocessing.get_context("fork")
    while job := receive(sys.stdin.buffer):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=lambda job=job, end=sender: end.send_bytes(answer(job)))
        child.start()
        sender.close()
        try:
            message = receiver.recv_bytes()
        except EOFError:
            message = pickle.dumps((False, "the process died without an answer"))
        child.join()
        send(answers, message)


if __name__ == "__main__":
    serve()
