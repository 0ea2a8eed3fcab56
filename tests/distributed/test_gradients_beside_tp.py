"""A run whose tp ranks have different gradients of what each holds whole ends in its first step."""

import copy
from unittest import mock

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.fsdp import tensor_parallel
from megablocks_utils.mesh.placement import local_tensor
from megablocks_utils.training.loop import fit
from tests.support.parity import Layout, ParityCase, build_run


def _train_without_sums(rank, argv):
    """Leave each rank the gradients of its own heads; return the error and what had changed."""
    with mock.patch.object(tensor_parallel, "sum_gradient_over", lambda tensor, _: tensor):
        setup, state = build_run(argv)
        weights = [local_tensor(p.detach()) for p in state.model.parameters()]
        before = copy.deepcopy(weights)
        steps = []
        try:
            steps.extend(fit(state, setup))
        except ConfigurationError as error:
            changed = sum(not now.equal(was) for now, was in zip(weights, before, strict=True))
            return error.as_options(), len(steps), changed
    return "", len(steps), 0


def test_a_sum_that_is_missing_ends_all_ranks_before_weights_change(ranks2, parity_folder):
    """Norms of heads see each rank's heads alone; the run with their sums is one of parity's."""
    case = ParityCase(Layout(2, 2, tp_size=2), "qwen3_moe", num_steps=2, num_examples=20)
    for sentence, num_steps, num_changed in ranks2.run(
        _train_without_sums, parity_folder.argv(case)
    ):
        assert sentence.startswith("--tp_size is 2, but it must be 1 for this model")
        assert "q_norm.weight" in sentence or "k_norm.weight" in sentence
        assert (num_steps, num_changed) == (0, 0)
