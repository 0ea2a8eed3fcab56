"""Take one optimizer step of either script on one rank, on a fake process group.

With fake tensors nothing is computed and almost no memory is used: a model of any size is rehearsed
on a laptop. With real tensors (`is_real`) the step is computed on this machine's device, so that
its allocator, kernels and optimizer can be measured; what would have come from peers is left as it
is in memory, so no number in it means anything.

Facts about torch 2.13 that shape this module: a `DeviceMesh` cannot be made under fake tensors, so
the model is wrapped while it is on meta; the peak of an optimizer step needs Adam's states, so they
are made before the first micro-step.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megablocks_utils.attention.implementation import set_implementation
from megablocks_utils.config import RunConfig
from megablocks_utils.fsdp.tensor_parallel import split_dense_layers
from megablocks_utils.lora.apply import apply_lora, choose_adapters
from megablocks_utils.mesh.dense_mesh import build_dense_mesh
from megablocks_utils.mesh.placement import is_replicated, local_tensor
from megablocks_utils.moe.model_facts import find_top_k
from megablocks_utils.planning.model.prediction import (
    COMPONENTS,
    ParallelLayout,
    PlannedRun,
    Prediction,
)
from megablocks_utils.quantization.packed_experts import list_stored
from megablocks_utils.rehearsal.assumptions import (
    AssumedValues,
    assume_routing,
    assume_stored,
    pretend,
)
from megablocks_utils.rehearsal.fake_process_group import fake_process_group
from megablocks_utils.rehearsal.library_patches import without_values
from megablocks_utils.rehearsal.memory_ledger import HOST, IN_LAYERS, LedgerPeak, MemoryLedger
from megablocks_utils.rehearsal.planned_batch import build_planned_batch
from megablocks_utils.rehearsal.planned_config import build_config
from megablocks_utils.rehearsal.rehearsed_runs import (
    Fsdp1Run,
    Fsdp2Run,
    RehearsalInputs,
    move_to_meta,
)
from megablocks_utils.rehearsal.traffic_counter import Route, TrafficCounter, sum_groups
from megablocks_utils.rehearsal.watched_operators import WatchedOperators
from megablocks_utils.training.describe_model import find_layers
from megablocks_utils.training.model_source import build_bare_model, split_experts
from megablocks_utils.training.step.gradient_checkpointing import apply_gradient_checkpointing
from megablocks_utils.training.step.micro_batch import LossWeights
from megablocks_utils.training.step.sequence_parallel import share_rows

_SEED = 42
_MICRO_STEPS = 2
"""Micro-steps that are rehearsed at most: one that finds no gradients, one that finds some."""


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsed step needed.

    Attributes:
        peaks: when tensors held most in each moment of the step, as the ledger has booked it.
        allocated_bytes: held after zero_grad.
        host_bytes: held in host memory at most, of what is offloaded.
        sent: bytes by receivers, scaled to all micro-steps of the run.
    """

    peaks: list[LedgerPeak]
    allocated_bytes: int
    sent: Mapping[Route, int]
    host_bytes: int = 0

    @property
    def peak(self) -> LedgerPeak:
        """The moment at which tensors held most of all."""
        return max(self.peaks, key=lambda peak: peak.total_bytes)

    def as_prediction(self) -> Prediction:
        """Return it as a plan has it."""
        return Prediction(
            {name: self.peak.components.get(name, 0) for name in COMPONENTS},
            "backward" if self.peak.moment == IN_LAYERS else self.peak.moment,
            self.allocated_bytes,
            sum_groups(self.sent),
            self.host_bytes,
        )


def rehearse(
    model: Path | PreTrainedModel,
    layout: ParallelLayout,
    run: PlannedRun,
    *,
    device: torch.device,
    rank: int = 0,
    is_real: bool = False,
    on_wrapped: Callable[[], None] = lambda: None,
    on_ready: Callable[[], None] = lambda: None,
    on_done: Callable[[], None] = lambda: None,
) -> Rehearsal:
    """Take one step as one rank of `run.world_size`; no process group may be initialised.

    Args:
        model: on meta, which is changed; or the folder with its config.json.
        layout: how the experts are spread.
        run: what is planned; of its micro-steps two at most are taken.
        device: where tensors are, or pretend to be.
        rank: whose step it is.
        is_real: whether they are real.
        on_wrapped: called when the model is there, but none of its weights.
        on_ready: called when weights and optimizer state are there, before the first micro-step;
            whoever measures begins here.
        on_done: called after zero_grad, while everything that a run holds is still there.

    Raises:
        UserError: a model or kernel that cannot be run.
    """
    steps = 1 if _begins_with_gradients(run) else min(run.accumulation, _MICRO_STEPS)
    config = build_config(layout, run, steps)
    ledger, traffic = MemoryLedger(device.type), TrafficCounter()
    fakes = () if is_real else pretend(run, lambda copy: ledger.assign([copy], HOST))
    with fake_process_group(run.world_size, device.type, rank):
        rehearsed, layers = _build(model, config, run, device)
        ledger.watch_layers(layers[-1])
        with ExitStack() as modes:
            watched = WatchedOperators(AssumedValues(run.label_tokens), traffic, ledger)
            for mode in (*fakes, ledger, watched):
                modes.enter_context(mode)
            on_wrapped()
            rehearsed.fill()
            rehearsed.model.train()
            step = _Step(rehearsed, run, ledger, traffic)
            step.make_optimizer_state()
            ledger.open()
            on_ready()
            step.take(steps)
            on_done()
            return step.report()


def _begins_with_gradients(run: PlannedRun) -> bool:
    """Say whether one micro-step, begun with gradients, does what every later one does.

    With groups it does not: sums of a group wait in memory of their own.
    """
    is_one_group = run.entry_point == "fsdp2" and run.dp_replicate_size == 1
    return run.sync_each_batch and run.accumulation > 1 and is_one_group


def _build(
    model: Path | PreTrainedModel, config: RunConfig, run: PlannedRun, device: torch.device
) -> tuple[Fsdp1Run | Fsdp2Run, nn.ModuleList]:
    """Do what `training.setup` does, without data and weights, and wrap what can be wrapped."""
    precision = run.precision
    if isinstance(model, Path):
        dtypes = getattr(torch, precision.weights), getattr(torch, precision.compute)
        model = build_bare_model(model, *dtypes)
    if run.is_varlen:
        set_implementation(model, "varlen")
    if run.sp_size > 1:
        share_rows(model, run.sp_size, device, run.tp_size)
    layers = find_layers(model)
    compute_dtype = getattr(torch, precision.compute)
    sharded = split_experts(model, config, device, compute_dtype, run.expert_tokens)
    if sharded is not None:
        for module in sharded.expert_modules.values():
            assume_routing(module, run.expert_tokens, (find_top_k(model) or 1), run.imbalance)
            assume_stored(module)
    if config.adapter.has_lora:
        adapters = choose_adapters(model, config.adapter)
        dtype = getattr(torch, precision.adapter)
        with without_values():
            apply_lora(model, sharded, adapters, dtype=dtype, seed=_SEED)
        move_to_meta(model)
    mesh = build_dense_mesh(
        device.type, tp_size=run.tp_size, dp_replicate_size=run.dp_replicate_size
    )
    if run.tp_size > 1:
        assert mesh is not None and sharded is not None, "its experts are this project's"
        split_dense_layers(model, sharded, mesh)
    apply_gradient_checkpointing(model, config.gradient_checkpointing)
    kind = Fsdp1Run if run.entry_point == "fsdp1" else Fsdp2Run
    return kind(RehearsalInputs(model, sharded, config, run, device, mesh)), layers


class _Step:
    """One optimizer step, booked."""

    def __init__(
        self,
        rehearsed: Fsdp1Run | Fsdp2Run,
        run: PlannedRun,
        ledger: MemoryLedger,
        traffic: TrafficCounter,
    ) -> None:
        self._rehearsed = rehearsed
        self._run = run
        self._ledger = ledger
        self._traffic = traffic
        self._trainable = [p for p in rehearsed.model.parameters() if p.requires_grad]

    def make_optimizer_state(self) -> None:
        """Have the optimizer make its state, which the first backward pass would not see."""
        optimizer = self._rehearsed.optimizer
        for parameter in self._trainable:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        if not _begins_with_gradients(self._run):
            optimizer.zero_grad()
        for trained, state in optimizer.state.items():
            for value in state.values():
                is_moved = self._run.offloaded == "optimizer" and value.dim() > 0
                on_host = is_moved or self._is_on_host(trained)
                self._ledger.assign([value], HOST if on_host else "optimizer")
        self._traffic.take()

    def take(self, micro_steps: int) -> None:
        """Run the micro-steps, and end the step."""
        rehearsed, ledger = self._rehearsed, self._ledger
        aux_loss_coef = 0.01 if self._run.has_aux_loss else 0.0
        weights = LossWeights(
            self._run.label_tokens, micro_steps, aux_loss_coef, logits_map=rehearsed.logits_map
        )
        self.sent_by_micro_step = []
        for number in range(micro_steps):
            ledger.moment = "forward"
            is_last = number == micro_steps - 1
            rehearsed.micro_step(build_planned_batch(self._run), weights, is_last=is_last)
            self._assign()
            self.sent_by_micro_step.append(self._traffic.take())
        ledger.moment = "optimizer"
        rehearsed.finish_gradients()
        self.sent_at_end = self._traffic.take()
        rehearsed.update()

    def report(self) -> Rehearsal:
        """Say what it needed."""
        first, last = self.sent_by_micro_step[0], self.sent_by_micro_step[-1]
        sent = Counter(last)
        for route, size in first.items():
            sent[route] += size * (self._run.accumulation - 1)
        sent += self.sent_at_end
        ledger = self._ledger
        return Rehearsal(ledger.find_peaks(), ledger.held_bytes, sent, ledger.find_host_peak())

    def _assign(self) -> None:
        for parameter in self._rehearsed.model.parameters():
            on_host = self._is_on_host(parameter)
            stored = list_stored(local_tensor(parameter.detach()))
            self._ledger.assign(stored, HOST if on_host else "parameters")
            self._ledger.assign([parameter.grad], HOST if on_host else "gradients")

    def _is_on_host(self, parameter: Tensor) -> bool:
        """Return whether FSDP2 keeps a parameter, with its gradient and states, in host memory."""
        return self._run.offloaded == "params" and not is_replicated(parameter)
