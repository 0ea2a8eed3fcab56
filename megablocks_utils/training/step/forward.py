"""Give a micro-batch to a model, and take the logits or the loss of its label positions."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import create_masks_for_generate, find_packed_sequence_indices

from megablocks_utils.attention.ulysses import WholeRows, whole_rows
from megablocks_utils.attention.varlen_interface import example_lengths
from megablocks_utils.fsdp.tensor_parallel import gather_split_linear
from megablocks_utils.training.data.batches import MicroBatch, Packing
from megablocks_utils.training.step.linear_cross_entropy import (
    LogitsMap,
    linear_cross_entropy,
    takes_blocks,
)
from megablocks_utils.training.step.objective import (
    LabelPositions,
    label_positions,
    token_loss_sum,
)
from megablocks_utils.training.step.replaced_forward import replaced_forward

__all__ = ["run_forward", "run_loss"]


def run_loss(
    model: nn.Module,
    batch: MicroBatch,
    device: torch.device,
    logits_map: LogitsMap | None,
    *,
    router_logits: bool = False,
) -> tuple[Any, Tensor]:
    """Run a transformers model, wrapped or not, on a micro-batch, and sum its token losses.

    Args:
        model: a causal language model.
        batch: its examples.
        device: where the model computes.
        logits_map: what the model does to its head's logits, so that all of them are never there
            at once; None: they are.
        router_logits: whether it is asked for its router logits and auxiliary loss.

    Returns:
        The model's outputs, and the sum of the token losses: a scalar in fp32.
    """
    head = _find_head(model)
    if logits_map is None or not takes_blocks(head):
        outputs, logits, targets = run_forward(model, batch, device, router_logits=router_logits)
        return outputs, token_loss_sum(logits, targets)
    positions = label_positions(batch.labels, batch.columns).to(device)
    shape = batch.take_own(batch.labels).shape
    losses: list[Tensor] = []

    def compute_loss(hidden: Tensor) -> Tensor:
        # Here FSDP has gathered the head's weights.
        assert hidden.shape[:2] == shape, "the head sees every position"
        rows, targets = positions.take_from(hidden)[0], positions.targets
        split, weight, bias = gather_split_linear(head)
        if split is not None:
            rows, targets = split.take(rows), split.take(targets)
        loss_sum, no_logits = linear_cross_entropy(rows, weight, bias, targets, logits_map)
        losses.append(loss_sum if split is None else split.total(loss_sum))
        return no_logits

    with replaced_forward(head, compute_loss):
        outputs = _call(model, batch, device, router_logits=router_logits)
    [loss_sum] = losses
    # FSDP gathers weights for backward when it comes to what a module has returned.
    return outputs, loss_sum + outputs.logits.sum()


def run_forward(
    model: nn.Module, batch: MicroBatch, device: torch.device, *, router_logits: bool = False
) -> tuple[Any, Tensor, Tensor]:
    """Run a transformers model, wrapped or not, on a micro-batch.

    Its output head sees only the positions whose next token is learned.

    Args:
        model: a causal language model.
        batch: its examples.
        device: where the model computes.
        router_logits: whether it is asked for its router logits and auxiliary loss.

    Returns:
        The model's outputs, (1, P, V) logits and (P,) target tokens.
    """
    positions = label_positions(batch.labels, batch.columns)
    with _keep_positions(model, positions, batch.take_own(batch.labels).shape, device):
        outputs = _call(model, batch, device, router_logits=router_logits)
    logits = outputs.logits
    if logits.shape[:2] != (1, len(positions.targets)):
        logits = positions.take_from(logits)
    return outputs, logits, positions.targets.to(device)


def _call(model: nn.Module, batch: MicroBatch, device: torch.device, *, router_logits: bool) -> Any:
    config = model.config
    assert isinstance(config, PreTrainedConfig), "a transformers model has one"
    rows = batch.row_lengths
    with ExitStack() as stack:
        if rows:
            stack.enter_context(example_lengths(rows))
        if batch.columns is not None:
            stack.enter_context(whole_rows(_describe_rows(batch, device)))
        return model(
            **_model_inputs(config, batch, device),
            use_cache=False,
            output_router_logits=router_logits,
        )


def _model_inputs(
    config: PreTrainedConfig, batch: MicroBatch, device: torch.device
) -> dict[str, Any]:
    """Return what the model is called with; see `Packing`."""
    input_ids = batch.take_own(batch.input_ids).to(device)
    if batch.columns is not None:
        return _inputs_of_part(batch, input_ids, device)
    if batch.packing in (Packing.PADDED, Packing.ALONE):
        # Positions are the model's own to count: some have three for each token.
        if batch.attention_mask is None:
            return {"input_ids": input_ids}
        return {"input_ids": input_ids, "attention_mask": batch.attention_mask.to(device)}
    position_ids = batch.position_ids.to(device)
    inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids}
    if batch.packing is Packing.MASKS:
        # Of the embeddings, only sizes, dtype and device are looked at.
        embeddings = torch.empty((*input_ids.shape, 0), device=device)
        inputs["attention_mask"] = create_masks_for_generate(
            config, embeddings, None, None, position_ids=position_ids
        )
    elif batch.packing is Packing.SEQUENCES:
        inputs |= _sequence_indices(batch.position_ids, device)
    return inputs


def _inputs_of_part(batch: MicroBatch, input_ids: Tensor, device: torch.device) -> dict[str, Any]:
    """Return what the model is called with for a part of each row; masks know the whole ones."""
    inputs: dict[str, Any] = {
        "input_ids": input_ids,
        "position_ids": batch.take_own(batch.position_ids).to(device),
    }
    if batch.packing is Packing.SEQUENCES:
        inputs |= _sequence_indices(batch.position_ids, device)
    return inputs


def _describe_rows(batch: MicroBatch, device: torch.device) -> WholeRows:
    position_ids = batch.position_ids.to(device)
    if not batch.packing.is_one_row:
        mask = batch.attention_mask
        return WholeRows(position_ids, None if mask is None else mask.to(device))
    if len(batch.lengths) == 1:
        return WholeRows(position_ids)
    numbers = find_packed_sequence_indices(batch.position_ids)
    on_device = None if numbers is None else numbers.to(device)
    return WholeRows(position_ids, example_numbers=on_device)


def _sequence_indices(position_ids: Tensor, device: torch.device) -> dict[str, Any]:
    """Return the cumulated lengths and the numbers of a row's examples, as kernels take them."""
    starts = (position_ids[0] == 0).nonzero().flatten()
    ends = torch.tensor([position_ids.shape[1]])
    boundaries = torch.cat((starts, ends)).to(device, torch.int32)
    longest = int(torch.diff(torch.cat((starts, ends))).max())
    numbers = ((position_ids == 0).cumsum(-1) - 1).to(device, torch.int32)
    return {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": numbers,
    }


def _find_head(model: nn.Module) -> nn.Module | None:
    find_head = getattr(model, "get_output_embeddings", None)
    head = None if find_head is None else find_head()
    assert head is None or isinstance(head, nn.Module), "an output head is a module"
    return head


@contextmanager
def _keep_positions(
    model: nn.Module, positions: LabelPositions, shape: torch.Size, device: torch.device
) -> Iterator[None]:
    """Let the output head see only these positions, while entered.

    Not by the argument `logits_to_keep`: some models lack it, and it means the same positions in
    each row.
    """
    head = _find_head(model)
    if head is None:
        yield
        return
    on_device = positions.to(device)

    def select(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor) or args[0].shape[:2] != shape:
            return None
        return (on_device.take_from(args[0]), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
