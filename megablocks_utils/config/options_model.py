"""What is trained, and on what: model, data, experts, adapters and dtypes.

Torch-free rows of the table `config.options.OPTIONS`.
"""

from megablocks_utils.config.backends import KERNEL_CHOICES
from megablocks_utils.config.option import Option

__all__ = ["MODEL_OPTIONS"]

MODEL_OPTIONS = (
    Option(
        "model_name_or_path",
        "text",
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        help="model to fine-tune: Hub name or local folder",
    ),
    Option(
        "data_path",
        "text",
        "data/alpaca_sample.json",
        help="local .json, .jsonl or .parquet file, or a Hub dataset name",
    ),
    Option(
        "use_megablocks_sharding",
        "boolean",
        False,
        help="expert parallelism: every process holds some of the experts and tokens travel",
    ),
    Option(
        "ep_size",
        "integer",
        None,
        help="processes that one copy of the experts is split over; "
        "must divide the number of processes and the number of experts",
        aliases=("expert_degree",),
        minimum=1,
        shown_default="the number of processes",
    ),
    Option(
        "expert_dp",
        "text",
        None,
        help="what processes with the same experts do: shard them (memory 1/world) or replicate "
        "them (copies whose gradients are averaged; the only way of FSDP1)",
        choices=("shard", "replicate"),
        shown_default="shard with FSDP2, replicate with FSDP1",
    ),
    Option(
        "kernel",
        "text",
        "auto",
        help="how a process runs its experts; auto: on a GPU the fastest that was measured (see "
        "megablocks_utils.tune), else torch's grouped_mm; triton: this project's kernels; "
        "scattermoe and megablocks are packages to install, without adapters on experts",
        choices=KERNEL_CHOICES,
    ),
    Option("use_scattermoe", "boolean", False, help="same as --kernel scattermoe"),
    Option(
        "use_lora",
        "text",
        "none",
        help="train low-rank adapters on the attention, on the experts (mlp-only) or on both, "
        "everything else frozen; none trains all weights",
        choices=("none", "attn-only", "mlp-only", "all"),
    ),
    Option(
        "lora_r",
        "integer",
        None,
        help="rank of the adapters",
        minimum=1,
        shown_default="16, or that of --resume_adapter",
    ),
    Option(
        "lora_alpha",
        "integer",
        None,
        help="strength of the adapters: lora_alpha / lora_r",
        minimum=1,
        shown_default="16, or that of --resume_adapter",
    ),
    Option(
        "resume_adapter",
        "text",
        None,
        help="PEFT adapter to go on from, folder or Hub name: weights, rank and alpha are its own, "
        "the optimizer starts anew",
    ),
    Option(
        "verify_adapter",
        "text",
        "auto",
        help="after saving, load the adapter with plain PEFT on the plain model in one process and "
        "compare logits; auto: where the model fits in the memory of one process",
        choices=("auto", "True", "False"),
    ),
    Option(
        "verify_kernel",
        "boolean",
        True,
        help="before the first step, compare the kernel with eager on the model's own weights, and "
        "train nothing if it is off by more than twice what rounding explains",
    ),
    Option(
        "precision",
        "text",
        None,
        help="fp32: all float32; mixed: float32 weights and Adam states, bfloat16 compute (with "
        "LoRA the frozen base is bfloat16); bf16_sr: all bfloat16, updates rounded "
        "stochastically; bf16: all bfloat16",
        choices=("fp32", "mixed", "bf16_sr", "bf16"),
        shown_default="fp32 on CPU; on GPU mixed with LoRA, bf16_sr without",
    ),
    Option(
        "dtype",
        "text",
        None,
        help="dtype of weights, gradients and compute; alone, float32 means --precision fp32 and "
        "bfloat16 means --precision bf16",
        choices=("float32", "bfloat16"),
        aliases=("torch_dtype",),
        shown_default="from --precision",
    ),
    Option(
        "optim_dtype",
        "text",
        None,
        help="dtype of Adam's states",
        choices=("float32", "bfloat16"),
        shown_default="from --precision",
    ),
    Option(
        "truncate_model_for_debug",
        "boolean",
        False,
        help="keep the first two layers only",
    ),
)
