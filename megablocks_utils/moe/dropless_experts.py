"""The experts of one layer as a dropless MoE (dMoE) over concatenated, sharded weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from megablocks_utils.config.dispatch_cost import ROW_DISPATCH, DispatchChoice
from megablocks_utils.kernels.backends.backend import ExpertBackend
from megablocks_utils.kernels.fused.unpermute import fused_unpermute_and_combine
from megablocks_utils.kernels.permute import (
    ExpertOrder,
    count_by_expert,
    permute_tokens,
    sort_counted_rows,
)
from megablocks_utils.kernels.weights import ExpertWeights, LowRank
from megablocks_utils.mesh.device_mesh import EP_AXIS, EXPERT_TP_AXIS, axis_size
from megablocks_utils.mesh.peer_exchange import combine_from_peers, dispatch_to_peers
from megablocks_utils.mesh.placement import local_expert_range, local_tensor
from megablocks_utils.mesh.recomputation import keep
from megablocks_utils.mesh.token_dispatch import find_ranks_of_tokens
from megablocks_utils.mesh.token_exchange import (
    ExchangeCounts,
    PeerGroup,
    PendingCounts,
    combine_rows,
    dispatch_rows,
    exchange_counts,
    plan_dispatch,
)
from megablocks_utils.mesh.token_split import TokenSplit
from megablocks_utils.moe.expert_lora import ExpertLora
from megablocks_utils.moe.expert_slots import ExpertSlots
from megablocks_utils.moe.expert_spec import ExpertSpec
from megablocks_utils.moe.once_per_rank import RankRouting, run_once_per_rank
from megablocks_utils.moe.zero_experts import split_zero_experts
from megablocks_utils.quantization.packed_experts import PackedExperts
from megablocks_utils.quantization.weight_format import Parts


def run_where_experts_are(
    hidden_states: Tensor,
    order: ExpertOrder,
    counts: PendingCounts,
    group: ProcessGroup,
    backend: ExpertBackend,
    experts: ExpertWeights,
    peers: PeerGroup | None = None,
) -> Tensor:
    """Run tokens (T, H) through the experts of all ranks of the ep group: (N, H), by expert.

    **Collective:** two all-to-alls on the group and two in backward; as many on that of the peers.

    Args:
        hidden_states: tokens of this rank.
        order: of its rows.
        counts: who sends how many rows to whom, from `exchange_counts`; waited for when the rows
            lie in order.
        group: the ep group.
        backend: runs the experts of this rank.
        experts: of this rank.
        peers: who holds the other slices of these experts; None where this rank has them whole.
    """
    # No name, here or in a caller, keeps rows that were sent while others are computed.
    rows = permute_tokens(hidden_states, order)
    plan = plan_dispatch(counts.wait())
    received = ExpertOrder(plan.expert_major, plan.rank_major, plan.tokens_per_expert, top_k=1)
    if peers is None:
        rows = dispatch_rows(rows, plan, group)
        rows = backend(rows, received, None, experts)
        return combine_rows(rows, plan, group)
    rows = dispatch_to_peers(rows, plan, group, peers)
    rows = backend(rows, received, None, experts)
    return combine_from_peers(rows, plan, group, peers)


class DroplessExperts(nn.Module):
    """Send each token to its experts wherever they are, run them, and bring the results back.

    Takes the place of a transformers `experts` module and has its call:
    `(hidden_states (T, H), top_k_index (T, K), top_k_weights (T, K)) -> (T, H)`. Its parameters are
    those that the spec names, DTensors on `ep`, stored as transformers stores them; beside each
    projection may stand an adapter, `<projection>_lora`, which is None without.

    Zero experts and a norm behind the experts are computed at home, after the results are back. The
    norm's weight is a dense parameter: FSDP shards it over the world, and not with the experts.

    Attributes:
        spec: what the experts are.
        num_experts: E.
        post_expert_norm: normalises each expert's result before it is weighted; or None.
        exchange_counts: begins to find out who sends how many rows to whom; a run that is only
            rehearsed assumes it instead (see `rehearsal`).
        dispatch: how tokens travel, and why.
        token_split: whose tokens are whose, where ranks hold the same ones (tensor parallelism);
            None where this rank's tokens are its own.
        slots: which expert lies where; None where they lie in the model's order.
        weight_format: what the projections are packed in once they have values; None: they are not.
        read_stored: returns the parts of an expert's matrix (parameter's name in the model, expert)
            where the checkpoint has them in that format; None: all are packed as they are read.
    """

    post_expert_norm: nn.Module | None

    def __init__(
        self,
        spec: ExpertSpec,
        weights: Mapping[str, Tensor],
        *,
        mesh: DeviceMesh,
        backend: ExpertBackend,
        post_expert_norm: nn.Module | None = None,
        dispatch: DispatchChoice = ROW_DISPATCH,
        weight_format: str | None = None,
    ) -> None:
        """Take the weights as they are: DTensors on the axes of `mesh` that split them.

        Args:
            spec: what the experts are.
            weights: by `spec.parameter_names`.
            mesh: axes ("dp", "ep"), and perhaps "expert_tp".
            backend: runs the experts of this rank, packed as they may be.
            post_expert_norm: transformers' own, where `spec.has_post_norm`.
            dispatch: how tokens travel, where they do.
            weight_format: what the projections will be packed in.
        """
        super().__init__()
        assert weights.keys() == set(spec.parameter_names), (weights.keys(), spec)
        assert (post_expert_norm is not None) == spec.has_post_norm, spec
        for name in spec.parameter_names:
            self.register_parameter(name, nn.Parameter(weights[name]))
        for name in spec.projections:
            self.register_module(f"{name}_lora", None)
        self.spec = spec
        self.num_experts = spec.num_experts
        self.post_expert_norm = post_expert_norm
        self.mesh = mesh
        self.exchange_counts: ExchangeCounts = exchange_counts
        self.backend = backend
        self.weight_format = weight_format
        self.read_stored: Callable[[str, int], Parts | None] | None = None
        self.dispatch = dispatch
        self.token_split: TokenSplit | None = None
        self.slots: ExpertSlots | None = None

    def local_experts(self) -> Sequence[int]:
        """Return this rank's experts, in the order in which they lie here."""
        mine = local_expert_range(self.num_experts, self.mesh)
        return mine if self.slots is None else self.slots.experts[mine.start : mine.stop]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Apply the experts to this rank's tokens.

        The weights are cast to the dtype of the tokens, which is the dtype of compute: a no-op
        where FSDP gathered them in that dtype already.

        **Collective:** three all-to-alls on the `ep` axis (counts, rows out, rows back) and two in
        backward, one more each where tokens travel once to a rank (their routing), none where the
        axis has one rank; with `expert_tp` also those of `peer_exchange`, with `token_split` an
        all-gather over its group and two in backward. Every rank of all must call, also with no
        token.
        """
        split = self.token_split
        if split is None:
            return self._run_own(hidden_states, top_k_index, top_k_weights)
        own = [split.take(rows) for rows in (hidden_states, top_k_index, top_k_weights)]
        return split.join(self._run_own(*own), len(hidden_states))

    def _run_own(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Apply the experts to tokens that no other rank has."""
        # What is recomputed in backward must be routed as the rows were that other ranks hold.
        top_k_index = keep(top_k_index.contiguous)
        if self.spec.num_zero_experts == 0:
            return self._apply_experts(hidden_states, top_k_index, top_k_weights)
        routed = split_zero_experts(top_k_index, top_k_weights, self.num_experts)
        output = self._apply_experts(hidden_states, routed.index, routed.weights)
        return output + (routed.kept * hidden_states).to(output.dtype)

    def _apply_experts(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        if self.slots is not None:
            top_k_index = self.slots.route(top_k_index)
        tokens_per_expert = count_by_expert(top_k_index, self.num_experts)
        goes = self._find_ranks(top_k_index)
        counts = self._exchange_counts(tokens_per_expert, goes)
        order = sort_counted_rows(top_k_index, tokens_per_expert)
        experts = self.local_weights(hidden_states.dtype)
        if counts is None and self.post_expert_norm is None:
            return self.backend(hidden_states, order, top_k_weights, experts)
        if counts is not None and goes is not None:
            routing = RankRouting(top_k_index, top_k_weights, order, goes)
            group = self.mesh.get_group(EP_AXIS)
            return run_once_per_rank(hidden_states, routing, counts, group, self.backend, experts)
        rows = self._run_rows(hidden_states, order, counts, experts)
        if self.post_expert_norm is not None:
            rows = self.post_expert_norm(rows)
        return fused_unpermute_and_combine(rows, top_k_weights, order)

    def _find_ranks(self, top_k_index: Tensor) -> Tensor | None:
        """Say to which ranks each token goes; None where rows travel, or nothing does."""
        ep_size = axis_size(self.mesh, EP_AXIS)
        if ep_size == 1 or not self.dispatch.is_once_per_rank:
            return None
        return find_ranks_of_tokens(top_k_index, self.num_experts // ep_size, ep_size)

    def _exchange_counts(
        self, tokens_per_expert: Tensor, goes: Tensor | None
    ) -> PendingCounts | None:
        """Begin the exchange of counts; None where all experts are here.

        What a recomputed layer needs of it was kept: it makes no exchange and no host read.
        """
        ep_size = axis_size(self.mesh, EP_AXIS)
        peers = self._find_peers()
        if ep_size == 1 and peers is None:
            return None
        # Not `mesh[EP_AXIS]`, which makes a new mesh each time.
        group = self.mesh.get_group(EP_AXIS)
        tokens_per_rank = None if goes is None else goes.sum(dim=0)
        return keep(
            lambda: self.exchange_counts(tokens_per_expert, tokens_per_rank, group, ep_size, peers)
        )

    def _find_peers(self) -> PeerGroup | None:
        """Return who holds the other slices of this rank's experts; None where there are none."""
        size = axis_size(self.mesh, EXPERT_TP_AXIS)
        if size == 1:
            return None
        group = self.mesh.get_group(EXPERT_TP_AXIS)
        return PeerGroup(group, size, self.mesh.get_local_rank(EXPERT_TP_AXIS))

    def _run_rows(
        self,
        hidden_states: Tensor,
        order: ExpertOrder,
        counts: PendingCounts | None,
        experts: ExpertWeights,
    ) -> Tensor:
        """Run this rank's tokens through experts wherever they are: (N, H), in expert order."""
        if counts is None:
            rows = permute_tokens(hidden_states, order)
            return self.backend(rows, order.of_sorted_rows(), None, experts)
        group = self.mesh.get_group(EP_AXIS)
        peers = self._find_peers()
        return run_where_experts_are(
            hidden_states, order, counts, group, self.backend, experts, peers
        )

    def local_weights(self, dtype: torch.dtype) -> ExpertWeights:
        """Return the experts that this rank computes with, cast to the dtype of compute.

        Of slices of the same experts, the first adds the bias of the second projection.
        """
        experts = self.stored_weights().map_tensors(lambda tensor: _cast(tensor, dtype))
        peers = self._find_peers()
        if peers is None or experts.down_bias is None:
            return experts
        return replace(experts, down_bias=experts.down_bias * float(peers.rank == 0))

    def stored_weights(self) -> ExpertWeights:
        """Return the experts that this rank computes with, as they are: nothing is copied."""
        names = self.spec.parameter_names
        first, down = self.spec.projections
        return replace(
            self.spec.build_weights({n: local_tensor(self.get_parameter(n)) for n in names}),
            gate_up_lora=self._local_lora(first),
            down_lora=self._local_lora(down),
        )

    def _local_lora(self, projection: str) -> LowRank | None:
        lora = self._modules[f"{projection}_lora"]
        assert lora is None or isinstance(lora, ExpertLora), lora
        return None if lora is None else lora.local()

    def extra_repr(self) -> str:
        """Show sizes and the mesh in the printed model."""
        spec = self.spec
        return (
            f"num_experts={spec.num_experts}, hidden_size={spec.hidden_size}, "
            f"intermediate_size={spec.intermediate_size}, ep_size={axis_size(self.mesh, EP_AXIS)}"
        )


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a dtype; of packed weights what will be dequantized in it."""
    return tensor.in_dtype(dtype) if isinstance(tensor, PackedExperts) else tensor.to(dtype)
