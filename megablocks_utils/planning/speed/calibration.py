"""Seconds from two short runs on the user's node: a bandwidth, and the rest of a micro-step.

One run without expert parallelism and one with as much as there can be send very different numbers
of bytes c and take t seconds a micro-step. `t = h + c / b` of both gives b, the bytes a rank sends
a second, and h, all that does not depend on what is sent.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.planning.memory.scenario import Scenario

__all__ = ["Calibration", "TimedRun", "build_record", "describe_workload", "read_calibration"]
__all__ += ["solve"]

_KIND = "megablocks_utils calibration"


@dataclass(frozen=True)
class TimedRun:
    """One of the two runs.

    Attributes:
        name: the layout, in words.
        sent_bytes: what a rank sends in a micro-step.
        micro_step_s: seconds of each micro-step, warm-up left out.
    """

    name: str
    sent_bytes: float
    micro_step_s: Sequence[float]

    @property
    def median_s(self) -> float:
        """Seconds of a usual micro-step."""
        return median(self.micro_step_s)

    @property
    def spread_s(self) -> float:
        """Half of all micro-steps are nearer to the median than this."""
        return median(abs(seconds - self.median_s) for seconds in self.micro_step_s)


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        bytes_per_s: that a rank sends, all that it sends being counted.
        overhead_s: of a micro-step, whatever is sent.
        workload: what was run; seconds are given for the same only.
    """

    bytes_per_s: float
    overhead_s: float
    workload: Mapping[str, Any]

    def step_s(self, sent_bytes: float, accumulation: int) -> float:
        """Estimate an optimizer step in which a rank sends `sent_bytes`."""
        return accumulation * self.overhead_s + sent_bytes / self.bytes_per_s

    def check_workload(self, scenario: Scenario, path: str) -> None:
        """Refuse to give seconds for something else than what was measured.

        Raises:
            ConfigurationError: naming what differs.
        """
        wanted = describe_workload(scenario)
        for name, value in wanted.items():
            measured = self.workload.get(name)
            if measured != value:
                raise ConfigurationError(
                    f"--calibration is {path}, but it was measured with {name} {measured} and "
                    f"this plan has {value}; calibrate again with the flags of this plan."
                )


def describe_workload(scenario: Scenario) -> dict[str, Any]:
    """Return what the seconds of a micro-step depend on, besides the layout."""
    shape, run = scenario.shape, scenario.planned_run()
    return {
        "world_size": run.world_size,
        "model_type": shape.model_type,
        "parameters": shape.num_parameters,
        "per_device_train_batch_size": scenario.config.optim.per_device_train_batch_size,
        "max_seq_length": scenario.config.data.max_seq_length,
        "use_lora": run.use_lora,
        "expert_quantization": scenario.config.adapter.expert_quantization,
        "gradient_checkpointing": run.gradient_checkpointing,
        "compute_dtype": run.precision.compute,
    }


def solve(first: TimedRun, second: TimedRun, workload: Mapping[str, Any]) -> Calibration:
    """Solve the two equations.

    Raises:
        ConfigurationError: the runs differ too little in time or bytes to say what a byte costs,
            or contradict the model.
    """
    times = f"{first.name} took {first.median_s:.3g} s a micro-step, {second.name} "
    times += f"{second.median_s:.3g} s"
    bytes_apart = first.sent_bytes - second.sent_bytes
    apart_s = first.median_s - second.median_s
    if bytes_apart == 0:
        raise ConfigurationError(
            f"{times}: both send the same, so the bandwidth cannot be told; calibrate with another "
            "model or number of tokens."
        )
    if abs(apart_s) <= first.spread_s + second.spread_s:
        raise ConfigurationError(
            f"{times}: that is no difference beside how much steps vary, so the bandwidth cannot "
            "be told; calibrate with more --steps, a larger model or fewer tokens."
        )
    bytes_per_s = bytes_apart / apart_s
    if bytes_per_s <= 0:
        raise ConfigurationError(
            f"{times}: the run that sends more was the faster one, so its links are not what it "
            "waits for, and the bandwidth cannot be told; calibrate with fewer tokens."
        )
    overhead_s = first.median_s - first.sent_bytes / bytes_per_s
    if overhead_s <= 0:
        raise ConfigurationError(
            f"{times}: by these nothing is left for anything but sending, which cannot be; "
            "calibrate with more --steps on a quiet node."
        )
    return Calibration(bytes_per_s, overhead_s, dict(workload))


def build_record(
    calibration: Calibration, runs: Sequence[TimedRun], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the file holds: the two numbers, what they came from, and their provenance."""
    timed = [asdict(run) | {"median_s": run.median_s, "spread_s": run.spread_s} for run in runs]
    return {"kind": _KIND, **asdict(calibration), "runs": timed, "provenance": dict(provenance)}


def read_calibration(path: str | Path) -> Calibration:
    """Read what `calibrate` wrote.

    Raises:
        ConfigurationError: no such file, or not one of ours.
    """
    wanted = "it must be a file that python -m megablocks_utils.plan calibrate has written."
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        bytes_per_s, overhead_s = float(record["bytes_per_s"]), float(record["overhead_s"])
        are_usable = all(math.isfinite(n) and n > 0 for n in (bytes_per_s, overhead_s))
        is_ours = record["kind"] == _KIND and are_usable
        calibration = Calibration(bytes_per_s, overhead_s, workload=dict(record["workload"]))
    except OSError as error:
        raise ConfigurationError(
            f"--calibration is {path}, but it cannot be read ({error.strerror}); {wanted}"
        ) from error
    except (ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise ConfigurationError(f"--calibration is {path}, but it holds something else; {wanted}")
    return calibration
