"""Cases of parity: a layout and options, run through the real path and through the reference."""

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megablocks_utils.config import parse_args
from megablocks_utils.config.adapter import EXPERT_MODE_OF, parts_of
from megablocks_utils.fsdp.fsdp2 import full_parameters
from megablocks_utils.moe.expert_slots import ExpertSlots
from megablocks_utils.moe.expert_spec import find_expert_modules
from megablocks_utils.moe.rounded_experts import round_experts
from megablocks_utils.moe.sharded_moe import find_slots
from megablocks_utils.processes.launch import check_environment
from megablocks_utils.processes.start import start_processes
from megablocks_utils.training.loop import TrainingState, build_training_state, fit
from megablocks_utils.training.report.expert_load import describe_layer
from megablocks_utils.training.setup import Setup, build_setup
from tests.support.argv import keep_last
from tests.support.rank_pool import RankPool
from tests.support.stock_reference import StockRun, train_stock
from tests.support.tiny_adapters import attach_random_adapters
from tests.support.tiny_families import CAUSAL, save_tiny
from tests.support.tiny_models import FAMILIES, save_tiny_model
from tests.support.trace import Trace

GLOBAL_BATCH = 16
NUM_EXAMPLES = 37  # two full global batches and one of five examples
TWO_BATCHES = 20  # one full and one of four, where stock fp32 stays near fp64
LEARNING_RATE = 1e-3
SEED = 3
LORA_ALPHA = 8
# Larger adapters, and larger weights in a wider model, make runs in which stock fp32 itself is far
# from fp64 (a gradient norm 24% off was seen, after a tie in the router), so that nothing compares.
ADAPTER_STD = 0.03

MODELS: dict[str, tuple[str, dict]] = {
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "olmoe": ("olmoe", {}),
    # Half of the words, which is what tensor parallelism has FSDP shard, is an odd number.
    "mixtral, odd half of the words": ("mixtral", {"vocab_size": 130}),
    # Where a value lies within rounding of the clamp, its gradient is there or not in any fp32 run.
    "gpt_oss, clamp out of reach": ("gpt_oss", {"swiglu_limit": 7.0}),
    "olmoe, 2 experts": ("olmoe", {"num_experts": 2, "num_experts_per_tok": 1}),
    "mixtral, 8 experts": ("mixtral", {"num_local_experts": 8}),
    "qwen3_moe, tied": ("qwen3_moe", {"tie_word_embeddings": True}),
    # Blocks of every format divide the sizes; a rank of ep 2 has experts that 2 does not divide.
    "mixtral, 6 experts": (
        "mixtral",
        {"num_local_experts": 6, "hidden_size": 256, "intermediate_size": 512},
    ),
    "mixtral, 3 experts": ("mixtral", {"num_local_experts": 3}),
    "gpt_oss, 6 experts": (
        "gpt_oss",
        {
            "num_local_experts": 6,
            "hidden_size": 128,
            "intermediate_size": 128,
            "swiglu_limit": 7.0,
        },
    ),
    # Rows and columns of every projection go past a tile of 128 and of 256, and end inside one.
    "mixtral, wide": ("mixtral", {"hidden_size": 272, "intermediate_size": 328}),
    # For Triton's interpreter, which is slow.
    "mixtral, one layer": ("mixtral", {"num_hidden_layers": 1}),
    # Experts 2 to 7 never receive a token: see `starve_experts`.
    "olmoe, starved": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 1}),
} | {family: (family, {}) for family in CAUSAL if family not in FAMILIES}
"""Name of a tiny model -> family and options of its config."""


@dataclass(frozen=True)
class Layout:
    """Ranks and what is done with the experts; `ep_size` 0 is no expert parallelism.

    `groups` of ranks hold the whole model each (`--dp_replicate_size`); `tp_size` and `sp_size`
    ranks share rows; `expert_tp_size` ranks split each expert.
    """

    world_size: int
    ep_size: int
    expert_dp: str = "shard"
    groups: int = 1
    expert_tp_size: int = 1
    sp_size: int = 1
    tp_size: int = 1

    @property
    def data_ranks(self) -> int:
        """Ranks with rows of their own."""
        return self.world_size // (self.sp_size * self.tp_size)

    def __str__(self) -> str:
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        if self.groups > 1:
            ranks += f" in {self.groups} groups"
        if self.tp_size > 1:
            ranks += f" tp{self.tp_size}"
        if self.sp_size > 1:
            ranks += f" sp{self.sp_size}"
        if not self.ep_size:
            return f"{ranks} unsharded"
        slices = f" etp{self.expert_tp_size}" if self.expert_tp_size > 1 else ""
        return f"{ranks} ep{self.ep_size}{slices} {self.expert_dp}"


LAYOUTS = (
    Layout(1, 0),
    Layout(2, 2),
    Layout(4, 2, "shard"),
    Layout(4, 2, "replicate"),
    Layout(4, 4),
)
"""The five that the project promises."""


@dataclass(frozen=True)
class ParityCase:
    """One run: where, what, and with which options (names and values as on the command line)."""

    layout: Layout
    model: str = "mixtral"
    num_steps: int = 20
    accumulation: int = 1
    sync_each_batch: bool = True
    checkpointing: str = "True"
    lora: str = "none"
    lora_rank: int = 8
    aux_loss_coef: float = 0.0
    num_examples: int = NUM_EXAMPLES
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    kernel: str = "auto"
    token_dispatch: str = "auto"
    packing: str = "auto"
    learning_rate: float = LEARNING_RATE
    cpu_offload: str = "none"
    attention: str = "auto"
    placement: str = "contiguous"
    quantization: str = "none"
    compiles: bool = False
    optim: str = "adamw"

    def __str__(self) -> str:
        """Name the layout, the model and every option that is not the default."""
        plain = ParityCase(self.layout, self.model, self.num_steps)
        names = [name for name in vars(self) if getattr(self, name) != getattr(plain, name)]
        options = [f"{name}={getattr(self, name)}" for name in names]
        return ", ".join([str(self.layout), self.model, *options])

    @property
    def starts_from_peft(self) -> bool:
        """Whether both sides start from an adapter that PEFT has written: all but attn-only."""
        return self.lora not in ("none", "attn-only")

    @property
    def batch_size(self) -> int:
        """Examples of a micro-batch, so that every case has the same global batches."""
        return GLOBAL_BATCH // (self.layout.data_ranks * self.accumulation)


class ParityFolder:
    """Tiny models, data and reference runs, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reference = cache(train_stock)

    def argv(self, case: ParityCase) -> list[str]:
        """Return the words of the command line that runs a case."""
        options = {
            "model_name_or_path": self._model(case.model),
            "data_path": self._data(case.num_examples),
            "output_dir": self.folder / "unused",
            "max_steps": case.num_steps,
            "per_device_train_batch_size": case.batch_size,
            "gradient_accumulation_steps": case.accumulation,
            "sync_each_batch": case.sync_each_batch,
            "learning_rate": case.learning_rate,
            "weight_decay": case.weight_decay,
            "max_grad_norm": case.max_grad_norm,
            "seed": SEED,
            "gradient_checkpointing": case.checkpointing,
            "router_aux_loss_coef": case.aux_loss_coef,
            "precision": case.precision,
            "packing": case.packing,
            "cpu_offload": case.cpu_offload,
            "attn_implementation": case.attention,
            "dp_replicate_size": case.layout.groups,
            "tp_size": case.layout.tp_size,
            "sp_size": case.layout.sp_size,
            "expert_quantization": case.quantization,
            "optim": case.optim,
            "report_to": "none",
        }
        if case.layout.ep_size:
            options |= {
                "use_megablocks_sharding": True,
                "ep_size": case.layout.ep_size,
                "expert_tp_size": case.layout.expert_tp_size,
                "expert_dp": case.layout.expert_dp,
                "kernel": case.kernel,
                "token_dispatch": case.token_dispatch,
                "debug": True,  # copies of experts are compared bit by bit in every step
            }
        if case.compiles:
            options |= {"compile": True}
        if case.placement != "contiguous":
            options |= {"expert_placement": case.placement, "expert_loads": self.loads(case.model)}
        if case.lora != "none":
            name = "use_lora" if case.lora in EXPERT_MODE_OF else "lora_target"
            options |= {name: case.lora}
        if case.starts_from_peft:
            options |= {"resume_adapter": self.adapter(case)}
        elif case.lora != "none":
            options |= {"lora_r": case.lora_rank, "lora_alpha": LORA_ALPHA}
        return [word for name, value in options.items() for word in (f"--{name}", str(value))]

    def stock_run(self, case: ParityCase, dtype: str = "float32") -> StockRun:
        """Return the reference of a case; cases that mean the same steps share one."""
        deal = (case.layout.data_ranks, case.batch_size, case.accumulation)
        return StockRun(
            model_folder=str(self._dequantized(case)),
            data_path=str(self._data(case.num_examples)),
            global_batch=GLOBAL_BATCH,
            num_steps=case.num_steps,
            learning_rate=case.learning_rate,
            weight_decay=case.weight_decay,
            max_grad_norm=case.max_grad_norm,
            seed=SEED,
            dtype=dtype,
            lora_rank=case.lora_rank if case.lora == "attn-only" else 0,
            lora_alpha=LORA_ALPHA,
            adapter=str(self.adapter(case)) if case.starts_from_peft else None,
            aux_loss_coef=case.aux_loss_coef,
            deal=deal if case.aux_loss_coef else None,
            is_padded=case.packing == "False",
            optim=case.optim,
        )

    def adapter(self, case: ParityCase) -> Path:
        """Return an adapter that PEFT has written, with B random too, so that A has gradients."""
        folder = self._model(case.model) / f"adapter-{case.lora}-{case.lora_rank}"
        if not folder.exists():
            save_adapter(folder, self._model(case.model), case.lora, case.lora_rank)
        return folder

    def loads(self, model: str) -> Path:
        """Return loads by which each layer's experts are placed in another order: some busy."""
        folder = self._model(model)
        path = folder / "expert_load.jsonl"
        if not path.exists():
            config = AutoConfig.from_pretrained(folder)
            with torch.device("meta"):
                modules = find_expert_modules(AutoModelForCausalLM.from_config(config))
            lines = []
            for number, (name, module) in enumerate(modules.items()):
                num_experts = len(module.get_parameter("down_proj"))
                busy = [0.9 ** ((3 * e + number) % num_experts) for e in range(num_experts)]
                busy[0] = busy[1] = 2.0  # side by side, so that the model's order is not the best
                lines.append(asdict(describe_layer(name, busy, [[1.0]], None)) | {"step": 1})
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    def _model(self, name: str) -> Path:
        folder = self.folder / name.replace(", ", "-").replace(" ", "_")
        if not folder.exists():
            family, overrides = MODELS[name]
            if family in FAMILIES:
                prepare = _PREPARE.get(name.partition(", ")[2])
                save_tiny_model(family, folder, prepare=prepare, **overrides)
            else:
                save_tiny(family, folder, **overrides)
        return folder

    def _dequantized(self, case: ParityCase) -> Path:
        """Return the model that a run computes with: the case's own, or what a format keeps."""
        folder = self._model(case.model)
        if case.quantization == "none":
            return folder
        rounded = folder.with_name(f"{folder.name}-{case.quantization}")
        if not rounded.exists():
            model = AutoModelForCausalLM.from_pretrained(folder)
            round_experts(model, case.quantization)
            model.save_pretrained(rounded)
        return rounded

    def _data(self, num_examples: int) -> Path:
        path = self.folder / f"{num_examples}.json"
        if not path.exists():
            write_examples(path, num_examples)
        return path


def starve_experts(model: PreTrainedModel) -> None:
    """Route every token to expert 0 or 1.

    Their logits are x and -x, those of all others 0, so that one of the two is always the largest.
    """
    with torch.no_grad():
        for layer in model.model.layers:
            router = layer.mlp.gate.weight
            router[1] = -router[0]
            router[2:] = 0.0


def keep_activations_small(model: PreTrainedModel) -> None:
    """Halve all matrices, since sums over a hidden size of 272 are twice those over 64."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.5)


_PREPARE = {"starved": starve_experts, "wide": keep_activations_small}


def save_adapter(folder: Path, model_folder: Path, use_lora: str, rank: int) -> None:
    """Let PEFT write an adapter for a model, random in A and in B."""
    model, parts = AutoModelForCausalLM.from_pretrained(model_folder), parts_of(use_lora)
    places = {re.sub(r".*\.layers\.\d+\.", "", name) for name in find_expert_modules(model)}
    experts = [f"{at}.{name}" for at in sorted(places) for name in ("gate_up_proj", "down_proj")]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    ends = {
        "attention": {n.rpartition(".")[2] for n in linear if "_attn." in n},
        "lm_head": {"lm_head"},
    }
    # PEFT takes these names for those of single experts, unless their weights are named.
    weights = {
        "shared": {f"mlp.{n.partition('.mlp.')[2]}.weight" for n in linear if ".mlp." in n},
        "router": {"gate.weight"},
        "experts": set(experts),
    }
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=LORA_ALPHA,
        target_modules=sorted(end for part in parts for end in ends.get(part, ())),
        target_parameters=sorted(name for part in parts for name in weights.get(part, ())),
    )
    attached = attach_random_adapters(model, config, std=ADAPTER_STD)
    attached.save_pretrained(folder, save_embedding_layers=False)


def write_examples(path: Path, num_examples: int) -> None:
    """Write tokenized examples of 4 to 20 tokens; up to 3 at the front are not learned."""
    generator = random.Random(0)
    examples = []
    for _ in range(num_examples):
        tokens = [generator.randrange(3, 128) for _ in range(generator.randrange(4, 21))]
        prompt = generator.randrange(4)
        examples.append({"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:]})
    path.write_text(json.dumps(examples))


def run_case(
    pools: Mapping[int, RankPool],
    folder: ParityFolder,
    case: ParityCase,
    train: Callable[[int, list[str]], Trace] | None = None,
) -> Trace:
    """Run a case on its pool and return what rank 0 saw, having checked that all ranks agree.

    `train` is the path of another script than FSDP2's.
    """
    train = train or train_fsdp2
    traces = pools[case.layout.world_size].run(train, folder.argv(case), timeout=240)
    for trace in traces[1:]:
        assert trace.losses == traces[0].losses
        assert trace.grad_norms == traces[0].grad_norms
    return traces[0]


def train_fsdp2(rank: int, argv: list[str]) -> Trace:
    """Run the FSDP2 script's path on one rank of a pool."""
    setup, state = build_run(argv)
    trace = Trace()
    record_first_gradients(state, trace)
    for metrics in fit(state, setup):
        trace.losses.append(metrics.loss)
        trace.grad_norms.append(metrics.grad_norm)
        trace.learning_rates.append(metrics.learning_rate)
    weights = full_parameters(state.model, only_trainable=setup.config.adapter.has_lora)
    trace.weights = {name: weight.clone() for name, weight in weights if weight is not None}
    return trace


def build_run(argv: list[str]) -> tuple[Setup, TrainingState]:
    """Do on a rank of a pool what the FSDP2 script does before its first step."""
    setup = build_setup_of(argv)
    return setup, build_training_state(setup)


def build_setup_of(argv: list[str]) -> Setup:
    """Do on a rank of a pool what the FSDP2 script does before it wraps the model."""
    config = parse_args(keep_last(argv), entry_point="fsdp2")
    launch = check_environment(config)
    return build_setup(config, launch, start_processes(launch))


def gather_gradient(parameter: nn.Parameter, slots: dict[nn.Parameter, ExpertSlots]) -> Tensor:
    """Return the whole gradient of a parameter, in the order of the model."""
    grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return slots[parameter].to_model_order(grad) if parameter in slots else grad.clone()


def record_first_gradients(state: TrainingState, trace: Trace) -> None:
    """Gather every gradient right before the first optimizer step, on rank 0."""
    is_first = True

    def gather(_optimizer: Optimizer, _args: tuple, _kwargs: dict) -> None:
        nonlocal is_first
        if not is_first:
            return
        is_first = False
        slots = find_slots(state.model)
        for name, parameter in state.model.named_parameters():
            if parameter.requires_grad:
                trace.first_gradients[name] = gather_gradient(parameter, slots)
        if state.accelerator.process_index:
            trace.first_gradients.clear()

    state.optimizer.optimizer.register_step_pre_hook(gather)
