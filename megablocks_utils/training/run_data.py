"""Load the data of a run, for the model that is trained on it."""

from dataclasses import dataclass
from datetime import date
from functools import partial

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megablocks_utils.config import RunConfig
from megablocks_utils.moe.model_facts import vocab_size
from megablocks_utils.processes.agreement import broadcast_from_rank0, raise_on_all_ranks
from megablocks_utils.processes.launch import LaunchEnvironment
from megablocks_utils.training.data.answer_end import AnswerEnd, find_answer_end
from megablocks_utils.training.data.batches import Packing
from megablocks_utils.training.data.example_stream import (
    ExampleStream,
    StreamPosition,
    StreamReader,
)
from megablocks_utils.training.data.examples import TokenizedExamples, load_examples
from megablocks_utils.training.data.schedule import Schedule
from megablocks_utils.training.data.source_tokens import Tokenizing
from megablocks_utils.training.data.sources import DatasetPart
from megablocks_utils.training.data.streamed_schedule import StreamedSchedule
from megablocks_utils.training.data.training_templates import choose_chat_template
from megablocks_utils.training.report.progress import track_tokenizing
from megablocks_utils.training.resume.resume_point import ResumePoint, choose_template_date

__all__ = ["RunData", "let_generation_stop", "load_run_data"]


@dataclass(frozen=True)
class RunData:
    """Hold the data of a run.

    Attributes:
        examples: all of them, or the first ones of a stream.
        stream: where they are read while training; None where all are there.
    """

    examples: TokenizedExamples
    stream: ExampleStream | None = None

    def build_schedule(
        self,
        config: RunConfig,
        launch: LaunchEnvironment,
        packing: Packing,
        resume: ResumePoint | None,
    ) -> Schedule:
        """Return which examples each step holds."""
        base = (config, self.examples, launch.rank, launch.world_size, packing)
        if self.stream is None:
            return Schedule(*base)
        step, place = (0, None) if resume is None else (resume.step, resume.stream_position)
        size = config.count_global_batch(launch.world_size)
        reader = StreamReader(self.stream, size, step, StreamPosition(**(place or {})))
        return StreamedSchedule(*base, reader=reader)


def load_run_data(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    launch: LaunchEnvironment,
    resume: ResumePoint | None,
    *,
    console: Console,
) -> RunData:
    """Read and tokenize the examples of a run, and say what the user should know of them.

    **Collective:** every rank must call.

    Raises:
        UserError: on every rank, for data that cannot be used.
    """
    if config.data.streaming:
        return _open_stream(config, tokenizer, model, resume)
    examples = load_examples(
        config.data,
        tokenizer,
        launch,
        today=choose_template_date(resume),
        track=partial(track_tokenizing, console),
    )
    raise_on_all_ranks(lambda: examples.check_vocabulary(vocab_size(model)))
    for note in examples.notes:
        console.print(note, markup=False, soft_wrap=True)
    return RunData(examples)


def _open_stream(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    resume: ResumePoint | None,
) -> RunData:
    data = config.data
    template = raise_on_all_ranks(lambda: choose_chat_template(data.chat_template, tokenizer))
    today = choose_template_date(resume) or date.today()
    part = DatasetPart(data.dataset_config, data.dataset_split, is_streamed=True)
    how = Tokenizing(tokenizer, today, data.max_seq_length, part)
    stream = ExampleStream(data, config.seed, how, template, vocab_size(model))
    with template.in_use():  # also where nothing is read, so that all ranks save the same one
        return RunData(broadcast_from_rank0(stream.read_head), stream)


def let_generation_stop(
    config: RunConfig,
    examples: TokenizedExamples,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
) -> AnswerEnd | None:
    """Let the generation config, which is saved with the model, stop at what is learned."""
    generation_config = getattr(model, "generation_config", None)
    limit = config.data.max_seq_length
    end = find_answer_end(examples, tokenizer, generation_config, max_seq_length=limit)
    if end is not None:
        end.apply_to(generation_config)
    return end
