"""Memory and time of the loss: whole logits, torch's own linear cross entropy, and blocks.

    PYTHONPATH=. python -m benchmarks.loss_memory [WAY ...] [--labels 8192] [--vocabulary 151936]

Each way in a process of its own, fp32 on the CPU, a trained head: resident memory above the start,
without the gradients themselves, and how far the gradients are from those of whole logits. At full
size whole logits need 14 GiB; torch's way takes minutes. Prints a Markdown table.
"""

import argparse
import multiprocessing
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.report import markdown_table, say
from megablocks_utils.training.step.linear_cross_entropy import LogitsMap, linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
_PAGE_BYTES, _MIB = 4096, 2**20


def whole_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Hold all logits in fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def torch_own(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Use torch's operation with its defaults."""
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum")


def blocks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Use what both scripts use."""
    return linear_cross_entropy(hidden, weight, None, targets, LogitsMap())[0]


WAYS: dict[str, Loss] = {"whole": whole_logits, "torch": torch_own, "blocks": blocks}


@dataclass(frozen=True)
class Measurement:
    """One way, once."""

    peak_mib: float
    forward_s: float
    backward_s: float
    gradients: list[Tensor]


class _Peak(threading.Thread):
    """Watch resident memory until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.peak_bytes = _resident_bytes()
        self.is_over = False

    def run(self) -> None:
        """Look every millisecond."""
        while not self.is_over:
            self.peak_bytes = max(self.peak_bytes, _resident_bytes())
            time.sleep(0.001)


def measure(way: str, labels: int, vocabulary: int, hidden_size: int) -> Measurement:
    """Run forward and backward once."""
    torch.manual_seed(0)
    hidden = torch.randn(labels, hidden_size, requires_grad=True)
    weight = (torch.randn(vocabulary, hidden_size) / hidden_size**0.5).requires_grad_()
    targets = torch.randint(vocabulary, (labels,))
    WAYS["whole"](hidden[:4], weight, targets[:4]).backward()  # libraries set up
    hidden.grad = weight.grad = None
    peak = _Peak()
    peak.start()
    started = time.monotonic()
    loss = WAYS[way](hidden, weight, targets)
    between = time.monotonic()
    loss.backward()
    ended = time.monotonic()
    peak.is_over = True
    peak.join()
    gradients = [hidden.grad, weight.grad]
    held = sum(grad.numel() * grad.element_size() for grad in gradients if grad is not None)
    taken = (peak.peak_bytes - peak.start_bytes - held) / _MIB
    found = [grad for grad in gradients if grad is not None]
    return Measurement(taken, between - started, ended - between, found)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ways", nargs="*", default=["whole", "blocks"], metavar="WAY")
    parser.add_argument("--labels", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden_size", type=int, default=64)
    arguments = parser.parse_args()
    sizes = arguments.labels, arguments.vocabulary, arguments.hidden_size
    rows, reference = [], None
    for way in arguments.ways:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(measure, (way, *sizes))
        reference = reference or found.gradients
        errors = [
            float((seen - wanted).norm() / wanted.norm())
            for seen, wanted in zip(found.gradients, reference, strict=True)
        ]
        times = f"{found.forward_s:.1f}", f"{found.backward_s:.1f}"
        rows.append([way, f"{found.peak_mib:,.0f}", *times, f"{max(errors):.1e}"])
    head = ("way", "MiB", "forward s", "backward s", "gradients from the first way's")
    say(markdown_table(head, rows, num_left=1))


if __name__ == "__main__":
    main()
