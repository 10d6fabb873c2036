"""The weights that a run begins with: those of another model, or initial values."""

from data import Tokenizer
from optim import HybridZero
from trainer.checkpoint import SavedOptimizer
from trainer.config import ConfigError, RunConfig
from trainer.generate.stored import ModelReader, copy_weights
from trainer.parallel.plan import LocalModel

_FREE = {
    *("balance_loss_weight", "mtp_loss_weight", "initializer_range", "pad_token_id"),
    *("hc_init_scale", "hc_init_own_read", "hc_init_comb_diagonal"),
}
"""Fields of a model that do not decide what its weights mean."""


def start_from(
    config: RunConfig,
    local: LocalModel,
    optimizer: SavedOptimizer,
    tokenizer: Tokenizer,
    read_model: ModelReader | None,
) -> str | None:
    """Copies the weights of `config.start_from`, and returns a line about it; None without one.

    Every rank calls it, and temporarily has all weights on its host. An MTP block that the other
    model lacks keeps its initial values.

    Raises ConfigError for a model of other sizes or with another tokenizer, and the errors of
    `read_model`.
    """
    if config.start_from is None or read_model is None:
        return None
    stored = read_model(config.start_from)
    ours, theirs = (x.model_dump(exclude=_FREE) for x in (config.model, stored.config))
    for name, value in ours.items():
        if theirs[name] != value and name != "num_nextn_predict_layers":
            raise ConfigError(
                f"start_from = {config.start_from}: its model has {name} = {theirs[name]}, and "
                f"model.{name} is {value}; both should be the same"
            )
    if difference := tokenizer.difference(stored.tokenizer):
        raise ConfigError(f"start_from = {config.start_from}: has another tokenizer: {difference}")
    weights = stored.read()
    copy_weights(local, weights.tensors)
    assert isinstance(optimizer, HybridZero)  # see post_problems
    optimizer.read_parameters()
    step = "" if weights.step is None else f", step {weights.step}"
    return f"starts from the weights of {config.start_from}{step}"
