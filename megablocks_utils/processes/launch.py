"""What both scripts do around their run: environment, errors and exit codes.

No torch at module level: a bad option or environment is answered before torch is imported.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from megablocks_utils.config import OPTION_NAMES, RunConfig
from megablocks_utils.config.reader import HelpRequested
from megablocks_utils.config.values import join_words
from megablocks_utils.errors import ConfigurationError, UserError
from megablocks_utils.processes.monitor import leave_run

__all__ = [
    "LaunchEnvironment",
    "raise_first_error",
    "raise_on_all_ranks",
    "check_environment",
    "broadcast_from_rank0",
    "run_entry_point",
]

# A launcher ends all ranks as soon as one has failed: the others give rank 0 this long to speak.
_RANK_ZERO_FIRST_S = 3.0
_Result = TypeVar("_Result")
_LAUNCHER_NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK")


@dataclass(frozen=True)
class LaunchEnvironment:
    """Say which process of how many this is, as the launcher's environment says.

    Attributes:
        rank: This process among all, from 0.
        local_rank: This process among those of its machine, from 0.
        world_size: How many processes the run has.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def run_entry_point(main: Callable[[list[str]], None], argv: Sequence[str]) -> None:
    """Call `main(argv)` and end the process as the contract's exit codes say.

    A UserError becomes its one sentence on standard error, written by rank 0 alone, and exit code
    2. `--help` is written once and ends with 0. Every other exception keeps its traceback, unless
    `monitor` finds that another rank's loss was behind it. An error that only some ranks meet must
    go through `raise_first_error`, or rank 0 has nothing to say.

    Raises:
        SystemExit: with the exit code.
    """
    is_first = os.environ.get("RANK", "0").strip() in ("", "0")
    try:
        main(list(argv))
        leave_run()
        _leave_process_group()
    except HelpRequested as request:
        if is_first:
            sys.stdout.write(str(request))
        sys.exit(0)
    except UserError as error:
        sentence = error.as_options(OPTION_NAMES)
        if is_first:
            sys.stderr.write(f"{sentence}\n")
        leave_run(sentence)
        if not is_first:
            time.sleep(_RANK_ZERO_FIRST_S)
        _end(error.exit_code)


def check_environment(
    config: RunConfig | None = None, environ: Mapping[str, str] = os.environ
) -> LaunchEnvironment:
    """Check the launcher's environment variables, before anything waits for other processes.

    Args:
        config: The run, to see whether it asks for more processes than there are.
        environ: The environment.

    Raises:
        ConfigurationError: for variables that are missing, no numbers or contradict each other,
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


def raise_first_error(error: UserError | None) -> None:
    """Raise on every rank the error that the lowest-numbered failing rank met; None is no error.

    For what only some ranks can see, such as a file that one machine cannot read.

    **Collective:** all ranks of the default group must call it, with an error or without; before
    `torch.distributed` is initialised it raises this rank's own.

    Raises:
        UserError: the raise_on_all_ranks one.
    """
    import torch.distributed as dist

    errors = [error]
    if dist.is_available() and dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    for met in errors:
        if met is not None:
            raise met


def raise_on_all_ranks(action: Callable[[], _Result]) -> _Result:
    """Do something local on every rank, and raise on all ranks what one of them met.

    **Collective:** as `raise_first_error`.
    """
    error = result = None
    try:
        result = action()
    except UserError as met:
        error = met
    raise_first_error(error)
    return result


def broadcast_from_rank0(action: Callable[[], _Result]) -> _Result:
    """Do something on rank 0 alone; every rank returns its result, or raises what it met.

    For what ranks may see differently and must do alike.

    **Collective:** as `raise_first_error`.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return action()
    outcome = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [action()]
        except UserError as met:
            outcome = [met]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def _read_number(environ: Mapping[str, str], name: str, minimum: int) -> int:
    text = environ[name].strip()
    if not text.isdecimal() or int(text) < minimum:
        raise ConfigurationError(
            f"{name} is {text or 'empty'}, but it must be a whole number of at least {minimum}."
        )
    return int(text)


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


def _leave_process_group() -> None:
    """Part from the other processes of a run that is done, as NCCL wants it."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _end(code: int) -> NoReturn:
    """End this process with `code`, at once where a process group is up.

    With one, the interpreter's ordinary end would run the destructors of gloo or NCCL, which may
    wait for peers that are waiting for us. Nothing of ours is left to do but to flush.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
