"""What a run is made of: its model and its data, the same on every rank."""

from functools import partial
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megablocks_utils.checkpoint.fingerprint import fingerprint_model_folder
from megablocks_utils.config import ResolvedPrecision, RunConfig, check_world
from megablocks_utils.processes.agreement import raise_on_all_ranks
from megablocks_utils.processes.launch import LaunchEnvironment
from megablocks_utils.training.data.answer_end import AnswerEnd, find_answer_end
from megablocks_utils.training.data.examples import TokenizedExamples, load_examples
from megablocks_utils.training.model_source import ModelSource
from megablocks_utils.training.resume.resume_point import ResumePoint, choose_template_date
from megablocks_utils.training.same_run import (
    ADAPTER_FILES,
    Input,
    check_same_inputs,
    fingerprint_files,
)

__all__ = ["compare_inputs", "let_generation_stop", "load_data", "open_source"]


def open_source(
    config: RunConfig,
    folder: Path,
    precision: ResolvedPrecision,
    world_size: int,
    console: Console,
) -> ModelSource:
    """Open the model, check its experts against the ranks, and say which tensors nobody reads.

    **Collective:** every rank must call.
    """
    source = raise_on_all_ranks(lambda: ModelSource(folder, config, precision))
    check_world(config, world_size, source.num_experts)
    if names := source.ignored:
        line = f"{folder}: {names[0]} ({len(names)} in all) has no use, in transformers neither"
        console.print(line, markup=False)
    return source


def load_data(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    launch: LaunchEnvironment,
    resume: ResumePoint | None,
    *,
    console: Console,
) -> TokenizedExamples:
    """Load the examples, check them against the model, and say where they are kept if that is odd.

    **Collective:** every rank must call.
    """
    today = choose_template_date(resume)
    examples = load_examples(config.data, tokenizer, launch, today=today)
    raise_on_all_ranks(lambda: examples.check_vocabulary(model.config.vocab_size))
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


def compare_inputs(config: RunConfig, folder: Path, examples: TokenizedExamples) -> str:
    """Refuse ranks that read something else; return the fingerprint of the model.

    **Collective:** every rank must call.
    """
    inputs = [
        Input("data", "data_path", config.data.data_path, examples.checksum),
        Input(
            "model",
            "model_name_or_path",
            config.model.model_name_or_path,
            partial(fingerprint_model_folder, folder),
        ),
    ]
    if (adapter := config.adapter.resume_adapter) is not None:
        fingerprint = partial(fingerprint_files, Path(adapter), ADAPTER_FILES)
        inputs.append(Input("adapter", "resume_adapter", adapter, fingerprint))
    return check_same_inputs(inputs)["model_name_or_path"]
