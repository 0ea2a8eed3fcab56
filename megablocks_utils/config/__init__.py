"""Every option of a run: one table, one reader, frozen dataclasses checked once. No torch."""

from megablocks_utils.config.adapter import AdapterConfig
from megablocks_utils.config.entry_points import check_leftovers, parse_args, parse_known_args
from megablocks_utils.config.machine import check_world, resolve_precision
from megablocks_utils.config.model import DataConfig, ModelConfig
from megablocks_utils.config.optim import OptimConfig
from megablocks_utils.config.parallel import ParallelConfig
from megablocks_utils.config.precision import PrecisionConfig, ResolvedPrecision
from megablocks_utils.config.run_config import OPTION_NAMES, OPTIONS, RunConfig
from megablocks_utils.config.saving import SavingConfig

__all__ = [
    "AdapterConfig",
    "DataConfig",
    "ModelConfig",
    "OPTIONS",
    "OPTION_NAMES",
    "OptimConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "ResolvedPrecision",
    "RunConfig",
    "SavingConfig",
    "check_leftovers",
    "check_world",
    "parse_args",
    "parse_known_args",
    "resolve_precision",
]
