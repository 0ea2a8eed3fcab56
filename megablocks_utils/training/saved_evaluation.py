"""Measure a saved model, adapter or checkpoint with its weights spread over the ranks."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megablocks_utils.checkpoint.run_manifest import adapters_of, read_run_manifest
from megablocks_utils.config import RunConfig
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.export import ExportOptions, export_checkpoint
from megablocks_utils.merge import MergeOptions, merge_adapter
from megablocks_utils.processes.agreement import gather_from_all_ranks
from megablocks_utils.processes.launch import LaunchEnvironment
from megablocks_utils.processes.output_folder import MANIFEST_NAME, follow_pointer
from megablocks_utils.processes.start import start_run
from megablocks_utils.training.data.alpaca import alpaca_prompt
from megablocks_utils.training.evaluation.greedy_answers import Prompt, answer_prompts
from megablocks_utils.training.evaluation.held_out_data import share_held_out
from megablocks_utils.training.evaluation.held_out_loss import evaluate_loss
from megablocks_utils.training.evaluation.undisturbed import undisturbed
from megablocks_utils.training.loop import build_training_state
from megablocks_utils.training.setup import Setup, build_setup

__all__ = ["evaluate_sharded", "unpacked"]


@contextmanager
def unpacked(model_path: str, adapter: str | None) -> Iterator[tuple[str, str | None]]:
    """Yield a model and an adapter that transformers and PEFT load; a checkpoint is exported.

    It is written to a temporary folder, which needs room for it.

    Args:
        model_path: Hub name, local folder, or checkpoint of a run.
        adapter: over the model; None: none.

    Raises:
        ConfigurationError: an adapter is given beside a checkpoint of a LoRA run.
        CheckpointError: a checkpoint that is damaged.
    """
    folder = follow_pointer(Path(model_path))
    if not (folder / MANIFEST_NAME).is_file():
        yield model_path, adapter
        return
    manifest = read_run_manifest(folder)
    with TemporaryDirectory() as work:
        output = Path(work) / "exported"
        if adapters_of(manifest) is None:
            export_checkpoint(ExportOptions(output, folder))
            yield str(output), adapter
            return
        if adapter is not None:
            raise ConfigurationError(
                f"--adapter is {adapter}, but {model_path} is a checkpoint of a LoRA run, with an "
                "adapter of its own: leave it out."
            )
        export_checkpoint(ExportOptions(output, folder))
        yield manifest["options"]["model"]["model_name_or_path"], str(output)


def evaluate_sharded(
    config: RunConfig,
    launch: LaunchEnvironment,
    adapter: str | None,
    questions: Sequence[str],
    max_new_tokens: int,
) -> dict[str, Any]:
    """Return `loss`, `label_tokens`, `examples` and `answers` of a model, the same on every rank.

    **Collective:** every rank of the world must call.

    Args:
        config: model, data and ranks of a run of the FSDP2 script.
        launch: which process this is.
        adapter: is merged into the model first; None: none.
        questions: instructions that are answered greedily.
        max_new_tokens: of each answer at most.

    Raises:
        UserError: on every rank, for what the user can mend.
    """
    device = start_run(config, launch)
    with _whole_model(config.model.model_name_or_path, adapter, launch) as name:
        model = replace(config.model, model_name_or_path=name)
        setup = build_setup(replace(config, model=model), launch, device)
        state = build_training_state(setup)
        schedule = setup.schedule
        held_out = share_held_out(schedule, schedule.examples, setup.console, setup.tokenizer)
        assert held_out is not None, "there are examples"
        prompts = _read_prompts(setup, questions)
        with undisturbed(state.model):
            found = evaluate_loss(state.model, held_out, device, setup.probe.logits_map, step=0)
            tokens = answer_prompts(
                state.model,
                prompts,
                held_out,
                device,
                ends=_list_ends(setup),
                max_new_tokens=max_new_tokens,
            )
    decode = None if setup.tokenizer is None else setup.tokenizer.decode
    answers = {
        question: str(decode(answer, skip_special_tokens=True)).strip()
        for question, answer in zip(questions, tokens, strict=True)
        if decode is not None
    }
    return {
        "loss": found.eval_loss,
        "label_tokens": found.eval_tokens,
        "examples": len(held_out.examples),
        "answers": answers,
    }


@contextmanager
def _whole_model(model_path: str, adapter: str | None, launch: LaunchEnvironment) -> Iterator[str]:
    """Yield where this rank reads a model without adapters; one rank of each machine makes it.

    **Collective:** every rank must enter and leave.
    """
    host = socket.gethostname()
    with ExitStack() as made:

        def make() -> tuple[str, str]:
            return host, made.enter_context(_merged(model_path, adapter))

        first = launch.local_rank == 0
        found = gather_from_all_ranks(lambda: make() if first else None)
        folders = dict(item for item in found if item is not None)
        yield folders.get(host, model_path)
        gather_from_all_ranks(lambda: None)  # before the folder is removed


@contextmanager
def _merged(model_path: str, adapter: str | None) -> Iterator[str]:
    """Yield a model that holds what an adapter adds, in fp32; made in a temporary folder."""
    with unpacked(model_path, adapter) as (model, over), TemporaryDirectory() as work:
        if over is None:
            yield model
            return
        output = Path(work) / "merged"
        merge_adapter(MergeOptions(over, output, model, "float32"))
        yield str(output)


def _read_prompts(setup: Setup, questions: Sequence[str]) -> list[Prompt]:
    tokenizer = setup.tokenizer
    if not questions:
        return []
    if tokenizer is None:
        raise ConfigurationError(f"--ask is given, but {setup.model_folder} has no tokenizer.")
    return [Prompt(list(tokenizer(alpaca_prompt(q))["input_ids"]), []) for q in questions]


def _list_ends(setup: Setup) -> set[int]:
    """Return the tokens at which the model's own generation stops."""
    ends = getattr(getattr(setup.model, "generation_config", None), "eos_token_id", None)
    listed = ends if isinstance(ends, list | tuple) else [ends]
    return {end for end in listed if isinstance(end, int)}
