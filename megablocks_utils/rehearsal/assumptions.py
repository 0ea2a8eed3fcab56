"""What nobody can know before a run, assumed: where tokens go, above all."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import ProcessGroup

from megablocks_utils.config.dispatch_cost import TokenTraffic
from megablocks_utils.kernels import permute
from megablocks_utils.kernels.fused import unpermute
from megablocks_utils.mesh.device_mesh import EP_AXIS, axis_size
from megablocks_utils.mesh.token_exchange import (
    ExchangeCounts,
    ExchangedCounts,
    PeerGroup,
    PendingCounts,
    TokenSizes,
    exchange_rows,
)
from megablocks_utils.moe.dropless_experts import DroplessExperts
from megablocks_utils.planning.model.prediction import PlannedRun
from megablocks_utils.quantization import packed_experts
from megablocks_utils.quantization.format_table import FORMATS
from megablocks_utils.quantization.weight_format import Parts
from megablocks_utils.rehearsal.library_patches import (
    attention_of_a_gpu,
    copied_between_memories,
    no_launches,
    one_example_a_row,
    shape_grouped_mm,
)
from megablocks_utils.rehearsal.remembered_fakes import RememberedFakes

__all__ = ["AssumedValues", "assume_gpu_sums", "assume_routing", "assume_stored", "pretend"]


def assume_routing(module: DroplessExperts, num_tokens: int, top_k: int, imbalance: float) -> None:
    """Have a layer send evenly, and receive more than its share.

    Args:
        module: the layer.
        num_tokens: T.
        top_k: K.
        imbalance: received rows over routed ones.
    """
    module.exchange_counts = _assume_counts(num_tokens, top_k, imbalance)
    if not module.dispatch.is_once_per_rank:
        return
    ep_size = axis_size(module.mesh, EP_AXIS)
    copies = TokenTraffic(module.num_experts, top_k, ep_size, 0).count_copies(num_tokens)

    def route(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_states, index, weights = inputs
        return hidden_states, _route_evenly(index, copies, module.num_experts, ep_size), weights

    module.register_forward_pre_hook(route)


def assume_stored(experts: DroplessExperts) -> None:
    """Have a layer take packed weights as they are stored: none is drawn, and none is packed.

    Args:
        experts: what their weights are changes no size.
    """
    if experts.weight_format is None:
        return
    layout_of = FORMATS[experts.weight_format].describe_parts

    def read(name: str, _expert: int) -> Parts:
        sizes = experts.get_parameter(name.rpartition(".")[2]).shape[1:]
        layouts = layout_of(*(sizes[::-1] if experts.spec.is_transposed else sizes))
        return {part: torch.zeros(of.shape, dtype=of.dtype) for part, of in layouts.items()}

    experts.read_stored = read


def _route_evenly(index: Tensor, copies: int, num_experts: int, ep_size: int) -> Tensor:
    """Return experts (T, K) that lie on as many ranks as there shall be copies of tokens."""
    token = torch.arange(len(index), device=index.device).unsqueeze(1)
    slot = torch.arange(index.shape[1], device=index.device)
    num_ranks = copies // len(index) + (token < copies % len(index)).long()
    rank, num_local = (token + torch.minimum(slot, num_ranks - 1)) % ep_size, num_experts // ep_size
    return rank * num_local + (token + slot) % num_local


def _assume_counts(num_tokens: int, top_k: int, imbalance: float) -> ExchangeCounts:
    """Return an `exchange_counts` of a rank that sends evenly, and receives more than its share.

    It makes the same exchange, and does not look at what came of it.

    Args:
        num_tokens: T.
        top_k: K.
        imbalance: received rows over routed ones.
    """
    num_rows = num_tokens * top_k

    def exchange(
        tokens_per_expert: Tensor,
        tokens_per_rank: Tensor | None,
        group: ProcessGroup,
        ep_size: int,
        peers: PeerGroup | None = None,
    ) -> PendingCounts:
        device, tokens = tokens_per_expert.device, None
        num_brought = math.ceil(num_rows * imbalance) if ep_size > 1 else num_rows
        sent = tokens_per_expert.view(ep_size, -1)
        cells = _spread(num_brought, sent.numel())
        rows = [
            cells[start : start + sent.shape[1]] for start in range(0, len(cells), sent.shape[1])
        ]
        if tokens_per_rank is not None:
            sent = torch.cat([sent, tokens_per_rank.unsqueeze(1)], dim=1)
            copies = TokenTraffic(len(tokens_per_expert), top_k, ep_size, 0).count_copies(
                num_tokens
            )
            came = _spread(math.ceil(copies * imbalance), ep_size)
            tokens = TokenSizes(_spread(copies, ep_size), came, torch.tensor(came, device=device))
        exchange_rows(sent.view(-1), None, None, group)
        counts = ExchangedCounts(
            send_sizes=_spread(num_rows, ep_size),
            receive_sizes=[sum(row) for row in rows],
            received=torch.tensor(rows, device=device),
            tokens=tokens,
        )
        if peers is not None:
            received = counts.received.repeat(peers.size, 1)
            exchange_rows(received, None, None, peers.group)
            of_peers = [sum(counts.receive_sizes)] * peers.size
            counts = replace(counts, received=received, peer_sizes=of_peers)
        return PendingCounts(lambda: counts)

    return exchange


def _spread(total: int, parts: int) -> list[int]:
    """Cut a number into parts as equal as can be."""
    return [total // parts + (part < total % parts) for part in range(parts)]


@contextmanager
def assume_gpu_sums() -> Iterator[None]:
    """Weight and sum rows in the memory that a GPU takes, while entered, with tensors on a CPU.

    Dot products are cut into blocks as there. No kernel is launched: what it would fill is made,
    and left as it is.
    """

    def find_kernels(device: torch.device, dtype: torch.dtype) -> unpermute.CombineKernels | None:
        return unpermute.CombineKernels(_shape_sums, _shape_gradients)

    originals = permute._BLOCK_ELEMENTS_CPU, unpermute.find_combine_kernels
    permute._BLOCK_ELEMENTS_CPU = permute._BLOCK_ELEMENTS
    unpermute.find_combine_kernels = find_kernels
    try:
        yield
    finally:
        permute._BLOCK_ELEMENTS_CPU, unpermute.find_combine_kernels = originals


@contextmanager
def assume_gpu_unpacking() -> Iterator[None]:
    """Unpack as many values at a time as on a GPU, while entered, with tensors on a CPU."""
    original = packed_experts.count_unpacked

    def count_on_a_gpu(device_type: str) -> int:
        assert device_type == "cpu", device_type
        return original("cuda")

    packed_experts.count_unpacked = count_on_a_gpu
    try:
        yield
    finally:
        packed_experts.count_unpacked = original


def _shape_sums(rows: Tensor, weights: Tensor, _top_k: int, _inverse: Tensor) -> Tensor:
    return rows.new_empty(weights.shape[0], rows.shape[1])


def _shape_gradients(
    _grad: Tensor,
    rows: Tensor,
    weights: Tensor,
    _inverse: Tensor | None,
    *,
    token: Tensor | None = None,
    wants_rows: bool,
    wants_weights: bool,
) -> tuple[Tensor | None, Tensor | None]:
    return (
        torch.empty_like(rows) if wants_rows else None,
        torch.empty_like(weights) if wants_weights else None,
    )


def pretend(run: PlannedRun, on_host: Callable[[Tensor], None]) -> Iterator[AbstractContextManager]:
    """Yield what makes tensors fake, and libraries right about them.

    Args:
        run: what is planned.
        on_host: called with what is copied to host memory.
    """
    if run.kernel == "triton":
        yield no_launches()
    if run.device_type == "cuda":
        yield assume_gpu_sums()
        yield assume_gpu_unpacking()
        yield attention_of_a_gpu()
    if run.offloaded != "none":
        yield copied_between_memories(on_host)
    if run.examples == 1:
        yield one_example_a_row()
    # Rotary frequencies are real: every model computes them when it is built.
    yield RememberedFakes(allow_non_fake_inputs=True)


class AssumedValues:
    """Answer the questions that fake tensors cannot.

    So many positions have labels; the optimizer has made one step. Any other question is an error,
    as it is without this. Integers that come from other ranks are zeros.
    """

    def __init__(self, label_tokens: int) -> None:
        self._label_tokens = label_tokens

    def answer(self, func: Any, args: tuple) -> Any:
        """Return what an operator would, given its arguments; NotImplemented: fakes can answer."""
        if args and isinstance(args[0], FakeTensor):
            tensor = args[0]
            if func is torch.ops.aten.nonzero.default and tensor.dim() == 1:
                count = min(len(tensor), self._label_tokens)
                return torch.empty(count, 1, dtype=torch.int64, device=tensor.device)
            if func is torch.ops.aten._local_scalar_dense.default and tensor.is_floating_point():
                return 1.0
            if func is torch.ops.aten._grouped_mm.default and tensor.dtype != torch.bfloat16:
                return shape_grouped_mm(*args[:3])
            if func is torch.ops._c10d_functional.wait_tensor.default:
                return tensor  # not another one, as fakes have it: nothing is copied
        return NotImplemented

    def correct(self, func: Any, result: Any) -> Any:
        """Return an operator's result without what others would have sent in it."""
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            # Numbers of places must be numbers of some.
            return result if result.is_floating_point() else result.zero_()
        return result
