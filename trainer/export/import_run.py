"""`v4 import`: starts a run from a Hugging Face folder. `open_run`: loads the newest checkpoint."""

from typing import Any

from data.storage import AnyPath
from trainer.build import build_native
from trainer.checkpoint import RunCheckpoint, checkpoints_in, unsaved_progress
from trainer.config import RunConfig, save_config
from trainer.export.compare import check_generation, check_sizes, check_tokenizer
from trainer.export.hf_folder import CONFIG_JSON, read_hf_config, read_hf_weights
from trainer.parallel.grid import Grid
from trainer.parallel.plan import LocalModel
from trainer.process.command_line import v4
from trainer.process.errors import CheckpointError, ExportError
from trainer.run_tokenizer import keep_tokenizer, open_tokenizer
from trainer.state import TrainState

# Fields that config.json lacks, or has of training only; the padding is the tokenizer's.
_OURS = (
    "pad_token_id",
    "balance_loss_weight",
    "mtp_loss_weight",
    "initializer_range",
    "hc_init_scale",
    "hc_init_own_read",
    "hc_init_comb_diagonal",
)


def open_run(config: RunConfig, grid: Grid) -> tuple[LocalModel, TrainState]:
    """Returns this rank's part of the model of a run's newest checkpoint, and its counters.

    Raises CheckpointError when there is none.
    """
    tokenizer = open_tokenizer(config)
    local, optimizer = build_native(config, grid)
    checkpoint = RunCheckpoint(
        config, grid, local.model, optimizer, tokenizer.hash, local.placements
    )
    state = TrainState()
    if checkpoint.load(state) is None:
        raise CheckpointError(f"{config.run_dir}: holds no checkpoint yet; train the run first")
    return local, state


def imported_sizes(source: AnyPath) -> dict[str, dict[str, Any]]:
    """Returns what a folder's config.json determines of a run's config, by its origin.

    Raises ExportError and ModelConfigError as `read_hf_config`.
    """
    sizes = read_hf_config(source).model_dump(mode="json", exclude={*_OURS})
    return {str(source / CONFIG_JSON): {"model": sizes}}


def import_hf_folder(config: RunConfig, source: AnyPath) -> str:
    """Makes a run that starts from a Hugging Face folder and returns a sentence about it.

    The run folder gets a checkpoint of step 0 and `config`, whose model has the folder's sizes (see
    `imported_sizes`). Raises ExportError when the run folder has checkpoints or metrics, or the
    folder contradicts the config or itself; CheckpointError when the run has lost its checkpoints;
    ModelConfigError when weights are missing or do not fit.
    """
    if existing := checkpoints_in(config.checkpoints):
        raise ExportError(
            f"{config.run_dir}: already holds {existing[-1].name}; name a new run_dir"
        )
    if last := unsaved_progress(config):
        raise ExportError(f"{config.run_dir}: has metrics of {last} steps; name a new run_dir")
    ours = {name: getattr(config.model, name) for name in _OURS}
    imported = read_hf_config(source, **ours)
    check_sizes(config.model, imported, source)
    check_generation(imported, source)
    tokenizer = open_tokenizer(config)
    check_tokenizer(tokenizer, source)
    weights = read_hf_weights(source)
    grid = Grid.single()
    local, optimizer = build_native(config.alone(), grid)
    local.model.load_hf_state_dict(weights)
    optimizer.read_parameters()
    config.run_dir.mkdir(parents=True, exist_ok=True)
    keep_tokenizer(config, tokenizer)
    path = RunCheckpoint(config, grid, local.model, optimizer, tokenizer.hash).save(TrainState())
    save_config(config)
    has_mtp = any(name.startswith("mtp.") for name in weights)
    return f"wrote {path}{_about_mtp(config, has_mtp)}; train it: {v4('train', config.run_dir)}"


def _about_mtp(config: RunConfig, has_mtp: bool) -> str:
    """Returns what the folder's config.json has of MTP and its weights have not, or the reverse."""
    if has_mtp and config.model.num_nextn_predict_layers == 0:
        return " (without the folder's mtp.*: its config.json has num_nextn_predict_layers = 0)"
    if not has_mtp and config.model.num_nextn_predict_layers > 0:
        return f" (mtp.* was not in the folder and is initialised from seed {config.seed})"
    return ""
