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

__all__ = ["LaunchEnvironment", "check_environment", "reports_errors"]

_LAUNCHER_NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
_MAX_DIGITS = 9  # of a number of processes
_MAX_PORT = 65535


@dataclass(frozen=True)
class LaunchEnvironment:
    """Which process of how many this is, according to the launcher.

    Attributes:
        rank: This process among all, from 0.
        local_rank: This process among those of its machine, from 0.
        world_size: How many processes the run has.
        local_world_size: How many of them this machine has; None if the launcher does not say.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int | None = None

    @property
    def has_one_host(self) -> bool:
        """Whether all processes are known to be on this machine."""
        return self.world_size in (1, self.local_world_size)


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
    if "TORCHELASTIC_RESTART_COUNT" in environ:
        _read_number(environ, "TORCHELASTIC_RESTART_COUNT", 0)
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
        local_world_size=_read_local_world_size(environ),
    )
    for name, rank in (("RANK", launch.rank), ("LOCAL_RANK", launch.local_rank)):
        if rank >= launch.world_size:
            raise ConfigurationError(
                f"{name} is {rank}, but it must be below WORLD_SIZE, which is {launch.world_size}."
            )
    if launch.world_size > 1:
        _check_address(environ)
    return launch


def reports_errors(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process reports an error that all of them meet.

    That is rank 0, and on every other machine its first process, since logs stay on their machine.
    So does a process whose rank nobody can read.
    """
    rank = environ.get("RANK", "0").strip()
    is_number = re.fullmatch("[0-9]{1,9}", rank)
    return not is_number or int(rank) == 0 or environ.get("LOCAL_RANK", "").strip() == "0"


def _read_number(
    environ: Mapping[str, str], name: str, minimum: int, maximum: int | None = None
) -> int:
    text = environ[name].strip()
    wanted = f"a whole number of at least {minimum}"
    if maximum is not None:
        wanted = f"a whole number from {minimum} to {maximum}"
    # Not `isdecimal`, which takes the digits of every script.
    if re.fullmatch("[0-9]+", text):
        if len(text) <= _MAX_DIGITS and minimum <= int(text) <= (maximum or int(text)):
            return int(text)
        if maximum is None and len(text) > _MAX_DIGITS:
            wanted += f", of at most {_MAX_DIGITS} digits"
    raise ConfigurationError(f"{name} is {text[:40] or 'empty'}, but it must be {wanted}.")


def _read_local_world_size(environ: Mapping[str, str]) -> int | None:
    if "LOCAL_WORLD_SIZE" not in environ:
        return None
    found = _read_number(environ, "LOCAL_WORLD_SIZE", 1)
    seen = f"LOCAL_WORLD_SIZE is {found}, but it must be"
    world_size = _read_number(environ, "WORLD_SIZE", 1)
    local_rank = _read_number(environ, "LOCAL_RANK", 0)
    if found > world_size:
        raise ConfigurationError(f"{seen} at most WORLD_SIZE, which is {world_size}.")
    if found <= local_rank < world_size:
        raise ConfigurationError(f"{seen} above LOCAL_RANK, which is {local_rank}.")
    return found


def _check_address(environ: Mapping[str, str]) -> None:
    if not environ["MASTER_ADDR"].strip():
        raise ConfigurationError(
            "MASTER_ADDR is empty, but it must be the name or address of the host of rank 0."
        )
    _read_number(environ, "MASTER_PORT", 1, _MAX_PORT)


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
