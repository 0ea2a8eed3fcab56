"""The birth certificate of a measurement: what made the numbers, on what, when."""

import datetime
import os
import shlex
from collections.abc import Sequence
from typing import Any

from megablocks_utils.training.report.run_record import (
    CHECKOUT,
    describe_hardware,
    read_commit,
    read_versions,
)

_VARIABLES = ("OMP_", "MKL_", "MALLOC_")


def build_provenance(module: str, argv: Sequence[str], **settings: Any) -> dict[str, Any]:
    """Return command, commit, versions, hardware, variables that set speed, date and `settings`."""
    return {
        "command": shlex.join(["python", "-m", module, *argv]),
        "commit": read_commit(CHECKOUT),
        "versions": read_versions(),
        "hardware": describe_hardware(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(_VARIABLES)},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **settings,
    }
