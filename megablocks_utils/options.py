"""The one table of options: what parsing, `--help`, `docs/options.md` and the defaults come from.

Torch-free. An option is a row of `OPTIONS`.
"""

from megablocks_utils.option_types import Option

__all__ = ["OPTIONS", "default_of", "find_option"]

_SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)

OPTIONS = (
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
        "output_dir", "text", "./results", help="folder for the model, metrics.jsonl and run.json"
    ),
    Option(
        "overwrite_output_dir",
        "boolean",
        False,
        help="write into an output_dir that holds a finished run",
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
        help="how a process runs its experts",
        choices=("auto", "eager", "grouped_mm", "triton", "scattermoe", "megablocks"),
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
        "max_seq_length",
        "integer",
        4096,
        help="tokens of an example; longer ones are cut, and counted in the log",
        minimum=2,
    ),
    Option(
        "shuffle",
        "boolean",
        True,
        help="shuffle the examples in every epoch; False keeps the order of the file",
    ),
    Option(
        "per_device_train_batch_size",
        "integer",
        8,
        help="examples of a micro-batch of one process",
        minimum=1,
    ),
    Option(
        "gradient_accumulation_steps",
        "integer",
        1,
        help="micro-batches of an optimizer step",
        minimum=1,
    ),
    Option(
        "sync_each_batch",
        "boolean",
        None,
        help="reduce gradients after every micro-batch of a step: costs communication, but "
        "waiting keeps whole unsharded gradients in memory",
        shown_default="True without LoRA, False with LoRA",
    ),
    Option("num_train_epochs", "number", 3.0, help="passes over the data", above=0),
    Option(
        "max_steps",
        "integer",
        -1,
        help="optimizer steps of the run, instead of --num_train_epochs; -1: not set",
        minimum=-1,
    ),
    Option("learning_rate", "number", 5e-5, help="peak learning rate of AdamW", minimum=0),
    Option(
        "lr_scheduler_type",
        "text",
        "linear",
        help="schedule of the learning rate",
        choices=_SCHEDULES,
    ),
    Option(
        "warmup_steps",
        "number",
        0,
        help="optimizer steps over which the learning rate rises from 0; below 1: that share of "
        "all steps",
        minimum=0,
    ),
    Option(
        "weight_decay",
        "number",
        0.0,
        help="weight decay of AdamW; biases and norms are left out",
        minimum=0,
    ),
    Option(
        "max_grad_norm",
        "number",
        1.0,
        help="global gradient norm above which gradients are scaled down; 0: never",
        minimum=0,
    ),
    Option(
        "seed",
        "integer",
        42,
        help="seed of the data order and of every random number",
        minimum=0,
        maximum=2**32 - 1,
    ),
    Option(
        "logging_steps",
        "integer",
        1,
        help="optimizer steps between two lines of the log (Hugging Face's default is 500); "
        "metrics.jsonl has every step",
        minimum=1,
    ),
    Option(
        "save_strategy",
        "text",
        "no",
        help="when checkpoints are written during the run; the final model always is",
        choices=("no", "steps", "epoch"),
    ),
    Option("save_steps", "integer", None, help="optimizer steps between two checkpoints"),
    Option("save_total_limit", "integer", None, help="checkpoints that are kept"),
    Option("resume_from_checkpoint", "text", None, help="checkpoint folder to go on from"),
    Option(
        "eval_strategy",
        "text",
        "no",
        help="FSDP1: Hugging Face's; FSDP2 does not evaluate while it trains",
        choices=("no",),
        aliases=("evaluation_strategy",),
        passed_on=("fsdp1",),
    ),
    Option(
        "report_to",
        "words",
        ("none",),
        help="where metrics go besides metrics.jsonl",
        choices=("none", "tensorboard"),
    ),
    Option(
        "gradient_checkpointing",
        "text",
        "True",
        help="recompute activations in the backward pass; selective keeps the all-to-all results "
        "and the routing",
        choices=("True", "False", "selective"),
        aliases=("activation_checkpointing",),
    ),
    Option(
        "router_aux_loss_coef",
        "number",
        None,
        help="weight of the router's load-balancing loss; 0 turns it off",
        minimum=0,
        shown_default="the model's own, if the model turns that loss on",
    ),
    Option(
        "debug",
        "boolean",
        False,
        help="print every parameter's mesh axes, placement and bytes; check in every step that "
        "replicas of an expert are bit-equal and gradients finite",
    ),
    Option(
        "truncate_model_for_debug",
        "boolean",
        False,
        help="keep the first two layers only",
    ),
)

_BY_NAME = {name: option for option in OPTIONS for name in (option.name, *option.aliases)}


def find_option(name: str) -> Option | None:
    """Return the option with this name or alias (without dashes), or None."""
    return _BY_NAME.get(name)


def default_of(name: str) -> object:
    """Return the default of an option: the dataclasses of `config` take theirs from here."""
    return _BY_NAME[name].default
