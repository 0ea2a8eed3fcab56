"""Be the ranks of one system: build it, then take a step whenever the parent process asks for one.

    python benchmarks/end_to_end/drive.py SPEC.json COMMAND_FD:ANSWER_FD ...     (a pair each rank)

Started by `systems.py`. The systems `script` and `script of another revision` are whatever
`train_accelerate_fsdp2.py` lies in the tree that the specification names, so that nothing of this
checkout is imported for them: only the standard library, torch and that tree.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

SCRIPT = "script"
_LIBRARIES = "megablocks_utils/processes/libraries.py"
_LOOP, _SCRIPT_MODULE = "megablocks_utils.training.loop", "train_accelerate_fsdp2"
_PADDING_IDS = 3
"""Ids below are never in the data: padding, and the one token of an empty micro-batch."""


class Gate:
    """Where a rank waits for the parent between two steps, and answers it.

    Args:
        commands: file to read a line from for each step; at its end this process is over.
        answers: file to write a line of JSON to after each step.
        vocab_size: of the model, whose tokens are counted.
    """

    def __init__(self, commands: int, answers: int, vocab_size: int) -> None:
        self._commands, self._answers = os.fdopen(commands), os.fdopen(answers, "w")
        self._tokens = TokenCount(vocab_size)
        self._base_bytes = read_resident()["VmRSS"]
        self._cpu_s = 0.0

    def wait(self) -> None:
        """Wait for the next step; the first time, say that this rank is ready."""
        if not self._cpu_s:
            self._write({"ready": True})
        command = self._commands.readline().strip()
        if not command:
            os._exit(0)
        self._tokens.start() if command == "count" else self._tokens.stop()
        self._cpu_s = time.process_time()

    def answer(self, loss_share: float) -> None:
        """Say what this rank's share of the step's loss is, and what the step took."""
        cpu_s = time.process_time() - self._cpu_s
        self._write(
            {
                "loss_share": loss_share,
                "cpu_s": cpu_s,
                "peak_bytes": self._read_peak(),
                "tokens": self._tokens.take(),
            }
        )

    def around(self, fit: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """Return a `fit` that waits before each step and answers after it."""

        def gated(*args: Any, **kwargs: Any) -> Iterator[Any]:
            steps = fit(*args, **kwargs)
            ranks = int(os.environ["WORLD_SIZE"])
            while True:
                self.wait()
                metrics = next(steps)
                self.answer(metrics.loss / ranks)
                yield metrics

        return gated

    def _read_peak(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return read_resident()["VmHWM"] - self._base_bytes

    def _write(self, line: dict[str, Any]) -> None:
        self._answers.write(f"{json.dumps(line)}\n")
        self._answers.flush()


class TokenCount:
    """Count how often each token goes into the model, by what its embedding is called with."""

    def __init__(self, vocab_size: int) -> None:
        self._counts = torch.zeros(vocab_size, dtype=torch.int64)
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def start(self) -> None:
        """Look at every call of an embedding from now on."""
        if self._hook is None:
            self._hook = register_module_forward_pre_hook(self._look)

    def stop(self) -> None:
        """Look no longer, which takes no time."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def take(self) -> list[int] | None:
        """Return the counts since the last call; None where nothing was looked at."""
        if self._hook is None:
            return None
        found: list[int] = self._counts.tolist()
        self._counts.zero_()
        return [0] * _PADDING_IDS + found[_PADDING_IDS:]

    def _look(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding) and module.num_embeddings == len(self._counts):
            ids = inputs[0].detach().flatten().cpu()
            self._counts += torch.bincount(ids, minlength=len(self._counts))


def read_resident() -> dict[str, int]:
    """Return bytes of resident memory of this process by the kernel's names."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.startswith("Vm"))
    return {name: 1024 * int(value.split()[0]) for name, value in pairs}


def train_script(argv: list[str], gate: Gate) -> None:
    """Run the tree's script, whose `fit` waits between steps."""
    loop = importlib.import_module(_LOOP)
    with patch.object(loop, "fit", gate.around(loop.fit)):
        importlib.import_module(_SCRIPT_MODULE).main(argv)


def set_up_allocators() -> None:
    """Do what the tree's commands do of it before torch is imported; older ones do nothing."""
    if Path(sys.path[0], _LIBRARIES).exists():
        importlib.import_module(_LIBRARIES.removesuffix(".py").replace("/", ".")).set_allocator()


def be_rank(rank: int, spec: dict[str, Any], commands: int, answers: int) -> None:
    """Build the system of the specification on this rank, and take its steps."""
    log = os.open(f"{spec['log']}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    os.environ.update(spec["environments"][rank])
    torch.set_num_threads(1)
    gate = Gate(commands, answers, spec["vocab_size"])
    if spec["system"] == SCRIPT:
        train_script(spec["argv"], gate)
        return
    contenders = importlib.import_module("benchmarks.end_to_end.contenders")
    contenders.train_other(spec["system"], spec["argv"], gate)


def main(argv: list[str]) -> int:
    """Import what all ranks need, then fork them, and return the first exit code that is not 0."""
    spec = json.loads(Path(argv[0]).read_text())
    pairs = [tuple(map(int, word.split(":"))) for word in argv[1:]]
    sys.path[0] = spec["tree"]  # in the place of this file's folder
    if spec["system"] == SCRIPT:
        set_up_allocators()
    for name in spec["preload"]:
        importlib.import_module(name)
    pids = []
    for rank, pair in enumerate(pairs):
        pid = os.fork()
        if pid == 0:
            for other in pairs:
                if other != pair:
                    _close(other)
            be_rank(rank, spec, *pair)
            os._exit(0)
        pids.append(pid)
    for pair in pairs:
        _close(pair)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return next((code for code in codes if code), 0)


def _close(pair: tuple[int, ...]) -> None:
    for descriptor in pair:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
