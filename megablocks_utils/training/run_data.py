"""Load the data of a run, for the model that is trained on it."""

from datetime import date
from functools import partial

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megablocks_utils.config import RunConfig
from megablocks_utils.moe.model_facts import vocab_size
from megablocks_utils.processes.agreement import broadcast_from_rank0, raise_on_all_ranks
from megablocks_utils.processes.launch import LaunchEnvironment
from megablocks_utils.training.data.answer_end import AnswerEnd, find_answer_end
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
from megablocks_utils.training.evaluation.held_out_data import choose_held_out
from megablocks_utils.training.report.progress import track_tokenizing
from megablocks_utils.training.resume.resume_point import ResumePoint, choose_template_date
from megablocks_utils.training.step.packing_probe import PackingChoice

__all__ = ["build_schedule", "let_generation_stop", "load_all_data"]


def load_all_data(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    launch: LaunchEnvironment,
    resume: ResumePoint | None,
    *,
    console: Console,
) -> tuple[TokenizedExamples, TokenizedExamples | None]:
    """Return the examples to train on, and those held out; None for a run without evaluation.

    **Collective:** every rank must call.

    Raises:
        UserError: on every rank, for data that cannot be used.
    """
    load = partial(_load_run_data, tokenizer=tokenizer, model=model, launch=launch)
    return choose_held_out(config, partial(load, resume=resume, console=console))


def _load_run_data(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    launch: LaunchEnvironment,
    resume: ResumePoint | None,
    *,
    console: Console,
) -> TokenizedExamples:
    """Read and tokenize the examples of a run, and say what the user should know of them.

    **Collective:** every rank must call.

    Raises:
        UserError: on every rank, for data that cannot be used.
    """
    today = choose_template_date(resume)
    if config.data.streaming:
        stream = _open_stream(config, tokenizer, model, today or date.today())
        with stream.template.in_use():  # on every rank, so that all are left with the same one
            return broadcast_from_rank0(stream.read_head)
    examples = load_examples(
        config.data,
        tokenizer,
        launch,
        today=today,
        track=partial(track_tokenizing, console),
    )
    raise_on_all_ranks(lambda: examples.check_vocabulary(vocab_size(model)))
    for note in examples.notes:
        console.print(note, markup=False, soft_wrap=True)
    return examples


def _open_stream(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    today: date,
) -> ExampleStream:
    data = config.data
    template = raise_on_all_ranks(lambda: choose_chat_template(data.chat_template, tokenizer))
    part = DatasetPart(data.dataset_config, data.dataset_split, is_streamed=True)
    how = Tokenizing(tokenizer, today, data.max_seq_length, part)
    return ExampleStream(data, config.seed, how, template, vocab_size(model))


def build_schedule(
    config: RunConfig,
    examples: TokenizedExamples,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    launch: LaunchEnvironment,
    choice: PackingChoice,
    resume: ResumePoint | None,
) -> Schedule:
    """Return which examples each step holds; a stream continues where its checkpoint ends.

    **Collective:** every rank must call.
    """
    base = (config, examples, launch.rank, launch.world_size, choice.packing)
    if not config.data.streaming:
        return Schedule(*base)
    day = examples.template_date
    today = date.today() if day is None else date.fromisoformat(day)
    stream = _open_stream(config, tokenizer, model, today)
    step, place = (0, None) if resume is None else (resume.step, resume.stream_position)
    size = config.count_global_batch(launch.world_size)
    reader = StreamReader(stream, size, step, StreamPosition(**(place or {})))
    return StreamedSchedule(*base, reader=reader)


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
