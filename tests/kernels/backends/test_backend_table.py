"""Which backends can be named, where each runs, and what is said of one that cannot."""

import inspect
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import gelu

from megablocks_utils.config import backends as facts
from megablocks_utils.errors import ConfigurationError, MissingKernelError
from megablocks_utils.kernels.backends.backend_table import BACKENDS, check_backend
from megablocks_utils.kernels.fused.tiles import choose_tiles
from megablocks_utils.kernels.gate import (
    Activation,
    ActivationGate,
    Clamp,
    KnownActivation,
    KnownGate,
)
from megablocks_utils.kernels.shapes import ExpertShapes
from tests.kernels.facts import CPU, H100, INTERPRETER, V100, put_packages, put_triton

RELU_SQUARED = Activation.RELU_SQUARED
ON_CPU = ExpertShapes(64, 96, torch.float32, "cpu")
ON_CUDA = ExpertShapes(64, 96, torch.bfloat16, "cuda")
FP64, FP32 = replace(ON_CUDA, dtype=torch.float64), replace(ON_CUDA, dtype=torch.float32)
LORA, GELU = replace(ON_CUDA, mode="lora"), replace(ON_CUDA, gate=ActivationGate(gelu))
ALL_PACKAGES = [name for backend in BACKENDS.values() for name in backend.packages]


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    put_packages(monkeypatch, *ALL_PACKAGES)


def refusal(kernel, shapes, device, kind=ConfigurationError):
    with pytest.raises(kind) as caught:
        check_backend(kernel, shapes, device)
    assert type(caught.value) is kind
    assert caught.value.parameters == ("kernel",)
    return str(caught.value)


def test_options_and_backends_know_the_same_ones_in_the_same_order():
    assert [backend.facts for backend in BACKENDS.values()] == list(facts.BACKENDS)


def test_every_backend_says_how_it_is_installed():
    for backend in BACKENDS.values():
        assert (backend.install is None) == (not backend.packages), backend.name
        takes = list(inspect.signature(backend.load(None)).parameters)[:4]
        assert takes == ["tokens", "order", "top_k_weights", "experts"], backend.name


RUNS_HERE = [
    ("eager", FP64, H100),
    ("eager", ON_CPU, CPU),
    ("grouped_mm", ON_CPU, CPU),
    ("grouped_mm", GELU, H100),
    ("triton", ON_CPU, INTERPRETER),
    ("triton", replace(LORA, hidden_size=63, dtype=torch.float16), H100),
    (
        "triton",
        replace(
            ON_CUDA, gate=KnownGate(clamp=Clamp.GPT_OSS, limit=7.0, alpha=1.702), has_bias=True
        ),
        H100,
    ),
    ("triton", replace(ON_CUDA, gate=KnownActivation(RELU_SQUARED), has_gate=False), H100),
    ("scattermoe", FP32, H100),
    ("scattermoe", replace(GELU, has_bias=True), H100),
    ("scattermoe", ON_CPU, INTERPRETER),
    ("megablocks", ON_CUDA, H100),
]
NEEDS_GPU = "needs a CUDA device (or TRITON_INTERPRET=1, Triton's interpreter, for tests)"
KNOWN_GATES = (
    "knows gates and activations with silu, gelu_tanh or relu_squared, and this model's is another"
)
CANNOT_RUN = [
    ("grouped_mm", FP64, H100, "grouped_mm computes in bfloat16, float16 or float32, not float64"),
    (
        "grouped_mm",
        replace(ON_CUDA, hidden_size=68),
        H100,
        "grouped_mm needs hidden_size (68) to be a multiple of 8 in bfloat16",
    ),
    (
        "grouped_mm",
        ON_CUDA,
        V100,
        "grouped_mm needs compute capability 8.0 or newer, and Tesla V100 has 7.0",
    ),
    ("triton", ON_CPU, CPU, f"triton {NEEDS_GPU}"),
    ("triton", FP64, H100, "triton computes in bfloat16, float16 or float32, not float64"),
    (
        "triton",
        GELU,
        H100,
        f"triton {KNOWN_GATES}",
    ),
    ("scattermoe", LORA, H100, "scattermoe does not support LoRA on experts"),
    ("scattermoe", ON_CPU, CPU, f"scattermoe {NEEDS_GPU}"),
    (
        "scattermoe",
        replace(ON_CPU, dtype=torch.bfloat16),
        INTERPRETER,
        "scattermoe in Triton's interpreter computes in float32 only, not bfloat16",
    ),
    ("megablocks", LORA, H100, "megablocks does not support LoRA on experts"),
    (
        "megablocks",
        replace(ON_CUDA, has_bias=True),
        H100,
        "megablocks does not support biases of experts",
    ),
    ("megablocks", FP32, H100, "megablocks computes in bfloat16, not float32"),
    ("megablocks", ON_CPU, CPU, "megablocks needs a CUDA device, and the device is cpu"),
]


@pytest.mark.parametrize(("kernel", "shapes", "device"), RUNS_HERE)
def test_what_can_run(kernel, shapes, device):
    assert BACKENDS[kernel].find_unsupported_reason(shapes, device) is None
    check_backend(kernel, shapes, device)


@pytest.mark.parametrize(("kernel", "shapes", "device", "reason"), CANNOT_RUN)
def test_what_cannot_run(kernel, shapes, device, reason):
    assert BACKENDS[kernel].find_unsupported_reason(shapes, device) == reason
    assert refusal(kernel, shapes, device).startswith(f"kernel is {kernel}, but {reason}; kernel ")


def test_an_unknown_name():
    assert refusal("fast", ON_CPU, CPU) == (
        "kernel is fast, but it must be auto, eager, grouped_mm, triton, scattermoe or megablocks."
    )


def test_a_refusal_says_what_works_instead():
    assert refusal("triton", GELU, H100) == (
        f"kernel is triton, but triton {KNOWN_GATES}; "
        "kernel eager, grouped_mm, scattermoe or megablocks works."
    )
    assert refusal("grouped_mm", ON_CUDA, V100).endswith("has 7.0; kernel eager works.")


@pytest.mark.parametrize("kernel", ["triton", "scattermoe", "megablocks"])
def test_a_missing_package_comes_with_its_install_line(kernel, monkeypatch):
    put_packages(monkeypatch, *(name for name in ALL_PACKAGES if name != kernel))
    assert refusal(kernel, ON_CUDA, H100, MissingKernelError) == (
        f"kernel is {kernel}, but {kernel} is not installed; install it with: "
        f"{BACKENDS[kernel].install}"
    )


def test_tiles_reach_our_kernels(monkeypatch):
    seen = []
    put_triton(monkeypatch, lambda *_inputs, **options: seen.append(options))
    tiles = choose_tiles(arch="sm_90", itemsize=2, rows=4096, num_experts=8)
    BACKENDS["triton"].load(tiles)(None, None, None, None)
    BACKENDS["triton"].load(None)(None, None, None, None)
    assert seen == [{"tiles": tiles}, {}]
