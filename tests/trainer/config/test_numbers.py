"""Numbers that would ruin a run are refused; those at the ends of what is allowed train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, TypeAdapter, ValidationError

from launch.job import ClusterConfig
from launch.sweep_file import Sweep
from model import V4Model
from model.parameters import parameter_table
from optim import Optimizer, build_table
from tests.trainer.config.test_config import refused
from trainer.config import RunConfig, load_config
from trainer.config.section import section_in

NUMBERS = (int, float)
# 0 means "none", "never", "at once", or turns something off.
ZERO = {
    "DecontaminationConfig": "min_fraction",
    "FiltersConfig": "min_characters max_garbled_fraction",
    "TransformsConfig": "fim_rate fim_spm_rate punctuation_split_rate",
    "DataConfig": "validation_fraction prefetch max_bad_record_fraction source_weights "
    "accept_change_at",
    "ModelConfig": "num_hash_layers balance_loss_weight hc_init_scale hc_init_comb_diagonal "
    "num_nextn_predict_layers mtp_loss_weight bos_token_id eos_token_id pad_token_id",
    "ScheduleConfig": "warmup_steps decay_fraction decay_start final_ratio",
    "MuonConfig": "momentum momentum_start momentum_warmup_steps weight_decay coarse_steps "
    "fine_steps",
    "AdamWConfig": "betas weight_decay",
    "OptimConfig": "max_skipped_steps learning_rate_factors",
    "ParallelConfig": "pipeline_layers_per_stage max_optimizer_padding",
    "PhaseParallelConfig": "pipeline_layers_per_stage",
    "PhaseConfig": "learning_rate mtp_loss_weight router_bias_speed source_weights",
    "LengthRule": "free weight",
    "PolicyConfig": "kl_weight",
    "DomainConfig": "weight",
    "PostConfig": "mtp_loss_weight",
    "AnticipatoryRoutingConfig": "lag_steps",
    "SpikeConfig": "snapshot_every max_rollbacks",
    "CheckpointConfig": "every keep",
    "MetricsConfig": "layer_stats_every",
    "EvaluationConfig": "every task_fewshot tasks_every",
    "WatchdogConfig": "seconds",
    "ProfileConfig": "ranks",
    "RunConfig": "steps seed mtp_loss_weight_in_decay router_bias_speed",
    "KubernetesConfig": "backoff_limit",
    "ClusterConfig": "max_restarts",
    "Parameter": "min max mu",
}
NEGATIVE = {
    "ModelConfig": "hc_init_scale hc_init_comb_diagonal",
    "DataConfig": "source_weights",  # refused by check_weights
    "PhaseConfig": "source_weights",
    "Parameter": "min max mu",
}
# An interval, a limit or a threshold that is never reached, or checked against the model's sizes.
HUGE = {
    "DecontaminationConfig": "min_matches",
    "TokenizerConfig": "sample_bytes",
    "FiltersConfig": "min_characters max_characters template_min_documents",
    "DataConfig": "accept_change_at packing_window seq_len source_weights",
    "PhaseConfig": "seq_len source_weights",
    "ModelConfig": "num_hash_layers bos_token_id eos_token_id pad_token_id",
    "ScheduleConfig": "warmup_steps decay_start",
    "MuonConfig": "momentum_warmup_steps max_batch_bytes",
    "OptimConfig": "clip_norm max_skipped_steps",
    "ParallelConfig": "tensor expert pipeline context expert_tensor max_optimizer_padding "
    "pipeline_stages_per_rank pipeline_layers_per_stage",
    "PhaseParallelConfig": "tensor expert pipeline context expert_tensor "
    "pipeline_stages_per_rank pipeline_layers_per_stage",
    "SlurmConfig": "cpus_per_node",
    "KubernetesConfig": "backoff_limit",
    "ClusterConfig": "max_restarts join_seconds save_seconds",
    "AnticipatoryRoutingConfig": "active_steps",
    "SpikeConfig": "median_window deviation_window threshold min_loss_deviation "
    "min_grad_norm_deviation min_router_deviation snapshot_every min_rollback_steps "
    "max_rollbacks min_history",
    "CheckpointConfig": "every keep",
    "MetricsConfig": "every layer_stats_every peak_tflops",
    "EvaluationConfig": "every max_rows prompt_tokens task_fewshot task_limit tasks_every",
    "ProfileConfig": "steps steps_on_signal ranks",
    "Parameter": "min max mu sigma q",
    "Hyperband": "min_iter max_iter s eta",
    "Sweep": "run_cap",
}


def sections(model: type[BaseModel], known: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    if model not in known:
        known.add(model)
        yield model
        for field in model.model_fields.values():
            if (inner := section_in(field.annotation)) is not None:
                yield from sections(inner, known)


def numbers_in(annotation: Any) -> set[type]:
    """The kinds of numbers anywhere in an annotation, except inside a section."""
    if annotation in NUMBERS:
        return {annotation}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return set()
    return {kind for inner in get_args(annotation) for kind in numbers_in(inner)}


KNOWN: set[type[BaseModel]] = set()
FIELDS = [
    (section, name, max(kinds, key=NUMBERS.index))
    for root in (RunConfig, ClusterConfig, Sweep)
    for section in sections(root, KNOWN)
    for name, field in section.model_fields.items()
    if (kinds := numbers_in(field.annotation))
]


def is_accepted(section: type[BaseModel], name: str, value: float) -> bool:
    """Whether a field accepts a number, in whatever holds its numbers."""
    field = section.model_fields[name]
    # The metadata of a field has its bounds, the section's config what it refuses.
    adapter = TypeAdapter(field.rebuild_annotation(), config=section.model_config)
    names = {"learning_rate_factors": "norms"}
    for candidate in (value, (value,), (value, value), {names.get(name, "a"): value}):
        try:
            adapter.validate_python(candidate)
        except ValidationError:
            continue
        return True
    return False


def accepting(of_kind: dict[type, float]) -> dict[str, str]:
    """The fields by section that accept a number, which depends on the field's kind."""
    accepted: dict[str, list[str]] = {}
    for section, name, kind in FIELDS:
        if kind in of_kind and is_accepted(section, name, of_kind[kind]):
            accepted.setdefault(section.__name__, []).append(name)
    return {section: " ".join(sorted(names)) for section, names in accepted.items()}


def ends_of(section: type[BaseModel], name: str) -> list[float]:
    """The smallest and the largest number that a field accepts; next to a bound that is open."""
    ends = []
    for bound in section.model_fields[name].metadata:
        match bound:
            case Ge():
                ends.append(bound.ge)
            case Gt():
                ends.append(bound.gt + 1e-6)
            case Le():
                ends.append(bound.le)
            case Lt():
                ends.append(bound.lt - 1e-6)
    return [float(end) for end in ends]


def in_order(fields: dict[str, str]) -> dict[str, str]:
    return {section: " ".join(sorted(names.split())) for section, names in fields.items() if names}


def test_every_section_is_walked() -> None:
    names = {section.__name__ for section, _, _ in FIELDS}
    assert {"ModelConfig", "Yarn", "DataConfig", "MuonConfig", "PhaseConfig", "Hyperband"} <= names
    assert len(FIELDS) > 120


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_no_field_accepts_what_is_not_finite(value: float) -> None:
    accepted = accepting({float: value})
    # Their own validator refuses it, and names the source.
    assert accepted.keys() <= {"DataConfig", "PhaseConfig"} or accepted == {}, accepted
    assert not {*" ".join(accepted.values()).split()} - {"source_weights"}


def test_zero_is_accepted_where_it_means_something() -> None:
    assert accepting({int: 0, float: 0.0}) == in_order(ZERO)


def test_negative_numbers_are_accepted_where_they_mean_something() -> None:
    assert accepting({int: -1, float: -1.0}) == in_order(NEGATIVE)


def test_huge_numbers_are_accepted_where_they_are_never_reached() -> None:
    assert accepting({int: 10**30, float: 1e300}) == in_order(HUGE)


ENDS = [
    (section, name, end)
    for section, of_run in (("model", "ModelConfig"), ("optim", "OptimConfig"))
    for other, name, kind in FIELDS
    if other.__name__ == of_run and kind is float
    for end in ends_of(other, name)
]


@pytest.mark.parametrize(("section", "name", "end"), ENDS)
def test_a_step_is_finite_at_the_ends_of_a_number(
    tiny: Path, section: str, name: str, end: float
) -> None:
    """Losses, gradients and weights; the gradient is clipped as in a run."""
    config = load_config(tiny, [f"{section}.{name}={end}"])
    model = V4Model(config.model)
    model.init_weights(0)
    tokens = torch.arange(2 * 48).view(2, 48) % config.model.vocab_size
    loss = model(tokens, targets=tokens.roll(-1, 1)).loss
    assert loss is not None
    loss.backward()
    parameters = {n: p for n, p in model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), config.optim.clip_norm or 1e9)
    shapes = {n: tuple(p.shape) for n, p in parameters.items()}
    table = build_table(shapes, parameter_table(config.model), config.optim)
    Optimizer(parameters, table, config.optim).step(config.optim.learning_rate)
    assert loss.isfinite() and norm.isfinite()
    assert all(parameter.isfinite().all() for parameter in parameters.values())


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("optim.adamw.eps=0", "optim.adamw.eps = 0 should be greater than or equal to 1e-30"),
        ("model.compress_rope_theta=1", "model.compress_rope_theta = 1 should be greater than 1"),
        ("router_bias_speed=.inf", "router_bias_speed = inf should be a finite number"),
        ("model.rms_norm_eps=.nan", "model.rms_norm_eps = nan should be a finite number"),
        ("optim.muon={coarse_steps: 0, fine_steps: 0}", "coarse_steps and fine_steps are both 0"),
    ],
)
def test_the_sentence_names_the_field(override: str, text: str) -> None:
    assert text in refused(override)
