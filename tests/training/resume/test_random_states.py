"""Random states come back, and a file that holds none is one sentence that changes nothing."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from megablocks_utils.errors import CheckpointError
from megablocks_utils.training.resume.random_states import (
    capture_random_states,
    restore_random_states,
)

PATH = Path("checkpoint-1/rng-00000.json")


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_the_same_numbers_are_drawn_again():
    states = capture_random_states()
    drawn = draw()
    restore_random_states(states, PATH)
    assert draw() == drawn


GOOD = json.loads(capture_random_states())
CONTENTS = [b"", b"[]", b"{}", b"null", b"[" * 200_000, b'{"python": NaN}', b"\xff"]
CONTENTS += [
    json.dumps(GOOD | changes).encode()
    for changes in (
        *({"python": None}, {"python": [3, [1], None]}, {"python": [9, GOOD["python"][1], None]}),
        *({"numpy": None}, {"numpy": ["MT19937", [1], 0, 0, 0.0]}, {"numpy": ["x", 1, 2, 3, 4]}),
        *({"torch": None}, {"torch": "AAAA"}, {"torch": 3}, {"torch": "\u00e9"}),
    )
]


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_other_contents_are_one_sentence(content):
    with pytest.raises(CheckpointError) as error:
        restore_random_states(content, PATH)
    assert str(error.value).startswith(f"{PATH} ") and "\n" not in str(error.value)
