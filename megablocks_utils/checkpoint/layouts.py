"""Where each expert weight lives on disk: layouts as data, used in both directions.

In memory every supported model has, for each MoE layer (E experts, H hidden, I intermediate):

    <layer>.mlp.experts.gate_up_proj   (E, 2I, H), gate rows first, then up rows
    <layer>.mlp.experts.down_proj      (E, H, I)
    <layer>.mlp.gate.weight            (E, H), the router

On the Hub each expert has its own matrices under names that differ by family; transformers can
also write the tensors as they are in memory (`save_original_format=False`). A `HubNaming` declares
one such naming; reading, checking and writing all derive from it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megablocks_utils.errors import CheckpointError

__all__ = [
    "EXPERT_TENSORS",
    "FUSED",
    "LAYOUT_OF_MODEL_TYPE",
    "MIXTRAL",
    "QWEN_MOE",
    "SUPPORTED_MODEL_TYPES",
    "TIED_PARAMETERS",
    "ExpertPart",
    "HubNaming",
    "MemoryPart",
    "detect_naming",
    "is_expert_parameter",
    "is_in_experts",
]

# The in-memory tensors, and which projections their rows hold, in order and in equal shares.
EXPERT_TENSORS = MappingProxyType({"gate_up_proj": ("gate", "up"), "down_proj": ("down",)})
MEMORY_BLOCK = "mlp"
EXPERT_PARAMETER = re.compile(r"(?P<layer>.+)\.mlp\.experts\.(?P<tensor>gate_up_proj|down_proj)")

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
    """Say what a Hub tensor is in memory: the whole of parameter `name`, or a piece of it.

    `expert` and `share` (which of the projections of `EXPERT_TENSORS`) are None for the whole.
    """

    name: str
    expert: int | None = None
    share: int | None = None


@dataclass(frozen=True)
class HubNaming:
    """Declare how a kind of checkpoint names the MoE block and the projections of an expert.

    Attributes:
        name: what messages call it.
        block: the Hub's name for the block that is `mlp` in memory.
        projections: Hub names of "gate", "up" and "down"; None where the experts are stored fused,
            as they are in memory.
    """

    name: str
    block: str
    projections: Mapping[str, str] | None

    def hub_key(self, name: str) -> str:
        """Return the Hub name of a parameter that is not an expert weight."""
        return name.replace(f".{MEMORY_BLOCK}.", f".{self.block}.")

    def expert_parts(self, name: str, experts: Iterable[int]) -> Iterator[ExpertPart]:
        """Yield the Hub parts of some experts of one in-memory expert tensor, in row order.

        Args:
            name: in-memory name, `<layer>.mlp.experts.gate_up_proj` or `...down_proj`.
            experts: which experts, by global index.
        """
        match = EXPERT_PARAMETER.fullmatch(name)
        projections = EXPERT_TENSORS[match["tensor"]]
        for expert in experts:
            if self.projections is None:
                yield ExpertPart(name, expert, 0, 1, is_fused=True)
                continue
            prefix = f"{match['layer']}.{self.block}.experts.{expert}"
            for share, projection in enumerate(projections):
                key = f"{prefix}.{self.projections[projection]}.weight"
                yield ExpertPart(key, expert, share, len(projections), is_fused=False)

    def memory_part(self, key: str) -> MemoryPart:
        """Return what the Hub tensor `key` is in memory; the way back of the two methods above."""
        if self.projections is not None:
            pattern = rf"(.+)\.{self.block}\.experts\.(\d+)\.(\w+)\.weight"
            match = re.fullmatch(pattern, key)
            for tensor, projections in EXPERT_TENSORS.items():
                for share, projection in enumerate(projections):
                    if match and match[3] == self.projections[projection]:
                        name = f"{match[1]}.{MEMORY_BLOCK}.experts.{tensor}"
                        return MemoryPart(name, int(match[2]), share)
        return MemoryPart(key.replace(f".{self.block}.", f".{MEMORY_BLOCK}."))

    def matches(self, key: str) -> bool:
        """Return whether `key` is an expert weight in this layout."""
        part = self.memory_part(key)
        is_piece = part.expert is not None
        return is_expert_parameter(part.name) and is_piece == (self.projections is not None)


def _naming(name: str, block: str, gate: str, up: str, down: str) -> HubNaming:
    return HubNaming(name, block, MappingProxyType({"gate": gate, "up": up, "down": down}))


MIXTRAL = _naming("mixtral", "block_sparse_moe", gate="w1", up="w3", down="w2")
QWEN_MOE = _naming("qwen_moe", MEMORY_BLOCK, gate="gate_proj", up="up_proj", down="down_proj")
FUSED = HubNaming("fused", MEMORY_BLOCK, None)

# What is written for each family; any of the layouts may be found when reading.
LAYOUT_OF_MODEL_TYPE = MappingProxyType(
    {"mixtral": MIXTRAL, "qwen3_moe": QWEN_MOE, "olmoe": QWEN_MOE}
)
SUPPORTED_MODEL_TYPES = tuple(LAYOUT_OF_MODEL_TYPE)
READABLE_LAYOUTS = (MIXTRAL, QWEN_MOE, FUSED)


def is_expert_parameter(name: str) -> bool:
    """Return whether the in-memory parameter `name` is an expert weight."""
    return EXPERT_PARAMETER.fullmatch(name) is not None


def is_in_experts(name: str) -> bool:
    """Return whether a parameter is in an experts module: a weight, or an adapter of one."""
    return ".mlp.experts." in name


def detect_naming(keys: Iterable[str], *, source: object = "the checkpoint") -> HubNaming:
    """Return the layout in which a checkpoint with these tensor names stores its experts.

    Args:
        keys: the checkpoint's tensor names.
        source: what a message calls the checkpoint, its folder for one.

    Raises:
        CheckpointError: no name is an expert weight in any known layout.
    """
    keys = tuple(keys)
    for layout in READABLE_LAYOUTS:
        if any(layout.matches(key) for key in keys):
            return layout
    known = ", ".join(layout.name for layout in READABLE_LAYOUTS)
    raise CheckpointError(f"{source} has no expert weights in a known layout ({known})")
