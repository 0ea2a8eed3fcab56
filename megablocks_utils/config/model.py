"""Which model is trained, and on which examples. Torch-free."""

from dataclasses import dataclass
from typing import Annotated

from megablocks_utils.config.option import Option

__all__ = ["DataConfig", "ModelConfig"]


@dataclass(frozen=True)
class ModelConfig:
    """Say which model is fine-tuned."""

    model_name_or_path: Annotated[
        str, Option("model to fine-tune: Hub name or local folder", metavar="MODEL")
    ] = "mistralai/Mixtral-8x7B-Instruct-v0.1"
    attn_implementation: Annotated[
        str,
        Option(
            "attention by varlen (no mask over packed rows), sdpa, eager or another name of "
            "transformers; auto: varlen where a probe shows it right for several examples a batch",
            metavar="NAME",
        ),
    ] = "auto"
    truncate_model_for_debug: Annotated[bool, Option("keep the first two layers only")] = False

    @property
    def truncate_layers(self) -> int | None:
        """Decoder layers that are kept, the first ones; None keeps all."""
        return 2 if self.truncate_model_for_debug else None


@dataclass(frozen=True)
class DataConfig:
    """Say which examples are learned, and in which order."""

    data_path: Annotated[
        tuple[str, ...],
        Option(
            "local .json, .jsonl or .parquet files, folders that datasets can load, or Hub dataset "
            "names, in this order",
            metavar="DATA ...",
            wanted="a name or path",
        ),
    ] = ("data/alpaca_sample.json",)
    data_weights: Annotated[
        tuple[float, ...] | None,
        Option(
            "shares in which an epoch draws from the sources of --data_path, until the first is "
            "used up",
            above=0,
            limit=10**6,
            shown_default="every example of every source",
        ),
    ] = None
    dataset_config: Annotated[
        str | None,
        Option("configuration of a dataset with several (no file)", metavar="NAME"),
    ] = None
    dataset_split: Annotated[
        str,
        Option("split of a dataset (no file), such as train or train[:10%]", metavar="SPLIT"),
    ] = "train"
    streaming: Annotated[
        bool,
        Option(
            "tokenize while training and keep nothing on disk, for data of any size; needs "
            "--max_steps"
        ),
    ] = False
    shuffle_buffer_size: Annotated[
        int,
        Option(
            "with --streaming True and --shuffle True: records that are held and shuffled at a "
            "time, one such block after the other",
            metavar="N",
            minimum=1,
        ),
    ] = 10_000
    packing_length: Annotated[
        int | None,
        Option(
            "fill rows with whole examples up to so many tokens; --per_device_train_batch_size "
            "then counts rows",
            metavar="N",
            minimum=2,
            shown_default="a row for every example",
        ),
    ] = None
    chat_template: Annotated[
        str | None,
        Option(
            "chat template of conversations: a .jinja file, or the name of a training template "
            "(data/README.md lists them)",
            metavar="TEMPLATE",
            shown_default="the tokenizer's",
        ),
    ] = None
    max_seq_length: Annotated[
        int,
        Option("tokens of an example; longer ones are cut, and counted in the log", minimum=2),
    ] = 4096
    shuffle: Annotated[
        bool, Option("shuffle the examples in every epoch; False keeps the order of the file")
    ] = True
