"""Weights & Biases: one run per run folder, offline where no key is found or no server answers.

A thread of its own opens the run and sends the records, so that training never waits for a server.
What goes wrong there is a warning: metrics.jsonl has every number anyway, and `wandb sync` uploads
what the run folder holds.
"""

import atexit
import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Literal

from data.files import write_atomically
from trainer.config import RunConfig
from trainer.metrics.flatten import flatten

START_SECONDS = 20.0  # until a server that does not answer is given up
FINISH_SECONDS = 20.0  # for what is still to be uploaded after the last step
_KEY = re.compile(r"[0-9A-Za-z_-]{32,}")


class WandbLog:
    """Sends records to a wandb run that a resume continues under the same id.

    wandb itself finds the key (WANDB_API_KEY or its login file); it is never read into the config
    nor written by this class. `log` gets warnings.
    """

    def __init__(self, config: RunConfig, log: Callable[[str], None]) -> None:
        self.config, self.log_line = config, log
        self._records: SimpleQueue[dict[str, Any] | int] = SimpleQueue()
        self._thread: Thread | None = None
        if config.metrics.wandb.mode != "disabled":
            self._thread = Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()

    def log(self, record: dict[str, Any]) -> None:
        """Sends one step's record, without waiting."""
        if self._thread is not None and self._thread.is_alive():
            self._records.put(record)

    def close(self, exit_code: int) -> None:
        """Ends the run, which can be resumed; waits a limited time for what is not uploaded."""
        if self._thread is None or not self._thread.is_alive():
            return
        self._records.put(exit_code)
        self._thread.join(2.0)
        if self._thread.is_alive():
            limit = START_SECONDS + FINISH_SECONDS
            self.log_line(f"wandb: waiting up to {limit:.0f} s for the server")
            self._thread.join(limit)
        if self._thread.is_alive():
            self.log_line(f"warning: wandb did not finish{self._upload()}")

    def _work(self) -> None:
        """Opens the run and sends records until the run ends; the body of the thread."""
        try:
            run = self._open()
        except Exception as error:
            self.log_line(
                f"warning: wandb: {_reason(error)}; it does not log from here on{self._upload()}"
            )
            return
        finally:
            atexit.register(_close_session)  # runs before wandb's own
        try:
            while isinstance(record := self._records.get(), dict):
                run.log(flatten(record) | _table_of_samples(record))
            run.finish(exit_code=record)
        except Exception as error:
            self.log_line(
                f"warning: wandb: {_reason(error)}; to upload the rest, run: "
                f"wandb sync {run.settings.sync_dir}"
            )

    def _open(self) -> Any:
        """Starts the run: online where a key is found and the server answers, else offline."""
        # wandb would wait for its server once more at exit, to report on itself.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb  # seconds to import, and only the first rank needs it

        quiet = wandb.Settings(silent=True)
        wandb.setup(quiet)
        mode = self.config.metrics.wandb.mode
        try:
            if mode != "offline" and wandb.login(prompt=False, verify=False):
                return self._init("online")
            problem = "no API key is found" if mode == "online" else None
        except Exception as error:
            problem = _reason(error)
        if problem is None:
            return self._init("offline")
        _close_session()  # forgets the run that could not be started
        wandb.setup(quiet)
        run = self._init("offline")
        self.log_line(
            f"warning: wandb: {problem}; this run is logged offline, to upload it later, run: "
            f"wandb sync {run.settings.sync_dir}"
        )
        return run

    def _upload(self) -> str:
        """Returns a clause about what the run folder holds for wandb, or an empty text."""
        folders = sorted((self.config.run_dir / "wandb").glob("*run-*-*"), key=os.path.getmtime)
        return f"; to upload what it has, run: wandb sync {folders[-1]}" if folders else ""

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        settings, run_dir = self.config.metrics.wandb, self.config.run_dir
        run = wandb.init(
            mode=mode,
            project=settings.project,
            entity=settings.entity,
            name=settings.name,
            group=settings.group,
            tags=list(settings.tags),
            dir=str(run_dir),
            id=run_id(run_dir),
            resume="allow",
            config=self.config.to_dict(),
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=START_SECONDS,
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        # Charts are over our own step: one that is trained again is a second point at the same x.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run


def _close_session() -> None:
    """Ends wandb's service, if it is there: its own exit hook has a traceback where it is not."""
    import wandb

    with suppress(Exception, SystemExit):
        wandb.teardown()


def run_id(run_dir: Path) -> str:
    """Returns the id in wandb/run-id, which the folder's first run makes.

    A folder that was moved keeps its id. A copy gets another while the original is there, else both
    would log into one wandb run. `wandb agent` names the run itself, through its environment.
    """
    if agents_id := os.environ.get("WANDB_RUN_ID"):
        return agents_id
    file = run_dir.resolve() / "wandb" / "run-id"
    file.parent.mkdir(parents=True, exist_ok=True)
    saved_id, owner = _read_id(file)
    if saved_id and owner not in (None, file) and _read_id(owner) == (saved_id, owner):
        saved_id = ""
    if not saved_id or owner != file:
        saved_id = saved_id or secrets.token_hex(6)
        write_atomically(file, f"{saved_id}\n{file}\n")
    return saved_id


def _read_id(file: Path) -> tuple[str, Path | None]:
    """Returns the id, empty if there is none, and the file in which it was written, if known."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return "", None
    return (lines[0] if lines else ""), Path(lines[1]) if len(lines) > 1 else None


def _reason(error: Exception) -> str:
    """Returns what went wrong in one line, without anything that may be a key."""
    text = " ".join(str(error).split()) or type(error).__name__
    return _KEY.sub("…", text)


def _table_of_samples(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a step's continued prompts as a table, if it has some."""
    if not (samples := record.get("samples")):
        return {}
    import wandb

    return {"samples": wandb.Table(columns=["prompt", "text"], data=[*map(list, samples.items())])}
