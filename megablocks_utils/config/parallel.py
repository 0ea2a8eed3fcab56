"""How the experts are spread over processes, and what runs them. Torch-free."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from megablocks_utils.config.backends import AUTO, KERNEL_CHOICES
from megablocks_utils.config.dispatch_cost import DISPATCH_CHOICES
from megablocks_utils.config.expert_balance import BALANCED, CONTIGUOUS
from megablocks_utils.config.option import Option
from megablocks_utils.config.values import join_words
from megablocks_utils.errors import ConfigurationError

__all__ = ["ParallelConfig", "check_ep_size", "count_data_ranks", "count_shard_ranks"]
__all__ += ["check_heads", "count_ranks_of_slice", "legal_ep_sizes"]


@dataclass(frozen=True)
class ParallelConfig:
    """Say how experts are spread and run.

    Attributes:
        use_megablocks_sharding: Whether expert parallelism is on.
        ep_size: Ranks that one copy of the experts is split over; None: the world size.
        expert_tp_size: Ranks that each expert is split over, by its intermediate size.
        expert_dp: "shard" or "replicate"; the parsers fill in the entry point's own (see
            `RunConfig.entry_point`), None only in a config built directly.
        dp_replicate_size: Groups of ranks that each hold the whole model, sharded within.
        tp_size: Ranks that split attention and dense layers of the same rows among them.
        sp_size: Ranks that split the tokens of the same rows among them.
        kernel: Backend that runs the experts, or "auto".
        verify_kernel: Whether it is compared with "eager" before the first step.
        token_dispatch: How tokens travel to their experts: "rows", "tokens" or "auto".
        expert_placement: "contiguous", or "balanced" by measured loads.
        expert_loads: File of these; None: that of the checkpoint a run resumes from.
    """

    use_megablocks_sharding: Annotated[
        bool,
        Option(
            "expert parallelism: every process holds some of the experts, and tokens are sent to "
            "theirs"
        ),
    ] = False
    ep_size: Annotated[
        int | None,
        Option(
            "processes that one copy of the experts is split over; must divide the number of "
            "processes (of a group, with --dp_replicate_size) and the number of experts",
            aliases=("expert_degree",),
            minimum=1,
            shown_default="the number of processes, of a group",
        ),
    ] = None
    expert_tp_size: Annotated[
        int,
        Option(
            "expert tensor parallelism: neighbouring processes that split every expert by its "
            "intermediate size and gather each other's tokens; --ep_size times this must divide "
            "the number of processes",
            minimum=1,
        ),
    ] = 1
    expert_dp: Annotated[
        str | None,
        Option(
            "what processes with the same experts do: shard them (memory 1/world) or replicate "
            "them (copies whose gradients are summed; the only way of FSDP1)",
            choices=("shard", "replicate"),
            shown_default="shard with FSDP2, replicate with FSDP1",
        ),
    ] = None
    dp_replicate_size: Annotated[
        int,
        Option(
            "HSDP: groups of neighbouring processes, such as nodes, that each hold the whole model "
            "and shard it within; between groups gradients alone are sent, once a step",
            minimum=1,
            shown_default="1, all processes are one group",
        ),
    ] = 1
    tp_size: Annotated[
        int,
        Option(
            "tensor parallelism: processes that split attention and dense layers among them, and "
            "share the same rows; global batches shrink by as much",
            minimum=1,
        ),
    ] = 1
    sp_size: Annotated[
        int,
        Option(
            "sequence parallelism (Ulysses): processes that each hold a part of the tokens of the "
            "same rows, and in attention all tokens of a part of the heads; global batches shrink "
            "by as much",
            minimum=1,
        ),
    ] = 1
    kernel: Annotated[
        str,
        Option(
            "how a process runs its experts; auto: on a GPU the fastest that was measured (see "
            "megablocks_utils.tune), else torch's grouped_mm; triton: this project's kernels; "
            "scattermoe and megablocks are packages to install, without adapters on experts",
            choices=KERNEL_CHOICES,
        ),
    ] = AUTO
    verify_kernel: Annotated[
        bool,
        Option(
            "before the first step, compare the kernel with eager on the model's own weights, and "
            "train nothing if it is off by more than twice what rounding explains"
        ),
    ] = True
    token_dispatch: Annotated[
        str,
        Option(
            "how tokens travel to other processes: rows: once for each expert; tokens: once for "
            "each process that has experts of theirs, which weights and sums the results; auto: "
            "what is fewer bytes if all experts are as likely",
            choices=DISPATCH_CHOICES,
        ),
    ] = AUTO
    expert_placement: Annotated[
        str,
        Option(
            "which process of an ep group holds which experts: contiguous: the first ones the "
            "first; balanced: in each layer as many, so that the loads of --expert_loads even out; "
            "files hold the model's order whatever it is",
            choices=(CONTIGUOUS, BALANCED),
        ),
    ] = CONTIGUOUS
    expert_loads: Annotated[
        str | None,
        Option(
            "for --expert_placement balanced, the expert_load.jsonl of a run of this model, see "
            "--expert_load_steps",
            metavar="FILE",
            shown_default="that of the checkpoint a run resumes from",
        ),
    ] = None


def legal_ep_sizes(world_size: int, num_experts: int | None = None) -> list[int]:
    """List every ep_size that divides the world size and, where it is known, the experts."""
    common = world_size if num_experts is None else math.gcd(world_size, num_experts)
    small = [size for size in range(1, math.isqrt(common) + 1) if common % size == 0]
    return sorted({*small, *(common // size for size in small)})


def count_shard_ranks(world_size: int, dp_replicate_size: int) -> int:
    """Return the ranks of a group, which the model is sharded over.

    Raises:
        ConfigurationError: dp_replicate_size does not divide the processes.
    """
    if world_size % dp_replicate_size:
        would = join_words(legal_ep_sizes(world_size), "and")
        raise ConfigurationError(
            f"dp_replicate_size is {dp_replicate_size}, but it must divide the {world_size} "
            f"processes of this run; {would} would work.",
            parameters=("dp_replicate_size",),
        )
    return world_size // dp_replicate_size


def count_ranks_of_slice(num_ranks: int, expert_tp_size: int, num_groups: int = 1) -> int:
    """Return how many of the ranks have the same slice of the intermediate size of experts.

    Args:
        num_ranks: Processes of the run, of a group where there are several.
        expert_tp_size: Ranks that each expert is split over.
        num_groups: Groups of processes that each hold the whole model.

    Raises:
        ConfigurationError: expert_tp_size does not divide the processes.
    """
    if num_ranks % expert_tp_size:
        owner = "this run" if num_groups == 1 else "a group"
        would = join_words(legal_ep_sizes(num_ranks), "and")
        raise ConfigurationError(
            f"expert_tp_size is {expert_tp_size}, but it must divide the {num_ranks} processes of "
            f"{owner}; {would} would work.",
            parameters=("expert_tp_size",),
        )
    return num_ranks // expert_tp_size


def count_data_ranks(world_size: int, tp_size: int, sp_size: int, num_groups: int = 1) -> int:
    """Return how many ranks, of all, have rows of their own: G counts these.

    Ranks of a tp and of an sp group share their rows. tp is innermost, then sp: rank `r` trains on
    the rows of data rank `r // (tp_size * sp_size)`.

    Args:
        world_size: Processes of the run.
        tp_size: Ranks of a tensor-parallel group.
        sp_size: Ranks of a sequence-parallel group.
        num_groups: Groups of processes that each hold the whole model, none of which is cut.

    Raises:
        ConfigurationError: the two do not divide the processes.
    """
    sizes = {"tp_size": tp_size, "sp_size": sp_size}
    given = {name: size for name, size in sizes.items() if size > 1}
    of_group = count_shard_ranks(world_size, num_groups)
    if of_group % (tp_size * sp_size):
        named = " and ".join(f"{name} is {size}" for name, size in given.items())
        product = "their product" if len(given) > 1 else "it"
        owner = "this run" if num_groups == 1 else "a group"
        would = join_words(legal_ep_sizes(of_group), "and")
        if len(given) > 1:
            would = "tp_size {} with sp_size {}".format(*_nearest_sizes(of_group, tp_size, sp_size))
        raise ConfigurationError(
            f"{named}, but {product} must divide the {of_group} processes of {owner}; {would} "
            "would work.",
            parameters=tuple(given),
        )
    return world_size // (tp_size * sp_size)


def _nearest_sizes(num_ranks: int, tp_size: int, sp_size: int) -> tuple[int, int]:
    """Return the sizes nearest to these, by ratio, whose product divides the ranks."""

    def distance(pair: tuple[int, int]) -> tuple[float, int]:
        tp, sp = pair
        # Of equals the one with most tp: layers may be too large for a rank.
        return max(tp / tp_size, tp_size / tp) * max(sp / sp_size, sp_size / sp), -tp

    sizes = legal_ep_sizes(num_ranks)
    return min(((tp, sp) for tp in sizes for sp in legal_ep_sizes(num_ranks // tp)), key=distance)


def check_heads(counts: Iterable[int], sp_size: int, tp_size: int = 1) -> None:
    """Refuse an sp_size that does not divide the heads of the attention.

    Args:
        counts: Heads of queries, of all kinds of layers; none where the model tells none.
        sp_size: Ranks that share rows.
        tp_size: Ranks that these are split over before; what it does not divide, it refuses itself.

    Raises:
        ConfigurationError: with the number, and the sizes that would work.
    """
    counts = sorted({count if count % tp_size else count // tp_size for count in counts})
    wrong = next((count for count in counts if count % sp_size), None)
    if sp_size == 1 or (counts and wrong is None):
        return
    heads = f"the {wrong} heads of its attention" if counts else "heads, and the model tells none"
    heads += f" that a rank has with tp_size {tp_size}" if counts and tp_size > 1 else ""
    would = join_words(legal_ep_sizes(math.gcd(*counts)), "and") if counts else "1"
    raise ConfigurationError(
        f"sp_size is {sp_size}, but it must divide {heads}; {would} would work.",
        parameters=("sp_size",),
    )


def check_ep_size(
    ep_size: int,
    *,
    world_size: int | None = None,
    num_experts: int | None = None,
    num_groups: int = 1,
    expert_tp_size: int = 1,
    note: str = "",
) -> None:
    """Refuse an ep_size that does not divide the processes or the experts.

    Args:
        ep_size: Ranks that one copy of the experts is split over.
        world_size: Processes of the run, of a group where there are several, that have the same
            slice of experts; None where there is no run.
        num_experts: Experts of a layer of the model; None while it is not known yet.
        num_groups: Groups of processes that each hold the whole model.
        expert_tp_size: Ranks that each expert is split over.
        note: What is said beside the value, such as where it comes from.

    Raises:
        ConfigurationError: with the numbers, and the ep sizes that would work.
    """
    processes = "process" if world_size == 1 else "processes"
    owner = "this run" if num_groups == 1 else "a group"
    if expert_tp_size > 1:
        owner += f" that have the same slice of experts (expert_tp_size {expert_tp_size})"
    counts = {
        f"the {world_size} {processes} of {owner}": world_size,
        f"the {num_experts} experts of this model": num_experts,
    }
    for name, count in counts.items():
        if count is None or (ep_size >= 1 and count % ep_size == 0):
            continue
        would = join_words(legal_ep_sizes(world_size or count, num_experts), "and")
        raise ConfigurationError(
            f"ep_size is {ep_size}{note}, but it must divide {name}; {would} would work.",
            parameters=("ep_size",),
        )
