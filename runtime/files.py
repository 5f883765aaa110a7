"""Files that are whole or absent: temporary name, fsync, rename."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from runtime.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MASK = os.umask(0)
os.umask(_MASK)
_MODE = 0o666 & ~_MASK
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is fsynced and renamed over ``path``.

    Raises:
        UserError: the disk is full or not writable. ``path`` keeps what it held before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fchmod(handle.fileno(), _MODE)  # safetensors makes its files private, which a shared folder is not
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if _number(error) in _FULL:
            raise UserError(f"{path}: no space left on the device; free some and run the same command again") from error
        if _number(error) in _REFUSED:
            raise UserError(f"{path}: cannot be written; check its permissions, then run the same command again") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _number(error: OSError) -> int | None:
    """The errno; safetensors gives it in its message alone."""
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else error.errno


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically (UTF-8). Raises UserError as :func:`atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def exclusive(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock ``name`` in ``folder``, so that no two processes write the same output.

    Raises:
        UserError: another process holds it (a run that is still going, perhaps one whose parent was killed).
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name.replace('/', '+')}.lock", timeout=0)
    try:
        with lock:
            yield
    except Timeout as error:
        raise UserError(f"{name} is being written by another process; wait for it or stop it") from error
