"""The page of four models on many GPUs is what the formulas say now."""

from benchmarks.scale import MARK, MODELS, PAGE, ask, format_section
from megablocks_utils.planning.model.model_shape import ModelShape
from tests.planning.cases import read_model


def test_the_page_is_up_to_date():
    """After a change of the formulas: PYTHONPATH=. python -m benchmarks.scale."""
    page = PAGE.read_text(encoding="utf-8").partition(MARK)[2]
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        f"## {name}" for name in MODELS
    ]
    for name in ("Mixtral-8x7B", "Qwen3-30B-A3B"):  # the others take seconds
        _, points = ask(MODELS[name])
        assert format_section(name, points) in page


def test_every_model_is_the_one_that_it_is_called():
    """Parameters as their makers count them, in billions: all, and active for a token."""
    counted = {"Mixtral-8x7B": (46.7, 12.9), "Qwen3-30B-A3B": (30.5, 3.3)}
    counted |= {"Qwen3-235B-A22B": (235, 22), "DeepSeek-V3": (671, 37)}
    for name, (total, active) in counted.items():
        shape = ModelShape.from_config(read_model(MODELS[name]))
        assert abs(shape.num_parameters / 1e9 - total) < 0.1
        assert abs(shape.num_active_parameters / 1e9 - active) < 0.6
