"""A shell script that a person starts on every node: for torchrun or accelerate launch."""

from megablocks_utils.planning.launcher.launch_job import LaunchJob

__all__ = ["write_shell_script"]

_HEAD = ': "${HEAD_NODE:?must be the name of the first node, the same on all}"'
_RANK = ': "${NODE_RANK:?must be 0 on the first node, 1 on the next, ...}"'


def write_shell_script(job: LaunchJob) -> str:
    """Return the script."""
    variables = [] if job.nodes == 1 else ["HEAD_NODE=node0"]
    checks = [] if job.nodes == 1 else [_HEAD]
    if job.nodes > 1 and job.entry_point == "fsdp1":
        variables.append("NODE_RANK=0")
        checks.append(_RANK)
    where = "in the project's folder" if job.nodes == 1 else f"on each of {job.nodes} nodes"
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# Start it {where}: {' '.join([*variables, 'bash', 'THIS_FILE'])}",
            "set -eu",
            *checks,
            f"exec {job.command()}",
            "",
        ]
    )
