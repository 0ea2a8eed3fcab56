"""When checkpoints are written, by the step alone.

Torch-free.
"""

import math
from dataclasses import dataclass

from megablocks_utils.config.options import default_of

__all__ = ["SavingConfig"]


@dataclass(frozen=True)
class SavingConfig:
    """Say when checkpoints are written, how, and which one a run goes on from.

    Attributes:
        save_strategy: "no", "steps" or "epoch".
        save_steps: Whole steps between two checkpoints, or below 1 the share of all steps.
        save_total_limit: Checkpoints that are kept; None: all.
        async_save: Whether they are written in the background.
        resume_from_checkpoint: "True", "False" or a folder; what it comes to is said by
            `processes.output_folder.choose_checkpoint`.
    """

    save_strategy: str = default_of("save_strategy")
    save_steps: float = default_of("save_steps")
    save_total_limit: int | None = default_of("save_total_limit")
    async_save: bool = default_of("async_save")
    resume_from_checkpoint: str = default_of("resume_from_checkpoint")

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
