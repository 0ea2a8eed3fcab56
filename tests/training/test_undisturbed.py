"""What an evaluation leaves as it was: modes, random states, gradients."""

import random

import numpy as np
import torch
from torch import nn

from megablocks_utils.training.evaluation.undisturbed import undisturbed


def test_modes_and_random_states_are_those_before():
    """A model of which one part is in evaluation already; everything draws within."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    model[1].eval()
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    with undisturbed(model):
        ones = torch.ones(8, requires_grad=True)
        assert torch.equal(model(ones), ones) and not (2 * ones).requires_grad
        draws = random.random(), np.random.rand(), torch.rand(1)
        assert len(draws) == 3
    assert [module.training for module in model.modules()] == [True, True, False]
    assert torch.is_grad_enabled()
    after = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    assert after == states
