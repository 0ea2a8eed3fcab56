"""The mesh as a table: which rank holds which experts."""

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

__all__ = ["build_mesh_table"]

COLUMN_GAP = 3  # characters rich puts between two columns


def build_mesh_table(
    dp_size: int, ep_size: int, num_experts: int, width: int, expert_tp_size: int = 1
) -> Table:
    """Draw the mesh: rows are dp, columns are ep, cells say "rank 3: experts 4-7".

    Where each expert is split, cells say "ranks 2-3: experts 4-7".

    Cells take two lines where the table would be too wide, and a mesh that is wider still is
    drawn as one row for each ep coordinate.

    Args:
        dp_size: Ranks that hold the same experts.
        ep_size: Ranks the experts are split over; divides `num_experts`.
        num_experts: Experts of one MoE layer.
        width: Characters there are.
        expert_tp_size: Neighbouring ranks that each expert is split over.
    """
    experts = [_name_experts(ep, num_experts // ep_size) for ep in range(ep_size)]
    for separator in (": ", "\n"):
        cells = [
            [
                f"{_name_ranks([dp * ep_size + ep], expert_tp_size)}{separator}{experts[ep]}"
                for ep in range(ep_size)
            ]
            for dp in range(dp_size)
        ]
        if _measure(cells) <= width:
            return _build_grid(cells)
    return _build_list(dp_size, experts, expert_tp_size)


def _measure(cells: list[list[str]]) -> int:
    """Return the width of the whole table, from its widest cells."""
    label = len(f"dp {len(cells) - 1}")
    return label + sum(
        COLUMN_GAP + max(len(line) for cell in column for line in cell.splitlines())
        for column in zip(*cells, strict=True)
    )


def _build_grid(cells: list[list[str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", style="bold", no_wrap=True)
    for ep in range(len(cells[0])):
        table.add_column(f"ep {ep}", no_wrap=True)
    for dp, row in enumerate(cells):
        table.add_row(f"dp {dp}", *(Text(cell) for cell in row))
    return table


def _build_list(dp_size: int, experts: list[str], expert_tp_size: int) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", style="bold", no_wrap=True)
    table.add_column("holds", no_wrap=True)
    table.add_column("dp 0" if dp_size == 1 else f"dp 0 to dp {dp_size - 1}", overflow="fold")
    for ep, held in enumerate(experts):
        cells = [dp * len(experts) + ep for dp in range(dp_size)]
        table.add_row(f"ep {ep}", held, _name_ranks(cells, expert_tp_size))
    return table


def _name_ranks(cells: list[int], expert_tp_size: int) -> str:
    """Name the ranks of cells of the table, counted row by row."""
    firsts = [cell * expert_tp_size for cell in cells]
    if expert_tp_size == 1:
        return f"rank{'s' * (len(cells) > 1)} {', '.join(map(str, firsts))}"
    return f"ranks {', '.join(f'{first}-{first + expert_tp_size - 1}' for first in firsts)}"


def _name_experts(ep: int, num_local_experts: int) -> str:
    first, last = ep * num_local_experts, (ep + 1) * num_local_experts - 1
    return f"expert {first}" if first == last else f"experts {first}-{last}"
