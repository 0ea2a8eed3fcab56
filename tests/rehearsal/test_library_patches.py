"""Every patch is still needed: where one of these fails, its patch can go."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from megablocks_utils.rehearsal.assumptions import AssumedValues
from megablocks_utils.rehearsal.library_patches import (
    attention_of_a_gpu,
    copied_between_memories,
    no_launches,
    one_example_a_row,
    shape_grouped_mm,
    watch_resizes,
    without_values,
)


def test_the_fake_of_grouped_mm_refuses_fp32():
    with FakeTensorMode():
        rows, matrices = torch.empty(6, 16), torch.empty(2, 16, 32)
        ends = torch.empty(2, dtype=torch.int32)
        with pytest.raises(RuntimeError, match="BF16"):
            torch._grouped_mm(rows, matrices, offs=ends)
        assert shape_grouped_mm(rows, matrices, ends).shape == (6, 32)
        assert shape_grouped_mm(rows.T, torch.empty(6, 32), ends).shape == (2, 16, 32)


def test_the_fake_of_an_exchange_is_another_tensor_when_it_is_awaited():
    wait = torch.ops._c10d_functional.wait_tensor.default
    with FakeTensorMode():
        rows = torch.empty(6, 16)
        assert wait(rows) is not rows
        assert AssumedValues(1).answer(wait, (rows,)) is rows


def test_transformers_takes_fake_positions_for_several_examples():
    with FakeTensorMode():
        positions = torch.arange(8)[None]
        assert masking_utils.find_packed_sequence_indices(positions) is not None
        with one_example_a_row():
            assert masking_utils.find_packed_sequence_indices(positions) is None
    assert masking_utils.find_packed_sequence_indices(torch.arange(8)[None]) is None


def test_attention_on_a_cpu_keeps_scores_where_values_are_narrower():
    class Watch(TorchDispatchMode):
        names = ""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            type(self).names += str(func)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode():
        query, value = torch.empty(1, 2, 4, 16), torch.empty(1, 2, 4, 8)
        with Watch():
            functional.scaled_dot_product_attention(query, query, value)
        assert "softmax" in Watch.names
        Watch.names = ""
        with attention_of_a_gpu(), Watch():
            output = functional.scaled_dot_product_attention(query, query, value)
    assert "softmax" not in Watch.names
    assert output.shape == value.shape


def test_nothing_is_copied_to_the_same_device():
    fully_shard_places = "/torch/_fsdp_param.py", "/torch/_fsdp_collectives.py", "/elsewhere.py"
    tensor, on_host, is_copied = torch.ones(2), [], []
    assert tensor.to("cpu", non_blocking=True) is tensor
    with copied_between_memories(on_host.append):
        for place in fully_shard_places:
            moved = eval(compile('tensor.to("cpu")', place, "eval"), {"tensor": tensor})
            is_copied.append(moved is not tensor)
    assert is_copied == [True, True, False]
    assert len(on_host) == 1  # gradients


def test_no_dispatch_mode_sees_a_storage_resized():
    class Watch(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            type(self).calls += 1
            return func(*args, **(kwargs or {}))

    storage = torch.empty(8).untyped_storage()
    seen = []
    with Watch(), watch_resizes(lambda resized: seen.append(resized.nbytes())):
        storage.resize_(0)
    assert (Watch.calls, seen) == (0, [0])
    storage.resize_(4)
    assert seen == [0]


def test_the_triton_interpreter_cannot_take_fake_tensors(ranks1):
    assert ranks1.run(launch_on_fakes) == [(True, True)]


def launch_on_fakes(rank):
    """Say whether a launch fails without the patch, and does nothing with it."""
    triton = pytest.importorskip("triton")

    @triton.jit
    def kernel(pointer):
        triton.language.store(pointer, 1.0)

    with FakeTensorMode():
        target = torch.empty(4)
        try:
            kernel[(1,)](target)
            fails = False
        except Exception:  # noqa: BLE001 - whatever the interpreter stumbles over
            fails = True
        with no_launches():
            kernel[(1,)](target)
    return fails, True


def test_first_values_are_drawn_in_memory():
    weight = torch.full((8, 64), 2.0)
    with without_values():
        torch.nn.init.kaiming_uniform_(weight)
        torch.nn.init.uniform_(weight)
        weight.uniform_()
    assert weight.eq(2).all()
    assert torch.nn.init.kaiming_uniform_(weight).lt(2).all()
