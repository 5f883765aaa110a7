"""Processes that a test starts, and all that those start: marked in their environment, and found by it."""

import os
import re
import signal
import time
import uuid
from contextlib import suppress

import psutil

MARK = "PRIORHOLE_STARTED_BY"

PROGRESS = re.compile(r"[\w +-]+, seed \d+.*: \d+/\d+ |all tasks: |feature network: |data set [\w-]+: ")
"""A line that says how far a stage is, which a slow machine prints and a quick one does not."""


def marked():
    """An environment whose mark every process inherits that is started in it, and the mark."""
    mark = uuid.uuid4().hex
    return os.environ | {MARK: mark, "PYTHONUNBUFFERED": "1"}, mark


def as_in_a_terminal():
    """Act on signals: under nohup, or as a background job, whoever starts a process may have them ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def living(mark):
    """The processes that hold the mark and have not ended."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def survivors(mark, seconds=10.0):
    """What is still there after so long; all of it is killed then."""
    until = time.monotonic() + seconds
    while (found := living(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    names = [f"{process.pid} {process.name()}" for process in found if process.is_running()]
    for process in found:
        with suppress(psutil.Error):
            process.kill()
    return names


def wait_until(condition, seconds=120.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came to it"
        time.sleep(0.05)
