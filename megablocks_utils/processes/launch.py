"""The launch environment: which process of how many this is, according to the launcher.

Torch-free: a bad environment is answered before torch is imported.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megablocks_utils.config import RunConfig
from megablocks_utils.config.values import join_words
from megablocks_utils.errors import ConfigurationError

__all__ = ["LaunchEnvironment", "check_environment"]

_LAUNCHER_NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
_MAX_DIGITS = 9  # of a number of processes


@dataclass(frozen=True)
class LaunchEnvironment:
    """Which process of how many this is, according to the launcher.

    Attributes:
        rank: This process among all, from 0.
        local_rank: This process among those of its machine, from 0.
        world_size: How many processes the run has.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def check_environment(
    config: RunConfig | None = None, environ: Mapping[str, str] = os.environ
) -> LaunchEnvironment:
    """Check the launcher's environment variables, before anything waits for other processes.

    Args:
        config: The run, to see whether it asks for more processes than there are.
        environ: The environment.

    Raises:
        ConfigurationError: for variables that are missing, not numbers or contradict each other,
            and for an ep_size above 1 in a process that no launcher started.
    """
    given = [name for name in _LAUNCHER_NAMES if name in environ]
    if not given:
        _check_single_process(config)
        return LaunchEnvironment()
    needed = (*_LAUNCHER_NAMES, "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in environ]
    if missing:
        raise ConfigurationError(
            f"{given[0]} is set, but {join_words(missing, 'and')} "
            f"{'is' if len(missing) == 1 else 'are'} missing from the environment; start with "
            "torchrun or accelerate launch, which set all of them."
        )
    launch = LaunchEnvironment(
        world_size=_read_number(environ, "WORLD_SIZE", 1),
        rank=_read_number(environ, "RANK", 0),
        local_rank=_read_number(environ, "LOCAL_RANK", 0),
    )
    for name, rank in (("RANK", launch.rank), ("LOCAL_RANK", launch.local_rank)):
        if rank >= launch.world_size:
            raise ConfigurationError(
                f"{name} is {rank}, but it must be below WORLD_SIZE, which is {launch.world_size}."
            )
    return launch


def _read_number(environ: Mapping[str, str], name: str, minimum: int) -> int:
    text = environ[name].strip()
    wanted = f"a whole number of at least {minimum}"
    # Not `isdecimal`, which takes the digits of every script.
    if re.fullmatch("[0-9]+", text):
        if len(text) <= _MAX_DIGITS and int(text) >= minimum:
            return int(text)
        wanted += f", of at most {_MAX_DIGITS} digits" if len(text) > _MAX_DIGITS else ""
    raise ConfigurationError(f"{name} is {text[:40] or 'empty'}, but it must be {wanted}.")


def _check_single_process(config: RunConfig | None) -> None:
    if config is None or config.parallel.ep_size in (None, 1):
        return
    ep_size = config.parallel.ep_size
    line = {
        "fsdp2": f"torchrun --nproc_per_node={ep_size} train_accelerate_fsdp2.py ...",
        "fsdp1": f"accelerate launch --num_processes {ep_size} --config_file accelerate.yaml "
        "train_fsdp1.py ...",
    }[config.entry_point]
    raise ConfigurationError(
        f"--ep_size is {ep_size}, but this is one process without a launcher; start {ep_size} "
        f"with: {line}"
    )
