"""A TrainJob for Kubeflow Trainer v2 (`trainer.kubeflow.org/v1alpha1`, as of version 2.2).

Its runtime `torch-distributed` gives every pod its place in PET_* variables, which torchrun takes
for its options.
"""

from dataclasses import replace

from megablocks_utils.planning.launcher.launch_job import LaunchJob

__all__ = ["write_train_job"]

_JOB = """\
# An image whose working directory is the project's folder, with requirements.txt installed, and a
# volume that all pods may write to (ReadWriteMany) are yours to name: kubectl create -f THIS_FILE
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
metadata:
  name: {name}
spec:
  runtimeRef:
    name: torch-distributed
  trainer:
    image: registry.example.com/megablocks-utils:latest
    numNodes: {nodes}
    numProcPerNode: {gpus}
    resourcesPerNode:
      limits:
        nvidia.com/gpu: {gpus}
    command:
      - bash
      - -c
      - |
        export HEAD_NODE=$PET_MASTER_ADDR NODE_RANK=$PET_NODE_RANK
        exec {command}
  runtimePatches:
    - manager: {name}
      trainingRuntimeSpec:
        template:
          spec:
            replicatedJobs:
              - name: node
                template:
                  spec:
                    template:
                      spec:
                        volumes:
                          - name: outputs
                            persistentVolumeClaim:
                              claimName: {name}-outputs
                          - name: shared-memory # NCCL's; a container has 64 MB otherwise
                            emptyDir:
                              medium: Memory
                        containers:
                          - name: node
                            volumeMounts:
                              - name: outputs
                                mountPath: {mount}
                              - name: shared-memory
                                mountPath: /dev/shm
"""


def write_train_job(job: LaunchJob) -> str:
    """Return the TrainJob."""
    job = job.on_shared_volume()
    if job.entry_point == "fsdp2":
        job = replace(job, head=("torchrun", job.head[-1]))
    return _JOB.format(
        name=job.name,
        nodes=job.nodes,
        gpus=job.gpus_per_node,
        mount=job.mount,
        command=job.command("        "),
    )
