"""Progress of long work, from whichever process does it to the one that shows it.

A worker writes a small JSON file per task; the driver reads them. Workers may be processes of this machine or tasks of
a cluster that shares the file system, and need no channel back.
"""

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

Curves = dict[str, dict[str, float]]
"""Numbers that are drawn as curves while work goes on: by what they are of, and by name."""


class Report(Protocol):
    """Told of progress, as often as one likes; it asks for the ``curves`` of now only when it writes them."""

    def __call__(self, done: int, total: int, note: str, curves: Callable[[], Curves] | None = None, /) -> None:
        """So much of the work is done."""
        ...


def silent(done: int, total: int, note: str, curves: Callable[[], Curves] | None = None, /) -> None:
    """A report that goes nowhere."""


def to_file(path: Path, every: float = 1.0) -> Report:
    """A report that writes ``path``, at most once in ``every`` seconds and always at the end.

    The file holds ``done``, ``total``, ``note``, ``curves``, and since the first report (what was resumed has not been done
    just now) the ``pace``, a second, and what is ``remaining`` at it, seconds; both None until there is a pace.
    """
    last, began, started, before, size = -math.inf, 0, 0.0, 0, -1

    def report(done: int, total: int, note: str, curves: Callable[[], Curves] | None = None, /) -> None:
        nonlocal last, began, started, before, size
        now = time.monotonic()  # whatever happens to the wall clock
        if total != size or done < before:  # the task's next piece of work
            began, started, size = done, now, total
        before = done
        if now - last >= every or done == total:
            last = now
            pace = (done - began) / (now - started) if done > began and now > started else None
            state = {"done": done, "total": total, "note": note, "curves": curves() if curves else {}, "pace": pace}
            state["remaining"] = None if pace is None else (total - done) / pace
            temporary = path.with_suffix(f".{os.getpid()}")
            with suppress(OSError):  # a full disk, a folder that is gone: nobody sees it, and the work goes on
                temporary.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_text(json.dumps(state))
                temporary.replace(path)

    return report
