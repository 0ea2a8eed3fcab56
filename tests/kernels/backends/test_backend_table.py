"""Which backends can be named, and what is said of those that cannot run."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import gelu

from megablocks_utils.errors import ConfigurationError, MissingKernelError
from megablocks_utils.kernels.backends.backend_table import find_unsupported_reason, load, refuse
from megablocks_utils.kernels.fused.tiles import choose_tiles
from megablocks_utils.kernels.gate import ActivationGate, SwiGlu
from megablocks_utils.kernels.shapes import ExpertShapes
from tests.kernels.facts import (
    CPU,
    H100,
    INTERPRETER,
    V100,
    put_adapter,
    put_triton,
    run_nothing,
)

ON_CPU = ExpertShapes(64, 96, torch.float32, "cpu")
ON_CUDA = ExpertShapes(64, 96, torch.bfloat16, "cuda")
NEEDS_GPU = (
    "our Triton kernels need a CUDA GPU (on a CPU they run with TRITON_INTERPRET=1 alone, Triton's "
    "interpreter, for tests)"
)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    put_triton(monkeypatch)


def refusal(kernel, shapes, device, kind=ConfigurationError):
    with pytest.raises(kind) as caught:
        refuse(kernel, shapes, device)
    assert type(caught.value) is kind
    return str(caught.value)


def test_an_unknown_name():
    assert refusal("fast", ON_CPU, CPU) == (
        "--kernel is fast, but it must be auto, eager, grouped_mm, triton, scattermoe or "
        "megablocks."
    )


OBSTACLES = [
    (ON_CPU, CPU, NEEDS_GPU),
    (ON_CPU, INTERPRETER, None),
    (ON_CUDA, H100, None),
    (
        ON_CUDA,
        V100,
        "our Triton kernels need compute capability 8.0 or newer, and Tesla V100 has 7.0",
    ),
    (replace(ON_CUDA, dtype=torch.float64), H100, "our Triton kernels do not take float64"),
    (replace(ON_CUDA, dtype=torch.float16), H100, None),
    (replace(ON_CUDA, gate=SwiGlu(1.702, 7.0)), H100, None),
    (
        replace(ON_CUDA, gate=ActivationGate(gelu)),
        H100,
        "our Triton kernels know SwiGLU and its clamped form, and this model's gate is another",
    ),
    (replace(ON_CUDA, hidden_size=63, mode="lora"), H100, None),
]


@pytest.mark.parametrize(("shapes", "device", "unsupported_reason"), OBSTACLES)
def test_where_our_kernels_run(shapes, device, unsupported_reason):
    assert find_unsupported_reason("triton", shapes, device) == unsupported_reason


def test_a_refusal_says_what_works_instead():
    assert refusal("triton", ON_CPU, CPU) == (
        f"--kernel is triton, but {NEEDS_GPU}; --kernel grouped_mm or eager works."
    )
    assert refusal("triton", replace(ON_CUDA, gate=ActivationGate(gelu)), H100) == (
        "--kernel is triton, but our Triton kernels know SwiGLU and its clamped form, and this "
        "model's gate is another; --kernel grouped_mm or eager works."
    )
    assert refusal("grouped_mm", replace(ON_CUDA, hidden_size=68), H100) == (
        "--kernel is grouped_mm, but torch's grouped_mm needs hidden_size (68) to be a multiple of "
        "8 in bfloat16; --kernel triton or eager works."
    )
    assert refusal("grouped_mm", ON_CUDA, V100) == (
        "--kernel is grouped_mm, but torch's grouped_mm needs compute capability 8.0 or newer; "
        "--kernel eager works."
    )


@pytest.mark.parametrize("name", ["scattermoe", "megablocks"])
def test_optional_packages(name, monkeypatch):
    put_adapter(monkeypatch, name, is_installed=False)
    assert refusal(name, ON_CUDA, H100, MissingKernelError) == (
        f"--kernel is {name}, but {name} is not installed; install it with: pip install {name}"
    )
    assert (
        find_unsupported_reason(name, ON_CUDA, H100)
        == f"{name} is not installed (pip install {name})"
    )
    put_adapter(monkeypatch, name, unsupported_reason=f"{name} cannot")
    assert refusal(name, ON_CUDA, H100) == (
        f"--kernel is {name}, but {name} cannot; --kernel triton, grouped_mm or eager works."
    )
    put_adapter(monkeypatch, name)
    refuse(name, ON_CUDA, H100)
    assert load(name, None) is run_nothing


@pytest.mark.parametrize("name", ["scattermoe", "megablocks"])
def test_packages_are_asked_about_these_experts(name, monkeypatch):
    asked = []
    put_adapter(monkeypatch, name)
    monkeypatch.setattr(
        f"megablocks_utils.kernels.{name}.find_{name}_obstacle",
        lambda *arguments: asked.append(arguments),
    )
    find_unsupported_reason(name, replace(ON_CUDA, mode="lora"), H100)
    find_unsupported_reason(name, replace(ON_CUDA, mode="frozen"), H100)
    assert asked == [
        (64, 96, torch.bfloat16, "cuda", True),
        (64, 96, torch.bfloat16, "cuda", False),
    ]


def test_without_triton(monkeypatch):
    put_triton(monkeypatch, is_installed=False)
    assert refusal("triton", ON_CUDA, H100, MissingKernelError) == (
        "--kernel is triton, but triton is not installed; install it with: pip install triton"
    )


def test_tiles_reach_our_kernels(monkeypatch):
    seen = []
    put_triton(monkeypatch, lambda *_inputs, **options: seen.append(options))
    tiles = choose_tiles(arch="sm_90", itemsize=2, rows=4096, num_experts=8)
    load("triton", tiles)(None, None, None, None)
    load("triton", None)(None, None, None, None)
    assert seen == [{"tiles": tiles}, {}]
