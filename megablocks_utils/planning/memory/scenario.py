"""A run to be planned: its options, its model's shape and how many ranks there are."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from megablocks_utils.config import RunConfig, resolve_precision
from megablocks_utils.config.adapter import DEFAULT_LORA_R, LM_HEAD, ROUTER, AdapterConfig
from megablocks_utils.config.parallel import count_ranks_of_slice, legal_ep_sizes
from megablocks_utils.config.quantization import check_packed_slices
from megablocks_utils.config.values import join_words
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.planning.memory.formula import legal_layouts, predict
from megablocks_utils.planning.model.model_shape import ModelShape
from megablocks_utils.planning.model.prediction import (
    ONE_ROW,
    ParallelLayout,
    PlannedRun,
    Prediction,
)

__all__ = ["DEFAULT_IMBALANCE", "Scenario", "has_rare_adapters", "read_shape"]

DEFAULT_IMBALANCE = 1.25


def has_rare_adapters(adapter: AdapterConfig) -> bool:
    """Say whether parts have adapters that the formulas do not know."""
    return not {ROUTER, LM_HEAD}.isdisjoint(adapter.parts)


@dataclass(frozen=True)
class Scenario:
    """Hold all that a prediction depends on, but the layout.

    Attributes:
        config: the options of the run.
        shape: the model's sizes.
        world_size: ranks.
        device_type: `cuda` or `cpu`.
        kernel: backend of the experts, with `auto` resolved.
        tokens: of the largest micro-batch that a rank, or ranks that share rows, have at a time.
        label_tokens: of these, those whose next token is learned.
        examples: in that micro-batch; more than one need a mask.
        packing: how they are laid out.
        is_varlen: whether attention takes them one by one, without a mask.
        has_whole_logits: whether the loss takes the logits of all labels at once.
        imbalance: rows that the busiest rank of an ep group receives, over its fair share.
        rehearse: predicts what the formulas do not know; None: nothing does.
    """

    config: RunConfig
    shape: ModelShape
    world_size: int
    device_type: str
    kernel: str
    tokens: int
    label_tokens: int
    examples: int = 1
    packing: str = ONE_ROW
    is_varlen: bool = False
    has_whole_logits: bool = False
    imbalance: float = DEFAULT_IMBALANCE
    rehearse: Callable[[ParallelLayout, PlannedRun], Prediction] | None = None

    @property
    def shard_size(self) -> int:
        """Ranks of a group, which the model is sharded over."""
        return self.world_size // self.config.parallel.dp_replicate_size

    @property
    def slice_ranks(self) -> int:
        """Ranks of a group that hold the same slice of every expert: ep times dp."""
        parallel = self.config.parallel
        return count_ranks_of_slice(
            self.shard_size, parallel.expert_tp_size, parallel.dp_replicate_size
        )

    @property
    def rank_tokens(self) -> int:
        """Tokens of the largest micro-batch that one rank has: its part, where ranks share rows."""
        return -(-self.tokens // self.config.parallel.sp_size)

    def with_groups(self, dp_replicate_size: int) -> "Scenario":
        """Return the same run with so many groups."""
        parallel = replace(self.config.parallel, dp_replicate_size=dp_replicate_size)
        return replace(self, config=replace(self.config, parallel=parallel))

    def one_group(self) -> "Scenario":
        """Return the same run on the ranks of one group."""
        return replace(self.with_groups(1), world_size=self.shard_size)

    def planned_run(self) -> PlannedRun:
        """Return what the engines want to know."""
        config = self.config
        return PlannedRun(
            world_size=self.world_size,
            entry_point=config.entry_point,
            precision=resolve_precision(config, self.device_type),
            use_lora=config.adapter.targets,
            lora_r=config.adapter.lora_r or DEFAULT_LORA_R,
            gradient_checkpointing=config.gradient_checkpointing,
            accumulation=config.optim.gradient_accumulation_steps,
            sync_each_batch=bool(config.optim.sync_each_batch),
            tokens=self.rank_tokens,
            label_tokens=min(self.label_tokens, self.rank_tokens),
            kernel=self.kernel,
            imbalance=self.imbalance,
            has_aux_loss=self._has_aux_loss(),
            device_type=self.device_type,
            examples=self.examples,
            packing=self.packing,
            is_varlen=self.is_varlen,
            dp_replicate_size=config.parallel.dp_replicate_size,
            cpu_offload=config.cpu_offload,
            has_whole_logits=self.has_whole_logits,
            token_dispatch=config.parallel.token_dispatch,
            sp_size=config.parallel.sp_size,
            expert_tp_size=config.parallel.expert_tp_size,
            tp_size=config.parallel.tp_size,
            packed_format=config.adapter.packed_format,
            optim=config.optim.optim,
        )

    def own_layout(self) -> ParallelLayout:
        """Return the layout that the options themselves ask for."""
        parallel = self.config.parallel
        if not parallel.use_megablocks_sharding:
            return ParallelLayout(1, "shard")
        ep_size = parallel.ep_size or self.slice_ranks
        is_dmoe = ep_size == 1
        if self.config.entry_point == "fsdp1":
            return ParallelLayout(ep_size, "replicate", is_dmoe)
        has_copies = ep_size < self.slice_ranks and parallel.expert_dp == "replicate"
        return ParallelLayout(ep_size, "replicate" if has_copies else "shard", is_dmoe)

    def legal_layouts(self) -> list[ParallelLayout]:
        """List every way to spread this model's experts over these ranks."""
        self._check_slices()
        self._check_heads()
        layouts = legal_layouts(
            self.shape,
            self.slice_ranks,
            self.config.entry_point,
            is_dmoe=self._needs_own_experts,
        )
        has_copies = self.config.cpu_offload != "params"  # which it refuses
        return [layout for layout in layouts if has_copies or layout.expert_dp == "shard"]

    def predict(self, layout: ParallelLayout) -> Prediction:
        """Predict one layout with the formulas, or by a rehearsal where they do not know the model.

        Raises:
            ConfigurationError: the formulas do not know it, and nothing else is there.
        """
        not_known = self.not_known
        if not not_known:
            return _predict_once(predict, self.shape, layout, self.planned_run())
        if self.config.parallel.sp_size > 1:
            raise ConfigurationError(
                f"sp_size is {self.config.parallel.sp_size}, but it must be 1 for a plan: the "
                f"formulas do not know {not_known} of a {self.shape.model_type} model.",
                parameters=("sp_size",),
            )
        if self.rehearse is None:
            raise ConfigurationError(
                f"the formulas do not know {not_known} of a {self.shape.model_type} model; "
                "python -m megablocks_utils.plan rehearses it"
            )
        return self.rehearse(layout, self.planned_run())

    @property
    def _needs_own_experts(self) -> bool:
        """Whether the experts must be this project's, without expert parallelism too."""
        return self.config.parallel.expert_tp_size > 1 or self.config.parallel.tp_size > 1

    def _check_slices(self) -> None:
        """Refuse slices of experts of different sizes, or through blocks, as `ExpertSpec` does.

        Raises:
            ConfigurationError: the intermediate size does not divide.
        """
        size = self.config.parallel.expert_tp_size
        if self.shape.expert_size % size:
            raise ConfigurationError(
                f"expert_tp_size is {size}, but it must divide the intermediate size of the "
                f"experts, which is {self.shape.expert_size}.",
                parameters=("expert_tp_size",),
            )
        if self.config.adapter.packed_format is not None:
            check_packed_slices(self.config.adapter.packed_format, self.shape.expert_size, size)

    def _check_heads(self) -> None:
        """Refuse heads that tensor parallelism cannot share out evenly, as `fsdp.tp_plan` does.

        Raises:
            ConfigurationError: it divides those of queries or keys unevenly.
        """
        tp_size, attention = self.config.parallel.tp_size, self.shape.attention
        if tp_size == 1 or attention is None or attention.kv_rank:
            return
        common = math.gcd(attention.num_heads, attention.num_kv_heads)
        if common % tp_size:
            raise ConfigurationError(
                f"tp_size is {tp_size}, but it must divide the heads of the attention "
                f"({attention.num_heads} of queries and {attention.num_kv_heads} of keys); "
                f"{join_words(legal_ep_sizes(common), 'and')} would work.",
                parameters=("tp_size",),
            )

    @property
    def not_known(self) -> str:
        """What of this run the formulas do not know; empty where they know all."""
        reason = self.shape.not_known or self._not_known_on_device() or self._not_known_under_tp()
        is_rare = has_rare_adapters(self.config.adapter)
        return reason or ("adapters on routers or the head" if is_rare else "")

    def _not_known_under_tp(self) -> str:
        """Say what of tensor parallelism is not known; empty for nothing."""
        shape, tp_size = self.shape, self.config.parallel.tp_size
        if tp_size == 1:
            return ""
        if shape.attention is not None and (shape.attention.kv_rank or shape.is_tied):
            return shape.not_known_under_tp or "how tensor parallelism splits it"
        if self.has_whole_logits:
            return shape.not_known_under_tp or "logits that are split over ranks"
        sizes = {shape.hidden_size, shape.vocab_size, *(layer.mlp_size for layer in shape.layers)}
        if any(size % tp_size for size in sizes):
            return shape.not_known_under_tp or f"layers that {tp_size} ranks cannot split evenly"
        return shape.not_known_under_tp

    def _not_known_on_device(self) -> str:
        """Say what is another on a CPU than on a GPU, and not known there; empty for nothing."""
        attention = self.shape.attention
        if self.device_type == "cuda" or attention is None:
            return ""
        is_even = attention.head_dim == attention.v_head_dim
        return "" if is_even else "attention on a CPU whose values are narrower than its keys"

    def _has_aux_loss(self) -> bool:
        """Whether the load-balancing loss is on, by the rule of `training.step.aux_loss`."""
        given = self.config.router_aux_loss_coef
        return (self.shape.aux_loss_coef if given is None else given) > 0


@lru_cache(maxsize=4096)
def _predict_once(
    predict: Callable[[ModelShape, ParallelLayout, PlannedRun], Prediction],
    shape: ModelShape,
    layout: ParallelLayout,
    run: PlannedRun,
) -> Prediction:
    """Remember predictions: the remedies of different rows ask for many of the same."""
    return predict(shape, layout, run)


def read_shape(config: RunConfig, model_config: Mapping[str, Any]) -> ModelShape:
    """Return the sizes of the model that a run trains: whole, or its first two layers.

    Raises:
        ConfigurationError: a family that is not known, or a value with which there is no model.
    """
    settings = dict(model_config)
    layers, kept = settings.get("num_hidden_layers"), config.model.truncate_layers
    if kept is not None and isinstance(layers, int):
        settings["num_hidden_layers"] = min(kept, layers)
    return ModelShape.from_config(settings)
