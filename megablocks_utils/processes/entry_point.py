"""Around every command: errors become one sentence and an exit code.

Torch-free: a bad option or environment is answered before torch is imported.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from megablocks_utils.config import OPTION_NAMES
from megablocks_utils.config.reader import HelpRequested
from megablocks_utils.config.secrets import find_secrets, redact_text
from megablocks_utils.errors import UserError
from megablocks_utils.processes.early_exit import announce_early_exit, report_crashes
from megablocks_utils.processes.error_file import write_error_file
from megablocks_utils.processes.launch import reports_errors
from megablocks_utils.processes.libraries import check_versions, set_allocator
from megablocks_utils.processes.monitor import leave_run

__all__ = ["run_entry_point"]

# A launcher ends all ranks as soon as one has failed: the others give rank 0 this long to report.
_RANK_0_FIRST_S = 3.0


def run_entry_point(main: Callable[[list[str]], None], argv: Sequence[str]) -> None:
    """Call `main(argv)` and end the process as the contract's exit codes say.

    A UserError becomes its one sentence on standard error, written by rank 0 and by the first
    process of every other machine, and exit code 2. `--help` is written once and ends with 0. Every
    other exception keeps its traceback, unless `monitor` finds that another rank's loss was behind
    it. An error that only some ranks meet must be raised on all of them (see `agreement`), or rank
    0 has nothing to report; before the processes have met, `early_exit` sees to it.

    Raises:
        SystemExit: with the exit code.
    """
    is_first = reports_errors()
    if "RANK" in os.environ:
        report_crashes()
    set_allocator()
    try:
        check_versions()
        main(list(argv))
        leave_run()
        _leave_process_group()
    except HelpRequested as request:
        if is_first:
            sys.stdout.write(str(request))
        sys.exit(0)
    except UserError as error:
        sentence = redact_text(error.as_options(OPTION_NAMES), find_secrets(argv))
        if is_first:
            sys.stderr.write(f"{sentence}\n")
            sys.stderr.flush()
        write_error_file(sentence)
        leave_run(sentence)
        if not is_first:
            time.sleep(_RANK_0_FIRST_S)
        announce_early_exit(sentence)
        _end(error.exit_code)


def _leave_process_group() -> None:
    """Leave the process group of a run that is done, as NCCL asks for."""
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
