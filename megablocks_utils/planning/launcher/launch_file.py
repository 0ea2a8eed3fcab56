"""`plan --launcher`: the chosen layout as a file that a scheduler or a person starts."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from megablocks_utils.planning.launcher.by_hand import write_shell_script
from megablocks_utils.planning.launcher.kubeflow import write_train_job
from megablocks_utils.planning.launcher.launch_job import LaunchJob
from megablocks_utils.planning.launcher.skypilot import write_skypilot_task
from megablocks_utils.planning.launcher.slurm import write_slurm_script
from megablocks_utils.planning.model.gpus import Gpu
from megablocks_utils.planning.model.prediction import ParallelLayout
from megablocks_utils.planning.speed.launch_lines import build_head, list_run_options
from megablocks_utils.planning.speed.layout_plan import PlanRequest

__all__ = ["LAUNCHERS", "build_launch_file"]

LAUNCHERS: Mapping[str, Callable[[LaunchJob], str]] = MappingProxyType(
    {
        "torchrun": write_shell_script,
        "accelerate": write_shell_script,
        "slurm": write_slurm_script,
        "skypilot": write_skypilot_task,
        "kubeflow": write_train_job,
    }
)
"""What `--launcher` names."""


def build_launch_file(
    launcher: str, request: PlanRequest, layout: ParallelLayout, gpu: Gpu | None
) -> str:
    """Return the text of the file that starts a run in this layout.

    Args:
        launcher: a key of `LAUNCHERS`.
        request: what was planned.
        layout: how the experts are spread.
        gpu: kind of the GPUs; None where only their memory was given.

    Raises:
        ConfigurationError: the launcher needs to know what was not given.
    """
    config, gpus = request.scenario.config, request.scenario.world_size
    nodes = max(1, gpus // request.cluster.gpus_per_node)
    job = LaunchJob(
        model=request.launch_model,
        entry_point=config.entry_point,
        head=tuple(build_head(config.entry_point, gpus, nodes)),
        options=tuple(
            list_run_options(request.launch_model, layout, config.entry_point, request.words)
        ),
        output_dir=config.output_dir,
        nodes=nodes,
        gpus_per_node=gpus // nodes,
        gpu=gpu,
    )
    return LAUNCHERS[launcher](job)
