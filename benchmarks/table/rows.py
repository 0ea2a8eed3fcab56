"""The rows of the table, and what was published of them. Imports no torch."""

from dataclasses import dataclass

PUBLISHED, OURS, TRANSFORMERS = "published", "ours", "transformers"

PUBLISHED_ON = (
    "foundation-model-stack/moe-distributed-training, README of 2024: Mixtral-8x7B-Instruct on "
    "Alpaca, 8 x A100-80GB, batch 1 a device, accumulation 16. Memory stands there as MiB; by its "
    "size it is decimal GB."
)
PUBLISHED_RANKS = 8
PUBLISHED_MICRO_STEPS = 1600
"""Inferred: the runtimes fit 100 optimizer steps of 16, not an epoch."""

_GB = 10**9


@dataclass(frozen=True)
class Published:
    """What was published of a row; all None where it ran out of memory.

    Attributes:
        runtime_s: of the whole run.
        peak_gb: decimal GB.
        allocated_gb: decimal GB, after a step.
        is_before_zero_grad: whether `allocated_gb` fits only with the gradients alive (inferred).
    """

    runtime_s: int | None = None
    peak_gb: int | None = None
    allocated_gb: int | None = None
    is_before_zero_grad: bool = False

    @property
    def is_oom(self) -> bool:
        """Whether it ran out of memory."""
        return self.runtime_s is None

    @property
    def micro_step_s(self) -> float | None:
        """Seconds of a micro-step, inferred."""
        return None if self.runtime_s is None else self.runtime_s / PUBLISHED_MICRO_STEPS

    @property
    def peak_bytes(self) -> int | None:
        """The peak in bytes."""
        return None if self.peak_gb is None else self.peak_gb * _GB

    @property
    def allocated_bytes(self) -> int | None:
        """What is held after a step, in bytes."""
        return None if self.allocated_gb is None else self.allocated_gb * _GB


@dataclass(frozen=True)
class Row:
    """One way to train the model.

    Attributes:
        name: what `--rows` calls it.
        group: `published`, `ours` or `transformers` (its own expert parallelism).
        use_lora: as the option.
        ep_share: the ep_size is the number of ranks over this; 0 is no expert parallelism.
        kernel: backend of the experts, as the option; of `transformers` and of rows without expert
            parallelism what transformers uses.
        expert_dp: as the option.
        published: what was published.
        notes: what a reader must know of it.
    """

    name: str
    group: str
    use_lora: str
    ep_share: int
    kernel: str = "grouped_mm"
    expert_dp: str = "shard"
    published: Published | None = None
    notes: tuple[str, ...] = ()

    def ep_size(self, ranks: int) -> int:
        """Return the ep_size on this number of ranks; 1 is no expert parallelism."""
        return ranks // self.ep_share if self.ep_share else 1

    def title(self, ranks: int, kernel: str | None = None) -> str:
        """Describe the row, with the backend that ran."""
        method = "full" if self.use_lora == "none" else f"LoRA r16 {self.use_lora}"
        if not self.ep_share:
            return f"{method}, no ep (FSDP2)"
        if self.group == TRANSFORMERS:
            return f"{method}, ep {self.ep_size(ranks)}, transformers"
        copies = {"replicate": ", copies", "shard": ", sharded"}[self.expert_dp]
        copies = copies if self.ep_size(ranks) < ranks else ""
        return f"{method}, ep {self.ep_size(ranks)}{copies}, {kernel or self.kernel}"


_COPIES = (
    "The seed kept copies of the experts over dp (and did not keep them equal); here their "
    "gradients are summed."
)
_SCATTERED_ADAPTERS = (
    "The scattermoe package runs experts without adapters: this project's own ScatterMoE-style "
    "kernels (triton) run in its place."
)
_CRASHES = "PEFT's adapters on experts do not work with transformers' expert parallelism."

ROWS = (
    Row("full-none", PUBLISHED, "none", 0, published=Published(3037, 59, 47, True)),
    Row("full-ep8", PUBLISHED, "none", 1, "megablocks", published=Published(871, 49, 36)),
    Row("full-ep4", PUBLISHED, "none", 2, "megablocks", "replicate", Published(), (_COPIES,)),
    Row("attn-none", PUBLISHED, "attn-only", 0, published=Published(2137, 22, 12)),
    Row("attn-ep8", PUBLISHED, "attn-only", 1, "megablocks", published=Published(878, 14, 12)),
    Row(
        "attn-ep4",
        PUBLISHED,
        "attn-only",
        2,
        "megablocks",
        "replicate",
        Published(878, 26, 25),
        (_COPIES,),
    ),
    Row(
        "attn-ep4-scattermoe",
        PUBLISHED,
        "attn-only",
        2,
        "scattermoe",
        "replicate",
        Published(831, 25, 24),
        (_COPIES,),
    ),
    Row(
        "all-ep4",
        PUBLISHED,
        "all",
        2,
        "triton",
        "replicate",
        Published(880, 26, 25),
        (_COPIES, _SCATTERED_ADAPTERS),
    ),
    Row("full-ep8-triton", OURS, "none", 1, "triton"),
    Row("full-ep4-shard", OURS, "none", 2, "triton"),
    Row("attn-ep8-triton", OURS, "attn-only", 1, "triton"),
    Row("attn-ep4-shard", OURS, "attn-only", 2, "triton"),
    Row("all-ep4-shard", OURS, "all", 2, "triton"),
    Row("stock-full-ep8", TRANSFORMERS, "none", 1),
    Row("stock-full-ep4", TRANSFORMERS, "none", 2),
    Row("stock-attn-ep8", TRANSFORMERS, "attn-only", 1),
    Row("stock-attn-ep4", TRANSFORMERS, "attn-only", 2),
    Row("stock-all-ep4", TRANSFORMERS, "all", 2, notes=(_CRASHES,)),
)
