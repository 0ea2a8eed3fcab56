"""Fine-tune an MoE model with expert parallelism and FSDP2, in a loop of our own on Accelerate.

    torchrun --nproc_per_node=8 train_accelerate_fsdp2.py --use_megablocks_sharding True ...

`--help` lists all options.
"""

import sys

from megablocks_utils.config import RunConfig, parse_args
from megablocks_utils.processes.accelerate_settings import check_accelerate_settings
from megablocks_utils.processes.early_signals import remember_early_signals
from megablocks_utils.processes.entry_point import run_entry_point
from megablocks_utils.processes.finished_run import is_finished_run
from megablocks_utils.processes.launch import LaunchEnvironment, check_environment
from megablocks_utils.processes.output_folder import check_output_dir


def main(argv: list[str]) -> None:
    """Check the options before torch is imported, then train."""
    config = parse_args(argv, entry_point="fsdp2")
    launch = check_environment(config)
    check_accelerate_settings(config)
    if not is_finished_run(config):
        check_output_dir(config)
    remember_early_signals()
    train(config, launch)


def train(config: RunConfig, launch: LaunchEnvironment) -> None:
    """Build, fit, report."""
    from megablocks_utils.processes.start import start_run

    # Before what takes long to import: hosts that differ learn of it at once.
    device = start_run(config, launch)

    from megablocks_utils.fsdp.fsdp2 import full_parameters
    from megablocks_utils.training.checkpointer import Checkpointer
    from megablocks_utils.training.evaluation_hooks import EvaluationHooks
    from megablocks_utils.training.loop import build_training_state, fit
    from megablocks_utils.training.recorder import RunRecorder
    from megablocks_utils.training.resume.already_done import is_already_done
    from megablocks_utils.training.setup import build_setup

    if is_already_done(config, launch):
        return
    setup = build_setup(config, launch, device)
    recorder = RunRecorder(setup)
    checkpointer = Checkpointer(setup, recorder.metrics_path)
    hooks = EvaluationHooks(setup, recorder, checkpointer)
    training = build_training_state(setup)
    with recorder:
        with checkpointer:
            for metrics in fit(training, setup, hooks):
                recorder.record(metrics)
        if checkpointer.is_interrupted:
            return
        state = training.run_state()
        hooks.load_best(state)
        tensors = full_parameters(state.model, only_trainable=config.adapter.has_lora)
        recorder.finish(state, tensors, training.kernel_check, hooks.as_record())


if __name__ == "__main__":
    run_entry_point(main, sys.argv[1:])
