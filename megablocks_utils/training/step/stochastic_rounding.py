"""AdamW for weights kept in bfloat16: the update is rounded stochastically, so small ones survive.

A bfloat16 weight moves only by steps of 2^-8 of its size; a learning rate of 1e-5 asks for less,
and round-to-nearest then drops every update. Rounding up with probability equal to the part dropped
keeps the expected weight exact and costs no memory. (torchao's optimizers do this too; they are not
used since they need a further package and compile for every shape before the first step.)

Copies of a parameter on several ranks must stay bit-equal, so the random bits are a function of
(seed, step, parameter, shard) and never of the rank. On a GPU one Triton kernel makes the whole
update (`kernels.fused.adamw`), on a CPU torch's operators, with other random bits.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from megablocks_utils.kernels.adamw_step import AdamWStep
from megablocks_utils.mesh.placement import is_replicated

__all__ = [
    "StochasticRoundingAdamW",
    "local_part",
    "shard_coordinate",
    "stochastic_round_",
    "store",
]

_DROPPED_BITS = 0xFFFF  # bfloat16 is the upper half of a float32
_STATES = ("exp_avg", "exp_avg_sq")
_CHUNK_ELEMENTS = 2**18  # worked on at a time: what fits a CPU's cache


def stochastic_round_(
    target: torch.Tensor, source: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Round `source` (float32) into `target` (bfloat16) at random, right in expectation.

    A value between two neighbours goes to the farther from zero with probability equal to its
    relative distance from the nearer, in steps of 2^-16. Representable values, infinities and NaN
    are kept as they are; a finite value above the largest bfloat16 may become infinite.

    Returns:
        `target`.
    """
    noise = _random_16_bits(source, generator)
    rounded = source.view(torch.int32).add(noise).bitwise_and_(~_DROPPED_BITS).view(torch.float32)
    return target.copy_(torch.where(source.isnan(), source, rounded))


def shard_coordinate(parameter: torch.Tensor, plain_shard: int = 0) -> tuple[int, ...]:
    """Return which shard of a parameter this rank holds: equal on ranks that hold copies.

    Args:
        parameter: for a DTensor the answer is its coordinate on the mesh axes that shard it.
        plain_shard: the answer for a tensor that is no DTensor: 0 where every rank holds a copy,
            the rank where each holds a piece (FSDP1).
    """
    if is_replicated(parameter):
        return ()
    if not isinstance(parameter, DTensor):
        return (plain_shard,)
    coordinate = parameter.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is not on the parameter's mesh"
    placed = zip(coordinate, parameter.placements, strict=True)
    return tuple(index for index, placement in placed if not placement.is_replicate())


class StochasticRoundingAdamW(torch.optim.Optimizer):
    """AdamW computed in float32 on local shards, stored in whatever dtype weights and states have.

    In float32 throughout it equals `torch.optim.AdamW`. States kept in bfloat16 are always rounded
    stochastically: with beta2 = 0.999 the second moment moves by at most 1e-3 of itself per step,
    below half of bfloat16's step, so rounded to nearest it would freeze.

    Args:
        params: parameters or groups, in the same order on every rank; DTensors on any mesh, plain
            tensors, and any mixture.
        state_dtype: of both moments, which are placed as their parameter is.
        stochastic_weights: False rounds bfloat16 weights to nearest.
        seed: equal on all ranks.
        plain_shard: see `shard_coordinate`.

    Example:
        ```python
        optimizer = StochasticRoundingAdamW(model.parameters(), lr=5e-5, seed=42)
        ```
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        state_dtype: torch.dtype = torch.bfloat16,
        stochastic_weights: bool = True,
        seed: int = 0,
        plain_shard: int = 0,
    ) -> None:
        self._state_dtype = state_dtype
        self._stochastic_weights = stochastic_weights
        self._seed = seed
        self._plain_shard = plain_shard
        self._numbers: dict[torch.Tensor, int] = {}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update_group(group)
        return loss

    def _update_group(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.grad is not None:
                self._update(self._numbers[parameter], parameter, group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, and number them: their random bits depend on it.

        An update of some of them must not number them anew.
        """
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self._numbers[parameter] = len(self._numbers)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, keeping the states' own dtype.

        PyTorch casts them to the parameter's, which would cut float32 states of bfloat16 weights.
        """
        super().load_state_dict(state_dict)
        saved_numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in zip(saved_numbers, parameters, strict=True):
            saved = state_dict["state"].get(number, {})
            for name, value in saved.items():
                if name != "step":
                    value = value.to(parameter.device, self._state_dtype)
                    self.state[parameter][name] = value

    def _update(self, number: int, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in _STATES:
                state[name] = torch.zeros_like(parameter, dtype=self._state_dtype)
        state["step"] += 1
        adamw = AdamWStep(
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=int(state["step"]),
        )
        seed = self._seed_of(adamw.step, number, parameter)
        tensors = [parameter, parameter.grad, *(state[name] for name in _STATES)]
        pieces = tuple(local_part(tensor, parameter) for tensor in tensors)
        if _takes_kernel(pieces):
            self._run_kernel(pieces, adamw, seed)
            return
        generator = torch.Generator(parameter.device)
        generator.manual_seed(seed)
        for chunk in _chunks(pieces):
            self._update_chunk(chunk, adamw, generator)

    def _run_kernel(self, pieces: tuple[torch.Tensor, ...], adamw: AdamWStep, seed: int) -> None:
        from megablocks_utils.kernels.fused.adamw import run_adamw

        weight, gradient, exp_avg, exp_avg_sq = pieces
        moments = (exp_avg, exp_avg_sq)
        is_stochastic = self._stochastic_weights
        run_adamw(weight, gradient, *moments, adamw, seed=seed, is_weight_stochastic=is_stochastic)

    def _update_chunk(
        self, chunk: tuple[torch.Tensor, ...], adamw: AdamWStep, generator: torch.Generator
    ) -> None:
        """Make one step of AdamW on equal pieces of weight, gradient and both moments."""
        weight, gradient, exp_avg, exp_avg_sq = chunk
        beta1, beta2 = adamw.betas
        gradient32, average32 = gradient.float(), exp_avg.float()
        square32, weight32 = exp_avg_sq.float(), weight.float()

        average32.lerp_(gradient32, 1 - beta1)
        square32.mul_(beta2).addcmul_(gradient32, gradient32, value=1 - beta2)
        scale = square32.sqrt().div_(adamw.scale_correction).add_(adamw.eps)
        weight32.mul_(adamw.kept_weight)
        weight32.addcdiv_(average32, scale, value=-adamw.step_size)

        store(exp_avg, average32, generator)
        store(exp_avg_sq, square32, generator)
        store(weight, weight32, generator if self._stochastic_weights else None)

    def _seed_of(self, step: int, number: int, parameter: torch.Tensor) -> int:
        """Return a seed equal on the ranks that hold copies, unrelated between shards and steps."""
        key = (self._seed, step, number, shard_coordinate(parameter, self._plain_shard))
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)


def _random_16_bits(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return int32 numbers uniform over [0, 2^16) in the shape of `like`, four from each draw."""
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    draws.random_(-(2**63), None, generator=generator)
    bits = draws.view(torch.int16)[: like.numel()].view(like.shape)
    return bits.to(torch.int32).bitwise_and_(_DROPPED_BITS)


def local_part(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that lies here, as the parameter's part does."""
    if not isinstance(tensor, DTensor):
        return tensor
    assert isinstance(parameter, DTensor), "a state is sharded as its parameter is"
    if tensor.placements != parameter.placements:
        tensor = tensor.redistribute(placements=parameter.placements)
    return tensor.to_local()


def _takes_kernel(pieces: tuple[torch.Tensor, ...]) -> bool:
    """Say whether the kernel makes the update: on a GPU, where the pieces lie alike."""
    return pieces[0].is_cuda and all(piece.is_contiguous() for piece in pieces)


def _chunks(tensors: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Cut equally shaped tensors into pieces small enough for float32 copies; views, not copies."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        return iter([tensors])
    return zip(*(tensor.view(-1).split(_CHUNK_ELEMENTS) for tensor in tensors), strict=True)


def store(target: torch.Tensor, value: torch.Tensor, generator: torch.Generator | None) -> None:
    """Write a float32 result back; a float32 target was updated in place already."""
    if target.dtype == torch.float32:
        return
    if generator is not None and target.dtype == torch.bfloat16:
        stochastic_round_(target, value, generator)
    else:
        target.copy_(value)
