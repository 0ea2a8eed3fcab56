"""Evaluate a run while it trains, in both loops: what is measured, kept, stopped and loaded."""

import math
from pathlib import Path
from typing import Any

from megablocks_utils.errors import NonFiniteError
from megablocks_utils.processes.agreement import (
    broadcast_from_rank0,
    max_over_ranks,
    raise_on_all_ranks,
)
from megablocks_utils.processes.output_folder import CHECKPOINT_PREFIX, find_checkpoints
from megablocks_utils.processes.progress_marks import PROGRESS
from megablocks_utils.training.evaluation.greedy_answers import answer_prompts, take_prompts
from megablocks_utils.training.evaluation.held_out_loss import HeldOut, evaluate_loss
from megablocks_utils.training.evaluation.undisturbed import undisturbed
from megablocks_utils.training.recorder import RunRecorder
from megablocks_utils.training.report.evaluations import (
    Evaluation,
    count_without_lower,
    find_best,
    read_evaluations,
)
from megablocks_utils.training.report.samples import Sample, read_samples
from megablocks_utils.training.resume.run_state import RunState
from megablocks_utils.training.setup import Setup
from megablocks_utils.training.step_hooks import StepHooks
from megablocks_utils.training.value_checks import check_before_saving, stops

__all__ = ["EvaluationHooks"]

MAX_NEW_TOKENS = 64
"""Of each answer to a held-out prompt."""


class EvaluationHooks(StepHooks):
    """Evaluate where `--eval_strategy` asks, before a checkpoint of the same step is saved.

    Everything that depends on earlier evaluations follows from their lines in `metrics.jsonl`,
    which every checkpoint holds: so a resumed run knows the best of them and its patience.

    Args:
        setup: the run.
        recorder: takes what is measured.
        inner: the hooks that save and stop.

    Attributes:
        stopped_early_step: the step after which patience has ended the run; None: it has not.
        final_step: the step whose weights `load_best` has loaded; None: those of the last.
    """

    def __init__(self, setup: Setup, recorder: RunRecorder, inner: StepHooks) -> None:
        self.stopped_early_step: int | None = None
        self.final_step: int | None = None
        self._setup, self._recorder, self._inner = setup, recorder, inner
        self._options = setup.config.evaluation
        self._evaluations: list[Evaluation] = []
        self._first_answers: dict[int, str] = {}
        if setup.resume is not None:
            self._evaluations = read_evaluations(setup.resume.metrics_path)
            if (path := setup.resume.samples_path) is not None:
                self._first_answers = {s.sample: s.first_answer for s in read_samples(path)}

    def before_first_step(self, step: int, state: RunState) -> None:
        """Evaluate what the run begins with, unless its checkpoint has that already."""
        self._inner.before_first_step(step, state)
        if all(evaluation.step != step for evaluation in self._evaluations):
            self._evaluate_if_due(step, state)
        self._stop_if_patience_is_over(step)

    @property
    def is_over(self) -> bool:
        """Whether patience is over."""
        return self.stopped_early_step is not None

    def should_stop(self) -> bool:
        """Return whether patience is over, or the run is asked to stop."""
        return self.is_over or self._inner.should_stop()

    def after_step(self, step: int, state: RunState) -> None:
        """Evaluate if that is due; then save if that is."""
        self._evaluate_if_due(step, state)
        self._stop_if_patience_is_over(step)
        self._inner.after_step(step, state)

    def after_stop(self, step: int, state: RunState) -> None:
        """Leave a run that patience has ended as one that is finished."""
        if not self.is_over:
            self._inner.after_stop(step, state)
            return
        check_before_saving(self._setup, state.shards(), "the model after the last step")
        self._say(
            f"Ended early after step {step} of {self._setup.schedule.num_steps}: no lower "
            f"eval_loss in {self._options.early_stopping_patience} evaluations"
        )

    def load_best(self, state: RunState) -> None:
        """Give the model the weights of the best checkpoint, if the run asks for it.

        **Collective:** every rank must call, when no save is under way.

        Raises:
            CheckpointError: on every rank, if the checkpoint cannot be read.
        """
        if not self._options.load_best_model_at_end:
            return
        found = broadcast_from_rank0(self._find_best_checkpoint)
        if found is None:
            self._say("no checkpoint has an eval_loss: the final model is that of the last step")
            return
        best, folder = found
        PROGRESS.begin(f"loading {folder.name}")
        raise_on_all_ranks(lambda: state.restore_weights(folder))
        self.final_step = best.step
        self._say(
            f"final model: {CHECKPOINT_PREFIX}{best.step}, whose eval_loss {best.eval_loss:.4f} is "
            "the lowest of the checkpoints"
        )

    def as_record(self) -> dict[str, Any] | None:
        """Return what `run.json` holds of it; None for a run without evaluation."""
        if self._setup.held_out is None or not self._evaluations:
            return None
        examples, best = self._setup.held_out.examples, find_best(self._evaluations)
        return {
            "examples": len(examples),
            "sha256": examples.checksum(),
            "first": self._evaluations[0].as_record(),
            "last": self._evaluations[-1].as_record(),
            "best": None if best is None else best.as_record(),
            "stopped_early_at_step": self.stopped_early_step,
            "final_model_step": self.final_step or self._evaluations[-1].step,
        }

    @property
    def _held_out(self) -> HeldOut:
        assert self._setup.held_out is not None, "the run is evaluated"
        return self._setup.held_out

    def _evaluate_if_due(self, step: int, state: RunState) -> None:
        schedule = self._setup.schedule
        if self._options.is_due(
            step,
            num_steps=schedule.num_steps,
            steps_per_epoch=schedule.steps_per_epoch,
            logging_steps=self._setup.config.logging_steps,
        ):
            with PROGRESS.within("evaluating"), undisturbed(state.model):
                self._evaluate(step, state)

    def _evaluate(self, step: int, state: RunState) -> None:
        setup = self._setup
        logits_map = setup.probe.logits_map
        evaluation = evaluate_loss(state.model, self._held_out, setup.device, logits_map, step=step)
        self._evaluations.append(evaluation)
        self._recorder.record_evaluation(evaluation)
        if not math.isfinite(evaluation.eval_loss) and stops(setup):
            raise NonFiniteError(
                f"eval_loss after step {step} is {evaluation.eval_loss}, wanted is a finite "
                "number: the model gives no finite logits for the held-out examples."
            )
        if self._options.predict_samples:
            self._recorder.record_samples(self._answer(step, state))

    def _answer(self, step: int, state: RunState) -> list[Sample]:
        setup, tokenizer = self._setup, self._setup.tokenizer
        assert tokenizer is not None and setup.answer_end is not None, "checked by the setup"
        prompts = take_prompts(self._held_out.examples, self._options.predict_samples)
        end = setup.answer_end
        ends = end.saved_ends or (() if end.tokenizer_end is None else (end.tokenizer_end,))
        answers = answer_prompts(
            state.model,
            prompts,
            self._held_out,
            setup.device,
            ends=ends,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        samples = []
        for number, (prompt, tokens) in enumerate(zip(prompts, answers, strict=True), start=1):
            answer = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
            expected = str(tokenizer.decode(prompt.expected, skip_special_tokens=True)).strip()
            first = self._first_answers.setdefault(number, answer)
            text = str(tokenizer.decode(prompt.tokens))
            samples.append(Sample(step, number, text, expected, first, answer))
        return samples

    def _stop_if_patience_is_over(self, step: int) -> None:
        """End the run, on all ranks if on one, unless it ends with this step anyway."""
        patience = self._options.early_stopping_patience
        if patience is None or step >= self._setup.schedule.num_steps:
            return
        if max_over_ranks(int(count_without_lower(self._evaluations) >= patience)):
            self.stopped_early_step = step

    def _find_best_checkpoint(self) -> tuple[Evaluation, Path] | None:
        folders = dict(find_checkpoints(self._recorder.output_dir))
        if (resume := self._setup.resume) is not None:
            earlier = find_checkpoints(resume.folder.parent)
            folders = {step: path for step, path in earlier if step <= resume.step} | folders
        best = find_best(self._evaluations, folders)
        return None if best is None else (best, folders[best.step])

    def _say(self, line: str) -> None:
        self._setup.console.print(line, markup=False, soft_wrap=True)
