"""The optimizer's kernel: torch's update, rounded with the bits that Philox gives, and one pass."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megablocks_utils.kernels.adamw_step import AdamWStep
from megablocks_utils.kernels.fused import adamw
from megablocks_utils.kernels.fused.adamw import PAIRS, ROUNDS, run_adamw
from megablocks_utils.training.step import stochastic_rounding
from megablocks_utils.training.step.stochastic_rounding import StochasticRoundingAdamW

BF16, FP32 = torch.bfloat16, torch.float32
STEP = AdamWStep(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, step=3)
SEED = 0x1234_5678_9ABC_DEF0
NUM_ELEMENTS = 2 * PAIRS + PAIRS + 77  # a whole program, and one that ends within its second half


def philox(seed: int, counter: np.ndarray, rounds: int) -> np.ndarray:
    """Compute Philox 4x32 (Salmon et al., SC11, section 3.4) of (counter, 0, 0, 0): (4, n)."""
    low = np.uint64(0xFFFFFFFF)
    c = [counter & low, counter >> np.uint64(32), counter * np.uint64(0), counter * np.uint64(0)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(rounds):
        left, right = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (right >> np.uint64(32)) ^ c[1] ^ np.uint64(key[0]),
            right & low,
            (left >> np.uint64(32)) ^ c[3] ^ np.uint64(key[1]),
            left & low,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c)


def noises(seed: int, num_elements: int) -> dict[str, torch.Tensor]:
    """Return the 16 random bits of each element, for what they round."""
    elements = np.arange(num_elements, dtype=np.uint64)
    program, within = np.divmod(elements, np.uint64(2 * PAIRS))
    half, pair = np.divmod(within, np.uint64(PAIRS))
    words = philox(seed, program * np.uint64(PAIRS) + pair, ROUNDS)
    columns = np.arange(num_elements)
    moments, other = words[2 * half.astype(int), columns], words[2 * half.astype(int) + 1, columns]
    mask = np.uint64(0xFFFF)
    found = {"exp_avg": moments & mask, "exp_avg_sq": moments >> np.uint64(16)}
    found["weight"] = other & mask
    return {name: torch.from_numpy(bits.astype(np.int32)) for name, bits in found.items()}


def test_philox_gives_its_published_numbers():
    """Known answers of the authors' Random123, kat_vectors: 7 and 10 rounds of zeros."""
    zero = np.zeros(1, dtype=np.uint64)
    assert [f"{word[0]:08x}" for word in philox(0, zero, 7)] == [
        *("5f6fb709", "0d893f64", "4f121f81", "4f730a48")
    ]
    assert f"{philox(0, zero, 10)[0][0]:08x}" == "6627e8d5"


def pieces(dtypes: dict[str, torch.dtype]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {
        name: torch.randn(NUM_ELEMENTS, generator=generator)
        for name in ("weight", "gradient", "exp_avg", "exp_avg_sq")
    }
    found["exp_avg_sq"].square_()
    return {name: value.to(dtypes.get(name, BF16)) for name, value in found.items()}


def exact_update(start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Compute the step in float32 by the operators of the CPU's path."""
    parameter = torch.nn.Parameter(start["weight"].float())
    optimizer = StochasticRoundingAdamW([parameter], state_dtype=FP32)
    found = {name: value.float().clone() for name, value in start.items()}
    chunk = tuple(found[name] for name in ("weight", "gradient", "exp_avg", "exp_avg_sq"))
    optimizer._update_chunk(chunk, STEP, torch.Generator())
    return found


@pytest.mark.parametrize(
    ("dtypes", "is_weight_stochastic"),
    [
        ({}, True),
        ({"exp_avg": FP32, "exp_avg_sq": FP32}, False),
        ({"weight": FP32, "gradient": FP32}, True),
    ],
    ids=["all in bfloat16", "float32 states", "float32 weights"],
)
def test_update_is_torchs_rounded_with_philoxs_bits(dtypes, is_weight_stochastic):
    start = pieces(dtypes)
    wanted, bits = exact_update(start), noises(SEED, NUM_ELEMENTS)
    got = {name: value.clone() for name, value in start.items()}
    run_adamw(*got.values(), STEP, seed=SEED, is_weight_stochastic=is_weight_stochastic)
    assert torch.equal(got["gradient"], start["gradient"])
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        exact = wanted[name]
        if got[name].dtype == FP32:
            # Rounded in another order: some units of fp32's last place of numbers around 1.
            torch.testing.assert_close(got[name], exact, rtol=1e-6, atol=2e-7)
            continue
        rounded = exact.to(BF16)
        if name != "weight" or is_weight_stochastic:
            rounded = (exact.view(torch.int32) + bits[name]).bitwise_and(~0xFFFF)
            rounded = rounded.view(FP32).to(BF16)
        # A last place of fp32 decides the rounding of one element in about 2^15.
        assert (got[name] != rounded).sum() <= 2, name


@pytest.mark.parametrize("pattern", [0x7F800000, 0xFF800000, 0x7FC00000, 0x7FFFFFFF], ids=hex)
def test_what_is_not_finite_stays_so(pattern):
    """Infinities and NaN; the last would become -0.0 by a carry into its sign."""
    start = pieces({"gradient": FP32})
    start["gradient"] = torch.full((NUM_ELEMENTS,), pattern, dtype=torch.int64)
    start["gradient"] = start["gradient"].to(torch.uint32).view(FP32)
    with np.errstate(invalid="ignore"):
        run_adamw(*start.values(), STEP, seed=SEED, is_weight_stochastic=True)
    assert not start["exp_avg"].isfinite().any()
    assert not start["weight"].isfinite().any()


class CountOperators(TorchDispatchMode):
    """Name torch's operators on more than one number."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        if isinstance(found, torch.Tensor) and found.numel() > 1:
            self.names.append(str(function))
        return found


@pytest.fixture
def with_kernel(monkeypatch):
    monkeypatch.setattr(stochastic_rounding, "_takes_kernel", lambda pieces: True)


def train(seed, num_steps=2):
    weights = [torch.nn.Parameter(torch.ones(3 * PAIRS, dtype=BF16)) for _ in range(2)]
    optimizer = StochasticRoundingAdamW(weights, lr=1e-3, seed=seed)
    for _ in range(num_steps):
        for weight in weights:
            weight.grad = torch.full_like(weight, 0.5)
        optimizer.step()
    return weights, optimizer


def test_a_step_moves_fourteen_bytes_a_parameter(with_kernel, monkeypatch):
    """Of the whole optimizer: the gradient read, weight and moments read and written."""
    weights, optimizer = train(seed=1)
    passed = []
    monkeypatch.setattr(adamw, "run_adamw", lambda *pieces, **_: passed.append(pieces[:4]))
    with CountOperators() as counted:
        optimizer.step()
    assert counted.names == []  # nothing but the kernel touches a parameter
    for (weight, gradient, *moments), parameter in zip(passed, weights, strict=True):
        assert weight.data_ptr() == parameter.data_ptr()
        num_bytes = [tensor.element_size() for tensor in (weight, *moments)]
        assert 2 * sum(num_bytes) + gradient.element_size() == 14


def test_bits_depend_on_seed_and_parameter_and_repeat(with_kernel):
    first, second = train(seed=1)[0]
    assert torch.equal(first, train(seed=1)[0][0])
    assert not torch.equal(first, second)
    assert not torch.equal(first, train(seed=2)[0][0])
    # Each step moves a weight by lr: on average kept, though bfloat16's step below 1 is 2^-8.
    error = 2**-8 * math.sqrt(2 / first.numel()) / 2
    assert abs(float(first.detach().double().mean()) - (1 - 2 * 1e-3)) <= 4 * error
