"""Signals that ask for a stop while a run still starts up. Torch-free."""

import signal

__all__ = ["remember_early_signals", "take_early_signal"]

_early: list[int] = []


def remember_early_signals() -> None:
    """Keep SIGUSR1 until the run can stop; by default it ends a process that starts up.

    Call it in the main thread. SIGTERM and SIGINT do end a process that starts up.
    """
    _early.clear()
    signal.signal(signal.SIGUSR1, lambda number, _frame: _early.append(number))


def take_early_signal() -> int:
    """Return the number of a signal that has come since, once; 0 for none."""
    number = _early[0] if _early else 0
    _early.clear()
    return number
