"""Go through a micro-step, event by event."""

from collections.abc import Sequence

from megablocks_utils.planning.memory.fsdp1_buffers import Fsdp1Buffers
from megablocks_utils.planning.memory.fsdp2_buffers import Fsdp2Buffers
from megablocks_utils.planning.memory.fsdp_units import FsdpUnit, ModelUnits
from megablocks_utils.planning.memory.ledger import Ledger
from megablocks_utils.planning.memory.loss_steps import build_loss_steps
from megablocks_utils.planning.memory.model_stages import HeadPlan, LayerPlan, plan_head
from megablocks_utils.planning.memory.sizes import Sizes
from megablocks_utils.planning.memory.stages import ACTIVATIONS, DISPATCH, Stage

__all__ = ["MicroStep"]

_BUFFERS, _GRADIENTS = "fsdp_buffers", "gradients"


class MicroStep:
    """A forward and a backward pass.

    Args:
        sizes: of the run.
        units: what this rank holds.
        layers: plan of every decoder layer.
        ledger: to book in.
        buffers: FSDP's.
        has_expert_gradients: whether experts outside of FSDP have gradients already.
    """

    def __init__(
        self,
        sizes: Sizes,
        units: ModelUnits,
        layers: Sequence[LayerPlan],
        *,
        ledger: Ledger,
        buffers: Fsdp1Buffers | Fsdp2Buffers,
        has_expert_gradients: bool,
    ) -> None:
        self._sizes = sizes
        self._units = units
        self._layers = layers
        self._head: HeadPlan = plan_head(sizes)
        self._loss = build_loss_steps(sizes, self._head, ledger)
        self._ledger = ledger
        self._buffers = buffers
        self._has_expert_gradients = has_expert_gradients
        self._recomputes = sizes.run.gradient_checkpointing != "none"
        self._keeps_exchanges = sizes.run.gradient_checkpointing == "selective"
        # Hidden states beside the copy in fp32 that the norms keep.
        self._stream = sizes.hidden_bytes * sizes.casts

    def run(self) -> None:
        """Book the whole micro-step."""
        self._ledger.moment = "forward"
        self._embed()
        for layer in self._layers:
            self._forward_layer(layer)
        self._compute_head()
        self._ledger.moment = "loss"
        self._loss.compute_loss()
        self._ledger.moment = "backward"
        self._loss.backward_loss()
        self._backward_head()
        for layer in reversed(self._layers):
            self._backward_layer(layer)
        self._backward_embedding()

    def _embed(self) -> None:
        embedding = self._units.embedding
        self._buffers.enter(embedding or self._units.tail)
        self._ledger.hold(ACTIVATIONS, self._head.held + self._head.mask)
        self._ledger.transient(ACTIVATIONS, self._sizes.hidden_bytes)
        if embedding is not None:
            self._buffers.leave(embedding)

    def _forward_layer(self, layer: LayerPlan) -> None:
        ledger, buffers, experts = self._ledger, self._buffers, layer.units.experts
        for unit in layer.units.dense:
            buffers.enter(unit)
        # Checkpointing keeps every layer's input.
        hidden = self._sizes.hidden_bytes if self._recomputes else self._stream
        ledger.hold(ACTIVATIONS, hidden)
        self._forward_stages(layer.dense)
        between = self._hidden_beside_experts()
        ledger.hold(ACTIVATIONS, between)
        if experts is not None:
            buffers.enter(experts)
        self._forward_stages(layer.experts)
        if experts is not None:
            buffers.leave(experts)
        ledger.free(ACTIVATIONS, between)
        self._forward_stages(layer.shared)
        ledger.transient(ACTIVATIONS, self._sizes.hidden_bytes)
        if not self._recomputes:
            ledger.free(ACTIVATIONS, hidden)
        for unit in layer.units.dense:
            buffers.leave(unit)

    def _hidden_beside_experts(self) -> int:
        """Return hidden states, before and after the norm, that only names of Python hold."""
        normalised = self._recomputes or not self._sizes.trains_all
        return self._sizes.hidden_bytes * (normalised + self._recomputes)

    def _forward_stages(self, stages: Sequence[Stage]) -> None:
        """Pass stages of the forward pass."""
        named = 0
        for stage in stages:
            own = 0
            if not self._recomputes:
                self._ledger.hold(stage.component, stage.saved_bytes)
            else:
                self._ledger.hold(stage.component, stage.named + stage.kept * self._keeps_exchanges)
                named += stage.named
                own = stage.saved_bytes - stage.named
            self._ledger.transient(stage.component, stage.forward_bytes + own)
        self._ledger.free(DISPATCH, named)

    def _recompute_stages(self, stages: Sequence[Stage]) -> None:
        """Pass stages that are computed again for the backward pass."""
        for stage in stages:
            if self._keeps_exchanges:
                self._ledger.free(stage.component, stage.kept)
            self._ledger.hold(stage.component, stage.saved_bytes)
            self._ledger.transient(stage.component, stage.forward_bytes)

    def _compute_head(self) -> None:
        ledger, head = self._ledger, self._head
        if self._units.embedding is not None:
            self._buffers.enter(self._units.tail)
        ledger.hold(ACTIVATIONS, head.norm.saved_bytes)
        ledger.transient(ACTIVATIONS, head.norm.forward_bytes)
        self._loss.compute_head()
        self._buffers.end_forward()
        if not self._recomputes:
            ledger.free(ACTIVATIONS, head.mask)

    def _backward_head(self) -> None:
        ledger, head, tail = self._ledger, self._head, self._units.tail
        self._buffers.enter_backward(tail, is_whole=True)
        ledger.hold(_BUFFERS, head.gradient)
        self._loss.backward_head()
        ledger.transient(ACTIVATIONS, 2 * self._sizes.hidden_bytes)
        gradients = head.gradient + self._backward_stages((head.norm,), tail)
        ledger.hold(ACTIVATIONS, self._sizes.hidden_bytes)  # the hidden states' gradients
        self._tail_gradients = gradients
        if self._units.embedding is not None:
            self._buffers.leave_backward(tail, gradients)

    def _backward_layer(self, layer: LayerPlan) -> None:
        ledger, buffers, experts = self._ledger, self._buffers, layer.units.experts
        for unit in reversed(layer.units.dense):
            buffers.enter_backward(unit)
        if experts is not None:
            # The way back comes to their outputs before it needs anything computed again.
            buffers.enter_backward(experts)
        if self._recomputes:
            ledger.hold(ACTIVATIONS, self._stream)
            # What the norm before the experts has made, no gradient asks for: a name holds it.
            normalised = self._sizes.hidden_bytes * (not self._sizes.trains_all)
            self._recompute_stages(layer.dense)
            ledger.hold(ACTIVATIONS, normalised)
            self._recompute_stages(layer.experts)
            ledger.free(ACTIVATIONS, normalised)
            self._recompute_stages(layer.shared)
            ledger.free(ACTIVATIONS, self._stream)
        owner = layer.units.trained_dense
        gradients = self._backward_stages(layer.shared, owner)
        if experts is None:
            gradients += self._backward_stages(layer.experts, owner)
        else:
            self._backward_experts(layer.experts, experts)
        gradients += self._backward_stages(layer.dense, owner)
        for unit in layer.units.dense:
            buffers.leave_backward(unit, gradients if unit is owner else 0)
        ledger.free(ACTIVATIONS, self._sizes.hidden_bytes * self._recomputes)

    def _backward_stages(self, stages: Sequence[Stage], unit: FsdpUnit) -> int:
        """Pass stages backward; returns the bytes of the gradients that wait to be reduced."""
        waiting = 0
        for stage in reversed(stages):
            if self._buffers.holds_gradients(unit):
                self._ledger.hold(_BUFFERS, stage.gradients)
                waiting += stage.gradients
            else:
                self._ledger.transient(_BUFFERS, stage.gradients)
            self._ledger.transient(stage.component, stage.backward_bytes)
            self._ledger.free(stage.component, stage.saved_bytes)
        return waiting

    def _backward_experts(self, stages: Sequence[Stage], experts: FsdpUnit) -> None:
        if experts.is_fsdp:
            gradients = self._backward_stages(stages, experts)
            self._buffers.leave_backward(experts, gradients)
            return
        self._backward_own_experts(stages, experts)

    def _backward_own_experts(self, stages: Sequence[Stage], experts: FsdpUnit) -> None:
        """Pass experts that FSDP does not hold: their gradients stay, or are added to earlier."""
        ledger = self._ledger
        has_same_dtype = experts.whole_compute_bytes == experts.trained_bytes
        stays = has_same_dtype and not self._has_expert_gradients
        for stage in reversed(stages):
            ledger.hold(_GRADIENTS if stays else DISPATCH, stage.gradients)
            ledger.transient(stage.component, stage.backward_bytes)
            ledger.free(stage.component, stage.saved_bytes)
        if stays:
            return
        if not has_same_dtype:
            # Cast one after the other, the first parameter's last.
            others = experts.whole_compute_bytes - experts.first_gradient_bytes
            ledger.transient(DISPATCH, experts.trained_bytes - others)
        ledger.free(DISPATCH, experts.whole_compute_bytes)
        if not self._has_expert_gradients:
            ledger.hold(_GRADIENTS, experts.trained_bytes)

    def _backward_embedding(self) -> None:
        ledger, head, embedding = self._ledger, self._head, self._units.embedding
        ledger.hold(_BUFFERS, head.gradient)
        ledger.free(
            ACTIVATIONS, self._sizes.hidden_bytes + head.held + head.mask * self._recomputes
        )
        if embedding is not None:
            self._buffers.leave_backward(embedding, head.gradient, is_whole=False)
        elif self._sizes.shape.is_tied:
            ledger.free(_BUFFERS, head.gradient)  # added to the head's
            self._buffers.leave_backward(self._units.tail, self._tail_gradients)
        else:
            waiting = self._tail_gradients + head.gradient
            self._buffers.leave_backward(self._units.tail, waiting)
        self._buffers.end_backward()
