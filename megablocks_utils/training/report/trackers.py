"""Trackers: where the numbers of a step go besides `metrics.jsonl`, alike in both scripts.

The FSDP2 loop logs through Accelerate's trackers, the FSDP1 script through the Trainer's callbacks;
both know a tracker by the same name. To add one, name it here and in the choices of `--report_to`.
"""

from collections.abc import Sequence
from importlib.util import find_spec

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.training.report.metrics import StepMetrics

__all__ = ["PACKAGES", "PROJECT_NAME", "check_trackers", "tracked_values"]

PACKAGES = {"tensorboard": "tensorboard"}
"""The package that each tracker needs, by the tracker's name."""

PROJECT_NAME = "megablocks_utils"


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not installed; Accelerate would leave it out silently.

    Raises:
        ConfigurationError: naming the line that installs it.
    """
    for name in names:
        package = PACKAGES[name]
        if find_spec(package) is None:
            raise ConfigurationError(
                f"report_to is {name}, but the package {package} is not installed; install it "
                f"with: pip install {package}",
                parameters=("report_to",),
            )


def tracked_values(metrics: StepMetrics) -> dict[str, float]:
    """Return the numbers of a step that trackers show, by their names in `metrics.jsonl`."""
    record = metrics.as_record()
    del record["step"]  # every tracker has it beside the values
    return record
