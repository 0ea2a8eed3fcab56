"""The launcher's environment: what works, and what is refused."""

import pytest

from megablocks_utils.config import parse_args
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.processes.launch import (
    LaunchEnvironment,
    check_environment,
    reports_errors,
)

LAUNCHED = {
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}


def test_environments_that_work():
    assert check_environment(environ={}) == LaunchEnvironment(rank=0, local_rank=0, world_size=1)
    assert check_environment(environ=LAUNCHED) == LaunchEnvironment(
        rank=3, local_rank=1, world_size=4
    )
    config = parse_args(
        ["--use_megablocks_sharding", "True", "--ep_size", "1"], entry_point="fsdp2"
    )
    assert check_environment(config, {}) == LaunchEnvironment()


ENVIRONMENTS = [
    ({"WORLD_SIZE": "4"}, "WORLD_SIZE is set, but RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT "
     "are missing from the environment; start with torchrun or accelerate launch, which set all "
     "of them."),
    ({**LAUNCHED, "RANK": None}, "WORLD_SIZE is set, but RANK is missing from the environment; "
     "start with torchrun or accelerate launch, which set all of them."),
    ({"RANK": "1", "LOCAL_RANK": "1"}, "RANK is set, but WORLD_SIZE, MASTER_ADDR and MASTER_PORT "
     "are missing from the environment; start with torchrun or accelerate launch, which set all "
     "of them."),
    ({**LAUNCHED, "RANK": "4"}, "RANK is 4, but it must be below WORLD_SIZE, which is 4."),
    ({**LAUNCHED, "LOCAL_RANK": "7"}, "LOCAL_RANK is 7, but it must be below WORLD_SIZE, which is "
     "4."),
    ({**LAUNCHED, "WORLD_SIZE": "0"}, "WORLD_SIZE is 0, but it must be a whole number of at least "
     "1."),
    ({**LAUNCHED, "WORLD_SIZE": "two"}, "WORLD_SIZE is two, but it must be a whole number of at "
     "least 1."),
    ({**LAUNCHED, "RANK": "٣"}, "RANK is ٣, but it must be a whole number of at least 0."),
    ({**LAUNCHED, "WORLD_SIZE": "9" * 20}, f"WORLD_SIZE is {'9' * 20}, but it must be a whole "
     "number of at least 1, of at most 9 digits."),
    ({**LAUNCHED, "RANK": "-1"}, "RANK is -1, but it must be a whole number of at least 0."),
    ({**LAUNCHED, "RANK": "²"}, "RANK is ², but it must be a whole number of at least 0."),
    ({**LAUNCHED, "MASTER_PORT": "0"}, "MASTER_PORT is 0, but it must be a whole number from 1 to "
     "65535."),
    ({**LAUNCHED, "MASTER_PORT": "70000"}, "MASTER_PORT is 70000, but it must be a whole number "
     "from 1 to 65535."),
    ({**LAUNCHED, "MASTER_PORT": "abc"}, "MASTER_PORT is abc, but it must be a whole number from 1 "
     "to 65535."),
    ({**LAUNCHED, "MASTER_ADDR": " "}, "MASTER_ADDR is empty, but it must be the name or address "
     "of the host of rank 0."),
    ({**LAUNCHED, "LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE is 8, but it must be at most "
     "WORLD_SIZE, which is 4."),
    ({**LAUNCHED, "LOCAL_WORLD_SIZE": "1"}, "LOCAL_WORLD_SIZE is 1, but it must be above "
     "LOCAL_RANK, which is 1."),
    ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT is x, but it must be a whole "
     "number of at least 0."),
    ({**LAUNCHED, "LOCAL_RANK": ""}, "LOCAL_RANK is empty, but it must be a whole number of at "
     "least 0."),
]  # fmt: skip


@pytest.mark.parametrize(("environ", "sentence"), ENVIRONMENTS)
def test_environments_that_do_not(environ, sentence):
    environ = {name: value for name, value in environ.items() if value is not None}
    with pytest.raises(ConfigurationError) as caught:
        check_environment(environ=environ)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("entry_point", "line"),
    [
        ("fsdp2", "torchrun --nproc_per_node=4 train_accelerate_fsdp2.py ..."),
        (
            "fsdp1",
            "accelerate launch --num_processes 4 --config_file accelerate.yaml train_fsdp1.py ...",
        ),
    ],
)
def test_ep_size_without_a_launcher(entry_point, line):
    words = ["--use_megablocks_sharding", "True", "--ep_size", "4"]
    with pytest.raises(ConfigurationError) as caught:
        check_environment(parse_args(words, entry_point=entry_point), {})
    assert str(caught.value) == (
        "--ep_size is 4, but this is one process without a launcher; start 4 with: " + line
    )


@pytest.mark.parametrize(
    ("environ", "reports"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, False),
        ({"RANK": "4", "LOCAL_RANK": "0"}, True),  # the first of another host
        ({"RANK": "x", "LOCAL_RANK": "1"}, True),  # who else should?
    ],
)
def test_one_process_of_each_host_reports_errors(environ, reports):
    assert reports_errors(environ) == reports
