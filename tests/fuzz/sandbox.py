"""Run a command in a forked process that can write nowhere but in its scratch folder."""

import ctypes
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Never

__all__ = ["Outcome", "close_scratch", "open_scratch", "prepare_imports", "run_command"]

NOBODY = 65534
KEEP_CAPABILITIES, CAPABILITIES_VERSION, READ_EVERYTHING = 8, 0x20080522, 1 << 2
"""Of Linux: `PR_SET_KEEPCAPS`, `_LINUX_CAPABILITY_VERSION_3`, `CAP_DAC_READ_SEARCH`."""
MEMORY_BYTES = 6 * 1024**3
LARGEST_FILE_BYTES = 1024**3
BROKEN_HARNESS = 97
"""Exit code of a child whose case could not be set up."""
PLACES = ("HOME", "HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "TMPDIR", "TRITON_CACHE_DIR")
PLACES += ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_HOME")
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "TRITON_INTERPRET": "1",
    "COLUMNS": "200",
}
Main = Callable[[list[str]], None]


@dataclass(frozen=True)
class Outcome:
    """Hold how a process ended.

    Attributes:
        code: exit code; below 0: the signal that ended it.
        stdout: what it wrote.
        stderr: likewise.
        is_hang: whether it was killed because it did not end.
        seconds: it took.
    """

    code: int
    stdout: str
    stderr: str
    is_hang: bool
    seconds: float


def open_scratch(folder: Path) -> None:
    """Make the folder that all is written to, and let everything that has a place lie in it."""
    for name in PLACES:
        place = folder / "places" / name.lower()
        place.mkdir(parents=True)
        os.environ[name] = str(place)
    os.environ.update(SETTINGS)
    _give_away(folder)


def close_scratch(folder: Path) -> None:
    """Remove a scratch folder, whatever permissions cases have left in it."""
    for parent, names, _ in os.walk(folder):
        for name in names:
            if not (Path(parent) / name).is_symlink():
                (Path(parent) / name).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _give_away(folder: Path) -> None:
    """Let `nobody` own a folder where we are root, for children give up their rights."""
    if os.geteuid() != 0:
        return
    for parent, names, files in os.walk(folder):
        for name in (".", *names, *files):
            os.lchown(Path(parent) / name, NOBODY, NOBODY)


def prepare_imports() -> None:
    """Import everything that commands import, so that forked processes need not."""
    import torch

    torch.set_num_threads(1)
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import rich.progress
    import rich.table  # noqa: F401

    import megablocks_utils.lora.merge_weights
    import megablocks_utils.training.checkpointer
    import megablocks_utils.training.loop
    import megablocks_utils.training.recorder
    import megablocks_utils.training.setup
    import megablocks_utils.training.trainer
    import megablocks_utils.training.trainer_arguments  # noqa: F401

    for name in ("fsdp1", "fsdp2", "evaluate", "export", "merge", "plan", "tune"):
        find_main(name)


def find_main(command: str) -> Main:
    """Return the function behind a command."""
    if command == "_make":
        from tests.fuzz.ground import make_model_and_data

        return make_model_and_data
    import importlib

    scripts = {"fsdp1": "train_fsdp1", "fsdp2": "train_accelerate_fsdp2"}
    module = importlib.import_module(scripts.get(command, f"megablocks_utils.{command}"))
    return module.main


def run_command(
    command: str,
    words: Sequence[str],
    folder: Path,
    *,
    timeout_s: float,
    set_up: Callable[[], None] = lambda: None,
    environ: Mapping[str, str | None] | None = None,
) -> Outcome:
    """Run a command in a process of its own, in an empty folder.

    Args:
        command: `fsdp1`, `fsdp2` or a module of the package.
        words: of its command line.
        folder: where it runs and where its output goes; made here.
        timeout_s: seconds after which it is killed.
        set_up: what it does before.
        environ: variables of its environment, None to take one away.

    Raises:
        RuntimeError: `set_up` failed.
    """
    folder.mkdir(parents=True)
    logs = [folder.with_suffix(suffix) for suffix in (".stdout", ".stderr")]
    started = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _be_child(command, words, folder, logs, set_up, environ or {})
    status, is_hang = _wait(child, started + timeout_s)
    stdout, stderr = (log.read_text(errors="replace") for log in logs)
    for log in logs:
        log.unlink()
    code = os.waitstatus_to_exitcode(status)
    if code == BROKEN_HARNESS:
        raise RuntimeError(f"the case could not be set up:\n{stderr}")
    return Outcome(code, stdout, stderr, is_hang, time.monotonic() - started)


def _wait(child: int, deadline: float) -> tuple[int, bool]:
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status, False
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1], True


def _be_child(
    command: str,
    words: Sequence[str],
    folder: Path,
    logs: Sequence[Path],
    set_up: Callable[[], None],
    environ: Mapping[str, str | None],
) -> Never:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number, log in enumerate(logs, start=1):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), number)
    code = BROKEN_HARNESS
    try:
        _give_up_rights(folder)
        os.chdir(folder)
        set_up()
        for name, value in environ.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        code = 1
        _call(command, words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  # whatever it is, it is the case's outcome
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _give_up_rights(folder: Path) -> None:
    _give_away(folder)
    for kind, limit in (
        (resource.RLIMIT_DATA, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, LARGEST_FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    if os.geteuid() == 0:
        _become_nobody()


def _become_nobody() -> None:
    """Give up root's rights, all but reading, for Python itself may lie in root's home."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(KEEP_CAPABILITIES, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    for rights in (READ_EVERYTHING, 0):
        header = (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION, 0)
        sets = (ctypes.c_uint32 * 6)(rights, rights)  # effective, permitted
        if libc.capset(header, sets) == 0:
            return
    raise OSError(ctypes.get_errno(), "the rights of root cannot be given up")


def _call(command: str, words: Sequence[str]) -> None:
    from huggingface_hub import constants

    from megablocks_utils.processes.entry_point import run_entry_point

    constants.HF_HUB_OFFLINE = True
    sys.argv = [command, *words]
    run_entry_point(find_main(command), words)
