"""What a run shows and leaves: output folder, log, checkpoints.

Torch-free rows of the table `config.options.OPTIONS`.
"""

from megablocks_utils.config.option import Option

__all__ = ["OUTPUT_OPTIONS"]

OUTPUT_OPTIONS = (
    Option(
        "output_dir",
        "text",
        "./results",
        help="folder for the model, metrics.jsonl, run.json and checkpoints",
    ),
    Option(
        "overwrite_output_dir",
        "boolean",
        False,
        help="write into an output_dir that holds a finished run, or checkpoints of one that is "
        "not finished; unless resuming, they are removed",
    ),
    Option(
        "ignore_plan",
        "boolean",
        False,
        help="start although the plan says that the run needs more memory than a device has",
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
        "report_to",
        "words",
        ("none",),
        help="where metrics go besides metrics.jsonl",
        choices=("none", "tensorboard"),
    ),
    Option(
        "save_strategy",
        "text",
        "no",
        help="when checkpoints are written: every --save_steps or at each epoch's end, and after "
        "the last step; the final model always is",
        choices=("no", "steps", "epoch"),
    ),
    Option(
        "save_steps",
        "number",
        500,
        help="optimizer steps between two checkpoints with --save_strategy steps; below 1: that "
        "share of all steps",
        above=0,
    ),
    Option(
        "save_total_limit",
        "integer",
        None,
        help="checkpoints that are kept; when one more is complete, the oldest goes",
        minimum=1,
        shown_default="all",
    ),
    Option(
        "async_save",
        "boolean",
        False,
        help="write checkpoints in the background, from a copy in host memory, while training "
        "goes on",
    ),
    Option(
        "resume_from_checkpoint",
        "text",
        "False",
        help="checkpoint to go on from: True is the newest complete one in --output_dir, False is "
        "none, anything else its folder",
    ),
    Option(
        "debug",
        "boolean",
        False,
        help="print every parameter's mesh axes, placement and bytes; check in every step that "
        "replicas of an expert are bit-equal and gradients finite",
    ),
)
