"""When checkpoints are written, by the step alone.

Torch-free.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated

from megablocks_utils.config.option import Duration, Option
from megablocks_utils.config.precision import SAVE_DTYPE_OPTION

__all__ = ["SavingConfig"]


@dataclass(frozen=True)
class SavingConfig:
    """Say when checkpoints are written, how, and which one a run resumes from.

    Attributes:
        save_strategy: "no", "steps" or "epoch".
        save_steps: Whole steps between two checkpoints, or below 1 the share of all steps.
        save_total_limit: Checkpoints that are kept; None: all.
        async_save: Whether they are written in the background.
        resume_from_checkpoint: "True", "False", "auto" or a folder; what it comes to is said by
            `processes.output_folder.choose_checkpoint`.
        time_limit: Wall time after which the run has saved and ended; None: no limit.
        stop_on_nonfinite: Whether values that are not finite end the run.
        save_dtype: Dtype of the final model's weights; None: that of training.
    """

    save_strategy: Annotated[
        str,
        Option(
            "when checkpoints are written: every --save_steps or at each epoch's end, and after "
            "the last step; the final model always is",
            choices=("no", "steps", "epoch"),
        ),
    ] = "no"
    save_steps: Annotated[
        float,
        Option(
            "optimizer steps between two checkpoints with --save_strategy steps; below 1: that "
            "share of all steps",
            above=0,
            limit=10**9,
        ),
    ] = 500
    save_total_limit: Annotated[
        int | None,
        Option(
            "checkpoints that are kept; when one more is complete, the oldest is removed",
            minimum=1,
            shown_default="all",
        ),
    ] = None
    async_save: Annotated[
        bool,
        Option(
            "write checkpoints in the background, from a copy in host memory, while training "
            "continues"
        ),
    ] = False
    resume_from_checkpoint: Annotated[
        str,
        Option(
            "checkpoint to resume from: True is the newest complete one in --output_dir, False is "
            "none, auto the newest if there is one and else none (one command for start and "
            "requeue), anything else its folder"
        ),
    ] = "False"
    time_limit: Annotated[
        Duration | None,
        Option(
            "wall time of the run since its start, as 3h50m, 90m, HH:MM:SS or D-HH:MM:SS: early "
            "enough before it the run saves a checkpoint and ends with exit code 0",
            metavar="TIME",
            shown_default="none",
        ),
    ] = None
    stop_on_nonfinite: Annotated[
        bool,
        Option(
            "end the run, with exit code 1, in the step whose loss, gradients or weights are not "
            "finite, and write no such checkpoint or model; False: warn and continue"
        ),
    ] = True
    save_dtype: Annotated[
        str | None, replace(SAVE_DTYPE_OPTION, shown_default="that of training")
    ] = None

    def is_due(self, step: int, *, num_steps: int, steps_per_epoch: int) -> bool:
        """Return whether a checkpoint is written after `step`, as Hugging Face's Trainer would.

        Args:
            step: Optimizer steps done, from 1.
            num_steps: Of the whole run; a checkpoint is due after the last one too.
            steps_per_epoch: Of one pass over the data.
        """
        if self.save_strategy == "no":
            return False
        every = steps_per_epoch
        if self.save_strategy == "steps":
            every = self._whole_steps(num_steps)
        return step == num_steps or step % every == 0

    def _whole_steps(self, num_steps: int) -> int:
        return math.ceil(self.save_steps * (num_steps if self.save_steps < 1 else 1))
