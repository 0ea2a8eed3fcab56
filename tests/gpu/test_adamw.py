"""The optimizer's kernel on a real GPU gives the bits that the interpreter gives.

PYTHONPATH=. python -m pytest -q -rs tests/gpu
"""

import pytest
import torch

from megablocks_utils.kernels.fused.adamw import run_adamw
from tests.kernels.fused.test_adamw import NUM_ELEMENTS, SEED, STEP, exact_update, noises, pieces

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_update_is_torchs_rounded_with_philoxs_bits():
    start = pieces({})
    wanted, bits = exact_update(start), noises(SEED, NUM_ELEMENTS)
    got = {name: value.cuda() for name, value in start.items()}
    run_adamw(*got.values(), STEP, seed=SEED, is_weight_stochastic=True)
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        rounded = (wanted[name].view(torch.int32) + bits[name]).bitwise_and(~0xFFFF)
        rounded = rounded.view(torch.float32).to(torch.bfloat16)
        # A last place of fp32 decides the rounding of one element in about 2^15.
        assert (got[name].cpu() != rounded).sum() <= 2, name
