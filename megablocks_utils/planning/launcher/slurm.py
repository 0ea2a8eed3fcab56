"""A batch script for SLURM: one launcher a node, time to save before the limit, requeue.

Shortly before the job's time is up SLURM signals the batch shell alone (`--signal=B:USR1@...`). It
passes SIGTERM on to the launchers, which torchrun and `accelerate launch` both hand to their ranks;
these save the last whole step and end. Then the job requeues itself and resumes.
"""

from megablocks_utils.planning.launcher.launch_job import LaunchJob

__all__ = ["write_slurm_script"]

_NOTICE_S = 300
_SHUTDOWN_S = 240  # a launcher's patience after SIGTERM, within the notice

_SCRIPT = """\
#!/usr/bin/env bash
# Submit it in the project's folder, which all nodes see: sbatch THIS_FILE
# Add what your site asks for, such as --partition and --account.
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@{notice}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={name}-%j.log
set -u
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD_NODE TORCH_ELASTIC_SHUTDOWN_TIMEOUT={shutdown}

start_node() {{ # exec, so that signals reach the launcher
  export NODE_RANK=$SLURM_NODEID
  exec {command}
}}
export -f start_node

is_time_up=""
stop() {{ # SLURM says that the time is nearly up: the ranks save and end
  is_time_up=yes
  scancel --signal=TERM "$SLURM_JOB_ID"
}}
trap stop USR1

# Not --kill-on-bad-exit: the other nodes may still write their part of the last checkpoint.
srun --kill-on-bad-exit=0 bash -c start_node &
step=$!
code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # a signal ends a wait
  code=0
  wait "$step" || code=$?
done
if [ -n "$is_time_up" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


def write_slurm_script(job: LaunchJob) -> str:
    """Return the batch script."""
    return _SCRIPT.format(
        name=job.name,
        nodes=job.nodes,
        gpus=job.gpus_per_node,
        notice=_NOTICE_S,
        shutdown=_SHUTDOWN_S,
        command=job.command("  "),
    )
