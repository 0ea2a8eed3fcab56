"""What happens when a rank is lost: the others end at once, one on each machine reports why.

Torch-free. A survivor may hang in a collective that nothing interrupts, or fail in it with an error
of its own, so a thread ends the process, whatever the main thread does.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from megablocks_utils.processes.error_file import write_error_file
from megablocks_utils.processes.liveness import (
    DEFAULT_LIMITS,
    POLL_S,
    STORE_LOSS,
    Watch,
    WatchLimits,
)
from megablocks_utils.processes.output_folder import find_checkpoints
from megablocks_utils.processes.progress_marks import PROGRESS, Activity
from megablocks_utils.processes.status_store import Loss, Member, StatusStore, Store

__all__ = ["authenticate_ranks", "leave_run", "start_monitor"]

_VERDICT_S = 4.0  # within it a loss on this machine is found
_FAR_VERDICT_S = 5.0  # within it, after the limit, one elsewhere is
_CONNECTION_WORDS = ("connection", "peer", "network", "pipe")
_GRACE_S = 10.0  # a rank ended with an error that the others have probably raised too
_GRACE_POLL_S = 0.2
_REPORTER_S = 1.5  # how long others wait for the lowest survivor to report
_LINGER_S = 2.0  # until all have seen the verdict: this process may host the store
# Without the store ranks find out one after the other, and one that has gone looks like the cause.
_LINGER_WITHOUT_STORE_S = 4.0
_OTHERS_LEAVE_S = 10.0  # how long the host of the store waits for the others to leave
_EXIT_CODE = 1


class _Monitor:
    """Watch the other ranks in a thread, and end this process when one is lost.

    Args:
        members: all ranks, in their order.
        rank: this one.
        store: for the `StatusStore`.
        output_dir: where the newest checkpoint is looked for.
        limits: how long to wait.
    """

    def __init__(
        self,
        members: Sequence[Member],
        rank: int,
        store: Store,
        output_dir: str | Path,
        limits: WatchLimits,
    ) -> None:
        self._members, self._rank, self._output_dir = members, rank, Path(output_dir)
        self._limits = limits
        self._status_store = StatusStore(store)
        self._watch = Watch(members, rank, self._status_store, limits=limits, progress=PROGRESS)
        self._activity = Activity()
        self._stopped = threading.Event()
        self._has_failed = self._is_ending = False
        self._looks = 0
        self._hook_before = sys.excepthook

    def start(self) -> None:
        """Give a first sign of life and start watching; in the main thread."""
        self._status_store.beat(self._rank, PROGRESS.standing(-1))
        # A launcher ends the survivors of a lost rank by SIGTERM before they could report why.
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._on_sigterm)
        for job in (self._poll, self._guard):
            threading.Thread(target=job, name=f"monitor {job.__name__}", daemon=True).start()

    def authenticate(self, secret: bytes) -> None:
        """Believe only ranks that have the secret; the process group is there."""
        self._status_store.authenticate(secret)
        # Around torch's own, which shows nothing before this one is through.
        self._hook_before = sys.excepthook
        sys.excepthook = self._on_exception

    def leave(self, error: str) -> None:
        """Stop watching, and tell the others that this rank ends.

        Args:
            error: why; empty where it ends because it is done.
        """
        self._stopped.set()
        sys.excepthook = self._hook_before
        if error:
            self._publish(error, grace_s=_GRACE_S)
        wait_s = 0.0 if self._rank else _LINGER_S if error else _OTHERS_LEAVE_S
        try:
            self._status_store.leave(self._rank)
            self._wait_for_others(wait_s)
        except RuntimeError:
            return  # the store has gone with those that left before

    def _wait_for_others(self, wait_s: float) -> None:
        last_s = time.monotonic() + wait_s
        while time.monotonic() < last_s and self._status_store.count_left() < len(self._members):
            time.sleep(0.05)

    def _poll(self) -> None:
        while not self._stopped.wait(POLL_S):
            if self._activity.has_worked() and not PROGRESS.is_stepping:
                PROGRESS.mark()
            if (loss := self._watch.look()) is not None:
                self._conclude(loss)
            self._looks += 1

    def _guard(self) -> None:
        """Notice that the store, whose machine may be gone, has left `_poll` without an answer."""
        looks, ticks = 0, 0
        while not self._stopped.wait(POLL_S):
            ticks = ticks + 1 if self._looks == looks else 0
            looks = self._looks
            if ticks * POLL_S >= self._limits.lost_s:
                is_first = self._watch.is_first_reporter(STORE_LOSS)
                self._report_and_end(STORE_LOSS, is_first, linger_s=_LINGER_WITHOUT_STORE_S)

    def _conclude(self, loss: Loss) -> None:
        is_other = loss.is_hang or loss.rank != self._rank
        is_first = is_other and self._watch.is_first_reporter(loss)
        try:
            if self._leaves_within(loss.grace_s):
                return
            is_reporter = self._claims_report(is_first)
            linger_s = _LINGER_S if is_reporter else 0.0
        except RuntimeError:
            is_reporter, linger_s = is_first, _LINGER_WITHOUT_STORE_S
        self._report_and_end(loss, is_reporter, linger_s=linger_s)

    def _leaves_within(self, grace_s: float) -> bool:
        """Return whether this rank leaves the run in its own way before the loss is reported."""
        last_s = time.monotonic() + grace_s
        while time.monotonic() < last_s:
            if self._stopped.wait(_GRACE_POLL_S):
                return True
            if self._has_failed or self._status_store.has_reporter(self._machine):
                break
        return False

    def _claims_report(self, is_first: bool) -> bool:
        """Return whether this rank reports the loss: the first one, or another if it does not."""
        last_s = time.monotonic() + (0.0 if is_first else _REPORTER_S)
        while time.monotonic() < last_s:
            if self._status_store.has_reporter(self._machine):
                return False
            time.sleep(0.1)
        return self._status_store.claim_reporter(self._members[self._rank])

    def _report_and_end(self, loss: Loss, is_reporter: bool, *, linger_s: float) -> NoReturn:
        self._is_ending = True
        sentence = self._describe(loss)
        write_error_file(sentence)
        if is_reporter:
            sys.stderr.write(f"{sentence}\n")
            sys.stderr.flush()
        time.sleep(linger_s)
        os._exit(_EXIT_CODE)

    @property
    def _machine(self) -> str:
        return self._members[self._rank].machine

    def _describe(self, loss: Loss) -> str:
        if loss.is_hang:
            return f"this run hangs: {loss.reason}. {_advise(self._output_dir)}"
        lost = self._members[loss.rank or 0]
        who = f"the store of this run (on {lost.host})" if loss.rank is None else str(lost)
        reason = loss.reason.removesuffix(".")
        return f"{who} was lost: {reason}. {_advise(self._output_dir)}"

    def _publish(self, reason: str, grace_s: float = 0.0) -> None:
        try:
            self._status_store.publish(Loss(self._rank, reason, grace_s))
        except RuntimeError:
            return  # no rank is left to be told

    def _on_exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Wait for a verdict where a lost peer may be behind the error, else tell the others."""
        if issubclass(kind, RuntimeError):
            self._has_failed = True
            time.sleep(self._verdict_wait_s(str(error)))
        self._stopped.set()
        first_line = "".join(str(error).strip().splitlines()[:1])
        reason = f"{kind.__name__}: {first_line}" if first_line else kind.__name__
        if issubclass(kind, KeyboardInterrupt):
            self._publish(reason, grace_s=_GRACE_S)
            self._hook_before(kind, error, trace)
            return
        self._publish(reason)
        write_error_file("".join(traceback.format_exception(kind, error, trace)))
        self._hook_before(kind, error, trace)
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(_LINGER_S)
        os._exit(_EXIT_CODE)  # an ordinary exit may wait for peers in gloo's or NCCL's destructors

    def _verdict_wait_s(self, message: str) -> float:
        has_far = any(member.machine != self._machine for member in self._members)
        is_about_peers = any(word in message.lower() for word in _CONNECTION_WORDS)
        return self._limits.lost_s + _FAR_VERDICT_S if has_far and is_about_peers else _VERDICT_S

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        time.sleep(_VERDICT_S)
        if self._is_ending:
            time.sleep(_LINGER_WITHOUT_STORE_S)
        self._publish(signal.Signals(number).name, grace_s=_GRACE_S)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


_running: list[_Monitor] = []


def start_monitor(
    members: Sequence[Member],
    rank: int,
    store: Store,
    output_dir: str | Path,
    limits: WatchLimits = DEFAULT_LIMITS,
) -> None:
    """Watch the other ranks until `leave_run`; in the main thread.

    From now on a lost rank, or a run in which no rank makes progress (see `PROGRESS`), ends this
    process with exit code 1. The lowest surviving rank of each machine writes one sentence to
    standard error: what happened, and what to resume from.

    **Collective:** all ranks must call it.

    Args:
        members: all ranks, in their order.
        rank: this one.
        store: a `torch.distributed` store with a client of its own, empty at the start.
        output_dir: where the newest complete checkpoint is looked for.
        limits: how long to wait.
    """
    monitor = _Monitor(members, rank, store, output_dir, limits)
    monitor.start()
    _running.append(monitor)


def authenticate_ranks(secret: bytes) -> None:
    """Believe from now on only what ranks with this secret write into the store.

    From now on, too, others learn of an exception that ends this process.

    **Collective:** all ranks must call it, with the same secret, once there is a process group.
    """
    for monitor in _running:
        monitor.authenticate(secret)


def leave_run(error: str = "") -> None:
    """Tell the other ranks, if they watch, that this one ends; every ordinary end calls it.

    Args:
        error: the sentence it ends with; empty where it is done. Ranks that do not raise the same
            error are ended 10 s later.
    """
    while _running:
        _running.pop().leave(error)


def _advise(output_dir: Path) -> str:
    try:
        complete = find_checkpoints(output_dir)
    except OSError as error:
        return f"{output_dir} cannot be read ({error.strerror})."
    if not complete:
        return f"There is no complete checkpoint in {output_dir}."
    return (
        f"The newest complete checkpoint is {complete[-1][1]}; resume from it with "
        "--resume_from_checkpoint True."
    )
