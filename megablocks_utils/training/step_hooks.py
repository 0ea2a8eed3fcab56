"""What a training loop asks between micro-steps and tells after each step."""


class StepHooks:
    """Do nothing: a run that nobody stops and that saves nothing on its way."""

    def should_stop(self) -> bool:
        """Say whether to drop the step that has begun and stop.

        **Collective:** every rank must ask, before every micro-step.
        """
        return False

    def after_step(self, step: int) -> None:
        """Take note of a step that is over, its metrics written.

        **Collective:** every rank must call.
        """

    def after_stop(self, step: int) -> None:
        """Take note that the loop has stopped with `step` steps done.

        **Collective:** every rank must call.
        """
