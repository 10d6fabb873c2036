"""Other models that read the samples of a rollout: teachers, and the reference of the KL.

They are loaded one after another, on the grid of the run and at its degrees, and dropped again;
each rank keeps its part of their weights on the host. Of what a model computes only the hidden
states of answers are read, at the ranks of the last pipeline stage.

Letters: T queries of a rank, n of them that predict a token of an answer, D hidden size, v
vocabulary of a tensor rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from data import Batch, Tokenizer
from model import IGNORE_INDEX, V4Model
from model.config import AttentionMode
from model.kernels.operations import Kernels
from model.transformer import Microbatch
from trainer.build import DTYPES
from trainer.config import Quantisation, RunConfig
from trainer.engine import Engine, NativeEngine
from trainer.generate.stored import ModelReader, StoredModel, copy_weights
from trainer.parallel.grid import Grid
from trainer.parallel.plan import build_local_model
from trainer.process.errors import PostTrainingError

ReadHidden = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden states [n, D], head [v, D], tokens of answers [n]) -> what is kept of them, [n, …]."""


class Teachers:
    """The models that a run's config names, by folder; all ranks use them together.

    Raises PostTrainingError for one with another tokenizer or vocabulary than the run's, and the
    errors of `read_model` for a folder that has no model.
    """

    def __init__(
        self,
        config: RunConfig,
        grid: Grid,
        tokenizer: Tokenizer,
        kernels: Kernels,
        read_model: ModelReader | None,
    ) -> None:
        assert config.post is not None
        self._config, self._grid, self._kernels = config, grid, kernels
        self._stored: dict[str, StoredModel] = {}
        if read_model is not None:
            self._stored = {folder: read_model(folder) for folder in config.post.models}
        for folder, stored in self._stored.items():
            _check(folder, stored, config, tokenizer)
        self._weights: dict[str, dict[str, Tensor]] = {}  # this rank's, on the host
        self._trained: dict[str, tuple[Quantisation, AttentionMode]] = {}
        self._heads: dict[str, Tensor] = {}

    def read(self, folder: str, batches: Sequence[Batch], read: ReadHidden) -> list[Tensor]:
        """Returns for each microbatch what `read` returns, on the host; every rank calls it.

        Only ranks of the last pipeline stage have any.
        """
        engine = self._load(folder)
        kept: list[Tensor] = []

        def reader(streams_TND: Tensor, micro: Microbatch, index: int) -> None:
            model = engine.model
            hidden_TD = micro.exchange.gather_queries(model.norm(model.hc_head(streams_TND)))
            targets_T = micro.query_targets_T
            chosen_n = (targets_T != IGNORE_INDEX).nonzero()[:, 0]
            self._keep_head(folder, model)
            kept.append(read(hidden_TD[chosen_n], model.head.weight, targets_T[chosen_n]).to("cpu"))

        engine.read_streams(batches, reader)
        return kept

    def head(self, folder: str) -> Tensor:
        """Returns this rank's rows of a model's output head, on its device, after `read`."""
        return self._heads[folder]

    def _keep_head(self, folder: str, model: V4Model) -> None:
        is_teacher = self._config.post is not None and self._config.post.method == "distil"
        if is_teacher and folder not in self._heads:
            self._heads[folder] = model.head.weight.detach().clone()

    def _load(self, folder: str) -> Engine:
        """Makes this rank's part of a model on its device, with an engine that runs it."""
        grid, parallel = self._grid, self._config.segment.parallel
        config = self._stored[folder].config.model_copy(update={"num_nextn_predict_layers": 0})
        local = build_local_model(
            config,
            DTYPES[self._config.precision],
            grid,
            parallel.stages(config, self._config.segment.seq_len),
            fp8=self._config.precision == "fp8",
            kernels=self._kernels,
        )
        local.model.to_empty(device=grid.device).requires_grad_(False)
        if folder in self._weights:
            local.model.load_state_dict(self._weights[folder])
        else:
            stored = self._stored[folder].read()
            copy_weights(local, stored.tensors)
            self._weights[folder] = {n: x.to("cpu") for n, x in local.model.state_dict().items()}
            self._trained[folder] = (stored.quantisation, stored.attention)
        engine = NativeEngine(local, grid)
        engine.quantisation, engine.attention = self._trained[folder]
        return engine


def _check(folder: str, stored: StoredModel, config: RunConfig, tokenizer: Tokenizer) -> None:
    if stored.config.vocab_size != config.model.vocab_size:
        raise PostTrainingError(
            f"{folder}: has a vocabulary of {stored.config.vocab_size:,}, and the model that "
            f"learns from it one of {config.model.vocab_size:,}; both should be the same"
        )
    if difference := tokenizer.difference(stored.tokenizer):
        raise PostTrainingError(
            f"{folder}: has another tokenizer than the model that learns from it: {difference}"
        )
