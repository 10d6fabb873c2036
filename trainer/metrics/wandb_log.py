"""Weights & Biases: one run per run folder, offline where no key is found."""

import os
import secrets
from pathlib import Path
from typing import Any

from data.files import write_atomically
from trainer.config import RunConfig
from trainer.metrics.layer_stats import flatten_layers
from trainer.metrics.update_stats import flatten_groups


class WandbLog:
    """Sends records to a wandb run that a resume continues under the same id.

    wandb itself finds the key (WANDB_API_KEY or its login file); it is never read into the config
    nor written by this class.
    """

    def __init__(self, config: RunConfig) -> None:
        self._run: Any = None
        settings = config.metrics.wandb
        if settings.mode == "disabled":
            return
        import wandb  # seconds to import, and only the first rank needs it

        mode = settings.mode
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        folder = config.run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            mode=mode,
            project=settings.project,
            entity=settings.entity,
            name=settings.name,
            group=settings.group,
            tags=list(settings.tags),
            dir=str(config.run_dir),
            id=self._run_id(folder),
            resume="allow",
            config=config.to_dict(),
            settings=wandb.Settings(console="off", silent=True),
        )
        # Charts are over our own step: one that is trained again is a second point at the same x.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    @staticmethod
    def _run_id(folder: Path) -> str:
        """The id in wandb/run-id; `wandb agent` names the run itself, through its environment."""
        if run_id := os.environ.get("WANDB_RUN_ID"):
            return run_id
        file = folder / "run-id"
        if file.is_file():
            return file.read_text(encoding="utf-8").strip()
        run_id = secrets.token_hex(6)
        write_atomically(file, run_id + "\n")
        return run_id

    def log(self, record: dict[str, Any]) -> None:
        """Sends one step's record."""
        if self._run is not None:
            plain = {n: v for n, v in record.items() if not isinstance(v, dict)}
            losses = record.get("validation_by_source", {})
            by_source = {f"validation_loss/{name}": loss for name, loss in losses.items()}
            by_source |= {f"epochs/{name}": read for name, read in record.get("epochs", {}).items()}
            layers = flatten_layers(record.get("layers", {}))
            groups = flatten_groups(record.get("groups", {}))
            self._run.log(plain | by_source | layers | groups)

    def close(self) -> None:
        """Ends the run; it can be resumed."""
        if self._run is not None:
            self._run.finish()
