"""Fine-tune an MoE model with expert parallelism and FSDP1, in Hugging Face's Trainer.

    accelerate launch --num_processes 8 --config_file accelerate.yaml train_fsdp1.py \
        --use_megablocks_sharding True ...

`--help` lists this project's options; every other option of TrainingArguments passes through.
"""

import sys

from megablocks_utils.config import RunConfig, parse_known_args
from megablocks_utils.config.given import GivenOption
from megablocks_utils.processes.accelerate_settings import check_accelerate_settings
from megablocks_utils.processes.early_signals import remember_early_signals
from megablocks_utils.processes.entry_point import run_entry_point
from megablocks_utils.processes.finished_run import is_finished_run
from megablocks_utils.processes.launch import LaunchEnvironment, check_environment
from megablocks_utils.processes.output_folder import check_output_dir


def main(argv: list[str]) -> None:
    """Check the options before anything is loaded, then train."""
    config, leftovers = parse_known_args(argv, entry_point="fsdp1")
    launch = check_environment(config)
    check_accelerate_settings(config)
    if not is_finished_run(config):
        check_output_dir(config)
    remember_early_signals()
    train(config, launch, leftovers)


def train(config: RunConfig, launch: LaunchEnvironment, leftovers: tuple[GivenOption, ...]) -> None:
    """Build, fit, report."""
    from megablocks_utils.processes.start import start_run
    from megablocks_utils.training.trainer_arguments import (
        build_trainer_arguments,
        parse_trainer_flags,
    )

    flags = parse_trainer_flags(leftovers)
    # Before what takes long to import: hosts that differ learn of it at once.
    device = start_run(config, launch, leftovers)

    from megablocks_utils.fsdp.fsdp1 import full_parameters
    from megablocks_utils.training.checkpointer import Checkpointer
    from megablocks_utils.training.evaluation_hooks import EvaluationHooks
    from megablocks_utils.training.recorder import RunRecorder
    from megablocks_utils.training.resume.already_done import is_already_done
    from megablocks_utils.training.setup import build_setup
    from megablocks_utils.training.trainer import MoETrainer

    if is_already_done(config, launch):
        return
    arguments = build_trainer_arguments(flags, config, device.type)
    setup = build_setup(config, launch, device)
    recorder = RunRecorder(setup)
    checkpointer = Checkpointer(setup, recorder.metrics_path)
    hooks = EvaluationHooks(setup, recorder, checkpointer)
    trainer = MoETrainer(setup, arguments, on_step=recorder.record, hooks=hooks)
    with recorder:
        with checkpointer:
            trainer.train()
        if checkpointer.is_interrupted:
            return
        state = trainer.run_state()
        hooks.load_best(state)
        tensors = full_parameters(state.model, only_trainable=config.adapter.has_lora)
        recorder.finish(state, tensors, trainer.kernel_check, hooks.as_record())


if __name__ == "__main__":
    run_entry_point(main, sys.argv[1:])
