"""What the options of data mean together. Torch-free."""

from collections.abc import Mapping
from typing import Any

from megablocks_utils.config.model import DataConfig
from megablocks_utils.errors import ConfigurationError

__all__ = ["check_data_options"]


def check_data_options(values: Mapping[str, Any]) -> None:
    """Refuse options of data that contradict each other.

    Args:
        values: every option by name, defaults where not given.

    Raises:
        ConfigurationError: naming an option, its value and what it contradicts.
    """
    weights, paths = values["data_weights"], values["data_path"]
    if weights is not None and len(weights) != len(paths):
        raise ConfigurationError(
            f"--data_weights has {len(weights)} numbers, but --data_path names {len(paths)} "
            "sources: each must have one."
        )
    if values["streaming"]:
        _check_streaming(values)
    elif values["shuffle_buffer_size"] != DataConfig.shuffle_buffer_size:
        raise ConfigurationError(
            f"--shuffle_buffer_size is {values['shuffle_buffer_size']}, but without --streaming "
            "True all examples are shuffled: leave it out."
        )
    if values["packing_length"] is not None and values["packing"] == "False":
        raise ConfigurationError(
            f"--packing_length is {values['packing_length']}, but --packing is False, which gives "
            "every example a row of its own: it must be auto or True."
        )


def _check_streaming(values: Mapping[str, Any]) -> None:
    if values["max_steps"] < 1:
        raise ConfigurationError(
            f"--max_steps is {values['max_steps']}, but with --streaming True it must be at least "
            "1: how long the data is, is not known."
        )
    if values["packing_length"] is not None:
        raise ConfigurationError(
            f"--packing_length is {values['packing_length']}, but with --streaming True it cannot "
            "be given: rows are planned over all examples."
        )
    for name in ("save_strategy", "eval_strategy"):
        if values[name] == "epoch":
            raise ConfigurationError(
                f"--{name} is epoch, but with --streaming True it must be steps or no: how long an "
                "epoch is, is not known."
            )
