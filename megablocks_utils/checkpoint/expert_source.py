"""Take this rank's part of experts out of a model, or out of a checkpoint."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from megablocks_utils.checkpoint.index import open_checkpoint, resolve_checkpoint_folder
from megablocks_utils.checkpoint.layouts import ModelLayout
from megablocks_utils.checkpoint.slices import SliceReader
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.mesh.placement import (
    DimSplit,
    distribute_experts,
    local_blocks,
    local_tensor,
    wrap_local_experts,
)
from megablocks_utils.moe.expert_spec import ExpertSpec

__all__ = ["ExpertSource"]


class ExpertSource:
    """Where the experts' weights come from: the model itself, or slices of a checkpoint."""

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: str | Path | None,
        mesh: DeviceMesh,
        device: torch.device,
    ) -> None:
        """Open the checkpoint, if there is one.

        Args:
            model: whose experts they are.
            checkpoint: folder or Hub name; None takes what the model has.
            mesh: of the experts.
            device: where the parts go.
        """
        self.reader: SliceReader | None = None
        if checkpoint is not None:
            folder = resolve_checkpoint_folder(str(checkpoint))
            # Rounded once, to the dtype of each parameter, as transformers does it.
            index = open_checkpoint(folder, dtype=torch.float32)
            self.reader = SliceReader(index, ModelLayout(model, index))
        self.mesh = mesh
        self.device = device

    def take(self, name: str, module: nn.Module, spec: ExpertSpec) -> dict[str, DTensor]:
        """Return the DTensors of one experts module, this rank's part on its device."""
        weights = {}
        for parameter_name in spec.parameter_names:
            whole = module.get_parameter(parameter_name).detach()[: spec.num_experts]
            split = spec.find_split(parameter_name)
            if self.reader is None:
                weights[parameter_name] = self._split(whole, split, name)
            else:
                weights[parameter_name] = self._read(whole, split, f"{name}.{parameter_name}")
        return weights

    def _read(self, whole: Tensor, split: DimSplit | None, name: str) -> DTensor:
        """Read this rank's part of a parameter, `whole` but for its values."""
        assert self.reader is not None
        planned = distribute_experts(whole.to("meta"), self.mesh, split)
        local = torch.empty_like(local_tensor(planned), device=self.device)
        for block in local_blocks(planned):
            self.reader.fill_local(name, block.of(local), block.offsets)
        return wrap_local_experts(local, self.mesh, split)

    def _split(self, weights: Tensor, split: DimSplit | None, name: str) -> DTensor:
        if weights.is_meta:
            raise ConfigurationError(
                f"{name} has no weights (it is on the meta device); pass checkpoint_name_or_path.",
                parameters=("checkpoint_name_or_path",),
            )
        local = distribute_experts(weights, self.mesh, split).to_local()
        return wrap_local_experts(local.to(self.device), self.mesh, split)
