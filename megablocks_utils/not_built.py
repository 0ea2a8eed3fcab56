"""Values of options that the contract names and this version has not built yet.

Torch-free. Building one means deleting its row.
"""

from megablocks_utils.option_types import NotBuilt, Option

__all__ = ["NOT_BUILT", "offered"]

NOT_BUILT = (
    NotBuilt("kernel", ("triton", "scattermoe", "megablocks")),
    NotBuilt("use_scattermoe", ("True",), "offers --kernel auto, eager and grouped_mm"),
    NotBuilt("save_strategy", ("steps", "epoch")),
    NotBuilt("save_steps", (), "saves the final model only"),
    NotBuilt("save_total_limit", (), "saves the final model only"),
    NotBuilt("resume_from_checkpoint", (), "starts every run from the model"),
)


def offered(option: Option) -> tuple[str, ...]:
    """Return the choices of an option that this version has built."""
    refused = {value for row in NOT_BUILT if row.name == option.name for value in row.values}
    return tuple(choice for choice in option.choices if choice not in refused)
