"""Answers to held-out prompts end where the model ends them."""

import torch

from megablocks_utils.training.data.batches import Packing
from megablocks_utils.training.evaluation.greedy_answers import Prompt, answer_prompts
from megablocks_utils.training.evaluation.held_out_loss import HeldOut
from tests.support.tiny_models import build_tiny_model
from tests.support.tokenized import examples_of


def test_an_answer_holds_nothing_from_its_end_on():
    """Whatever token that is; answers side by side end one by one."""
    model = build_tiny_model("mixtral").eval()
    prompts = [Prompt([5, 6, 7], []), Prompt([9, 8], [])]
    held_out = HeldOut(examples_of([([1, 2], [-100, 2])]), 2, 0, 1, Packing.PADDED)

    def answer(*ends):
        with torch.no_grad():
            return answer_prompts(
                model, prompts, held_out, torch.device("cpu"), ends=ends, max_new_tokens=5
            )

    whole = answer()
    assert [len(tokens) for tokens in whole] == [5, 5]
    end = whole[0][2]
    for tokens, ended in zip(whole, answer(end), strict=True):
        assert ended == tokens[: tokens.index(end) if end in tokens else 5]
