"""The settings of a training run, and the TOML files that they come from. Imports data/errors.py and files."""

from .fields import ConfigSection
from .init import InitSection
from .schedules import learning_rate, transfer_weight, transfer_weights
from .sections import Config, flatten, in_transfer
from .toml import dump_config, load_config, merged, read_toml, validated, without_removed

__all__ = [
    "Config",
    "ConfigSection",
    "InitSection",
    "dump_config",
    "flatten",
    "in_transfer",
    "learning_rate",
    "load_config",
    "merged",
    "read_toml",
    "transfer_weight",
    "transfer_weights",
    "validated",
    "without_removed",
]
