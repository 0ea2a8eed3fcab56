"""Take one optimizer step of the FSDP2 script on rank 0, with imaginary peers.

With fake tensors nothing is computed and almost no memory is used: a model of any size is rehearsed
on a laptop. With real tensors (`is_real`) the step is computed on this machine's device, so that
its allocator, kernels and optimizer can be measured; what would have come from peers is left as it
is in memory, so no number in it means anything.

Facts about torch 2.13 that shape this module: a `DeviceMesh` cannot be made under fake tensors, so
the model is wrapped while it is on meta; the peak of an optimizer step needs Adam's states, so they
are made before the first micro-step.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megablocks_utils.config import RunConfig
from megablocks_utils.fake_run.assumptions import AssumedValues, assume_counts
from megablocks_utils.fake_run.imaginary_peers import imaginary_peers
from megablocks_utils.fake_run.launches import no_launches
from megablocks_utils.fake_run.ledger import LedgerPeak, MemoryLedger
from megablocks_utils.fake_run.planned_config import build_config
from megablocks_utils.fake_run.traffic import TrafficCounter
from megablocks_utils.fsdp.fsdp2 import build_accelerator, fill_layers, find_layers, wrap_fsdp2
from megablocks_utils.lora.apply import apply_lora, choose_adapters
from megablocks_utils.planning.prediction import (
    COLLECTIVES,
    COMPONENTS,
    Layout,
    PlannedRun,
    Prediction,
)
from megablocks_utils.shard_moe_utils import ShardedMoE
from megablocks_utils.training.batches import MicroBatch
from megablocks_utils.training.gradient_checkpointing import apply_gradient_checkpointing
from megablocks_utils.training.loop import TrainingState, finish_gradients, run_micro_batch
from megablocks_utils.training.micro_batch import LossWeights
from megablocks_utils.training.model_source import build_bare_model, split_experts
from megablocks_utils.training.optimizer import build_lr_scheduler, build_optimizer

_SEED = 42
_NUM_STEPS = 1000


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsed step needed.

    Attributes:
        peak: the moment at which tensors held most, as the ledger has booked it.
        allocated_bytes: held after zero_grad.
        sent_bytes_per_step: by kind of collective, scaled to all micro-steps of the run.
    """

    peak: LedgerPeak
    allocated_bytes: int
    sent_bytes_per_step: dict[str, int]

    def as_prediction(self) -> Prediction:
        """Return it as a plan has it."""
        return Prediction(
            {name: self.peak.components.get(name, 0) for name in COMPONENTS},
            self.peak.moment,
            self.allocated_bytes,
            self.sent_bytes_per_step,
        )


def rehearse(
    folder: Path,
    layout: Layout,
    run: PlannedRun,
    *,
    device: torch.device,
    is_real: bool = False,
    on_ready: Callable[[], None] = lambda: None,
    on_done: Callable[[], None] = lambda: None,
) -> Rehearsal:
    """Take one step as rank 0 of `run.world_size`; no process group may be initialised.

    Args:
        folder: holds the model's config.json; weights are not read.
        layout: how the experts are spread.
        run: what is planned; of its micro-steps two at most are taken.
        device: where tensors are, or pretend to be.
        is_real: whether they are real.
        on_ready: called when weights and optimizer state are there, before the first micro-step;
            whoever measures begins here.
        on_done: called after zero_grad, while everything that a run holds is still there.

    Raises:
        UserError: a model or kernel that cannot be run.
    """
    config = build_config(layout, run)
    imagination = () if is_real else _imagination(run.kernel)
    ledger, traffic = MemoryLedger(device.type), TrafficCounter()
    with imaginary_peers(run.world_size, device.type):
        wrapped = _wrap(folder, config, run, device)
        with ExitStack() as modes:
            for mode in (*imagination, ledger, traffic, AssumedValues()):
                modes.enter_context(mode)
            state = _fill(wrapped, config, run, device)
            step = _Step(state, run, ledger, traffic)
            step.make_optimizer_state()
            ledger.open()
            on_ready()
            step.take(config.optim.gradient_accumulation_steps)
            on_done()
            return step.report()


@dataclass(frozen=True)
class _Wrapped:
    """A model that FSDP2 has wrapped on meta, and what is needed to go on."""

    accelerator: Accelerator
    model: nn.Module
    layers: dict[str, nn.Module]
    sharded: ShardedMoE | None


def _wrap(folder: Path, config: RunConfig, run: PlannedRun, device: torch.device) -> _Wrapped:
    """Do what `training.setup` and `prepare_fsdp2` do, without data and weights."""
    precision = run.precision
    model = build_bare_model(folder, getattr(torch, precision.weights))
    compute_dtype = getattr(torch, precision.compute)
    sharded = split_experts(model, config, device, compute_dtype, run.tokens)
    if sharded is not None:
        counts = assume_counts(run.tokens * model.config.num_experts_per_tok, run.imbalance)
        for module in sharded.expert_modules.values():
            module.exchange_counts = counts
    if config.adapter.has_lora:
        adapters = choose_adapters(model, config.adapter)
        apply_lora(model, sharded, adapters, dtype=getattr(torch, precision.adapter), seed=_SEED)
        _move_to_meta(model)
    apply_gradient_checkpointing(model, config.gradient_checkpointing)
    classes = sorted(model._no_split_modules)
    accelerator = build_accelerator(config, precision, classes, device.type)
    layers = find_layers(model, accelerator)
    return _Wrapped(accelerator, wrap_fsdp2(accelerator, model, sharded), layers, sharded)


def _move_to_meta(model: nn.Module) -> None:
    """Forget the adapters' values: they are filled like the weights, and booked."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            on_meta = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            setattr(module, name, on_meta)


def _fill(
    wrapped: _Wrapped, config: RunConfig, run: PlannedRun, device: torch.device
) -> TrainingState:
    model, accelerator = wrapped.model, wrapped.accelerator
    fill_layers(model, wrapped.layers, _fill_local, accelerator.device)
    optimizer = build_optimizer(model.named_parameters(), config.optim, run.precision, seed=_SEED)
    scheduler = build_lr_scheduler(optimizer, config.optim, _NUM_STEPS)
    prepared = accelerator.prepare_optimizer(optimizer)
    model.train()
    return TrainingState(accelerator, model, prepared, scheduler, wrapped.sharded)


def _fill_local(_name: str, local: Tensor, _offsets: tuple[int, ...]) -> None:
    local.normal_(std=0.02)


def _imagination(kernel: str) -> tuple[AbstractContextManager, ...]:
    # Rotary frequencies are real: every model computes them when it is built.
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    return (fakes, no_launches()) if kernel == "triton" else (fakes,)


class _Step:
    """One optimizer step, booked."""

    def __init__(
        self, state: TrainingState, run: PlannedRun, ledger: MemoryLedger, traffic: TrafficCounter
    ) -> None:
        self._state = state
        self._run = run
        self._ledger = ledger
        self._traffic = traffic
        self._trainable = [p for p in state.model.parameters() if p.requires_grad]

    def make_optimizer_state(self) -> None:
        """Have the optimizer make its state, which the first backward pass would not see."""
        optimizer = self._state.optimizer.optimizer
        for parameter in self._trainable:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        states = (value for state in optimizer.state.values() for value in state.values())
        self._ledger.assign(states, "optimizer")
        self._traffic.take()

    def take(self, micro_steps: int) -> None:
        """Run the micro-steps, and end the step."""
        state, ledger = self._state, self._ledger
        weights = LossWeights(self._run.label_tokens, micro_steps, self._aux_loss_coef())
        self.sent_by_micro_step = []
        for _ in range(micro_steps):
            ledger.moment = "forward"
            with state.accelerator.accumulate(state.model):
                run_micro_batch(state, self._micro_batch(), weights)
            self._assign()
            self.sent_by_micro_step.append(self._traffic.take())
        ledger.moment = "optimizer"
        finish_gradients(state, max_grad_norm=1.0)
        self.sent_at_end = self._traffic.take()
        state.optimizer.step()
        state.optimizer.zero_grad()

    def report(self) -> Rehearsal:
        """Say what it needed."""
        first, last = self.sent_by_micro_step[0], self.sent_by_micro_step[-1]
        sent = Counter(last)
        for kind, size in first.items():
            sent[kind] += size * (self._run.accumulation - 1)
        sent += self.sent_at_end
        sent_bytes = {kind: sent[kind] for kind in COLLECTIVES}
        return Rehearsal(self._ledger.find_peak(), self._ledger.held_bytes, sent_bytes)

    def _assign(self) -> None:
        self._ledger.assign(self._state.model.parameters(), "parameters")
        self._ledger.assign((p.grad for p in self._trainable), "gradients")

    def _micro_batch(self) -> MicroBatch:
        num_tokens = self._run.tokens
        tokens = torch.zeros(1, num_tokens, dtype=torch.int64)
        return MicroBatch(tokens, torch.arange(num_tokens)[None], tokens.clone(), is_dummy=False)

    def _aux_loss_coef(self) -> float:
        return 0.01 if self._run.has_aux_loss else 0.0
