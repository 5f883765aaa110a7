"""Worker processes on this machine, that end with the one that started them."""

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from runtime.errors import UserError

OF_ONE_RUN = False
"""Whether this process was started for one run of a stage, during which no file that was finished changes."""


def cores() -> int:
    """How many processor cores this process may use; a scheduler or taskset can leave it fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def pool(workers: int, gpus: Sequence[str] = ()) -> Iterator[ProcessPoolExecutor]:
    """A pool of fresh processes, which are started as calls are submitted to it.

    Args:
        workers: how many, at most. Submit within :func:`runtime.interruption.left_to_this_process`.
        gpus: what each of them sees (CUDA_VISIBLE_DEVICES), one a worker; nothing is changed if there are none.

    Raises:
        UserError: one of them was killed.
    """
    context = multiprocessing.get_context("spawn")
    try:
        places = context.Queue()
        for seen in gpus:
            places.put(seen)
        arguments = (places if gpus else None,)
        with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=arguments) as executor:
            yield executor
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed (out of memory, perhaps); "
            "run the same command again: it goes on from the last checkpoint"
        ) from error


def _begin(places: "multiprocessing.Queue[str] | None") -> None:
    if places is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = places.get(timeout=60)  # before anything here has asked for a GPU
    _die_with_parent()


def _die_with_parent() -> None:
    """Do not outlive a driver that was killed: an orphan would go on writing, and hold its locks."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
