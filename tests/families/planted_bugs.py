"""Plant one bug after the other in the ranks, and see the check of a family find it.

python -m tests.families.planted_bugs
"""

import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from torch import Tensor

from megablocks_utils.attention.causal_blocks import CausalBlocks
from megablocks_utils.checkpoint.slices import SliceReader
from megablocks_utils.kernels.gate import Clamp, KnownGate
from megablocks_utils.moe.dropless_experts import DroplessExperts
from megablocks_utils.training.report.metrics import StepMetrics
from tests.families import check, run
from tests.families.run import Seen, train_family
from tests.families.tp_bugs import TP_BUGS
from tests.support.rank_pool import RankPool

__all__ = ["BUGS", "main", "train_with_bug"]


def while_training(*patches: Any) -> Any:
    """Plant something once the model is built and probed."""
    own = run.fit

    def fit(*args: Any) -> Iterator[StepMetrics]:
        with ExitStack() as planted:
            for patch in patches:
                planted.enter_context(patch)
            yield from own(*args)

    return mock.patch.object(run, "fit", fit)


def forget_clamp() -> Any:
    """Compute a clamped gate without its clamp."""
    own = KnownGate.__call__

    def unclamped(gate: KnownGate, *values: Tensor) -> Tensor:
        return own(replace(gate, clamp=Clamp.NONE, limit=math.inf, alpha=1.0), *values)

    return while_training(mock.patch.object(KnownGate, "__call__", unclamped))


def shift_biases() -> Any:
    """Give every expert its neighbour's bias."""
    own = SliceReader.fill_local

    def fill(reader: SliceReader, name: str, local: Tensor, offsets: tuple[int, ...]) -> None:
        own(reader, name, local, offsets)
        if name.endswith("proj_bias"):
            local.copy_(local.roll(1, 0))

    return mock.patch.object(SliceReader, "fill_local", fill)


def weigh_twice() -> Any:
    """Multiply what experts give by the routing weights twice."""
    own = DroplessExperts.forward

    def forward(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return own(module, hidden, index, weights * weights)

    return mock.patch.object(DroplessExperts, "forward", forward)


def swap_interleaving() -> Any:
    """Read rows of gate and up that alternate as if they were halves, and the other way round."""
    own = DroplessExperts.__init__

    def build(module: Any, *args: Any, **kwargs: Any) -> None:
        own(module, *args, **kwargs)
        module.spec = replace(module.spec, is_interleaved=not module.spec.is_interleaved)

    return mock.patch.object(DroplessExperts, "__init__", build)


def join_examples() -> Any:
    """Let the examples of a packed row see each other."""
    own = CausalBlocks.__init__

    def build(blocks: CausalBlocks, lengths: Sequence[int], *args: Any) -> None:
        own(blocks, [sum(lengths)], *args)

    return while_training(mock.patch.object(CausalBlocks, "__init__", build))


def leave_buffers() -> Any:
    """Read no stored buffer, so that none is saved as it was."""
    return mock.patch("megablocks_utils.training.model_source.fill_buffers", lambda *_: None)


BUGS: Mapping[str, tuple[str, Callable[[], Any]]] = MappingProxyType(
    {
        "clamp forgotten": ("glm5_next", forget_clamp),
        "bias on the wrong expert": ("gpt_oss", shift_biases),
        "interleaving swapped": ("gpt_oss", swap_interleaving),
        "weights applied twice": ("mixtral", weigh_twice),
        "examples of a row see each other": ("afmoe", join_examples),
        "buffer not read and saved": ("deepseek_v3", leave_buffers),
    }
)
"""By name: a family that must show it, and what plants it."""


def train_with_bug(rank: int, argv: list[str], *, bug: str, draws: bool = False) -> Seen:
    """Train a step with a bug planted."""
    with (BUGS | TP_BUGS)[bug][1]():
        return train_family(rank, argv, draws=draws)


def main() -> int:
    """Plant all, and return 1 if one was not found."""
    missed = [*_plant_all(BUGS, {}), *_plant_all(TP_BUGS, {"tp_size": 2})]
    total = len(BUGS) + len(TP_BUGS)
    sys.stdout.write(f"{total - len(missed)} of {total} found\n")
    return int(bool(missed))


def _plant_all(
    bugs: Mapping[str, tuple[str, Callable[[], Any]]], axes: Mapping[str, int]
) -> list[str]:
    """Plant bugs on a mesh with further axes, and return those that were not found."""
    missed = []
    num_ranks = 2 * math.prod(axes.values())
    with RankPool(num_ranks) as pool, tempfile.TemporaryDirectory(prefix="bugs-") as folder:
        for number, (bug, (family, _)) in enumerate(bugs.items()):
            place = Path(folder, str(number))
            place.mkdir()
            train = partial(train_with_bug, bug=bug)
            row = check.check_family(pool, family, place, with_lora=False, train=train, axes=axes)
            sys.stdout.write(f"{bug} | {family} | {row.verdict} | {row.why}\n")
            sys.stdout.flush()
            if row.verdict in (check.Verdict.WORKS, check.Verdict.NOT_BUILT):
                missed.append(bug)
    return missed


if __name__ == "__main__":
    sys.exit(main())
