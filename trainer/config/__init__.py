"""A run's configuration: its fields, how it is read, and what a run does at every step.

Imports no torch, so that a login node can check a config.
"""

from trainer.config.evaluation import EvaluationConfig, is_task_file
from trainer.config.operation import ProfileConfig, WatchdogConfig
from trainer.config.parallel import ParallelConfig
from trainer.config.phases import Quantisation
from trainer.config.recipe import Phase, Recipe, Segment, short_length
from trainer.config.reference import FieldReference, Reference, SectionReference
from trainer.config.resume import (
    Rule,
    changed_fields,
    differences,
    replaced_optimizer,
    rule_of,
)
from trainer.config.run import CONFIG_FILE, RunConfig, is_hf_folder, load_as, load_config, load_run
from trainer.config.saved import save_config
from trainer.config.section import Section, UserPath
from trainer.config.source import ConfigError, require_unicode
from trainer.config.stability import AnticipatoryRoutingConfig, SpikeConfig

__all__ = [
    "CONFIG_FILE",
    "AnticipatoryRoutingConfig",
    "ConfigError",
    "EvaluationConfig",
    "FieldReference",
    "ParallelConfig",
    "Phase",
    "ProfileConfig",
    "Quantisation",
    "Recipe",
    "Reference",
    "Rule",
    "RunConfig",
    "Section",
    "SectionReference",
    "Segment",
    "SpikeConfig",
    "UserPath",
    "WatchdogConfig",
    "changed_fields",
    "differences",
    "is_hf_folder",
    "is_task_file",
    "load_as",
    "load_config",
    "load_run",
    "replaced_optimizer",
    "require_unicode",
    "rule_of",
    "save_config",
    "short_length",
]
