"""Numbers: every option has an upper bound, and a file says them as the command line does."""

import pytest

from benchmarks.table.options import COMMAND as TABLE
from megablocks_utils import evaluate, export, merge, tune
from megablocks_utils.config import OPTIONS, parse_args
from megablocks_utils.config.given import GivenOption
from megablocks_utils.config.values import parse_duration
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.planning import calibrate, plan_arguments

COMMANDS = (TABLE, *(m.COMMAND for m in (calibrate, evaluate, export, merge, plan_arguments, tune)))
NUMBERS = {
    f"{option.name} {option.help}": option
    for option in (*OPTIONS, *(option for command in COMMANDS for option in command.options))
    if option.kind in ("integer", "number")
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("text", ["9" * 20, "9" * 5000, "1e400", "1_0", "٣", "0x10", "nan", "inf"])
def test_no_number_is_without_bounds(name, text):
    option = NUMBERS[name]
    assert option.largest is not None
    given = GivenOption(f"--{option.name}", (text,), option)
    if option.kind == "number" and text == "9" * 20 and option.largest >= 1e20:
        assert given.read() == 1e20
        return
    with pytest.raises(ConfigurationError, match=rf"^--{option.name} is \S+, but it must be ") as e:
        given.read()
    assert len(str(e.value)) < 200


def test_the_largest_number_is_taken_and_no_larger_one():
    for option in NUMBERS.values():
        largest = int(option.largest) if option.kind == "integer" else option.largest
        assert GivenOption("--x", (str(largest),), option).read() == largest
        with pytest.raises(ConfigurationError):
            GivenOption("--x", (str(largest * 2),), option).read()


@pytest.mark.parametrize("text", ["1_000", "0x10", "1e3", "1:30", "0o17", "1.0", "~", "yes", "٣"])
def test_a_file_takes_no_number_that_the_command_line_refuses(text, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"max_steps: {text}\n")
    with pytest.raises(ConfigurationError) as typed:
        parse_args(["--max_steps", text], entry_point="fsdp2")
    with pytest.raises(ConfigurationError) as written:
        parse_args(["--config", str(path)], entry_point="fsdp2")
    if text != "~":  # null: there is no value
        assert str(written.value) == f"{path}:1: {typed.value}"


def test_a_file_may_say_a_time_that_yaml_takes_for_a_number(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("time_limit: 3:50:00\n")
    assert parse_args(["--config", str(path)], entry_point="fsdp2").saving.time_limit == "3:50:00"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3h50m", 13800),
        ("90m", 5400),
        ("45s", 45),
        ("1d2h", 93600),
        ("03:50:00", 13800),
        ("1-00:00:01", 86401),
        *((text, None) for text in ("", "90", "0s", "3h 50m", "50m3h", "1:90:00", "3:50", "-1h")),
        *((text, None) for text in ("1.5h", "٣h", "367d", "9" * 30 + "s", "1e3s")),
    ],
)
def test_times(text, seconds):
    assert parse_duration(text) == seconds
