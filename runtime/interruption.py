"""Stop at a signal: this process and all that it started, within seconds.

Files are written so that a process may be killed at any moment, and this is no gentler: nothing is unwound. An exception
raised by the handler would be, but can be raised in a destructor or a callback, where Python prints it and goes on.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
KILL_SECONDS = 5.0


def end_at_signals() -> None:
    """From now on, end with exit code 128 + the signal's number at an interrupt, a request to end or a lost terminal.

    What is ignored, as under nohup, stays ignored. Call it again after a library that sets handlers of its own.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: end(number))


@contextmanager
def left_to_this_process() -> Iterator[None]:
    """Processes started in the block leave a terminal's signals, which reach its whole group, to this one.

    A signal that arrives meanwhile is acted on after the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end(number: int) -> NoReturn:
    """End at a signal: kill all that this process started, say so in one line, exit with 128 + its number."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    try:
        stderr = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError):  # it may be closed
            said, quiet = os.dup(2), stderr
            os.dup2(quiet, 2)  # other threads, Ray's above all, have much to say of what dies now
            stderr = said
        _kill_descendants()
        _say(stderr, f"stopped by {signal.Signals(number).name}; the same command goes on from what was finished or saved")
    finally:
        os._exit(128 + number)


def _kill_descendants() -> None:
    started = psutil.Process().children(recursive=True)
    while started:  # again, for those that a process started while it was being listed
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started, timeout=KILL_SECONDS)
        started = [process for process in psutil.Process().children(recursive=True) if process not in started]


def _say(stderr: int, line: str) -> None:
    """Write past Python's buffers, which whatever was interrupted may hold; and show the cursor that bars hide."""
    shown = "\x1b[?25h\r\n" if os.isatty(stderr) else ""
    with suppress(OSError):  # nobody listens any more
        os.write(stderr, f"{shown}{line}\n".encode())
