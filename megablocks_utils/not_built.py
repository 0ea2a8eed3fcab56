"""Values of options that the contract names and this version has not built yet.

Torch-free. Building one means deleting its row.
"""

from megablocks_utils.option_types import NotBuilt, Option

__all__ = ["NOT_BUILT", "offered"]

NOT_BUILT = (
    NotBuilt("kernel", ("triton", "scattermoe", "megablocks")),
    NotBuilt("use_scattermoe", ("True",), "offers --kernel auto, eager and grouped_mm"),
)


def offered(option: Option) -> tuple[str, ...]:
    """Return the choices of an option that this version has built."""
    refused = {value for row in NOT_BUILT if row.name == option.name for value in row.values}
    return tuple(choice for choice in option.choices if choice not in refused)
