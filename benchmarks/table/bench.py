"""What all rows of a table share: the model, the ranks, the length of a run, the prediction."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.processes import as_words
from benchmarks.harness.provenance import ROOT
from benchmarks.table.options import CPU, PLAN, REAL, TableOptions
from benchmarks.table.rows import PUBLISHED_RANKS, TRANSFORMERS, Row
from megablocks_utils.config import parse_args
from megablocks_utils.planning.memory.scenario import DEFAULT_IMBALANCE, Scenario
from megablocks_utils.planning.model.config_file import read_config_file
from megablocks_utils.planning.model.gpus import GPUS
from megablocks_utils.planning.model.model_shape import ModelShape

_PUBLISHED_MODEL = ROOT / "benchmarks" / "models" / "mixtral-8x7b" / "config.json"
CARD_BYTES = GPUS["a100-80g"].memory_bytes
"""Of the cards that the published table was measured on."""

CPU_SIZES = {
    "hidden_size": 384,
    "intermediate_size": 1344,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
}
"""Mixtral's proportions, small: experts are four fifths of it."""

TOY_SIZES = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64}
"""Next to nothing: what a process needs to train it, it needs to train any model."""

_LORA_R = 16
_CPU_ACCUMULATION = 2
_EVEN = 1.0


@dataclass(frozen=True)
class Bench:
    """How rows run in one mode.

    Attributes:
        mode: of the command line.
        config: `config.json` of the model.
        ranks: processes of a run.
        accumulation: micro-steps of an optimizer step, one example each.
        tokens: of every example, all of them labels but the first.
        steps: optimizer steps that are measured.
        warmup_steps: optimizer steps before them.
        rounds: runs of each row, in turns.
        precision: as the option.
        device_type: `cuda` or `cpu`.
        imbalance: rows that the busiest rank receives, over its fair share, as predicted.
    """

    mode: str
    config: Mapping[str, Any]
    ranks: int
    steps: int
    warmup_steps: int
    rounds: int
    accumulation: int = 16
    tokens: int = 256
    precision: str = "bf16"
    device_type: str = "cuda"
    imbalance: float = DEFAULT_IMBALANCE

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model."""
        return ModelShape.from_config(self.config)

    @property
    def is_published(self) -> bool:
        """Whether published figures can stand beside those of this table."""
        published = ModelShape.from_config(read_published_model())
        return self.ranks == PUBLISHED_RANKS and self.shape == published

    @property
    def has_base(self) -> bool:
        """Whether measured bytes hold those of Python and libraries too."""
        return self.mode == CPU

    def kernel(self, row: Row) -> str:
        """Return the backend that runs a row's experts: a CPU runs grouped_mm for all."""
        return "grouped_mm" if self.device_type == "cpu" else row.kernel

    def scenario(self, row: Row) -> Scenario:
        """Return a row as plans see it, from the options that it is run with."""
        return Scenario(
            config=parse_args(as_words(self.arguments(row)), entry_point="fsdp2"),
            shape=self.shape,
            world_size=self.ranks,
            device_type=self.device_type,
            kernel=self.kernel(row) if row.ep_share else "transformers",
            tokens=self.tokens,
            label_tokens=self.tokens - 1,
            imbalance=self.imbalance,
        )

    def arguments(self, row: Row, *, steps: int | None = None) -> dict[str, Any]:
        """Return the options of a run of this row, without its paths.

        Args:
            row: which.
            steps: optimizer steps in all; None: as the table has them.
        """
        options = {
            "precision": self.precision,
            "use_lora": row.use_lora,
            "lora_r": _LORA_R,
            "max_seq_length": self.tokens,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": self.accumulation,
            "max_steps": steps or self.warmup_steps + self.steps,
            "gradient_checkpointing": True,
            "router_aux_loss_coef": 0,
            "verify_adapter": False,
            "ignore_plan": True,  # running out of memory is a result
        }
        if row.ep_share:
            options |= {"use_megablocks_sharding": True, "ep_size": row.ep_size(self.ranks)}
            options |= {"expert_dp": row.expert_dp}
        if row.ep_share and row.group != TRANSFORMERS:
            options["kernel"] = self.kernel(row)
        return options


def read_published_model() -> Mapping[str, Any]:
    """Return the `config.json` of the model that the published table is of."""
    return read_config_file(_PUBLISHED_MODEL)


def build_bench(options: TableOptions, config: Mapping[str, Any] | None = None) -> Bench:
    """Return the bench of a mode.

    Args:
        options: of the command line.
        config: `config.json` of the model; None: of the published one. `--cpu` shrinks it.
    """
    config = config or read_published_model()
    common = (options.ranks, options.steps, options.warmup_steps, options.rounds)
    if options.mode == CPU:
        # In bfloat16, resident memory grew with every step, probably with the code that oneDNN
        # compiles and keeps for every number of rows that an expert has met.
        return Bench(
            CPU,
            {**config, **CPU_SIZES},
            *common,
            accumulation=_CPU_ACCUMULATION,
            precision="fp32",
            device_type="cpu",
        )
    if options.mode in (PLAN, REAL):
        return Bench(options.mode, config, *common, tokens=options.tokens)
    return Bench(options.mode, config, *common, tokens=options.tokens, imbalance=_EVEN)


def predict_row(bench: Bench, row: Row) -> dict[str, Any] | None:
    """Predict what a rank holds; None for transformers' own way, which cannot be planned.

    Returns:
        `peak_bytes`, `allocated_bytes` (after zero_grad), `gradients_bytes`, `components`,
        `moment`, and `is_oom`: whether the tensors alone are more than `CARD_BYTES`.
    """
    if row.group == TRANSFORMERS:
        return None
    scenario = bench.scenario(row)
    prediction = scenario.predict(scenario.own_layout())
    return {
        "peak_bytes": prediction.peak_bytes,
        "allocated_bytes": prediction.allocated_bytes,
        "gradients_bytes": prediction.components["gradients"],
        "components": dict(prediction.components),
        "moment": prediction.moment,
        "is_oom": prediction.peak_bytes > CARD_BYTES,
    }
