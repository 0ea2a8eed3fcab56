"""A task for SkyPilot, which rents the nodes; as a managed job it is started again after a loss."""

from collections.abc import Mapping
from types import MappingProxyType

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.planning.launcher.launch_job import LaunchJob

__all__ = ["write_skypilot_task"]

_ACCELERATORS: Mapping[str, str] = MappingProxyType(
    {
        "a100-40g": "A100",
        "a100-80g": "A100-80GB",
        "h100-80g": "H100",
        "h200-141g": "H200",
        "b200-180g": "B200",
        "l40s-48g": "L40S",
    }
)
"""SkyPilot's names (`sky show-gpus`)."""

_TASK = """\
# Managed, so that it is started again where a node is lost: sky jobs launch THIS_FILE
name: {name}
num_nodes: {nodes}
resources:
  accelerators: {accelerator}:{gpus}
workdir: .
volumes: # one that all nodes see (sky volumes apply); a bucket will not do: it renames no folders
  {mount}: {name}-outputs
setup: |
  python3 -m venv .venv
  .venv/bin/pip install --quiet -r requirements.txt
run: |
  source .venv/bin/activate
  export HEAD_NODE=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
  export NODE_RANK=$SKYPILOT_NODE_RANK
  {command}
"""


def write_skypilot_task(job: LaunchJob) -> str:
    """Return the task.

    Raises:
        ConfigurationError: the kind of GPU is not known.
    """
    if job.gpu is None:
        raise ConfigurationError(
            "--launcher is skypilot, which rents GPUs by their kind, but --gpu is not given."
        )
    accelerator = _ACCELERATORS[job.gpu.name]
    job = job.on_shared_volume()
    return _TASK.format(
        name=job.name,
        nodes=job.nodes,
        accelerator=accelerator,
        gpus=job.gpus_per_node,
        mount=job.mount,
        command=job.command("  "),
    )
