"""The reason why a process ends, where torchrun and accelerate launch look for it.

Torch-free. Their report, in the log of every machine, then shows it in place of "To enable
traceback see".
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

__all__ = ["write_error_file"]


def write_error_file(reason: str, environ: Mapping[str, str] = os.environ) -> None:
    """Write the file that the launcher's report shows; without such a launcher, nothing.

    Args:
        reason: a sentence, or a traceback.
        environ: says where.
    """
    path = environ.get("TORCHELASTIC_ERROR_FILE", "")
    if not path:
        return
    # The form of `torch.distributed.elastic.multiprocessing.errors`, which shows the call stack.
    details = {"py_callstack": reason, "timestamp": str(int(time.time()))}
    record = {"message": {"message": reason, "extraInfo": details}}
    try:
        Path(path).write_text(json.dumps(record), encoding="utf-8")
    except OSError as error:
        sys.stderr.write(f"cannot write TORCHELASTIC_ERROR_FILE {path}: {error.strerror}\n")
