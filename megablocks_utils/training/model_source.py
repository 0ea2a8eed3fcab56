"""A checkpoint that has been checked, and the model without weights that it will fill."""

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from megablocks_utils.checkpoint.distributed_checkpoint import MODEL_PREFIX, read_stored_tensors
from megablocks_utils.checkpoint.index import CheckpointIndex, open_checkpoint
from megablocks_utils.checkpoint.json_file import read_settings
from megablocks_utils.checkpoint.layouts import ModelLayout
from megablocks_utils.checkpoint.load import build_model_on_meta, fill_buffers
from megablocks_utils.checkpoint.model_check import check_against_model
from megablocks_utils.checkpoint.slices import SliceReader
from megablocks_utils.checkpoint.stored_parts import find_kept_bits, read_stored_bits
from megablocks_utils.config import ResolvedPrecision, RunConfig
from megablocks_utils.config.model_sizes import check_model_sizes
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.files import MODEL_CONFIG_NAME
from megablocks_utils.fsdp.materialize import FillLocal
from megablocks_utils.moe.expert_spec import find_expert_modules
from megablocks_utils.moe.sharded_moe import ShardedMoE
from megablocks_utils.shard_moe_utils import require_experts, split_experts_on_meta
from megablocks_utils.training.step.kept_parameters import cast_parameters

__all__ = ["ModelSource", "build_bare_model", "split_experts"]


class ModelSource:
    """A checked checkpoint and the model that it will fill.

    Attributes:
        expert_specs: what the experts of each MoE layer are, by the name of their module.
        notes: what a user should know of how the checkpoint is read, one line each.
    """

    def __init__(self, folder: Path, config: RunConfig, precision: ResolvedPrecision) -> None:
        layers = config.model.truncate_layers
        self.folder = folder
        dtype = getattr(torch, precision.weights)
        compute = getattr(torch, precision.compute)
        self.model = build_bare_model(folder, dtype, compute, truncate_layers=layers)
        if layers is not None:
            _refuse_no_moe_layer(self.model, layers)
        self.expert_specs = require_experts(self.model)
        self.index: CheckpointIndex = open_checkpoint(folder, dtype=dtype)
        layout = ModelLayout(self.model, self.index)
        ignored = check_against_model(self.model, self.index, layout, truncate_layers=layers)
        self.reader = SliceReader(self.index, layout)
        self.notes = [*self.index.notes, *self._note_kept_bits(config.adapter.packed_format)]
        if ignored:
            use = "copied into the saved model" if layers is None else "left out"
            count = f"{ignored[0]} ({len(ignored)} in all)"
            self.notes.append(f"{folder}: {count} is not trained; {use}")
        fill_buffers(self.model, self.reader)

    @property
    def num_experts(self) -> int:
        """Experts of a layer; of the first where layers differ."""
        return next(iter(self.expert_specs.values())).num_experts

    def _note_kept_bits(self, packed_format: str | None) -> list[str]:
        """Return the line that says which experts are not read as all else that is quantized."""
        if packed_format is None:
            return []
        num_all = sum(len(spec.projections) for spec in self.expert_specs.values())
        num_kept = len(find_kept_bits(self.reader, self.expert_specs, packed_format))
        if num_kept == 0:
            return []
        return [
            f"{self.folder}: {num_kept} of {num_all} projections of experts are not read so: they "
            f"keep their bits, which are {packed_format}"
        ]

    def keep_stored_bits(self, sharded: ShardedMoE | None) -> None:
        """Let experts keep the bits they are stored in, where that is how they will be packed."""
        for module in () if sharded is None else sharded.expert_modules.values():
            if module.weight_format is not None:
                module.read_stored = partial(
                    read_stored_bits,
                    self.reader,
                    format_name=module.weight_format,
                    is_transposed=module.spec.is_transposed,
                )

    def choose_fill(self, checkpoint: Path | None) -> FillLocal:
        """Return what fills parameters, as the model is now, with the values of the model's files.

        In a run that resumes, only those that are not trained and those of which the checkpoint
        holds fewer rows: experts that are never computed with, which a run with expert parallelism
        does not keep.

        Args:
            checkpoint: that the run resumes from; None for one from the start.

        Raises:
            CheckpointError: the checkpoint cannot be read.
        """
        if checkpoint is None:
            return self.reader.fill_local
        stored = read_stored_tensors(checkpoint)
        resumed = set()
        for name, parameter in self.model.named_parameters():
            shape, _ = stored.get(MODEL_PREFIX + name, (tuple(parameter.shape), None))
            has_more_rows = parameter.dim() > 0 and len(parameter) > shape[0]
            if parameter.requires_grad and not has_more_rows:
                resumed.add(name)

        def fill(name: str, local: Tensor, offsets: tuple[int, ...]) -> None:
            if name not in resumed:
                self.reader.fill_local(name, local, offsets)

        return fill


def _refuse_no_moe_layer(model: PreTrainedModel, num_layers: int) -> None:
    if not find_expert_modules(model):
        raise ConfigurationError(
            f"truncate_model_for_debug keeps the first {num_layers} layers, but none of these is an"
            " MoE layer in this model; it must be False.",
            parameters=("truncate_model_for_debug",),
        )


def build_bare_model(
    folder: Path,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    *,
    truncate_layers: int | None = None,
) -> PreTrainedModel:
    """Build the model of a folder on meta, in the dtypes that its weights will be kept in."""
    path = folder / MODEL_CONFIG_NAME
    check_model_sizes(read_settings(path, "model"), path)
    model = build_model_on_meta(folder, truncate_layers=truncate_layers, dtype=dtype)
    model.tie_weights()
    cast_parameters(model, dtype, compute_dtype)
    return model


def split_experts(
    model: PreTrainedModel,
    config: RunConfig,
    device: torch.device,
    compute_dtype: torch.dtype,
    tokens_per_rank: int,
) -> ShardedMoE | None:
    """Split the experts over the ranks with expert parallelism; they stay on meta.

    Experts with adapters, or packed, are this project's own also without expert parallelism (ep 1):
    PEFT's way through transformers' experts holds W + B A of all experts.

    **Collective:** as `split_experts_on_meta`.
    """
    has_ep, expert_dp = config.parallel.use_megablocks_sharding, config.parallel.expert_dp
    weight_format = config.adapter.packed_format
    if not has_ep and not config.adapter.trains_experts and weight_format is None:
        return None
    assert expert_dp is not None, "parsers fill it in"
    groups = config.parallel.dp_replicate_size
    expert_tp_size = config.parallel.expert_tp_size
    num_ranks = dist.get_world_size() // groups // expert_tp_size
    return split_experts_on_meta(
        model,
        (config.parallel.ep_size or num_ranks) if has_ep else 1,
        kernel=config.parallel.kernel,
        expert_dp=expert_dp,
        device_type=device.type,
        compute_dtype=compute_dtype,
        expert_mode=config.adapter.expert_mode,
        tokens_per_rank=tokens_per_rank,
        dp_replicate_size=groups,
        token_dispatch=config.parallel.token_dispatch,
        expert_tp_size=expert_tp_size,
        weight_format=weight_format,
    )
