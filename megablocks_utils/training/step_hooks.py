"""What a training loop asks between micro-steps and calls after each step."""

from megablocks_utils.training.resume.run_state import RunState

__all__ = ["StepHooks"]


class StepHooks:
    """Hooks that do nothing: a run that cannot be stopped and saves no checkpoints."""

    @property
    def is_over(self) -> bool:
        """Whether the run ends with the steps done, the same on every rank; nothing is asked."""
        return False

    def should_stop(self) -> bool:
        """Return whether to drop the step that has begun and stop.

        **Collective:** every rank must call it, before every micro-step.
        """
        return False

    def before_first_step(self, step: int, state: RunState) -> None:
        """Look at the run before this process trains it.

        **Collective:** every rank must call.

        Args:
            step: optimizer steps done before.
            state: of the run at this step.
        """

    def after_step(self, step: int, state: RunState) -> None:
        """React to a step that is over, its metrics written.

        **Collective:** every rank must call.

        Args:
            step: optimizer steps done.
            state: of the run at this step.
        """

    def after_stop(self, step: int, state: RunState) -> None:
        """React to a loop that has stopped with `step` steps done.

        **Collective:** every rank must call.

        Args:
            step: optimizer steps done.
            state: of the run at this step.
        """
