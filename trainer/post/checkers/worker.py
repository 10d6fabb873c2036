"""A process that scores answers: `python -m trainer.post.checkers.worker FD PARENT SETTINGS`.

A line of JSON on standard input is an answer and its checker's name; its score is a line on the
file descriptor FD. What checkers print goes nowhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from trainer.config.post import SandboxConfig
from trainer.post.checkers.builtin import built_in
from trainer.post.checkers.response import Checker, Response
from trainer.post.checkers.sandbox import Sandbox
from trainer.process.errors import PostTrainingError
from trainer.process.parent import end_with


def load_checker(name: str, sandbox: Sandbox) -> Checker:
    """Returns a checker by its built-in name, `package.module:name` or `folder/file.py:name`.

    Raises PostTrainingError, in one sentence, where it is not there.
    """
    known = built_in(sandbox)
    if name in known:
        return known[name]
    place, separator, function = name.rpartition(":")
    if not separator:
        raise PostTrainingError(
            f"checker {name!r} is neither built in ({', '.join(sorted(known))}) nor "
            "package.module:name or file.py:name"
        )
    try:
        module = _load_file(place) if place.endswith(".py") else importlib.import_module(place)
        checker = getattr(module, function)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise PostTrainingError(f"checker {name!r} cannot be loaded: {reason}") from error
    if not callable(checker):
        raise PostTrainingError(f"checker {name!r} is no function, but {type(checker).__name__}")
    found: Checker = checker
    return found


def _load_file(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"checker_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _score(checker: Checker, response: dict[str, Any]) -> dict[str, Any]:
    try:
        reward = checker(Response.model_validate(response))
    except PostTrainingError:
        raise
    except Exception as error:
        return {"failure": f"it raised {type(error).__name__}: {error}"[:500], "kind": "raised"}
    is_number = isinstance(reward, int | float) and math.isfinite(reward)
    if not is_number or not 0 <= reward <= 1:
        text = f"it returned {reward!r:.100}, which is no number from 0 to 1"
        return {"failure": text, "kind": "value"}
    return {"reward": float(reward)}


def main() -> None:
    """Answers lines until standard input ends."""
    end_with(int(sys.argv[2]))
    settings = json.loads(sys.argv[3])
    requests = os.dup(0)
    _detach()
    with os.fdopen(requests) as lines, os.fdopen(int(sys.argv[1]), "w") as results:

        def answer(fields: dict[str, Any]) -> None:
            results.write(json.dumps(fields) + "\n")
            results.flush()

        try:
            sandbox = Sandbox(SandboxConfig.model_validate(settings["sandbox"]))
            if settings["uses_sandbox"]:
                sandbox.check()
            checkers = {name: load_checker(name, sandbox) for name in settings["checkers"]}
            answer({})
            for line in lines:
                request = json.loads(line)
                answer(_score(checkers[request["checker"]], request["response"]))
        except PostTrainingError as error:
            answer({"error": str(error)})


def _detach() -> None:
    """Lets checkers, and libraries and processes of theirs, print and read nothing."""
    with open(os.devnull, "r+b") as nowhere:
        for stream in range(3):
            os.dup2(nowhere.fileno(), stream)


if __name__ == "__main__":
    main()
