"""Check a written adapter by its use: plain PEFT on plain transformers must give our logits."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from megablocks_utils.lora.file_check import AdapterCheckError

_HIGHER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
# Our rounding errors are of stock's size but not the same; a wrong adapter is far outside.
_FACTOR = 4


@dataclass(frozen=True)
class LogitsCheck:
    """Say how far logits are from stock in a higher precision: medians over tokens, relative.

    Attributes:
        ours: of the trained, sharded model.
        stock: of plain transformers and PEFT in the run's dtype of compute: its own rounding.
        effect: of leaving the adapter out; below `stock` the check can tell nothing.
    """

    ours: float
    stock: float
    effect: float


def check_logits(
    adapter_dir: Path,
    base_dir: Path,
    input_ids: Tensor,
    logits: Tensor,
    *,
    compute: torch.dtype,
    num_layers: int,
) -> LogitsCheck:
    """Load the adapter with plain PEFT, in this process on the CPU, and compare logits.

    Args:
        adapter_dir: the adapter's folder.
        base_dir: the base model's.
        input_ids: (1, T) tokens.
        logits: (1, T, V) of the trained model for them.
        compute: the run's dtype of compute. The reference is computed in the next higher one.
        num_layers: of the trained model, which may be a truncated one.

    Raises:
        AdapterCheckError: they differ by more than rounding explains.
    """
    base = AutoModelForCausalLM.from_pretrained(
        base_dir,
        dtype=_HIGHER[compute],
        experts_implementation="eager",  # fp64 has no grouped product
        num_hidden_layers=num_layers,
    )
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers by a name that transformers 5.23 has deprecated.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        model = PeftModel.from_pretrained(base, adapter_dir).eval()
    with torch.no_grad():
        exact = model(input_ids, use_cache=False).logits
        with model.disable_adapter():
            without = model(input_ids, use_cache=False).logits
        stock = model.to(compute)(input_ids, use_cache=False).logits
    found = LogitsCheck(*(_median_error(seen, exact) for seen in (logits, stock, without)))
    if found.ours > _FACTOR * found.stock:
        raise AdapterCheckError(
            f"plain PEFT loads the written adapter, but its logits are {found.ours:.1e} from those "
            f"of the trained model, where rounding explains {found.stock:.1e}"
        )
    return found


def needed_bytes(num_parameters: int, compute: torch.dtype) -> int:
    """Return the memory that the check needs for the model's weights."""
    return num_parameters * _HIGHER[compute].itemsize


def _median_error(seen: Tensor, exact: Tensor) -> float:
    """Return the median over tokens of the relative error of their logits.

    Of tokens, since where two experts' routing weights tie, rounding alone may choose another.
    """
    difference = (seen.cpu().double() - exact.double()).norm(dim=-1)
    return (difference / exact.double().norm(dim=-1)).median().item()
