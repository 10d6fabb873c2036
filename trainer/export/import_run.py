"""`v4 import`: starts a run from a Hugging Face folder. `open_run`: loads the newest checkpoint."""

from pathlib import Path

from data import Tokenizer
from data.files import write_atomically
from trainer.build import build_native
from trainer.checkpoint import RunCheckpoint, checkpoints_in
from trainer.config import CONFIG_FILE, RunConfig
from trainer.errors import CheckpointError, ExportError
from trainer.export.hf_folder import read_hf_config, read_hf_weights
from trainer.parallel.grid import Grid
from trainer.parallel.plan import LocalModel
from trainer.run_tokenizer import keep_tokenizer, run_data
from trainer.state import TrainState

# Training settings that a Hugging Face config.json lacks.
_OURS = (
    "balance_loss_weight",
    "mtp_loss_weight",
    "hc_init_scale",
    "hc_init_own_read",
    "hc_init_comb_diagonal",
)


def open_run(config: RunConfig, grid: Grid) -> tuple[LocalModel, TrainState]:
    """Returns this rank's part of the model of a run's newest checkpoint, and its counters.

    Raises CheckpointError when there is none.
    """
    tokenizer = Tokenizer(run_data(config).tokenizer.path)
    local, optimizer = build_native(config, grid)
    checkpoint = RunCheckpoint(
        config, grid, local.model, optimizer, tokenizer.hash, local.placements
    )
    state = TrainState()
    if checkpoint.load(state) is None:
        raise CheckpointError(f"{config.run_dir}: holds no checkpoint yet; train the run first")
    return local, state


def import_hf_folder(config: RunConfig, source: Path) -> str:
    """Makes a run that starts from a Hugging Face folder and returns a sentence about it.

    The model's sizes come from the folder, everything else from `config`. The run folder gets a
    checkpoint of step 0 and the config to train it with. Raises ExportError when the run folder
    already has checkpoints, ModelConfigError when weights are missing or do not fit.
    """
    checkpoints = config.run_dir / "checkpoints"
    if existing := checkpoints_in(checkpoints):
        raise ExportError(
            f"{config.run_dir}: already holds {existing[-1].name}; name a new run_dir"
        )
    ours = {name: getattr(config.model, name) for name in _OURS}
    model_config = read_hf_config(source, **ours)
    config = config.model_copy(update={"model": model_config})
    tokenizer = Tokenizer(config.data.tokenizer.path)
    config.check_vocabulary(tokenizer.vocab_size)
    weights = read_hf_weights(source)
    grid = Grid.single()
    local, optimizer = build_native(config.alone(), grid)
    local.model.load_hf_state_dict(weights)
    optimizer.read_parameters()
    config.run_dir.mkdir(parents=True, exist_ok=True)
    keep_tokenizer(config, tokenizer)
    path = RunCheckpoint(config, grid, local.model, optimizer, tokenizer.hash).save(TrainState())
    write_atomically(config.run_dir / CONFIG_FILE, config.with_absolute_paths().to_yaml())
    fresh = "" if any(name.startswith("mtp.") for name in weights) else _fresh_mtp(config)
    return f"wrote {path}{fresh}; train it: v4 train {config.run_dir}"


def _fresh_mtp(config: RunConfig) -> str:
    if config.model.num_nextn_predict_layers == 0:
        return ""
    return f" (mtp.* was not in the folder and is initialised from seed {config.seed})"
