"""Every option of a run as frozen dataclasses, checked once at the door.

Torch-free, so that `--help` and bad options answer at once. The fields of the dataclasses are the
one table of options: names, defaults, ranges and help. Built directly (`RunConfig()`), a config
holds the table's defaults; a None there is described at its field, and the parsers replace those
that only depend on other options.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated

from megablocks_utils.config.adapter import AdapterConfig
from megablocks_utils.config.evaluation import EvaluationConfig
from megablocks_utils.config.model import DataConfig, ModelConfig
from megablocks_utils.config.optim import OptimConfig
from megablocks_utils.config.option import Option, list_options
from megablocks_utils.config.parallel import ParallelConfig, count_data_ranks
from megablocks_utils.config.precision import PrecisionConfig
from megablocks_utils.config.quantization import NO_DENSE_NF4, NO_QUANTIZATION
from megablocks_utils.config.saving import SavingConfig

__all__ = ["OPTIONS", "OPTION_NAMES", "RunConfig"]

_CHECKPOINTING = {"True": "full", "False": "none", "selective": "selective"}


@dataclass(frozen=True)
class RunConfig:
    """Hold all options of a run; no rank, device or world size in it.

    Attributes:
        entry_point: "fsdp2" or "fsdp1".
        model: Which model.
        data: Which examples.
        parallel: How experts are spread and run.
        adapter: Which adapters.
        precision: The precision options as given; `resolve_precision` says what they mean.
        optim: How a step is made.
        saving: When checkpoints are written, and which one the run resumes from.
        evaluation: When the loss of held-out examples is measured, and what follows from it.
        output_dir: Folder for everything the run leaves.
        overwrite_output_dir: Whether a finished run there may be overwritten.
        ignore_plan: Whether a run starts that the plan says cannot fit.
        gradient_checkpointing: "full", "none" or "selective".
        cpu_offload: "none", "optimizer" or "params".
        compile: Whether torch compiles the dense parts of the layers.
        router_aux_loss_coef: Weight of the load-balancing loss; None: as the model's config says.
        seed: Seed of data order and random numbers.
        logging_steps: Steps between two log lines.
        expert_load_steps: Steps between two in which the experts' loads are measured; 0: never.
        report_to: Trackers; empty for none.
        run_name: What trackers call the run; None: the output folder's name.
        project: What trackers group runs by; None: as the tracker's environment says.
        debug: Whether placements are printed and replicas checked in every step.
        lost_rank_timeout_s: Seconds without a sign of life after which a rank on another machine is
            lost.
        hang_timeout_s: Seconds without progress on any rank after which the run ends.
    """

    entry_point: str = "fsdp2"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    adapter: AdapterConfig = AdapterConfig()
    precision: PrecisionConfig = PrecisionConfig()
    optim: OptimConfig = OptimConfig()
    saving: SavingConfig = SavingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output_dir: Annotated[
        str, Option("folder for the model, metrics.jsonl, run.json and checkpoints", metavar="DIR")
    ] = "./results"
    overwrite_output_dir: Annotated[
        bool,
        Option(
            "write into an output_dir that holds a finished run, or checkpoints of one that is not "
            "finished; unless resuming, they are removed"
        ),
    ] = False
    ignore_plan: Annotated[
        bool,
        Option("start although the plan says that the run needs more memory than a device has"),
    ] = False
    gradient_checkpointing: Annotated[
        str,
        Option(
            "recompute activations in the backward pass; selective keeps the all-to-all results "
            "and the routing",
            choices=tuple(_CHECKPOINTING),
            aliases=("activation_checkpointing",),
            translation=MappingProxyType(_CHECKPOINTING),
        ),
    ] = "full"
    cpu_offload: Annotated[
        str,
        Option(
            "what lies in host memory instead of a GPU's: optimizer (Adam's states, brought to the "
            "GPU piece by piece for the update) or params (FSDP2: weights, gradients and Adam's "
            "states; weights are copied in unit by unit, the CPU makes the update)",
            choices=("none", "optimizer", "params"),
        ),
    ] = "none"
    compile: Annotated[
        bool,
        Option(
            "let torch compile the dense parts of each layer (norms, attention, routers), not the "
            "experts"
        ),
    ] = False
    router_aux_loss_coef: Annotated[
        float | None,
        Option(
            "weight of the router's load-balancing loss; 0 turns it off",
            minimum=0,
            shown_default="the model's own, if the model turns that loss on",
        ),
    ] = None
    seed: Annotated[
        int,
        Option("seed of the data order and of every random number", minimum=0, maximum=2**32 - 1),
    ] = 42
    logging_steps: Annotated[
        int,
        Option(
            "optimizer steps between two lines of the log (Hugging Face's default is 500); "
            "metrics.jsonl has every step",
            minimum=1,
        ),
    ] = 1
    expert_load_steps: Annotated[
        int,
        Option(
            "measure in every N-th optimizer step how the tokens are spread over each layer's "
            "experts: expert_load.jsonl, and expert_load.png at the end; 0: never",
            metavar="N",
            minimum=0,
        ),
    ] = 0
    report_to: Annotated[
        tuple[str, ...],
        Option(
            "where metrics go besides metrics.jsonl, one or more of them",
            choices=("none", "tensorboard", "wandb", "mlflow", "trackio"),
        ),
    ] = ()
    run_name: Annotated[
        str | None,
        Option(
            "what trackers call the run", metavar="NAME", shown_default="the name of --output_dir"
        ),
    ] = None
    project: Annotated[
        str | None,
        Option(
            "what trackers group runs by, also MLflow's experiment",
            metavar="NAME",
            shown_default="what the tracker's environment names, or megablocks_utils",
        ),
    ] = None
    debug: Annotated[
        bool,
        Option(
            "print the placement plan and every parameter's mesh axes, placement and bytes; check "
            "in every step that replicas are bit-equal and gradients finite"
        ),
    ] = False
    lost_rank_timeout_s: Annotated[
        float,
        Option(
            "seconds without a sign of life after which a rank on another machine is lost and the "
            "others end",
            minimum=10,
            maximum=86400,
        ),
    ] = 45
    hang_timeout_s: Annotated[
        float,
        Option(
            "seconds without progress on any rank, or of waiting for ranks to start, after which "
            "the run ends",
            minimum=10,
            maximum=604800,
        ),
    ] = 600

    def count_data_ranks(self, world_size: int) -> int:
        """Return how many of the ranks have rows of their own."""
        parallel = self.parallel
        return count_data_ranks(
            world_size, parallel.tp_size, parallel.sp_size, parallel.dp_replicate_size
        )

    def count_global_batch(self, world_size: int) -> int:
        """Return the examples of an optimizer step."""
        optim = self.optim
        per_rank = optim.per_device_train_batch_size * optim.gradient_accumulation_steps
        return self.count_data_ranks(world_size) * per_rank

    @property
    def may_be_varlen(self) -> bool:
        """Whether packed rows have no mask, if the model's attention is plain."""
        attention = self.model.attn_implementation
        return attention in ("auto", "varlen") and self.has_several_examples

    @property
    def has_several_examples(self) -> bool:
        """Whether a micro-batch may have more than one example."""
        return self.optim.per_device_train_batch_size > 1 or self.data.packing_length is not None

    @property
    def row_tokens(self) -> int:
        """Tokens of the longest row, of one example or of several."""
        return self.data.packing_length or self.data.max_seq_length


@dataclass(frozen=True)
class _OtherOptions:
    """Declare the options that have no field of their own in a configuration."""

    use_scattermoe: Annotated[bool, Option("same as --kernel scattermoe")] = False
    use_dora: Annotated[
        bool,
        Option("not built: True is refused, since DoRA's norms are those of whole merged weights"),
    ] = False
    dense_quantization: Annotated[
        str,
        Option(
            "not built: frozen weights outside the experts keep their dtype",
            choices=(NO_QUANTIZATION,),
            refused=MappingProxyType({"nf4": NO_DENSE_NF4}),
        ),
    ] = NO_QUANTIZATION


OPTIONS: tuple[Option, ...] = (*list_options(RunConfig), *list_options(_OtherOptions))
"""The one table of options: what parsing, `--help` and `docs/options.md` come from."""

OPTION_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "checkpoint_name_or_path": "model_name_or_path",
        "compute_dtype": "dtype",
        "expert_mode": "use_lora",
    }
)
"""Options whose name is not that of the library's parameter, by parameter; for `as_options`."""
