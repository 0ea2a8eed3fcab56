"""Machines that tests choose backends on, and modules that stand in for optional ones."""

import sys
from types import ModuleType

from megablocks_utils.kernels.device import DeviceFacts

CPU = DeviceFacts("cpu", None, False, "2.13.0", "3.9.0")
H100 = DeviceFacts("NVIDIA H100 80GB HBM3", (9, 0), False, "2.13.0", "3.9.0")
V100 = DeviceFacts("Tesla V100", (7, 0), False, "2.13.0", "3.9.0")
INTERPRETER = DeviceFacts("cpu", None, True, "2.13.0", "3.9.0")


def run_nothing(tokens, order, top_k_weights, experts, **_options):
    """Stand in for a backend that cannot run here."""
    return tokens


def put_module(monkeypatch, name, **members) -> ModuleType:
    """Make `import megablocks_utils.kernels.<name>` find a module with these members."""
    package, _, last = f"megablocks_utils.kernels.{name}".rpartition(".")
    module = ModuleType(f"{package}.{last}")
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys.modules[package], last, module, raising=False)
    return module


def put_adapter(monkeypatch, name, *, is_installed=True, unsupported_reason=None) -> None:
    """Stand in for the adapter of an optional package."""
    put_module(
        monkeypatch,
        name,
        **{
            f"run_experts_{name}": run_nothing,
            f"find_{name}_obstacle": lambda *arguments: unsupported_reason,
            f"{name.upper()}_INSTALL": f"pip install {name}",
            f"is_{name}_installed": lambda: is_installed,
        },
    )


def put_triton(monkeypatch, run=run_nothing, *, is_installed=True) -> None:
    """Stand in for our Triton kernels, and say whether there is a Triton."""
    put_module(monkeypatch, "fused.experts", run_experts_triton=run)
    monkeypatch.setattr(
        "megablocks_utils.kernels.available.is_triton_installed", lambda: is_installed
    )
