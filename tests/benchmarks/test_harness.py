"""What all benchmarks share: records, tables, ranks."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from benchmarks.harness.processes import run_ranks
from benchmarks.harness.record import Record
from benchmarks.harness.report import fill_in, format_spread, group_rows, markdown_table


def test_row_takes_the_place_of_an_older_one_of_its_case(tmp_path):
    path = tmp_path / "rows.json"
    record = Record(path, {"commit": "c"})
    for case, n in (({"world_size": 4}, 1), ({"world_size": 2}, 2), ({"world_size": 4}, 3)):
        record.add({"case": case, "n": n}, "case")
    rows = [{"case": {"world_size": 4}, "n": 3}, {"case": {"world_size": 2}, "n": 2}]
    assert Record.read(path).content == {"commit": "c", "rows": rows}
    assert record.find(case={"world_size": 2}) == rows[1] and record.find(n=1) is None


def test_tables_keep_every_cell_and_spreads_are_median_and_range():
    table = markdown_table(("a", "b", "c"), [("1", "2", "3"), ("4", "5", "6")], num_left=2)
    lines = [line.strip("|").split("|") for line in table.splitlines()]
    assert [[cell.strip() for cell in line] for line in lines] == [
        *(["a", "b", "c"], ["---", "---", "---:"], ["1", "2", "3"], ["4", "5", "6"])
    ]
    values = {"n": 3, "median": 2e6, "min": 1e6, "max": 4e6}
    assert format_spread(values, 1, unit=1e6, is_bold=True) == "**2.0** (1.0-4.0)"
    rows = [{"a": 1, "b": 2}, {"a": 2, "b": 2}, {"a": 1, "b": 3}]
    assert group_rows(rows, "a") == {(1,): [rows[0], rows[2]], (2,): [rows[1]]}


def test_parts_of_a_page_are_replaced_between_their_marks():
    page = "a\n<!-- moe_layer: gpu -->\nold\n<!-- end -->\nb\n<!-- end -->\n"
    filled = fill_in(page, {"gpu": r"new \1", "cpu": "c"}, "moe_layer")
    assert filled == "a\n<!-- moe_layer: gpu -->\n\nnew \\1\n\n<!-- end -->\nb\n<!-- end -->\n"
    assert fill_in(filled, {"gpu": r"new \1"}, "moe_layer") == filled


def add_up(start):
    total = torch.tensor(start + dist.get_rank())
    dist.all_reduce(total)
    assert total < 10, "too large"
    return {"total": total.item(), "rank": int(os.environ["RANK"])}


def test_ranks_answer_in_order_and_a_failed_one_is_an_error():
    assert run_ranks(add_up, 2, 1) == [{"total": 3, "rank": 0}, {"total": 3, "rank": 1}]
    with pytest.raises(ProcessRaisedException, match="too large"):
        run_ranks(add_up, 2, 10)
