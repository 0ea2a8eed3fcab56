"""What glibc keeps of freed memory in a process that was told to give it back."""

import json
import os
import subprocess
import sys

import pytest
import torch

from megablocks_utils.config import parse_args
from megablocks_utils.processes import start
from megablocks_utils.processes.freed_memory import read_kept_bytes
from megablocks_utils.processes.launch import LaunchEnvironment

# Frees every second of 64 blocks of 1 MiB, once a larger one has raised glibc's threshold.
PROGRAM = """
import json, sys
from megablocks_utils.processes.freed_memory import give_back_freed_memory, read_kept_bytes

large = bytearray(2**24)
del large
if sys.argv[1] == "True":
    give_back_freed_memory()
before = read_kept_bytes()
blocks = [bytearray(2**20) for _ in range(64)]
del blocks[::2]
print(json.dumps(read_kept_bytes() - before))
assert "torch" not in sys.modules
"""


@pytest.mark.skipif(read_kept_bytes() is None, reason="another C library than glibc")
@pytest.mark.parametrize(
    ("gives_back", "set_up", "keeps"),
    [
        (False, {}, True),
        (True, {}, False),
        (True, {"MALLOC_MMAP_THRESHOLD_": str(2**25)}, True),
        (True, {"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={2**25}"}, True),
    ],
)
def test_holes_are_kept_unless_told_and_the_user_is_obeyed(gives_back, set_up, keeps):
    plain = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "GLIBC_"))}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(gives_back)],
        env=plain | set_up,
        capture_output=True,
        text=True,
        check=True,
    )
    # All 32 holes, or none: what Python itself allocates between takes less than one.
    assert (json.loads(result.stdout) > 31 * 2**20) == keeps, result.stdout


@pytest.mark.parametrize(
    ("device", "quantization", "times"), [("cpu", "nf4", 1), ("cpu", "none", 0), ("cuda", "nf4", 0)]
)
def test_it_is_told_where_packed_experts_are_on_a_cpu(device, quantization, times, monkeypatch):
    told = []
    monkeypatch.setattr(start, "start_processes", lambda *_, **__: torch.device(device))
    monkeypatch.setattr(start, "give_back_freed_memory", lambda: told.append(True))
    words = ["--use_lora", "all", "--expert_quantization", quantization]
    words += ["--use_megablocks_sharding", "True"]
    config = parse_args(words, entry_point="fsdp2")
    assert start.start_run(config, LaunchEnvironment()) == torch.device(device)
    assert len(told) == times
