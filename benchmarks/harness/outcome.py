"""How a run ended: it was measured, or why there are no numbers. Imports no torch."""

import re
from dataclasses import dataclass
from typing import Any

MEASURED, OOM, FAILED = "measured", "OOM", "failed"
NOT_INSTALLED, LEFT_OUT, NOT_MEASURED = "not installed", "left out", "not measured"
NOT_REACHED = "not reached"
TIMED_OUT = -1

_KILLED = -9
_NO_MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|can't allocate memory|bad_alloc|MemoryError"
)
_LONGEST = 300


@dataclass(frozen=True)
class Ending:
    """How the processes of a run ended.

    Attributes:
        exit_code: of the process that failed first; 0 if none did, negative for a signal,
            `TIMED_OUT` where the run was ended.
        stderr: of that process.
    """

    exit_code: int
    stderr: str = ""

    @classmethod
    def after_timeout(cls, seconds: float) -> "Ending":
        """Return the ending of a run that took too long."""
        return cls(TIMED_OUT, f"it did not end within {seconds:.0f} s")

    def last_line(self) -> str:
        """Return the last line of standard error."""
        lines = self.stderr.strip().splitlines()
        return lines[-1].strip() if lines else "no message"


def explain(ending: Ending) -> dict[str, Any]:
    """Return status, reason and exit code of a run that failed: out of memory, or its last line."""
    # The last one: the lines of a traceback before it may match too.
    lines = [line.strip() for line in reversed(ending.stderr.splitlines())]
    out = next((line for line in lines if _NO_MEMORY.search(line)), None)
    if out is None and ending.exit_code == _KILLED:
        out = "killed by the system (SIGKILL), as it does when the machine has no memory left"
    status, reason = (FAILED, ending.last_line()) if out is None else (OOM, out)
    return {"status": status, "reason": _shorten(reason), "exit_code": ending.exit_code}


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
