"""The mesh drawn to the letter, and never wider than the console."""

import io

import pytest
from rich.console import Console

from megablocks_utils.training.report.mesh_table import build_mesh_table


def render(dp_size, ep_size, num_experts, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(build_mesh_table(dp_size, ep_size, num_experts, width))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_two_by_two():
    assert render(2, 2, 8, 80) == [
        "       ep 0                  ep 1",
        "────────────────────────────────────────────────",
        "dp 0   rank 0: experts 0-3   rank 1: experts 4-7",
        "dp 1   rank 2: experts 0-3   rank 3: experts 4-7",
    ]


def test_one_by_four():
    assert render(1, 4, 4, 80) == [
        "       ep 0               ep 1               ep 2               ep 3",
        "────────────────────────────────────────────────────────────────────────────────",
        "dp 0   rank 0: expert 0   rank 1: expert 1   rank 2: expert 2   rank 3: expert 3",
    ]


def test_one_by_four_on_two_lines_where_one_is_too_long():
    assert render(1, 4, 8, 80) == [
        "       ep 0          ep 1          ep 2          ep 3",
        "────────────────────────────────────────────────────────────",
        "dp 0   rank 0        rank 1        rank 2        rank 3",
        "       experts 0-1   experts 2-3   experts 4-5   experts 6-7",
    ]


def test_cells_break_exactly_where_they_must():
    assert "rank 0: experts 0-3   rank 1: experts 4-7" in render(2, 2, 8, 48)[2]
    assert render(2, 2, 8, 47)[2:4] == [
        "dp 0   rank 0        rank 1",
        "       experts 0-3   experts 4-7",
    ]


def test_a_wide_mesh_has_a_row_for_each_ep_coordinate():
    assert render(2, 8, 16, 80) == [
        "       holds           dp 0 to dp 1",
        "───────────────────────────────────",
        "ep 0   experts 0-1     ranks 0, 8",
        "ep 1   experts 2-3     ranks 1, 9",
        "ep 2   experts 4-5     ranks 2, 10",
        "ep 3   experts 6-7     ranks 3, 11",
        "ep 4   experts 8-9     ranks 4, 12",
        "ep 5   experts 10-11   ranks 5, 13",
        "ep 6   experts 12-13   ranks 6, 14",
        "ep 7   experts 14-15   ranks 7, 15",
    ]


@pytest.mark.parametrize("width", [40, 80, 92, 120])
@pytest.mark.parametrize("dp_size", [1, 2, 16])
@pytest.mark.parametrize("ep_size", [1, 2, 4, 8, 64])
def test_every_rank_is_there_once_within_the_width(dp_size, ep_size, width):
    lines = render(dp_size, ep_size, 128, width)
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    body = " ".join(lines[2:])
    for word in ("dp", "ep"):
        body = body.replace(f"{word} ", word)
    words = [word.strip(",:") for word in body.split()]
    ranks = sorted(int(word) for word in words if word.isdigit())
    assert ranks == list(range(dp_size * ep_size))
