"""Stochastic rounding: exact if possible, right on average, equal on copies and on resume."""

import copy
import math

import pytest
import torch

from megablocks_utils.training.step import stochastic_rounding
from megablocks_utils.training.step.stochastic_rounding import (
    StochasticRoundingAdamW,
    stochastic_round_,
)

INFINITY = float("inf")


def rounded(source, seed=0):
    target = torch.empty(source.shape, dtype=torch.bfloat16)
    return stochastic_round_(target, source, torch.Generator().manual_seed(seed))


def neighbours(value):
    """Return the two bfloat16 numbers around a float32 value, the one nearer to zero first."""
    pattern = torch.tensor(value).view(torch.int32)
    inner = pattern.bitwise_and(~0xFFFF)
    return [float(bits.view(torch.float32)) for bits in (inner, inner + 0x10000)]


@pytest.mark.parametrize(
    ("value", "draws"),
    [
        (1.001, 2**18),
        (-1.001, 2**18),
        (3.14159, 2**18 + 3),  # not a multiple of the four values in one draw
        (1.0 + 2**-23, 2**22),  # one part in 2^16: needs all sixteen random bits
        (-(2.0 - 2**-23), 2**22),  # and its mirror image, just below a power of two
        (1e-40, 2**18),  # subnormal
    ],
)
def test_rounding_is_unbiased(value, draws):
    """Each draw is the outer neighbour with probability p = (x - inner) / gap, else the inner one.

    So the mean of n draws has standard error gap * sqrt(p * (1 - p) / n); with the seed fixed, 4 of
    them (6e-5 two-sided) never fail by chance.
    """
    source = torch.full((draws,), value)
    exact, result = float(source[0]), rounded(source).double()
    inner, outer = neighbours(value)
    assert set(result.tolist()) == {inner, outer}
    probability = (exact - inner) / (outer - inner)
    error = abs(outer - inner) * math.sqrt(probability * (1 - probability) / draws)
    assert abs(float(result.mean()) - exact) <= 4 * error


def test_representable_values_and_infinities_are_kept_bit_for_bit():
    every_bfloat16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = every_bfloat16.view(torch.bfloat16)
    values = values[~values.isnan()]
    assert {INFINITY, -INFINITY} <= set(values.tolist())
    for seed in range(3):
        assert torch.equal(
            rounded(values.float(), seed).view(torch.int16), values.view(torch.int16)
        )


def test_every_nan_stays_nan():
    patterns = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1, -(2**23) + 1])
    nans = patterns.to(torch.int32).view(torch.float32).repeat(64)
    assert nans.isnan().all()
    assert rounded(nans).isnan().all()


def test_any_shape_and_stride_and_emptiness():
    source = torch.randn(6, 10).t()[1:, ::2]
    inner = source.contiguous().view(torch.int32).bitwise_and(~0xFFFF).view(torch.float32)
    result = rounded(source).float()
    assert result.shape == (9, 3)
    assert ((result - inner).abs() <= inner.abs() * 2**-7).all()
    assert rounded(torch.empty(0, 4)).shape == (0, 4)


def train(parameters, optimizer, gradients):
    for step_gradients in gradients:
        for parameter, gradient in zip(parameters, step_gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


def random_parameters(dtype, shapes=((5, 7), (33,), (0, 3))):
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [torch.nn.Parameter(value) for value in values]


def random_gradients(parameters, steps, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(p.shape, generator=generator).to(p.dtype) for p in parameters]
        for _ in range(steps)
    ]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [2**18, 8], ids=["whole", "chunked"])
def test_in_float32_it_is_pytorch_s_adamw(monkeypatch, weight_decay, chunk):
    monkeypatch.setattr(stochastic_rounding, "_CHUNK_ELEMENTS", chunk)
    ours, theirs = random_parameters(torch.float32), random_parameters(torch.float32)
    options = {"lr": 1e-2, "weight_decay": weight_decay}
    gradients = random_gradients(ours, 20)
    our_optimizer = StochasticRoundingAdamW(ours, state_dtype=torch.float32, **options)
    train(ours, our_optimizer, gradients)
    their_optimizer = torch.optim.AdamW(theirs, **options)
    train(theirs, their_optimizer, gradients)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-7)
        for name in ("exp_avg", "exp_avg_sq"):
            our_state, their_state = our_optimizer.state[our], their_optimizer.state[their]
            torch.testing.assert_close(our_state[name], their_state[name], rtol=1e-6, atol=1e-8)


def test_small_updates_are_lost_in_pure_bfloat16_and_kept_on_average_with_rounding():
    """Under a constant gradient Adam moves by lr a step: here 1e-4 where bfloat16's step is 2^-8.

    Each of k roundings has a standard deviation of at most half a gap, so the mean of n weights
    has standard error at most gap * sqrt(k / n) / 2 around 1 - k * lr.
    """
    steps, count, lr, gap = 50, 2**16, 1e-4, 2**-8
    gradients = [[torch.full((count,), 0.5, dtype=torch.bfloat16)]] * steps

    pure = [torch.nn.Parameter(torch.ones(count, dtype=torch.bfloat16))]
    train(pure, torch.optim.AdamW(pure, lr=lr, weight_decay=0.0), gradients)
    assert torch.equal(pure[0], torch.ones(count, dtype=torch.bfloat16))

    for state_dtype in (torch.bfloat16, torch.float32):
        kept = [torch.nn.Parameter(torch.ones(count, dtype=torch.bfloat16))]
        train(kept, StochasticRoundingAdamW(kept, lr=lr, state_dtype=state_dtype), gradients)
        assert kept[0].dtype == torch.bfloat16
        error = gap * math.sqrt(steps / count) / 2
        assert error < steps * lr / 50
        assert abs(float(kept[0].detach().double().mean()) - (1 - steps * lr)) <= 4 * error


def test_weights_are_rounded_to_nearest_on_request():
    weights = [torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))]
    optimizer = StochasticRoundingAdamW(weights, lr=1e-4, stochastic_weights=False)
    train(weights, optimizer, [[torch.ones(64, dtype=torch.bfloat16)]] * 5)
    assert torch.equal(weights[0], torch.ones(64, dtype=torch.bfloat16))


def test_second_moment_decays_where_round_to_nearest_freezes_it():
    """Without gradient the second moment shrinks by 1e-3 a step, below half of bfloat16's step.

    The mean over n elements has standard error at most gap * sqrt((k + 1) / n) / 2, as above.
    """
    steps, count = 200, 2**14
    gradients = [[torch.ones(count, dtype=torch.bfloat16)]]
    gradients += [[torch.zeros(count, dtype=torch.bfloat16)]] * steps

    nearest = [torch.nn.Parameter(torch.ones(count, dtype=torch.bfloat16))]
    optimizer = torch.optim.AdamW(nearest, lr=1e-3)
    train(nearest, optimizer, gradients[:1])
    first = optimizer.state[nearest[0]]["exp_avg_sq"].clone()
    train(nearest, optimizer, gradients[1:])
    assert torch.equal(optimizer.state[nearest[0]]["exp_avg_sq"], first)

    rounding = [torch.nn.Parameter(torch.ones(count, dtype=torch.bfloat16))]
    optimizer = StochasticRoundingAdamW(rounding, lr=1e-3)
    train(rounding, optimizer, gradients)
    mean = float(optimizer.state[rounding[0]]["exp_avg_sq"].double().mean())
    expected, gap = 1e-3 * 0.999**steps, 2.0**-17  # of the numbers between 2^-10 and 2^-9
    assert abs(mean - expected) <= 4 * gap * math.sqrt((steps + 1) / count) / 2
    assert expected < 0.85 * float(first[0])


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_saved_state_continues_bit_equal(state_dtype):
    parameters = random_parameters(torch.bfloat16)
    gradients = random_gradients(parameters, 6)
    options = {"lr": 1e-2, "state_dtype": state_dtype, "seed": 3}
    optimizer = StochasticRoundingAdamW(parameters, **options)
    train(parameters, optimizer, gradients[:3])

    resumed = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    resumed_optimizer = StochasticRoundingAdamW(resumed, **options)
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for ours, theirs in zip(parameters, resumed, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            loaded = resumed_optimizer.state[theirs][name]
            assert loaded.dtype == state_dtype
            assert torch.equal(loaded, optimizer.state[ours][name])

    train(parameters, optimizer, gradients[3:])
    train(resumed, resumed_optimizer, gradients[3:])
    for ours, theirs in zip(parameters, resumed, strict=True):
        assert torch.equal(ours, theirs)


def test_bits_depend_on_seed_step_and_parameter():
    def weights_after(seed, steps):
        twins = [torch.nn.Parameter(torch.ones(512, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = StochasticRoundingAdamW(twins, lr=1e-3, seed=seed)
        train(twins, optimizer, [[torch.ones(512, dtype=torch.bfloat16)] * 2] * steps)
        return twins

    first, second = weights_after(seed=0, steps=1)
    assert torch.equal(first, weights_after(seed=0, steps=1)[0])
    assert not torch.equal(first, second)
    assert not torch.equal(first, weights_after(seed=1, steps=1)[0])
    moved_in_step_1, moved_by_step_2 = first < 1, weights_after(seed=0, steps=2)[0] < first
    assert not torch.equal(moved_in_step_1, moved_by_step_2)


def test_a_parameter_without_gradient_is_left_alone():
    with_gradient, without = random_parameters(torch.bfloat16, ((4,), (4,)))
    before = without.detach().clone()
    optimizer = StochasticRoundingAdamW([with_gradient, without], weight_decay=0.5)
    with_gradient.grad = torch.ones_like(with_gradient)
    optimizer.step()
    assert torch.equal(without, before)
    assert list(optimizer.state) == [with_gradient]
