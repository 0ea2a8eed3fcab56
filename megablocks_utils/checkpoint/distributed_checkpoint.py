"""Write and read the shards of all ranks with torch's distributed checkpoint (DCP)."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megablocks_utils.checkpoint.dcp_index import IndexReader, read_index, stored_tensors
from megablocks_utils.checkpoint.tensor_shards import Block, TensorShard
from megablocks_utils.errors import CheckpointError

__all__ = ["MODEL_PREFIX", "OPTIMIZER_PREFIX"]
__all__ += ["read_shards", "read_stored_tensors", "read_whole_tensor"]
__all__ += ["write_shards"]

# A weight x is stored as model.x, its states as optimizer.x.exp_avg, .exp_avg_sq and .step.
MODEL_PREFIX = "model."
OPTIMIZER_PREFIX = "optimizer."
_NUM_NAMED = 3
# Experts' weights or a state of them: what is before and behind the name of the projection.
_FIRST_PROJECTION = re.compile(r"(.*\.)(?:gate_)?up_proj(?:_bias)?((?:\.exp_avg(?:_sq)?)?)")
_AS_GIVEN = {"flatten_state_dict": False, "flatten_sharded_tensors": False}


def write_shards(
    shards: Mapping[str, TensorShard], folder: Path, group: dist.ProcessGroup | None
) -> None:
    """Write every rank's shards in parallel, one file per rank and an index, and sync them to disk.

    What several ranks hold alike is written once, by the one with the least to write.

    **Collective:** over `group`, a CPU group; every rank must call. A rank may lack names of which
    it holds nothing.

    Raises:
        CheckpointError: on every rank, if one of them cannot write.
    """
    writer = _Writer(folder, sync_files=True)
    try:
        dcp.save(
            dict(shards),
            storage_writer=writer,
            planner=_ShardSavePlanner(**_AS_GIVEN),
            process_group=group,
        )
    except CheckpointException as error:
        raise CheckpointError(f"cannot write {folder}: {_first_reason(error)}") from error


def read_shards(shards: Mapping[str, TensorShard], folder: Path) -> None:
    """Fill shards from a checkpoint written with any mesh and sharding; no communication.

    Args:
        shards: whose blocks are filled in place.
        folder: written by `write_shards`.

    Raises:
        CheckpointError: the checkpoint lacks a tensor, holds it in another shape, or cannot be
            read. Experts that are never computed with may be missing: they stay as they are.
    """
    read_index(folder)  # for its own sentence, which DCP would wrap
    try:
        with warnings.catch_warnings():
            # "torch.distributed is disabled": each rank reads for itself on purpose.
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(
                dict(shards),
                storage_reader=IndexReader(folder),
                planner=_ShardLoadPlanner(**_AS_GIVEN),
                no_dist=True,
            )
    except CheckpointException as error:
        raise CheckpointError(f"cannot read {folder}: {_first_reason(error)}") from error


def read_whole_tensor(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, folder: Path
) -> Tensor:
    """Read one tensor whole; shape and dtype are those of `read_stored_tensors`.

    Raises:
        CheckpointError: as `read_shards`.
    """
    tensor = torch.empty(shape, dtype=dtype)
    read_shards({name: TensorShard(shape, (Block((0,) * len(shape), tensor),))}, folder)
    return tensor


def read_stored_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of every tensor of a checkpoint by name.

    Raises:
        CheckpointError: the index cannot be read.
    """
    return {
        name: (tuple(stored.size), stored.properties.dtype)
        for name, stored in stored_tensors(read_index(folder)).items()
    }


class _Writer(dcp.FileSystemWriter):
    """Raise what the system said, which torch's archives hide behind an error of their own."""

    def write_data(self, plan: SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


class _ShardSavePlanner(dcp.DefaultSavePlanner):
    """Plan the writing of shards, which DCP itself does not know."""

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                _write_item(name, shard, block)
                for name, shard in self.state_dict.items()
                for block in shard.blocks
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].tensor_at(index.offset)


class _ShardLoadPlanner(dcp.DefaultLoadPlanner):
    """Plan the reading of shards, each block from whatever stored blocks overlap it."""

    def set_up_planner(
        self,
        state_dict: dict[str, TensorShard],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        # Not the default's, which would replace shards of meta tensors by real ones.
        self.state_dict, self.metadata = state_dict, metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None  # DCP calls `set_up_planner` first
        stored = stored_tensors(self.metadata)
        _check_stored(self.state_dict, stored)
        return LoadPlan(
            [
                item
                for name, shard in self.state_dict.items()
                for item in create_read_items_for_chunk_list(
                    name, stored[name], [_chunk(block) for block in shard.blocks]
                )
            ]
        )

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].tensor_at(index.offset)


def _write_item(name: str, shard: TensorShard, block: Block) -> WriteItem:
    chunk = _chunk(block)
    data = TensorWriteData(
        chunk=chunk,
        properties=TensorProperties.create_from_tensor(block.tensor),
        size=torch.Size(shard.whole_shape),
    )
    return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def _chunk(block: Block) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(block.offsets), block.tensor.size())


def _check_stored(
    shards: Mapping[str, TensorShard], stored: Mapping[str, TensorStorageMetadata]
) -> None:
    missing = [name for name in shards if name not in stored]
    if missing:
        raise CheckpointError(
            f"it has no {', '.join(missing[:_NUM_NAMED])} ({len(missing)} missing)"
        )
    for name, shard in shards.items():
        found = tuple(stored[name].size)
        if found != shard.whole_shape and not _differs_in_unused_rows(
            found, shard.whole_shape, _find_second_projection(name, stored)
        ):
            raise CheckpointError(f"its {name} has shape {found}, wanted is {shard.whole_shape}")


def _differs_in_unused_rows(
    found: tuple[int, ...], wanted: tuple[int, ...], second: TensorStorageMetadata | None
) -> bool:
    """Say whether two tensors of experts differ only in how many of them are never computed with.

    These have a first projection and no second; a run with expert parallelism does not keep them.
    """
    if second is None or found[1:] != wanted[1:]:
        return False
    return min(found[0], wanted[0]) >= second.size[0]


def _find_second_projection(
    name: str, stored: Mapping[str, TensorStorageMetadata]
) -> TensorStorageMetadata | None:
    """Return what is stored beside experts' first projection; None for all other names."""
    match = _FIRST_PROJECTION.fullmatch(name)
    return None if match is None else stored.get(f"{match[1]}down_proj{match[2]}")


def _first_reason(error: CheckpointException) -> str:
    """Return what the lowest-numbered failing rank met, in one line."""
    _rank, (cause, _trace) = min(error.failures.items())
    reason = getattr(cause, "strerror", None) or " ".join(str(cause).split())
    return reason or type(cause).__name__
