"""How it is trained: examples, steps, optimizer, loss.

Torch-free rows of the table `config.options.OPTIONS`.
"""

from megablocks_utils.config.option import Option

__all__ = ["TRAINING_OPTIONS"]

_SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)

TRAINING_OPTIONS = (
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
        "eval_strategy",
        "text",
        "no",
        help="FSDP1: Hugging Face's; FSDP2 does not evaluate while it trains",
        choices=("no",),
        aliases=("evaluation_strategy",),
        passed_on=("fsdp1",),
    ),
)
