"""Worker processes on this machine, that end with the one that started them."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from runtime.errors import UserError


@contextmanager
def pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of fresh processes, which are started as calls are submitted to it.

    Args:
        workers: how many, at most. Submit within :func:`runtime.interruption.left_to_this_process`.

    Raises:
        UserError: one of them was killed.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, initializer=_die_with_parent) as executor:
            yield executor
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed (out of memory, perhaps); "
            "run the same command again: it goes on from the last checkpoint"
        ) from error


def _die_with_parent() -> None:
    """Do not outlive a driver that was killed: an orphan would go on writing, and hold its locks."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
