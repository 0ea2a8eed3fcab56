"""Load the data of a run, for the model that is trained on it."""

from functools import partial

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megablocks_utils.config import RunConfig
from megablocks_utils.moe.model_facts import vocab_size
from megablocks_utils.processes.agreement import raise_on_all_ranks
from megablocks_utils.processes.launch import LaunchEnvironment
from megablocks_utils.training.data.answer_end import AnswerEnd, find_answer_end
from megablocks_utils.training.data.examples import TokenizedExamples, load_examples
from megablocks_utils.training.report.progress import track_tokenizing
from megablocks_utils.training.resume.resume_point import ResumePoint, choose_template_date

__all__ = ["let_generation_stop", "load_run_data"]


def load_run_data(
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
    return examples


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
