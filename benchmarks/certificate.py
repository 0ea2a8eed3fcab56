"""The birth certificate of a measurement: what made the numbers, on what, when."""

import datetime
import shlex
from collections.abc import Sequence
from typing import Any

from megablocks_utils.training.run_record import (
    CHECKOUT,
    describe_hardware,
    read_commit,
    read_versions,
)


def build_certificate(module: str, argv: Sequence[str], **settings: Any) -> dict[str, Any]:
    """Return command, commit, versions, hardware, date and the settings given."""
    return {
        "command": shlex.join(["python", "-m", module, *argv]),
        "commit": read_commit(CHECKOUT),
        "versions": read_versions(),
        "hardware": describe_hardware(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **settings,
    }
