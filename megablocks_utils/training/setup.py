"""Build what both entry points train: processes, data, and a sharded model with its weights."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from megablocks_utils.checkpoint.index import resolve_checkpoint_folder
from megablocks_utils.checkpoint.slices import SliceReader
from megablocks_utils.checkpoint.tokenizer import load_tokenizer
from megablocks_utils.config import ResolvedPrecision, RunConfig, check_world, resolve_precision
from megablocks_utils.fsdp.materialize import FillLocal
from megablocks_utils.fsdp.placement_plan import PlacementPlan
from megablocks_utils.lora.apply import ChosenAdapters, apply_lora, choose_adapters
from megablocks_utils.lora.settings import LoraSettings
from megablocks_utils.mesh.sequence_exchange import SequenceGroup
from megablocks_utils.moe.expert_spec import find_expert_parameters
from megablocks_utils.moe.kernel_check import KernelCheck, verify_kernel
from megablocks_utils.moe.model_facts import find_top_k
from megablocks_utils.moe.sharded_moe import ShardedMoE
from megablocks_utils.processes.agreement import raise_on_all_ranks
from megablocks_utils.processes.launch import LaunchEnvironment
from megablocks_utils.training.data.answer_end import AnswerEnd
from megablocks_utils.training.data.examples import TokenizedExamples
from megablocks_utils.training.data.schedule import Schedule
from megablocks_utils.training.dense_layers import place_parameters
from megablocks_utils.training.describe_model import describe_model
from megablocks_utils.training.evaluation.held_out_data import share_held_out
from megablocks_utils.training.evaluation.held_out_loss import HeldOut
from megablocks_utils.training.expert_placement import find_loads_path, place_experts
from megablocks_utils.training.memory_check import MemoryCheck, check_memory
from megablocks_utils.training.model_source import ModelSource, split_experts
from megablocks_utils.training.report.parameters import ParameterCounts, count_parameters
from megablocks_utils.training.report.summary import build_console
from megablocks_utils.training.report.trackers import check_trackers
from megablocks_utils.training.resume.resume_compatibility import (
    ResumeCompatibility,
    check_compatibility,
    describe_compatibility,
)
from megablocks_utils.training.resume.resume_point import (
    ResumePoint,
    find_resume_point,
)
from megablocks_utils.training.run_data import build_schedule, let_generation_stop, load_all_data
from megablocks_utils.training.same_run import check_run_inputs
from megablocks_utils.training.step.layer_options import apply_layer_options
from megablocks_utils.training.step.model_probe import (
    ModelProbe,
    apply_router_options,
    probe_model,
)
from megablocks_utils.training.step.routing_hooks import RoutingHooks
from megablocks_utils.training.step.sequence_parallel import apply_sequence_parallelism


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
        answer_end: what the data teaches as the end of an answer; None without a tokenizer.
        schedule: which examples each step holds.
        model_folder: the local folder its weights came from.
        model: on meta until FSDP has wrapped it; adapters, where asked for, have their values.
        sharded: how its experts are split; None without expert parallelism and without adapters of
            experts, which are this project's at ep 1 also then.
        placement: how every parameter will lie on the ranks.
        lora: which adapters; None where all weights are trained.
        counts: parameters of the whole model.
        num_experts: experts of a layer.
        top_k: experts of a token; None where the model does not say it.
        parameter_specs: (name, whole shape, dtype) of every parameter but adapters.
        reader: of the model's checkpoint, by its layout.
        fill_local: where the weights come from once each rank knows its part of them.
        compatibility: what a run that resumes from this one's checkpoints must share with it.
        resume: the checkpoint to resume from; None for a run that starts fresh.
        plan: the memory that was predicted, or why it was not.
        probe: what was found out of the model's forward pass.
        routing: counts the tokens of experts, to balance them or to measure their loads.
        held_out: what is evaluated, and how ranks share it; None for a run without evaluation.
        sequence: the ranks that share this rank's rows; None: it has its own.
    """

    config: RunConfig
    launch: LaunchEnvironment
    precision: ResolvedPrecision
    device: torch.device
    console: Console
    tokenizer: PreTrainedTokenizerBase | None
    answer_end: AnswerEnd | None
    schedule: Schedule
    model_folder: Path
    model: PreTrainedModel
    sharded: ShardedMoE | None
    placement: PlacementPlan
    lora: LoraSettings | None
    counts: ParameterCounts
    num_experts: int
    top_k: int | None
    parameter_specs: list[tuple[str, tuple[int, ...], torch.dtype]]
    reader: SliceReader
    fill_local: FillLocal
    compatibility: ResumeCompatibility
    resume: ResumePoint | None
    plan: MemoryCheck
    probe: ModelProbe
    routing: RoutingHooks
    sequence: SequenceGroup | None = None
    held_out: HeldOut | None = None

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """The expert weights as they are now, sharded or not, by name; without adapters."""
        return find_expert_parameters(self.model)

    def verify_kernel(self) -> KernelCheck | None:
        """Compare the kernel with `eager`, all weights being there; None if it is not ours.

        **Collective:** as `moe.kernel_check.verify_kernel`, which raises what this raises.
        """
        if self.sharded is None:
            return None
        if not self.config.parallel.verify_kernel:
            return KernelCheck(skipped="--verify_kernel is False")
        check = verify_kernel(self.sharded, getattr(torch, self.precision.compute))
        if check.replaced is not None:
            self.console.print(check.replaced, markup=False, soft_wrap=True)
        return check

    @property
    def first_step(self) -> int:
        """Optimizer steps that earlier processes of this run have done."""
        return self.resume.step if self.resume else 0

    @property
    def num_layers(self) -> int:
        """How many layers become an FSDP unit."""
        classes = set(self.layer_classes)
        return sum(type(module).__name__ in classes for module in self.model.modules())

    @property
    def layer_classes(self) -> list[str]:
        """Class names of the layers that this model has, which become one FSDP unit each."""
        present = {type(module).__name__ for module in self.model.modules()}
        return sorted(present.intersection(self.model._no_split_modules or ()))


def build_setup(config: RunConfig, launch: LaunchEnvironment, device: torch.device) -> Setup:
    """Load data, build the model without its weights, split the experts, attach adapters.

    **Collective:** every rank must call; what one rank cannot read ends all of them.

    Raises:
        UserError: on every rank, for what the user can mend.
    """
    console, precision = _begin(config, launch), resolve_precision(config, device.type)
    resume = find_resume_point(config, launch)
    source = _open_model(config, precision, launch.world_size, console)
    folder, model = source.folder, source.model
    adapters = raise_on_all_ranks(lambda: _choose_adapters(source.model, config))
    lora = None if adapters is None else adapters.settings
    tokenizer = raise_on_all_ranks(lambda: load_tokenizer(folder))
    examples, held_out = load_all_data(config, tokenizer, model, launch, resume, console=console)
    fingerprint = check_run_inputs(config, folder, examples, held_out)
    probe = probe_model(config, model, device, console)
    sequence = apply_sequence_parallelism(config, model, probe.packing.packing, device, console)
    schedule = build_schedule(config, examples, tokenizer, model, launch, probe.packing, resume)
    compatibility = _check_compatibility(
        schedule, precision, lora, model, fingerprint, held_out=held_out, resume=resume
    )
    checkpoint = None if resume is None else resume.folder
    description = raise_on_all_ranks(lambda: describe_model(model))
    sharded = raise_on_all_ranks(lambda: _split_experts(source, schedule, device, precision))
    place_experts(sharded, find_loads_path(config, resume), console)
    routing = apply_router_options(config, model, probe, device, source.reader.fill_local)
    specs = [(name, tuple(p.shape), p.dtype) for name, p in model.named_parameters()]
    plan = check_memory(config, description, schedule, device, sharded, probe=probe, lora=lora)
    raise_on_all_ranks(lambda: _apply_lora(model, sharded, adapters, config, precision))
    apply_layer_options(model, config, probe, console)
    return Setup(
        config=config,
        launch=launch,
        precision=precision,
        device=device,
        console=console,
        tokenizer=tokenizer,
        answer_end=let_generation_stop(config, examples, tokenizer, model),
        schedule=schedule,
        model_folder=folder,
        model=model,
        sharded=sharded,
        placement=place_parameters(model, sharded, config, device, console),
        lora=lora,
        counts=_count(model, sharded),
        num_experts=source.num_experts,
        top_k=find_top_k(model),
        parameter_specs=specs,
        reader=source.reader,
        fill_local=raise_on_all_ranks(lambda: source.choose_fill(checkpoint)),
        compatibility=compatibility,
        resume=resume,
        plan=plan,
        probe=probe,
        routing=routing,
        sequence=sequence,
        held_out=share_held_out(schedule, held_out, console, tokenizer),
    )


def _begin(config: RunConfig, launch: LaunchEnvironment) -> Console:
    """Refuse what needs nothing read to be refused, seed all random numbers, open the console."""
    raise_on_all_ranks(lambda: check_trackers(config.report_to))
    set_seed(config.seed)
    check_world(config, launch.world_size)
    return build_console(launch.rank == 0)


def _open_model(
    config: RunConfig, precision: ResolvedPrecision, world_size: int, console: Console
) -> ModelSource:
    name = config.model.model_name_or_path
    folder = raise_on_all_ranks(lambda: resolve_checkpoint_folder(name))
    source = raise_on_all_ranks(lambda: ModelSource(folder, config, precision))
    for note in source.notes:
        console.print(note, markup=False)
    check_world(config, world_size, source.num_experts)
    return source


def _check_compatibility(
    schedule: Schedule,
    precision: ResolvedPrecision,
    lora: LoraSettings | None,
    model: PreTrainedModel,
    fingerprint: str,
    *,
    held_out: TokenizedExamples | None,
    resume: ResumePoint | None,
) -> ResumeCompatibility:
    """Return what runs that resume must share with this one, which shares it with `resume`."""
    found = describe_compatibility(
        schedule.config,
        precision,
        lora,
        schedule.examples,
        model_type=model.config.model_type,
        world_size=schedule.world_size,
        base_sha256=None if lora is None else fingerprint,
        packing=schedule.packing,
    )
    if held_out is not None:
        found = replace(found, eval_sha256=held_out.checksum())
    if resume is not None:
        check_compatibility(resume.manifest, found, schedule.config, schedule)
    return found


def _split_experts(
    source: ModelSource, schedule: Schedule, device: torch.device, precision: ResolvedPrecision
) -> ShardedMoE | None:
    config = schedule.config
    tokens = schedule.examples.lengths.mean() * config.optim.per_device_train_batch_size
    tokens = round(tokens / config.parallel.sp_size)
    compute = getattr(torch, precision.compute)
    sharded = split_experts(source.model, config, device, compute, tokens)
    source.keep_stored_bits(sharded)
    return sharded


def _choose_adapters(model: PreTrainedModel, config: RunConfig) -> ChosenAdapters | None:
    return choose_adapters(model, config.adapter) if config.adapter.has_lora else None


def _apply_lora(
    model: PreTrainedModel,
    sharded: ShardedMoE | None,
    adapters: ChosenAdapters | None,
    config: RunConfig,
    precision: ResolvedPrecision,
) -> None:
    dtype = getattr(torch, precision.adapter)
    if adapters is not None:
        apply_lora(model, sharded, adapters, dtype=dtype, seed=config.seed)


def _count(model: PreTrainedModel, sharded: ShardedMoE | None) -> ParameterCounts:
    experts = find_expert_parameters(model) if sharded is None else sharded.expert_parameters
    return count_parameters(model, experts, find_top_k(model))
