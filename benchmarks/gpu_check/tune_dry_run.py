"""The search for tiles without a GPU: every step of `megablocks_utils.tune` but the measuring."""

import sys
from collections.abc import Sequence

import torch

from megablocks_utils.kernels.device import DeviceFacts, read_device_facts
from megablocks_utils.processes.entry_point import run_entry_point
from megablocks_utils.tune import parse_options, tune

_ANY_MS = 1.0


def main(argv: Sequence[str]) -> None:
    """Search as on a GPU of compute capability 9.0, whose every time is the same."""
    triton = read_device_facts("cpu").triton_version
    facts = DeviceFacts("none, a dry run", (9, 0), False, torch.__version__, triton)
    tune(parse_options(argv), facts, "cpu", lambda run: _ANY_MS)


if __name__ == "__main__":
    run_entry_point(main, sys.argv[1:])
