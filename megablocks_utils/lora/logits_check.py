"""Check a written adapter by its use: plain PEFT on plain transformers must give our logits."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from megablocks_utils.checkpoint.library_output import (
    filter_peft_warnings,
    without_transformers_bars,
)
from megablocks_utils.checkpoint.quantization_config import load_dequantized
from megablocks_utils.lora.file_check import AdapterCheckError
from megablocks_utils.moe.rounded_experts import round_experts

_HIGHER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
# Our rounding errors are of stock's size but not the same; a wrong adapter is far outside.
_FACTOR = 4
# Rounding is not quite without direction: stock itself showed 0.71 at an effect twice its size, and
# 1.23, where the trained model showed 1.34, at an effect four times its size.
_SHARE_BOUND = 0.25


@dataclass(frozen=True)
class LogitsCheck:
    """Say how far logits are from plain transformers and PEFT in a higher precision.

    Errors are medians over tokens, relative. In bfloat16 rounding can be as large as the whole
    effect of an adapter; but it has no direction, so the share shows what the errors cannot.

    Attributes:
        ours: error of the trained, sharded model.
        stock: error of plain transformers and PEFT in the run's dtype of compute: their rounding.
        effect: error of leaving the adapter out.
        share: how much of the adapter's change of the logits the trained model shows (its
            projection on that change), 1 without rounding; 1 too for an adapter without effect.
        stock_share: how much plain transformers and PEFT in the run's dtype show of it.
    """

    ours: float
    stock: float
    effect: float
    share: float
    stock_share: float = 1.0

    @property
    def is_hidden(self) -> bool:
        """Whether rounding is larger than the adapter's effect, so that logits can tell little."""
        return self.effect < self.stock

    def find_fault(self) -> str | None:
        """Say in a clause what is wrong, or return None."""
        if self.ours > _FACTOR * self.stock:
            return (
                f"its logits are {self.ours:.1e} from those of the trained model, where rounding "
                f"explains {self.stock:.1e}"
            )
        allowed = max(_SHARE_BOUND, _FACTOR * abs(self.stock_share - 1))
        if not self.is_hidden and abs(self.share - 1) > allowed:
            return f"the trained model's logits show {self.share:.1%} of the change it makes"
        return None


def check_logits(
    adapter_dir: Path,
    base_dir: Path,
    input_ids: Tensor,
    logits: Tensor,
    *,
    compute: torch.dtype,
    plain: PreTrainedModel,
    is_truncated: bool = False,
    weight_format: str | None = None,
    kept_bits: Collection[str] = frozenset(),
) -> LogitsCheck:
    """Load the adapter with plain PEFT, in this process on the CPU, and compare logits.

    Args:
        adapter_dir: the adapter's folder.
        base_dir: the base model's.
        input_ids: (1, T) tokens.
        logits: (1, T, V) of the trained model for them.
        compute: the run's dtype of compute. The reference is computed in the next higher one.
        plain: the trained model as transformers builds it, on meta.
        is_truncated: whether it has fewer layers than the base model.
        weight_format: what the trained model's experts are packed in, or None: the adapter was
            trained on what they dequantize to.
        kept_bits: names of experts' weights that the base model has in this format already.

    Raises:
        AdapterCheckError: they differ by more than rounding explains.
    """
    dequantized = load_dequantized(base_dir)
    with without_transformers_bars(), filter_peft_warnings():
        base = _find_auto_class(base_dir, type(plain)).from_pretrained(
            base_dir,
            dtype=_HIGHER[compute],
            experts_implementation="eager",  # fp64 has no grouped product
            **({"config": plain.config} if is_truncated else {}),
            **dequantized,
        )
        for parameter in base.parameters() if dequantized else ():
            # Transformers leaves those that are not quantized in the dtype they are stored in.
            parameter.data = parameter.data.to(_HIGHER[compute])
        if weight_format is not None:
            round_experts(base, weight_format, kept_bits)
        model = PeftModel.from_pretrained(base, adapter_dir).eval()
    exact = compute_logits(model, input_ids)
    with model.disable_adapter():
        without = compute_logits(model, input_ids)
    stock = compute_logits(model.to(compute), input_ids)
    found = compare_logits(logits, stock, exact, without)
    if fault := found.find_fault():
        raise AdapterCheckError(f"plain PEFT loads the written adapter, but {fault}")
    return found


@torch.no_grad()
def compute_logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Return a model's logits, also in float64 of one that casts to float32 within."""
    try:
        logits: Tensor = model(input_ids, use_cache=False).logits
    except RuntimeError:  # what it has cast meets a weight that is not
        with _KeepFloat64():
            logits = model(input_ids, use_cache=False).logits
    return logits


class _KeepFloat64(TorchFunctionMode):
    """Let `Tensor.float`, which shall widen bfloat16, leave float64 as it is."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def _find_auto_class(folder: Path, model_class: type[PreTrainedModel]) -> type[_BaseAutoModelClass]:
    """Return the class with which a user loads a folder as a model of `model_class`."""
    config_class = type(AutoConfig.from_pretrained(folder))
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        if config_class in auto_class._model_mapping:
            found = auto_class._model_mapping[config_class]
            if model_class in (found if isinstance(found, tuple) else (found,)):
                return auto_class
    return AutoModelForCausalLM


def compare_logits(ours: Tensor, stock: Tensor, exact: Tensor, without: Tensor) -> LogitsCheck:
    """Compare logits (1, T, V) of the trained model and of stock with those in higher precision.

    Args:
        ours: of the trained model.
        stock: of plain transformers and PEFT in the run's dtype of compute.
        exact: the same in a higher precision.
        without: as `exact`, without the adapter.
    """
    ours, stock, exact, without = (x.cpu().double() for x in (ours, stock, exact, without))
    return LogitsCheck(
        ours=_median_error(ours, exact),
        stock=_median_error(stock, exact),
        effect=_median_error(without, exact),
        share=_share(ours - without, exact - without),
        stock_share=_share(stock - without, exact - without),
    )


def needed_bytes(num_parameters: int, compute: torch.dtype) -> int:
    """Return the memory that the check needs for the model's weights."""
    return num_parameters * _HIGHER[compute].itemsize


def _median_error(seen: Tensor, exact: Tensor) -> float:
    """Return the median over tokens of the relative error of their logits.

    Of tokens, since where two experts' routing weights tie, rounding alone may choose another.
    """
    return ((seen - exact).norm(dim=-1) / exact.norm(dim=-1)).median().item()


def _share(change: Tensor, wanted: Tensor) -> float:
    size = wanted.square().sum()
    return 1.0 if size == 0 else ((change * wanted).sum() / size).item()
