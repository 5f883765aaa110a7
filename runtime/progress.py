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

Report = Callable[[int, int, str], None]
"""Called as report(done, total, note), as often as one likes."""


def silent(done: int, total: int, note: str) -> None:
    """A report that goes nowhere."""


def to_file(path: Path, every: float = 1.0) -> Report:
    """A report that writes ``path``, at most once in ``every`` seconds and always at the end.

    The file holds ``done``, ``total``, ``note``, and ``remaining``: seconds, from the pace since the first report (what was
    resumed has not been done just now); None until there is a pace.
    """
    last, began, started, before, size = -math.inf, 0, 0.0, 0, -1

    def report(done: int, total: int, note: str) -> None:
        nonlocal last, began, started, before, size
        now = time.monotonic()  # whatever happens to the wall clock
        if total != size or done < before:  # the task's next piece of work
            began, started, size = done, now, total
        before = done
        if now - last >= every or done == total:
            last = now
            remaining = (now - started) / (done - began) * (total - done) if done > began else None
            temporary = path.with_suffix(f".{os.getpid()}")
            with suppress(OSError):  # a full disk, a folder that is gone: nobody sees it, and the work goes on
                temporary.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_text(json.dumps({"done": done, "total": total, "note": note, "remaining": remaining}))
                temporary.replace(path)

    return report
