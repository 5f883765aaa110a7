"""Files that are whole or absent: temporary name, fsync, rename."""

import errno
import glob
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from runtime.errors import UserError, first_line

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MASK = os.umask(0)
os.umask(_MASK)
_MODE = 0o666 & ~_MASK


ABANDONED_SECONDS = 3600.0
"""No write stands still for so long."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is fsynced and renamed over ``path``.

    Raises:
        UserError: as :func:`explained` does. ``path`` keeps what it held before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(path)
            yield temporary
            with open(temporary, "rb+") as handle:
                os.fchmod(handle.fileno(), _MODE)  # safetensors makes its files private, which a shared folder is not
                os.fsync(handle.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # a read-only file system refuses even to remove what is not there
            temporary.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """What writers of ``path`` that were killed left half-written, here or on a machine that shares the folder."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        remove_if_abandoned(left)


def remove_if_abandoned(temporary: Path) -> None:
    """Remove a file of :func:`atomic_path` whose writer was killed; one that is being written stays."""
    with suppress(OSError):  # its writer has just finished, or it is another user's
        if time.time() - temporary.stat().st_mtime > ABANDONED_SECONDS:
            temporary.unlink()


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Around what writes, moves or removes ``path``.

    Raises:
        UserError: instead of an OSError of the block: the disk is full, or ``path`` cannot be written. It names the path.
    """
    try:
        yield
    except OSError as error:
        if _number(error) in _FULL:
            raise UserError(f"{path}: no space left on the device; free some and run the same command again") from error
        raise UserError(
            f"{path}: cannot be written ({error.strerror or first_line(error)}); "
            f"check the permissions there, then run the same command again"
        ) from error


def require_writable(*folders: Path) -> None:
    """Before long work: files can be made in ``folders``, or in what there is of the paths to them. Leaves nothing there.

    Raises:
        UserError: as :func:`explained` does.
    """
    for folder in dict.fromkeys(folders):
        present = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        with explained(folder), tempfile.TemporaryFile(dir=present):
            pass


def _number(error: OSError) -> int | None:
    """The errno; safetensors gives it in its message alone."""
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else error.errno


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically (UTF-8). Raises UserError as :func:`atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def exclusive(folder: Path, name: str, wait: float | bool = False) -> Iterator[None]:
    """Hold the lock ``name`` in ``folder``, so that no two processes write the same output.

    Args:
        folder, name: of the lock.
        wait: for who holds it, as is right where what it makes is shared; a number is how many seconds at most.

    Raises:
        UserError: another process holds it (a run that is still going, perhaps one whose parent was killed), or the lock
            cannot be made.
    """
    path = folder / f"{name.replace('/', '+')}.lock"
    lock = FileLock(path, timeout=-1 if wait is True else float(wait))
    with explained(path):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(f"{name} is being written by another process; wait for it or stop it") from error
    try:
        yield
    finally:
        lock.release()
