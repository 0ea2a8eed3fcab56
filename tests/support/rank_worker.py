"""What one rank of a pool does: join the group, then answer cases until pytest is gone."""

import faulthandler
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import threading
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.tensor._redistribute import _gen_transform_infos
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

__all__ = ["report_ready", "serve", "stack_file"]

SEED = 0


def stack_file(folder: str, rank: int) -> Path:
    """Return where a rank writes its Python stack on SIGUSR1."""
    return Path(folder, f"stack-{rank}")


def report_ready(rank: int) -> int:
    """Answer once the process group works."""
    dist.barrier()
    return rank


def serve(rank: int, world_size: int, port: int, folder: str, pipe: Connection) -> None:
    """Be one rank: join the group, then run cases until the pipe closes."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    threading.Thread(target=_exit_with_parent, args=(folder,), daemon=True).start()
    torch.set_num_threads(1)
    with stack_file(folder, rank).open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
        dist.init_process_group(
            "gloo",
            rank=rank,
            world_size=world_size,
            init_method=f"file://{folder}/rendezvous",
        )
        environment = dict(os.environ)
        while (job := _next_job(pipe)) is not None:
            _reset(environment)
            status, answer = _answer(rank, job)
            pipe.send_bytes(status)
            pipe.send_bytes(answer)


def _exit_with_parent(folder: str) -> None:
    """Leave whatever this rank hangs in, and no files, once pytest is gone, killed included."""
    wait([multiprocessing.parent_process().sentinel])
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _next_job(pipe: Connection) -> bytes | None:
    try:
        return pipe.recv_bytes()
    except EOFError:
        return None


def _answer(rank: int, job: bytes) -> tuple[bytes, bytes]:
    """Run one case and return its pickled result, or the traceback of whatever ended it."""
    try:
        function, args, kwargs = pickle.loads(job)
        return b"returned", pickle.dumps(function(rank, *args, **kwargs))
    except BaseException:  # noqa: BLE001 - also sys.exit, and pytest.fail, which is no Exception
        return b"raised", traceback.format_exc().encode()


def _leave_groups() -> None:
    """Leave every group but the first: each keeps threads that wake up a hundred times a second.

    DTensor's caches go with them: meshes of the same shape are equal to them, so that a later case
    would be answered with a mesh whose groups are gone.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    _clear_sharding_prop_cache()
    _gen_transform_infos.cache_clear()


def _reset(environment: dict[str, str]) -> None:
    """Undo what an earlier case may have left: singletons, variables, random states, modes."""
    _leave_groups()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
