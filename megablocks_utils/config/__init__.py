"""Every option of a run: one table, one reader, frozen dataclasses checked once. No torch."""

from megablocks_utils.config.run_config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    ResolvedPrecision,
    RunConfig,
    SavingConfig,
    check_world,
    parse_args,
    parse_known_args,
    resolve_precision,
)

__all__ = [
    "AdapterConfig",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "ResolvedPrecision",
    "RunConfig",
    "SavingConfig",
    "check_world",
    "parse_args",
    "parse_known_args",
    "resolve_precision",
]
