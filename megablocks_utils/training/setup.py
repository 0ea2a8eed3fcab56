"""Build what both entry points train: processes, data, and a sharded model with its weights."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from megablocks_utils.checkpoint.index import (
    CheckpointIndex,
    open_checkpoint,
    resolve_checkpoint_folder,
)
from megablocks_utils.checkpoint.layouts import (
    Layout,
    detect_layout,
    is_expert_parameter,
    is_in_experts,
)
from megablocks_utils.checkpoint.load import (
    build_model_on_meta,
    check_against_model,
    load_dense_parameters,
    load_experts,
)
from megablocks_utils.config import ResolvedPrecision, RunConfig, check_world, resolve_precision
from megablocks_utils.errors import CheckpointError, UserError
from megablocks_utils.launch import Launch, agree_on_error
from megablocks_utils.lora.apply import ChosenAdapters, apply_lora, choose_adapters
from megablocks_utils.lora.settings import LoraSettings
from megablocks_utils.shard_moe_utils import (
    PROJECTIONS,
    ShardedMoE,
    find_expert_modules,
    shard_moe,
)
from megablocks_utils.training.data import TokenizedExamples, load_examples
from megablocks_utils.training.gradient_checkpointing import apply_gradient_checkpointing
from megablocks_utils.training.parameters import ParameterCounts, count_parameters
from megablocks_utils.training.progress import track_sharding
from megablocks_utils.training.schedule import Schedule
from megablocks_utils.training.summary import build_console
from megablocks_utils.training.watching import watch_ranks

_TRUNCATED_LAYERS = 2
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Setup:
    """A run that is ready to be wrapped with FSDP.

    Attributes:
        config: the options.
        launch: which process this is.
        precision: the dtypes.
        device: where this rank computes.
        console: rank 0's console; quiet elsewhere.
        tokenizer: of the model; None if its folder has none.
        schedule: which examples each step holds.
        model_folder: the local folder its weights came from.
        model: the transformers model, with adapters where asked for; weights on the CPU or the
            device.
        sharded: what `shard_moe` returned; None without expert parallelism and without adapters of
            experts, which are this project's at ep 1 also then.
        lora: which adapters; None where all weights are trained.
        counts: parameters of the whole model.
        num_experts: experts of a layer.
        parameter_specs: (name, whole shape, dtype) of every parameter but adapters.
    """

    config: RunConfig
    launch: Launch
    precision: ResolvedPrecision
    device: torch.device
    console: Console
    tokenizer: PreTrainedTokenizerBase | None
    schedule: Schedule
    model_folder: Path
    model: PreTrainedModel
    sharded: ShardedMoE | None
    lora: LoraSettings | None
    counts: ParameterCounts
    num_experts: int
    parameter_specs: list[tuple[str, tuple[int, ...], torch.dtype]]

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """The expert weights as they are now, sharded or not, by name; without adapters."""
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if is_expert_parameter(name)
        }

    @property
    def layer_classes(self) -> list[str]:
        """Class names of the decoder layers, which become one FSDP unit each."""
        return sorted(self.model._no_split_modules)


def start_processes(launch: Launch, output_dir: str | None = None) -> torch.device:
    """Connect the processes of the run and return this rank's device.

    **Collective:** waits for all ranks. A run of one process makes a group of one, so that there is
    one code path.

    Args:
        launch: which process this is.
        output_dir: where to look for checkpoints when a rank is lost; None: nobody watches.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Gathering experts that are sharded twice takes two all-gathers, which is no news to anybody.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    if dist.is_initialized():
        return device
    if launch.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return device
    store, rank, world_size = next(dist.rendezvous("env://"))
    # With its static rendezvous torchrun keeps the store when it restarts the processes: without a
    # prefix they would read each other's old addresses.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt_{attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    if output_dir is not None:
        watch_ranks(store, output_dir)
    return device


def build_setup(config: RunConfig, launch: Launch, device: torch.device) -> Setup:
    """Load data and model, shard the experts, attach adapters.

    **Collective:** every rank must call; what one rank cannot read ends all of them.

    Raises:
        UserError: on every rank, for what the user can put right.
    """
    set_seed(config.seed)
    check_world(config, launch.world_size)
    console = build_console(launch.rank == 0)
    precision = resolve_precision(config, device.type)
    folder = _agreed(lambda: resolve_checkpoint_folder(config.model.model_name_or_path))
    source = _agreed(lambda: _ModelSource(folder, config, precision))
    check_world(config, launch.world_size, source.num_experts)
    adapters = _agreed(lambda: _choose_adapters(source.model, config))
    tokenizer = _agreed(lambda: _load_tokenizer(folder))
    examples = _agreed(lambda: _load_data(config, tokenizer, source.model))
    with track_sharding(console, len(source.expert_names)) as on_layer:
        sharded = _agreed(lambda: source.load(config, device, on_layer))
    model = source.model
    specs = [(name, tuple(p.shape), p.dtype) for name, p in model.named_parameters()]
    if adapters is not None:
        _agreed(lambda: _apply_lora(model, sharded, adapters, config, precision))
    # After the adapters: before them, PEFT would make the embeddings' output ask for a gradient,
    # which only reentrant checkpointing needs.
    apply_gradient_checkpointing(model, config.gradient_checkpointing)
    return Setup(
        config=config,
        launch=launch,
        precision=precision,
        device=device,
        console=console,
        tokenizer=tokenizer,
        schedule=Schedule(config, examples, launch.rank, launch.world_size),
        model_folder=folder,
        model=model,
        sharded=sharded,
        lora=adapters and adapters.settings,
        counts=_count(model, source.num_experts),
        num_experts=source.num_experts,
        parameter_specs=specs,
    )


class _ModelSource:
    """A checked checkpoint and the model that it will fill."""

    def __init__(self, folder: Path, config: RunConfig, precision: ResolvedPrecision) -> None:
        layers = _TRUNCATED_LAYERS if config.model.truncate_model_for_debug else None
        self.folder = folder
        self.dtype = getattr(torch, precision.weights)
        self.compute_dtype = getattr(torch, precision.compute)
        self.model = build_model_on_meta(folder, truncate_layers=layers)
        self.expert_names = list(find_expert_modules(self.model))
        self.index: CheckpointIndex = open_checkpoint(folder)
        self.layout: Layout = detect_layout(self.index)
        check_against_model(self.model, self.index, self.layout, truncate_layers=layers)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(self.dtype)  # still on meta: only names the dtype

    @property
    def num_experts(self) -> int:
        """Experts of a layer."""
        return self.model.get_submodule(self.expert_names[0]).num_experts

    def load(
        self, config: RunConfig, device: torch.device, on_layer: Callable[[int], None]
    ) -> ShardedMoE | None:
        """Fill the model: this rank's experts only with expert parallelism, all of them without.

        Experts with adapters are this project's own also without expert parallelism (ep 1): PEFT's
        way through transformers' experts holds W + B A of all experts.
        """
        sharded = None
        has_ep = config.parallel.use_megablocks_sharding
        if has_ep or config.adapter.trains_experts:
            sharded = shard_moe(
                self.model,
                ep_size=(config.parallel.ep_size or dist.get_world_size()) if has_ep else 1,
                checkpoint_name_or_path=self.folder,
                kernel=config.parallel.kernel,
                expert_dp=config.parallel.expert_dp,
                device_type=device.type,
                compute_dtype=self.compute_dtype,
                on_layer=on_layer,
            )
        else:
            self._fill_all_experts(on_layer)
        load_dense_parameters(self.model, self.index, self.layout, dtype=self.dtype)
        return sharded

    def _fill_all_experts(self, on_layer: Callable[[int], None]) -> None:
        for name in self.expert_names:
            module = self.model.get_submodule(name)
            weights = load_experts(
                self.index, self.layout, name, first=0, last=module.num_experts, dtype=self.dtype
            )
            for projection in PROJECTIONS:
                setattr(module, projection, nn.Parameter(weights[projection]))
            on_layer(1)


def _agreed(action: Callable[[], _Result]) -> _Result:
    """Do something local on every rank, and raise on all ranks what one of them met."""
    error = result = None
    try:
        result = action()
    except UserError as met:
        error = met
    agree_on_error(error)
    return result


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return the model's tokenizer; None for a folder without one (tokenized data needs none)."""
    if not any(folder.glob("tokenizer*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be used: {error}") from error


def _choose_adapters(model: PreTrainedModel, config: RunConfig) -> ChosenAdapters | None:
    return choose_adapters(model, config.adapter) if config.adapter.has_lora else None


def _apply_lora(
    model: PreTrainedModel,
    sharded: ShardedMoE | None,
    adapters: ChosenAdapters,
    config: RunConfig,
    precision: ResolvedPrecision,
) -> None:
    dtype = getattr(torch, precision.adapter)
    apply_lora(model, sharded, adapters, dtype=dtype, seed=config.seed)


def _load_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel
) -> TokenizedExamples:
    examples = load_examples(config.data, tokenizer)
    examples.check_vocabulary(model.config.vocab_size)
    return examples


def _count(model: PreTrainedModel, num_experts: int) -> ParameterCounts:
    experts = {n: p for n, p in model.named_parameters() if is_in_experts(n)}
    return count_parameters(model, experts, model.config.num_experts_per_tok, num_experts)
