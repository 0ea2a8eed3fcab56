"""Systems that are compared: each in processes of its own, driven step by step from this one.

Between its turns a system waits for a line on a pipe, and takes no time from the others.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from benchmarks.end_to_end.drive import SCRIPT
from benchmarks.harness.launchers import free_port
from benchmarks.harness.processes import rank_environment
from benchmarks.harness.provenance import ROOT

_DRIVER = Path(__file__).with_name("drive.py")
_PRELOADED = (
    "accelerate",
    "matplotlib.figure",
    "peft",
    "torch.distributed.fsdp",
    "transformers.models.mixtral.modeling_mixtral",
)
_OWN = (
    "megablocks_utils.training.checkpointer",
    "megablocks_utils.training.loop",
    "megablocks_utils.training.recorder",
    "megablocks_utils.training.setup",
    "train_accelerate_fsdp2",
)
_OTHERS = ("benchmarks.end_to_end.contenders",)
_END_S = 20.0


@dataclass(frozen=True)
class SystemSpec:
    """A system to be started.

    Attributes:
        name: in tables.
        argv: options of our script; the other systems read from them what they train.
        kind: `script`, or a name that `contenders.train_other` knows.
        tree: checkout whose script runs.
        compares_later_steps: whether it starts from the same weights, adapters included, so that
            its later losses must agree too.
    """

    name: str
    argv: Sequence[str]
    kind: str = SCRIPT
    tree: Path = ROOT
    compares_later_steps: bool = True


@dataclass(frozen=True)
class StepTaken:
    """A step of a system, all its ranks together.

    Attributes:
        loss: of the global batch.
        wall_s: until the last rank was done.
        cpu_s: summed over ranks.
        peak_bytes: by rank, since its start, above what it held before it built anything.
        tokens: how often each token went into the model; None where that was not counted.
    """

    loss: float
    wall_s: float
    cpu_s: float
    peak_bytes: list[int]
    tokens: list[int] | None


class SystemEndedError(RuntimeError):
    """Report that a system ended, with the end of what its first rank at fault wrote."""


class System:
    """The running ranks of a system; a context that ends them.

    Args:
        spec: which.
        ranks: processes.
        vocab_size: of the model.
        folder: for its specification and logs; exists.
    """

    def __init__(self, spec: SystemSpec, ranks: int, vocab_size: int, folder: Path) -> None:
        self.spec, self._folder = spec, folder
        self._stack = ExitStack()
        self._commands: list[TextIO] = []
        self._answers: list[TextIO] = []
        port = free_port()
        described = {
            "system": spec.kind,
            "argv": list(spec.argv),
            "tree": str(spec.tree),
            "preload": [*(_OWN if spec.kind == SCRIPT else _OTHERS), *_PRELOADED],
            "log": str(folder / "rank"),
            "environments": [rank_environment(rank, ranks, port) for rank in range(ranks)],
            "vocab_size": vocab_size,
        }
        (folder / "spec.json").write_text(json.dumps(described))
        words = [self._open_pipes() for _ in range(ranks)]
        theirs = [descriptor for pair in words for descriptor in pair]
        self._process = subprocess.Popen(
            [
                sys.executable,
                str(_DRIVER),
                str(folder / "spec.json"),
                *(f"{read}:{write}" for read, write in words),
            ],
            cwd=spec.tree,
            env=os.environ | {"PYTHONPATH": str(spec.tree), "OMP_NUM_THREADS": "1"},
            pass_fds=theirs,
            stdout=subprocess.DEVNULL,
            stderr=(folder / "driver.txt").open("w"),
        )
        for descriptor in theirs:
            os.close(descriptor)

    def __enter__(self) -> "System":
        return self

    def __exit__(self, *_: object) -> None:
        for command in self._commands:
            command.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stack.close()

    def wait_until_ready(self) -> None:
        """Wait until all ranks have built the model.

        Raises:
            SystemEndedError: one has ended.
        """
        self._read_answers()

    def step(self, *, counts_tokens: bool = False) -> StepTaken:
        """Take a step on all ranks.

        Raises:
            SystemEndedError: a rank has ended.
        """
        start = time.perf_counter()
        for command in self._commands:
            command.write("count\n" if counts_tokens else "step\n")
            command.flush()
        answers = self._read_answers()
        wall_s = time.perf_counter() - start
        counts = [answer["tokens"] for answer in answers]
        return StepTaken(
            loss=sum(answer["loss_share"] for answer in answers),
            wall_s=wall_s,
            cpu_s=sum(answer["cpu_s"] for answer in answers),
            peak_bytes=[answer["peak_bytes"] for answer in answers],
            tokens=[sum(column) for column in zip(*counts, strict=True)] if counts_tokens else None,
        )

    def _open_pipes(self) -> tuple[int, int]:
        """Return what a rank reads commands from and writes answers to; keep the other ends."""
        command_read, command_write = os.pipe()
        answer_read, answer_write = os.pipe()
        self._commands.append(self._stack.enter_context(os.fdopen(command_write, "w")))
        self._answers.append(self._stack.enter_context(os.fdopen(answer_read)))
        return command_read, answer_write

    def _read_answers(self) -> list[Mapping[str, Any]]:
        found = []
        for rank, answer in enumerate(self._answers):
            line = answer.readline()
            if not line:
                raise SystemEndedError(
                    f"{self.spec.name}: rank {rank} ended: {self._read_log(rank)}"
                )
            found.append(json.loads(line))
        return found

    def _read_log(self, rank: int) -> str:
        paths = (self._folder / f"rank-{rank}.txt", self._folder / "driver.txt")
        texts = [path.read_text(errors="replace") for path in paths if path.exists()]
        lines = [line for text in texts for line in text.strip().splitlines()]
        return lines[-1] if lines else "it wrote nothing"
