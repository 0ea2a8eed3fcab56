"""How large a piece of work one program of each Triton kernel does: a small explicit table.

No autotuner: what runs is a function of this table and of the power of two below the number of
rows, the same on every rank and in every run. `search` measures the candidates of the table.
"""

from collections.abc import Mapping
from types import MappingProxyType

from megablocks_utils.kernels.fused.tile import KINDS, Tile, TileTable

__all__ = [
    "FEW_ROWS",
    "bucket_of",
    "choose_tile",
    "choose_tiles",
    "list_candidates",
    "name_architecture",
]

FEW_ROWS = 512
"""Rows per expert below which half-high tiles waste less."""

_TMA = True


# For each kind the tiles for few and for many rows per expert, then more to measure: one, and last
# where there are four, one for persistent programs.
_Candidates = Mapping[str, tuple[Tile, ...]]
_SM_90: _Candidates = {
    "up": (
        *(Tile(64, 128, 64, 4, 3, _TMA), Tile(128, 128, 64, 8, 4, _TMA)),
        *(Tile(128, 64, 64, 8, 4, _TMA), Tile(128, 128, 64, 8, 4, _TMA, 1)),
    ),
    "linear": (
        *(Tile(64, 128, 64, 4, 4, _TMA), Tile(128, 256, 64, 8, 3, _TMA)),
        *(Tile(128, 128, 64, 8, 4, _TMA), Tile(128, 256, 64, 8, 4, _TMA, 1)),
    ),
    "skinny": (Tile(64, 64, 64, 4, 4), Tile(128, 64, 64, 4, 4), Tile(128, 32, 128, 4, 3)),
    "act_backward": (
        *(Tile(64, 128, 64, 4, 4, _TMA), Tile(128, 128, 64, 8, 4, _TMA)),
        Tile(128, 64, 64, 8, 4, _TMA),
    ),
    "weight_grad": (
        *(Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4)),
    ),
}
# On Blackwell 4 warps of a half-high tile have too few registers for the gate's gradients.
# Persistent programs have two accumulators in tensor memory, which has 512 columns, and a third for
# an adapter.
_SM_100 = {
    **_SM_90,
    "linear": (*_SM_90["linear"][:3], Tile(128, 128, 64, 8, 4, _TMA, 1)),
    "act_backward": (Tile(64, 128, 64, 8, 4, _TMA), *_SM_90["act_backward"][1:]),
}
_TABLE: Mapping[tuple[str, int], _Candidates] = MappingProxyType(
    {
        ("sm_90", 2): _SM_90,
        ("sm_100", 2): _SM_100,
        ("sm_80", 2): {
            "up": (
                *(Tile(64, 64, 32, 4, 4), Tile(128, 64, 32, 8, 4), Tile(64, 128, 32, 8, 3)),
                Tile(128, 64, 32, 8, 4, programs_per_processor=2),
            ),
            "linear": (
                *(Tile(64, 128, 32, 4, 3), Tile(128, 128, 32, 8, 4), Tile(128, 128, 64, 8, 3)),
                Tile(128, 128, 32, 8, 4, programs_per_processor=1),
            ),
            "skinny": (Tile(64, 64, 64, 4, 4), Tile(128, 64, 64, 4, 3), Tile(128, 32, 64, 4, 4)),
            "act_backward": (
                *(Tile(64, 128, 32, 4, 4), Tile(128, 128, 32, 8, 4), Tile(128, 128, 64, 8, 3)),
            ),
            "weight_grad": (
                *(Tile(128, 128, 32, 8, 4), Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3)),
            ),
        },
        ("sm_86", 2): {
            "up": (
                *(Tile(64, 64, 32, 4, 3), Tile(128, 64, 32, 8, 3), Tile(64, 128, 32, 8, 3)),
                Tile(64, 128, 32, 8, 3, programs_per_processor=1),
            ),
            "linear": (
                *(Tile(64, 128, 32, 4, 3), Tile(128, 128, 32, 8, 3), Tile(128, 64, 64, 4, 3)),
                Tile(128, 128, 32, 8, 3, programs_per_processor=1),
            ),
            "skinny": (Tile(64, 64, 32, 4, 4), Tile(128, 64, 32, 4, 4), Tile(64, 32, 64, 4, 3)),
            "act_backward": (
                *(Tile(64, 64, 64, 4, 3), Tile(128, 64, 32, 8, 3), Tile(64, 128, 32, 8, 3)),
            ),
            "weight_grad": (
                *(Tile(64, 128, 32, 4, 3), Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 3)),
            ),
        },
        # fp32 goes through the ordinary cores: the accumulators of small tiles fill the registers.
        ("any", 4): {
            "up": (Tile(32, 64, 16, 4, 3), Tile(64, 64, 16, 8, 3), Tile(64, 32, 16, 4, 3)),
            "linear": (Tile(64, 64, 16, 4, 3), Tile(128, 64, 16, 8, 3), Tile(64, 64, 16, 8, 3)),
            "skinny": (Tile(64, 32, 32, 4, 3), Tile(64, 64, 32, 4, 3), Tile(64, 32, 16, 4, 3)),
            "act_backward": (
                *(Tile(64, 64, 16, 8, 3), Tile(64, 64, 32, 8, 3), Tile(64, 32, 32, 4, 3)),
            ),
            "weight_grad": (
                *(Tile(64, 64, 16, 4, 3), Tile(64, 64, 32, 4, 3), Tile(128, 64, 16, 8, 3)),
            ),
        },
    }
)
# The interpreter's time goes with the number of programs and steps; its memory is no matter.
_INTERPRET = TileTable(
    up=Tile(32, 64, 32, 4, 1),
    linear=Tile(32, 64, 32, 4, 1),
    skinny=Tile(32, 64, 64, 4, 1),
    act_backward=Tile(32, 64, 32, 4, 1),
    weight_grad=Tile(64, 128, 32, 4, 1),
)


def name_architecture(capability: tuple[int, int] | None) -> str:
    """Return which part of the table a GPU takes, by its shared memory; None is the interpreter.

    Those between and beyond are counted with the largest that their memory holds: 8.6, 8.9 and 12
    have 99 KiB, 8.7 has what 8.0 has, 11 what 10.0 has.
    """
    if capability is None:
        return "interpret"
    if capability in ((8, 0), (8, 7)):
        return "sm_80"
    if capability[0] in (10, 11):
        return "sm_100"
    return "sm_90" if capability[0] == 9 else "sm_86"


def bucket_of(rows: int) -> int:
    """Return the largest power of two that is not above a number of rows; 1 for none."""
    return 1 << (max(rows, 1).bit_length() - 1)


def choose_tile(
    kind: str,
    *,
    arch: str,
    itemsize: int,
    rows: int,
    num_experts: int,
    num_cols: int | None = None,
    num_processors: int = 1,
) -> Tile:
    """Return the tile that a kernel runs with unless a search has found a better one.

    That for many rows where an expert has many, and it makes a program for every processor.

    Args:
        kind: one of `KINDS`.
        arch: from `name_architecture`.
        itemsize: bytes of a number: 2 or 4.
        rows: routed rows N; only the power of two below counts.
        num_experts: L that they are spread over.
        num_cols: columns of the kernel's result; None where it is not cut by rows, or not known.
        num_processors: of the GPU.
    """
    if arch == "interpret":
        return getattr(_INTERPRET, kind)
    few, many, *_ = _list_tiles(kind, arch, itemsize)
    bucket = bucket_of(rows)
    if bucket < FEW_ROWS * num_experts:
        return few
    if num_cols is None or kind == "weight_grad":
        return many
    num_programs = -(-bucket // many.block_m) * -(-num_cols // many.block_n)
    return few if num_programs < num_processors else many


def choose_tiles(
    *,
    arch: str,
    itemsize: int,
    rows: int,
    num_experts: int,
    num_cols: Mapping[str, int] = MappingProxyType({}),
    num_processors: int = 1,
) -> TileTable:
    """Return the tile of every kind, as `choose_tile` does, with `num_cols` by kind."""
    tiles = {
        kind: choose_tile(
            kind,
            arch=arch,
            itemsize=itemsize,
            rows=rows,
            num_experts=num_experts,
            num_cols=num_cols.get(kind),
            num_processors=num_processors,
        )
        for kind in KINDS
    }
    return TileTable(**tiles)


def list_candidates(kind: str, *, arch: str, itemsize: int) -> tuple[Tile, ...]:
    """Return the tiles of a kind that are worth measuring, all of which fit the architecture."""
    if arch == "interpret":
        return (getattr(_INTERPRET, kind),)
    return _list_tiles(kind, arch, itemsize)


def _list_tiles(kind: str, arch: str, itemsize: int) -> tuple[Tile, ...]:
    return _TABLE[("any" if itemsize == 4 else arch, itemsize)][kind]
