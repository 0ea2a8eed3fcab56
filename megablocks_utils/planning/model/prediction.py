"""What is planned, and what a plan says of it; formulas and rehearsal both speak in these terms.

Torch-free. All figures are of one rank, the one that needs most.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megablocks_utils.config import ResolvedPrecision
from megablocks_utils.config.adapter import ATTENTION, EXPERTS, SHARED, parts_of
from megablocks_utils.config.backends import AUTO

__all__ = [
    "COLLECTIVES",
    "COMPONENTS",
    "ONE_ROW",
    "PADDED",
    "GroupTraffic",
    "ParallelLayout",
    "PlannedRun",
    "Prediction",
    "sum_traffic",
]

ONE_ROW, PADDED = "positions", "padded"
"""How the examples of a micro-batch are laid out: one after the other in a row, or a row for each.
As `training.data.batches.Packing` has it, with other ways of marking where one ends."""

COMPONENTS = (
    "parameters",
    "gradients",
    "optimizer",
    "fsdp_buffers",
    "activations",
    "dispatch_buffers",
)
"""Where a peak's bytes are.

`parameters`: this rank's shards, and experts it holds whole; `gradients`: likewise, as they are
kept between micro-steps; `optimizer`: its states; `fsdp_buffers`: gathered weights, gradients
that wait to be reduced, and what collectives copy in and out of; `activations`: what the backward
pass needs and temporaries; `dispatch_buffers`: rows that travel between ranks or are put in order
for the experts, and everything the experts compute with them.
"""

COLLECTIVES = ("all_gather", "reduce_scatter", "all_to_all", "all_reduce")


class GroupTraffic(NamedTuple):
    """What one rank sends in an optimizer step by collectives of one kind over groups of one form.

    Attributes:
        kind: one of `COLLECTIVES`.
        size: ranks of a group.
        stride: from one of its ranks to the next.
        num_bytes: that leave this rank, all micro-steps. Of n ranks that share W bytes, all-gather
            and reduce-scatter send W * (n - 1) / n, all-reduce twice that; all-to-all what goes to
            other ranks.
    """

    kind: str
    size: int
    stride: int
    num_bytes: int


def sum_traffic(parts: Iterable[GroupTraffic]) -> tuple[GroupTraffic, ...]:
    """Add up what goes the same way, in one order, without what sends nothing."""
    total: Counter[tuple[str, int, int]] = Counter()
    for part in parts:
        total[part.kind, part.size, part.stride] += part.num_bytes
    return tuple(GroupTraffic(*way, n) for way, n in sorted(total.items()) if n)


@dataclass(frozen=True)
class ParallelLayout:
    """One way to spread the experts.

    Attributes:
        ep_size: ranks that one copy of the experts is split over; 1 is no expert parallelism:
            FSDP shards the experts over the world like all else.
        expert_dp: `shard` or `replicate`: what the ranks of a group with the same experts do;
            `shard` where there is one such rank, and for ep_size 1.
        is_dmoe: whether the experts are this project's also at ep_size 1, as
            `--use_megablocks_sharding True --ep_size 1` makes them; then expert_dp counts.
    """

    ep_size: int
    expert_dp: str
    is_dmoe: bool = False

    def describe(self) -> str:
        """Say it in a few words."""
        if self.ep_size == 1 and not self.is_dmoe:
            return "no expert parallelism"
        return f"ep_size {self.ep_size}, expert_dp {self.expert_dp}"


@dataclass(frozen=True)
class PlannedRun:
    """What of a run decides its memory and traffic, besides the model and the layout.

    Attributes:
        world_size: ranks.
        entry_point: `fsdp2` or `fsdp1`.
        precision: dtypes.
        use_lora: which parts have adapters: what `config.adapter.name_targets` returns.
        lora_r: rank of the adapters.
        gradient_checkpointing: `full`, `none` or `selective`.
        accumulation: micro-steps of an optimizer step.
        sync_each_batch: whether gradients are reduced after every micro-step.
        tokens: T, of the largest micro-batch that a rank has at a time.
        label_tokens: of these, positions whose next token is learned.
        kernel: backend of the experts, with `auto` resolved; counts where ep_size is above 1 or
            adapters are on the experts.
        imbalance: rows that the busiest rank of an ep group receives, over its fair share.
        has_aux_loss: whether the load-balancing loss is on.
        device_type: `cuda` or `cpu`.
        examples: in that micro-batch.
        cpu_offload: what lies in host memory: `none`, `optimizer` or `params`. On a CPU it is the
            same memory.
        dp_replicate_size: groups of ranks that each hold the whole model.
        token_dispatch: how tokens travel, as the option has it.
        packing: how they are laid out. Where each is padded to a row of its own, padding is part of
            `tokens`, and a mask has only the tokens of a row in its second dim.
        is_varlen: whether attention takes them one by one. More than one are else kept apart by a
            mask (T, T), which transformers makes once, and torch's attention again in floating
            point in every layer.
        has_whole_logits: whether the loss takes the logits of all labels at once: where what the
            model does to them is not known.
        sp_size: ranks that share rows; `tokens` and `label_tokens` are those of a rank.
        expert_tp_size: ranks that each expert is split over.
        tp_size: ranks that have the same rows, and split attention and dense layers.
        packed_format: what the experts' weights are packed in; None: not.
        optim: the optimizer.
    """

    world_size: int
    entry_point: str
    precision: ResolvedPrecision
    use_lora: str
    lora_r: int
    gradient_checkpointing: str
    accumulation: int
    sync_each_batch: bool
    tokens: int
    label_tokens: int
    kernel: str
    imbalance: float
    has_aux_loss: bool
    device_type: str
    examples: int = 1
    is_varlen: bool = False
    packing: str = ONE_ROW
    has_whole_logits: bool = False
    token_dispatch: str = AUTO
    cpu_offload: str = "none"
    dp_replicate_size: int = 1
    sp_size: int = 1
    expert_tp_size: int = 1
    tp_size: int = 1
    packed_format: str | None = None
    optim: str = "adamw"

    @property
    def shard_size(self) -> int:
        """Ranks of a group, which the model is sharded over."""
        return self.world_size // self.dp_replicate_size

    @property
    def dense_shard_size(self) -> int:
        """Ranks of a group that FSDP shards all but experts over."""
        return self.shard_size // self.tp_size

    def count_copies(self, layout: ParallelLayout) -> int:
        """Return the ranks of a group that hold the same part of the experts: along dp."""
        return self.shard_size // (layout.ep_size * self.expert_tp_size)

    @property
    def expert_tokens(self) -> int:
        """Of the tokens of a rank, those that it brings to the experts: no other one does."""
        return -(-self.tokens // self.tp_size)

    @property
    def offloaded(self) -> str:
        """What of a run on GPUs lies in host memory."""
        return self.cpu_offload if self.device_type == "cuda" else "none"

    @property
    def is_padded(self) -> bool:
        """Whether there are several rows, of one example and padding each."""
        return self.packing == PADDED and self.examples > 1

    @property
    def example_lengths(self) -> tuple[int, ...]:
        """Tokens of each example, padding counted: as equal as can be."""
        whole = self.tokens * self.sp_size
        longest = -(-whole // self.examples)
        return tuple(min(longest, whole - n) for n in range(0, whole, longest))

    @property
    def row_tokens(self) -> int:
        """Tokens that attention may see: those of a row."""
        whole = self.tokens * self.sp_size
        return -(-whole // self.examples) if self.is_padded else whole

    @property
    def lora_parts(self) -> tuple[str, ...]:
        """Which parts of the model have adapters."""
        return parts_of(self.use_lora)

    @property
    def trains_attention(self) -> bool:
        """Whether the attention's linear layers have adapters."""
        return ATTENTION in self.lora_parts

    @property
    def trains_experts(self) -> bool:
        """Whether the experts have adapters."""
        return EXPERTS in self.lora_parts

    @property
    def trains_dense(self) -> bool:
        """Whether dense MLPs and shared experts have adapters."""
        return SHARED in self.lora_parts

    def has_own_experts(self, layout: ParallelLayout) -> bool:
        """Say whether the experts are this project's: split, with adapters, or packed."""
        is_changed = self.trains_experts or self.packed_format is not None
        return layout.ep_size > 1 or layout.is_dmoe or is_changed


@dataclass(frozen=True)
class Prediction:
    """What one rank will hold and send.

    Attributes:
        components: bytes of each of `COMPONENTS` at the moment of the peak.
        moment: when that is, in a word or two: `forward`, `loss`, `backward`, `optimizer`.
        allocated_bytes: held between two steps, after zero_grad.
        host_bytes: the most that is held in host memory instead, of what is offloaded.
        sent: bytes that leave this rank in one optimizer step, as `sum_traffic` returns them.
    """

    components: Mapping[str, int]
    moment: str
    allocated_bytes: int
    sent: tuple[GroupTraffic, ...]
    host_bytes: int = 0

    @property
    def sent_bytes_per_step(self) -> dict[str, int]:
        """Bytes by kind of `COLLECTIVES`, over whichever groups."""
        total = dict.fromkeys(COLLECTIVES, 0)
        for part in self.sent:
            total[part.kind] += part.num_bytes
        return total

    @property
    def peak_bytes(self) -> int:
        """The most that is allocated at once."""
        return sum(self.components.values())

    @property
    def largest_component(self) -> str:
        """The component with most of the peak's bytes."""
        return max(self.components, key=self.components.__getitem__)
