"""Check a contender: its output and every gradient, at the timed size, against a plain loop.

The loop would not fit a large layer in high precision, and need not: a token's output does not
depend on other tokens. So a contender runs all T tokens, with a gradient that is zero except for a
sample of tokens spread evenly over them. Then its output and gradients of the sample, and all
gradients of weights, are those of the loop over the sample alone, and those of other tokens are
zero. A dropped tile, a race or an overflow at the real size is seen, which a check at a smaller
size would miss.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from benchmarks.harness.contender import Contender
from benchmarks.moe_layer.cases import Case
from benchmarks.moe_layer.inputs import PROJECTIONS, LayerInputs, LayerWeights
from benchmarks.moe_layer.ours import trained_leaves

ALLOWED = 2.0
"""How many times the error of the plain loop in the same dtype a contender may have."""
SAMPLE = 512


class WrongError(Exception):
    """Report a contender whose results are not those of the layer."""


@dataclass(frozen=True)
class Expected:
    """What a case must give for a sample of its tokens.

    Attributes:
        sample: indices of the tokens.
        results: by name, in high precision.
        bounds: by name, the largest relative error that is allowed.
    """

    sample: Tensor
    results: dict[str, Tensor]
    bounds: dict[str, float]


def describe_check() -> str:
    """Say how contenders are checked."""
    return (
        "before a contender is measured, its output and all gradients, at the timed size, are "
        f"compared with a plain loop over {SAMPLE} of the tokens in fp32 without TF32 (fp64 "
        f"for fp32 contenders), by relative norms; each may be {ALLOWED:g} times as far off as the "
        "same loop in the dtype of the contender."
    )


def compute_expected(case: Case, weights: LayerWeights, inputs: LayerInputs) -> Expected:
    """Run the plain loop over the sample, in high precision and in the dtype of the case."""
    sample = pick_sample(case.num_tokens, inputs.tokens.device)
    exact_dtype = torch.float64 if case.dtype == "float32" else torch.float32
    exact = _run_loop(case, weights, inputs, sample, exact_dtype)
    own = _run_loop(case, weights, inputs, sample, inputs.tokens.dtype)
    bounds = {name: ALLOWED * _relative_error(own[name], exact[name]) for name in exact}
    return Expected(sample, exact, bounds)


def pick_sample(num_tokens: int, device: torch.device) -> Tensor:
    """Return the indices of at most `SAMPLE` tokens, evenly spread, the first and the last too."""
    count = min(SAMPLE, num_tokens)
    places = torch.linspace(0, num_tokens - 1, count, dtype=torch.float64, device=device)
    return places.round().long()


def check_contender(contender: Contender, expected: Expected) -> dict[str, float]:
    """Run a contender and return what share of its bound each result uses, by name.

    Raises:
        WrongError: a result is missing, or past its bound.
    """
    assert contender.upstream is not None
    upstream = torch.zeros_like(contender.upstream)
    upstream[expected.sample] = contender.upstream[expected.sample]
    found = replace(contender, upstream=upstream).results()
    if found.keys() != expected.results.keys():
        raise WrongError(f"it has other results: {sorted(found.keys() ^ expected.results.keys())}")
    used = {}
    for name, tensor in found.items():
        if name in contender.inputs:
            _refuse_other_tokens(name, tensor, expected.sample)
        if name == "output" or name in contender.inputs:
            tensor = tensor[expected.sample]
        error, bound = _relative_error(tensor, expected.results[name]), expected.bounds[name]
        used[name] = error / bound if bound else error
        if not error <= bound:
            raise WrongError(f"{_title(name)} is off by {error:.1e}, more than {bound:.1e}")
    return used


def _refuse_other_tokens(name: str, gradient: Tensor, sample: Tensor) -> None:
    others = gradient.clone()
    others[sample] = 0
    if others.count_nonzero():
        raise WrongError(f"{_title(name)} is not zero at tokens without one")


def _run_loop(
    case: Case, weights: LayerWeights, inputs: LayerInputs, sample: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    cast = {name: tensor.to(dtype) for name, tensor in weights.named().items()}
    names = trained_leaves(case, weights).keys()
    trained = {name: cast[name].detach().clone().requires_grad_() for name in names}
    leaves = {
        name: tensor.detach()[sample].to(dtype).requires_grad_()
        for name, tensor in inputs.leaves().items()
    }
    output = _loop_over_experts(
        leaves["tokens"],
        inputs.top_k_index[sample],
        leaves["top_k_weights"],
        *_merge(cast | trained, weights.scaling),
    )
    wanted = leaves | trained
    upstream = inputs.upstream[sample].to(dtype)
    gradients = torch.autograd.grad(output, list(wanted.values()), upstream)
    return {"output": output.detach()} | dict(zip(wanted, gradients, strict=True))


def _merge(tensors: dict[str, Tensor], scaling: float) -> list[Tensor]:
    """Return both weights with their adapters, the obvious way: W + scaling * B A."""
    merged = []
    for name in PROJECTIONS:
        weight = tensors[name]
        if f"{name}.lora_A" in tensors:
            product = tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"]
            weight = weight + scaling * product
        merged.append(weight)
    return merged


def _loop_over_experts(
    tokens: Tensor, index: Tensor, top_k_weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    output = torch.zeros_like(tokens)
    for expert, (first, second) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        token, slot = (index == expert).nonzero(as_tuple=True)
        gate, up = linear(tokens[token], first).chunk(2, dim=-1)
        result = linear(silu(gate) * up, second)
        output = output.index_add(0, token, result * top_k_weights[token, slot, None])
    return output


def _relative_error(seen: Tensor, wanted: Tensor) -> float:
    # In the precision of the truth: copies in fp64 of a large layer's gradients would not fit.
    return ((seen.to(wanted.dtype) - wanted).norm() / wanted.norm()).item()


def _title(name: str) -> str:
    return name if name == "output" else f"the gradient of {name}"
