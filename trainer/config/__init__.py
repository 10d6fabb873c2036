"""A run's configuration: what it may say, how it is read, and what it asks for at every step.

Imports no torch, so that a login node can check a config.
"""

from trainer.config.run import RunConfig, Section, load_as, load_config, load_run
from trainer.config.source import ConfigError

__all__ = ["ConfigError", "RunConfig", "Section", "load_as", "load_config", "load_run"]
