"""Machines that tests select backends on, and what is installed on them."""

import sys
from types import ModuleType

from megablocks_utils.kernels.backends import backend
from megablocks_utils.kernels.device import DeviceFacts

CPU = DeviceFacts("cpu", None, False, "2.13.0", "3.9.0")
H100 = DeviceFacts("NVIDIA H100 80GB HBM3", (9, 0), False, "2.13.0", "3.9.0")
A100 = DeviceFacts("NVIDIA A100", (8, 0), False, "2.13.0", "3.9.0")
B200 = DeviceFacts("NVIDIA B200", (10, 0), False, "2.13.0", "3.9.0")
RTX_5090 = DeviceFacts("NVIDIA GeForce RTX 5090", (12, 0), False, "2.13.0", "3.9.0")
V100 = DeviceFacts("Tesla V100", (7, 0), False, "2.13.0", "3.9.0")
INTERPRETER = DeviceFacts("cpu", None, True, "2.13.0", "3.9.0")


def run_nothing(tokens, order, top_k_weights, experts, **_options):
    """Stand in for a backend that cannot run here."""
    return tokens


def put_packages(monkeypatch, *names) -> None:
    """Let these optional packages be installed, and no others."""
    monkeypatch.setattr(backend, "find_spec", lambda name: name if name in names else None)


def put_triton(monkeypatch, run=run_nothing) -> None:
    """Let Triton alone be installed, and `run` stand in for our kernels."""
    put_packages(monkeypatch, "triton")
    name = "megablocks_utils.kernels.fused.fused_experts"
    module = ModuleType(name)
    module.run_experts_triton = run
    monkeypatch.setitem(sys.modules, name, module)
