"""Check this project inside transformers' expert parallelism: `python -m tests.families.inside`.

Each family's tiny model is split as `DistributedConfig` says, on 2 and on 4 ranks, and its loss and
every gradient are compared with stock transformers in one process.
"""

import argparse
import logging
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.distributed import DistributedConfig
from transformers.utils.logging import disable_progress_bar

from megablocks_utils import register_ep_implementation
from tests.families.stock import load_stock
from tests.support.compare import relative_error
from tests.support.rank_pool import RankError, RankPool
from tests.support.tiny_families import save_tiny

__all__ = ["Sizes", "find_largest_error", "main"]

FAMILIES = (
    *("qwen3_5_moe_text", "gpt_oss", "qwen3_moe", "gemma4_text", "glm_moe_dsa", "glm4_moe"),
    *("glm4_moe_lite", "deepseek_v4", "nemotron_h", "deepseek_v3", "deepseek_v32", "kimi_k25"),
    *("minimax_m2", "minimax_m3_vl_text", "qwen3_next", "qwen3_vl_moe"),
)
TOLERANCE = 1e-5
# A gradient that is zero but for rounding: the norm of others is 1e-3 and more.
NO_GRADIENT = 1e-7


@dataclass(frozen=True)
class Sizes:
    """How transformers splits a model; every group of tp_size ranks has examples of its own."""

    ep_size: int
    fsdp_size: int
    tp_size: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.fsdp_size * self.tp_size

    def __str__(self) -> str:
        """Name them as the table does."""
        tp = f" tp {self.tp_size}" if self.tp_size > 1 else ""
        return f"ep {self.ep_size} fsdp {self.fsdp_size}{tp}"


LAYOUTS = (Sizes(2, 2), Sizes(2, 4), Sizes(2, 1, 2), Sizes(4, 4), Sizes(4, 2, 2))


def main(argv: Sequence[str]) -> int:
    """Check the families named, or the ten that matter, and return 1 if one is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.families.inside", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="the ten that matter")
    families = parser.parse_args(argv).families or FAMILIES
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()
    is_wrong = False
    with RankPool(2) as two, RankPool(4) as four, tempfile.TemporaryDirectory() as folder:
        for sizes, family in product(LAYOUTS, families):
            start = time.perf_counter()
            path = Path(folder, family)
            if not path.exists():
                save_tiny(family, path)
            seen = _check({2: two, 4: four}[sizes.world_size], path, sizes)
            is_wrong |= not seen.startswith("equal")
            seconds = time.perf_counter() - start
            sys.stdout.write(f"{family} | {sizes} | {seen} | {seconds:.1f} s\n")
            sys.stdout.flush()
    return int(is_wrong)


def _check(pool: RankPool, folder: Path, sizes: Sizes) -> str:
    try:
        error, name = find_largest_error(pool, folder, sizes)
        if error < TOLERANCE:
            return f"equal: {error:.1e}"
        wide, wide_name = find_largest_error(pool, folder, sizes, torch.float64)
    except RankError as failure:
        last = [report.strip().splitlines()[-1] for report in failure.reports.values()]
        return f"fails: {last[0]}"
    verdict = "equal in fp64" if wide < TOLERANCE else f"WRONG ({wide_name})"
    return f"{verdict}: {wide:.1e}; in fp32 {error:.1e} ({name})"


def find_largest_error(
    pool: RankPool, folder: Path, sizes: Sizes, dtype: torch.dtype = torch.float32
) -> tuple[float, str]:
    """Return the largest relative error of loss and gradients against stock, and where it is.

    Raises:
        RankError: the model was refused or its step failed.
    """
    stock = load_stock(folder, dtype)
    losses = [_loss_sum(stock, example) for example in range(sizes.fsdp_size)]
    (sum(losses, torch.zeros(())) / sizes.fsdp_size).backward()  # FSDP averages over the ranks
    seen = pool.run(run_in_transformers, str(folder), asdict(sizes), str(dtype))
    errors = {}
    for rank, (loss, grads) in enumerate(seen):
        wanted = losses[rank // sizes.tp_size].item()
        errors[abs(loss - wanted) / abs(wanted)] = "loss"
        errors |= {_error(grads, name, p.grad): name for name, p in stock.named_parameters()}
    return max(errors.items())


def _error(grads: Mapping[str, Tensor | None], name: str, wanted: Tensor | None) -> float:
    seen = grads[name]
    if wanted is None or wanted.norm() < NO_GRADIENT:
        return 0.0 if seen is None else float(seen.norm() >= NO_GRADIENT)
    return float("inf") if seen is None else relative_error(seen, wanted)


def run_in_transformers(
    rank: int, folder: str, sizes: dict[str, int], dtype: str
) -> tuple[float, dict[str, Tensor | None]]:
    """Return a rank's loss, and the gradients, whole."""
    logging.disable(logging.WARNING)
    register_ep_implementation()
    config = DistributedConfig(**sizes, ep_implementation="megablocks_utils")
    named = AutoConfig.from_pretrained(folder)
    is_text = type(named) in AutoModelForCausalLM._model_mapping
    auto = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    model = auto.from_pretrained(
        folder,
        dtype=getattr(torch, dtype.removeprefix("torch.")),
        distributed_config=config,
        experts_implementation="eager" if dtype == "torch.float64" else None,
    ).train()
    if dtype == "torch.float64" and config.efsdp_size == 1:
        _divide_once(model, config.dp_size)
    loss = _loss_sum(model, rank // sizes["tp_size"])
    loss.backward()
    grads = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
    }
    return loss.item(), grads


def _divide_once(model: PreTrainedModel, dp_size: int) -> None:
    """Let FSDP2 divide the experts' gradients by the number of batches, not by its square.

    Where one rank holds all copies, torch 2.13 divides twice by the factor that transformers has
    set, unless it reduces in fp32 or bf16.
    """
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule) and name.endswith(".experts"):
            module.set_gradient_divide_factor(math.sqrt(dp_size))


def _loss_sum(model: PreTrainedModel, example: int) -> Tensor:
    """Return the loss of an example, which is of no other's length."""
    generator = torch.Generator().manual_seed(example)
    ids = torch.randint(3, 128, (1, 19 - 4 * example), generator=generator)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return cross_entropy(logits.to(wide), ids[0, 1:], reduction="sum")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
