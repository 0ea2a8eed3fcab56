"""Where each expert weight lies on disk: naming on the Hub as data, used in both directions.

In memory every supported model has, for each MoE layer (E experts, H hidden, I intermediate):

    <layer>.mlp.experts.gate_up_proj   (E, 2I, H), gate rows first, then up rows
    <layer>.mlp.experts.down_proj      (E, H, I)
    <layer>.mlp.gate.weight            (E, H), the router

On the Hub each expert has its own matrices under names that differ by family (`families`);
transformers can also write the tensors as they are in memory (`save_original_format=False`). A
`HubNaming` declares one such naming; reading, checking and writing all derive from it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megablocks_utils.errors import CheckpointError
from megablocks_utils.families import FAMILIES, ModelFamily

__all__ = [
    "EXPERTS_PATH",
    "EXPERT_TENSORS",
    "FUSED",
    "READABLE_NAMINGS",
    "TIED_PARAMETERS",
    "ExpertPart",
    "HubNaming",
    "MemoryPart",
    "detect_naming",
    "is_expert_parameter",
    "is_in_experts",
    "naming_of_family",
]

# The in-memory tensors, and which projections their rows hold, in order and in equal shares.
EXPERT_TENSORS = MappingProxyType({"gate_up_proj": ("gate", "up"), "down_proj": ("down",)})
MEMORY_BLOCK = "mlp"
EXPERTS_PATH = f"{MEMORY_BLOCK}.experts"
"""Of the experts module in memory, within its decoder layer."""
EXPERT_PARAMETER = re.compile(
    rf"(?P<layer>.+)\.{re.escape(EXPERTS_PATH)}\.(?P<tensor>{'|'.join(EXPERT_TENSORS)})"
)

# Parameters that are the same tensor when the config says tie_word_embeddings: copy -> source.
TIED_PARAMETERS = MappingProxyType({"lm_head.weight": "model.embed_tokens.weight"})


@dataclass(frozen=True)
class ExpertPart:
    """Name the Hub tensor that holds one share of the rows of one expert of an in-memory tensor.

    The expert's rows are `num_shares` equal shares in order. With `is_fused` the Hub tensor holds
    all experts as in memory, and this part is its row `expert` of dim 0, whole.
    """

    key: str
    expert: int
    share: int
    num_shares: int
    is_fused: bool

    def rows(self, num_rows: int) -> slice:
        """Return which of the expert's `num_rows` rows in memory this part holds."""
        num_share_rows = num_rows // self.num_shares
        return slice(self.share * num_share_rows, (self.share + 1) * num_share_rows)

    def hub_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the Hub tensor's shape, given the in-memory tensor's (E, rows, columns)."""
        num_experts, num_rows, num_columns = shape
        if self.is_fused:
            return (num_experts, num_rows, num_columns)
        return (num_rows // self.num_shares, num_columns)


@dataclass(frozen=True)
class MemoryPart:
    """Say what a Hub tensor is in memory: the whole of parameter `name`, or one expert's share.

    Attributes:
        name: of the parameter.
        expert: whose rows they are; None for the whole of the parameter.
        share: which of the projections of `EXPERT_TENSORS`; 0 for the whole.
    """

    name: str
    expert: int | None = None
    share: int = 0


@dataclass(frozen=True)
class HubNaming:
    """Declare how a kind of checkpoint names the MoE block and the projections of an expert.

    Attributes:
        name: what messages call it.
        block: the Hub's name for the block that is `mlp` in memory.
        projections: Hub names of "gate", "up" and "down"; empty where the experts are stored fused,
            as they are in memory.
    """

    name: str
    block: str
    projections: Mapping[str, str]

    @property
    def is_fused(self) -> bool:
        """Whether one Hub tensor holds all experts, as in memory."""
        return not self.projections

    def hub_key(self, name: str) -> str:
        """Return the Hub name of a parameter that is not an expert weight."""
        return name.replace(f".{MEMORY_BLOCK}.", f".{self.block}.")

    def expert_parts(self, name: str, experts: Iterable[int]) -> Iterator[ExpertPart]:
        """Yield the Hub parts of some experts of one in-memory expert tensor, in row order.

        Args:
            name: in-memory name, `<layer>.mlp.experts.gate_up_proj` or `...down_proj`.
            experts: which experts, by global index.
        """
        layer, tensor = _split_expert_name(name)
        projections = EXPERT_TENSORS[tensor]
        for expert in experts:
            if self.is_fused:
                yield ExpertPart(name, expert, 0, 1, is_fused=True)
                continue
            prefix = f"{layer}.{self.block}.experts.{expert}"
            for share, projection in enumerate(projections):
                key = f"{prefix}.{self.projections[projection]}.weight"
                yield ExpertPart(key, expert, share, len(projections), is_fused=False)

    def memory_part(self, key: str) -> MemoryPart:
        """Return what the Hub tensor `key` is in memory; the inverse of the two methods above."""
        match = re.fullmatch(rf"(.+)\.{self.block}\.experts\.(\d+)\.(\w+)\.weight", key)
        for tensor, projections in EXPERT_TENSORS.items():
            for share, projection in enumerate(projections):
                if match and match[3] == self.projections.get(projection):
                    return MemoryPart(f"{match[1]}.{EXPERTS_PATH}.{tensor}", int(match[2]), share)
        return MemoryPart(key.replace(f".{self.block}.", f".{MEMORY_BLOCK}."))

    def matches(self, key: str) -> bool:
        """Return whether `key` is an expert weight in this naming."""
        part = self.memory_part(key)
        is_of_one_expert = part.expert is not None
        return is_expert_parameter(part.name) and is_of_one_expert != self.is_fused


FUSED = HubNaming("fused", MEMORY_BLOCK, MappingProxyType({}))


def _naming(family: ModelFamily) -> HubNaming:
    return HubNaming(family.naming, family.moe_block, family.projections)


_NAMINGS = {family.naming: _naming(family) for family in FAMILIES.values()}
READABLE_NAMINGS = (*_NAMINGS.values(), FUSED)
"""Any of them may be found when reading, whatever the family."""


def naming_of_family(model_type: str) -> HubNaming:
    """Return the naming in which checkpoints of a supported family are written."""
    return _NAMINGS[FAMILIES[model_type].naming]


def is_expert_parameter(name: str) -> bool:
    """Return whether the in-memory parameter `name` is an expert weight."""
    return EXPERT_PARAMETER.fullmatch(name) is not None


def is_in_experts(name: str) -> bool:
    """Return whether a parameter is in an experts module: a weight, or an adapter of one."""
    return f".{EXPERTS_PATH}." in name


def detect_naming(keys: Iterable[str], *, source: object = "the checkpoint") -> HubNaming:
    """Return the naming in which a checkpoint with these tensor names stores its experts.

    Args:
        keys: the checkpoint's tensor names.
        source: what a message calls the checkpoint, its folder for one.

    Raises:
        CheckpointError: no name is an expert weight in any known naming.
    """
    keys = tuple(keys)
    for naming in READABLE_NAMINGS:
        if any(naming.matches(key) for key in keys):
            return naming
    known = ", ".join(naming.name for naming in READABLE_NAMINGS)
    seen = next((f"; it has {key}" for key in keys if "expert" in key), "")
    raise CheckpointError(f"{source} has no expert weights in a known naming ({known}){seen}")


def _split_expert_name(name: str) -> tuple[str, str]:
    """Return the layer and the tensor of an expert weight's name."""
    match = EXPERT_PARAMETER.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is not an expert weight")
    return match["layer"], match["tensor"]
