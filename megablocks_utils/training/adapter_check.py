"""After a LoRA run: is the adapter on disk the one that was trained?"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from megablocks_utils.byte_units import GIB
from megablocks_utils.checkpoint.load import build_model_on_meta
from megablocks_utils.checkpoint.stored_parts import find_kept_bits
from megablocks_utils.lora.file_check import (
    ExpertNorms,
    check_files,
    count_trained,
    measure_experts,
)
from megablocks_utils.lora.logits_check import LogitsCheck, check_logits, needed_bytes
from megablocks_utils.lora.settings import LoraSettings
from megablocks_utils.processes.agreement import broadcast_from_rank0
from megablocks_utils.training.evaluation.undisturbed import undisturbed
from megablocks_utils.training.report.memory import read_available_memory
from megablocks_utils.training.resume.run_state import RunState
from megablocks_utils.training.setup import Setup

_NUM_TOKENS = 128
AUTO_LIMIT_BYTES = 16 * GIB
"""Above it, `--verify_adapter auto` loads no model: the check must not outlast a short run."""


@dataclass(frozen=True)
class AdapterReport:
    """What the check found.

    Attributes:
        trained: adapters of single experts (one projection each) that got gradients.
        total: all of them.
        logits: comparison with plain PEFT; None if it was not made.
        skipped: why not.
    """

    trained: int
    total: int
    logits: LogitsCheck | None
    skipped: str | None

    def as_record(self) -> dict[str, Any]:
        """Return what `run.json` holds."""
        return asdict(self)

    def describe(self) -> str:
        """Describe it in a line or two."""
        experts = (
            f"{self.trained} of {self.total} expert adapters got gradients and are in the file"
        )
        parts = [experts] if self.total else []
        if self.logits is None:
            parts.append(f"not loaded with plain PEFT: {self.skipped}")
        else:
            logits = self.logits
            hidden = ", so they say little" if logits.is_hidden else ""
            parts.append(
                f"plain PEFT's logits differ by {logits.ours:.1e} from ours (its own rounding: "
                f"{logits.stock:.1e}; without the adapter: {logits.effect:.1e}{hidden})"
            )
        return "; ".join(parts)


class AdapterCheck:
    """Remember what was trained, then compare the written files with it.

    Args:
        setup: the run.
        model: wrapped, trained.
        optimizer: of the run.
        has_learned: whether any step had a learning rate above 0.

    Attributes:
        report: what was found, once called on rank 0.
    """

    report: AdapterReport | None = None

    def __init__(
        self, setup: Setup, lora: LoraSettings, state: RunState, *, has_learned: bool
    ) -> None:
        """**Collective:** measures on every rank of the world, and runs one forward pass."""
        self._setup = setup
        self._measured = _measure(setup, lora, state.optimizer if has_learned else None)
        # Each rank sees another amount of free memory.
        self._skipped = broadcast_from_rank0(partial(_find_skip_reason, setup))
        self._input_ids = torch.from_numpy(setup.schedule.examples[0][0][None, :_NUM_TOKENS])
        self._logits = None
        if self._skipped is None:
            self._logits = _run_forward(state.model, self._input_ids.to(setup.device))

    def __call__(self, folder: Path) -> None:
        """Check the files in a folder; rank 0 only.

        Raises:
            AdapterCheckError: they are not what was trained.
        """
        setup = self._setup
        plain = build_plain_model(setup)
        check_files(folder, plain, self._measured)
        logits = None
        if self._logits is not None:
            logits = check_logits(
                folder,
                setup.model_folder,
                self._input_ids,
                self._logits,
                compute=getattr(torch, setup.precision.compute),
                plain=plain,
                is_truncated=setup.config.model.truncate_layers is not None,
                weight_format=setup.config.adapter.packed_format,
                kept_bits=_find_kept_bits(setup),
            )
        self.report = AdapterReport(*count_trained(self._measured), logits, self._skipped)


def _find_kept_bits(setup: Setup) -> set[str]:
    """Return the experts' weights that are packed as the checkpoint has them."""
    packed_format = setup.config.adapter.packed_format
    if setup.sharded is None or packed_format is None:
        return set()
    specs = {path: module.spec for path, module in setup.sharded.expert_modules.items()}
    return find_kept_bits(setup.reader, specs, packed_format)


def build_plain_model(setup: Setup) -> PreTrainedModel:
    """Build the model of a run as transformers does, on meta, with as many layers."""
    layers = setup.config.model.truncate_layers
    return build_model_on_meta(setup.model_folder, truncate_layers=layers)


def _measure(
    setup: Setup, lora: LoraSettings, optimizer: Optimizer | None
) -> dict[str, ExpertNorms]:
    if setup.sharded is None or not lora.expert_ranks:
        return {}
    return measure_experts(setup.sharded, lora, {} if optimizer is None else optimizer.state)


def _find_skip_reason(setup: Setup) -> str | None:
    choice = setup.config.adapter.verify_adapter
    if choice == "False":
        return "--verify_adapter is False"
    needed = needed_bytes(setup.counts.total, getattr(torch, setup.precision.compute))
    room = min(read_available_memory() // 2, AUTO_LIMIT_BYTES)
    if choice == "True" or needed <= room:
        return None
    return (
        f"the model would take {needed / GIB:.1f} GiB in one process, and --verify_adapter auto "
        f"uses at most {room / GIB:.1f} GiB here"
    )


def _run_forward(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Return the logits (1, T, V) on the CPU; every rank runs the same tokens."""
    with undisturbed(model):
        return model(input_ids=input_ids, use_cache=False).logits.cpu()
