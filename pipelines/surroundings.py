"""What a command finds itself in: a user whom the system does not know, and streams that are closed, full or abandoned."""

import getpass
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

from runtime.errors import UserError, first_line


def name_user() -> None:
    """Name a user whom the system does not know, as in a container or on a cluster's node: MLflow, Ray and torch ask.

    A home folder that does not exist is the system's temporary one instead; in one that cannot be written, matplotlib would
    warn that it finds no place for its fonts.
    """
    home = Path(os.path.expanduser("~"))  # which raises nothing for such a user, as pathlib's does
    if not home.is_dir():
        os.environ["HOME"] = tempfile.gettempdir()
    elif not os.access(home, os.W_OK):
        os.environ.setdefault("MPLCONFIGDIR", str(Path(tempfile.gettempdir()) / f"matplotlib-{os.getuid()}"))
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())


def require_folder() -> None:
    """Refuse to work in a folder that is gone, before the libraries that look for it, each with words of its own.

    Raises:
        UserError: it is.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the current folder is gone; change to one that is there") from error


@contextmanager
def usable_streams() -> Iterator[None]:
    """While the block runs, nothing that is printed can stop the work, except results that standard output cannot take.

    Whoever reads standard output may stop reading (``| head -1``): the rest is dropped, and the exit code is as usual.
    What the terminal's encoding lacks is printed as an escape.

    Raises:
        UserError: from ``print``: standard output cannot be written, as on a full disk.
    """
    for descriptor in range(3):  # a closed one would become the next file that is opened, and be printed into
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = cast(TextIO, _Output(sys.stdout or nowhere))
        sys.stderr = cast(TextIO, _Errors(sys.stderr or nowhere))
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def refusal(error: OSError) -> str:
    """One line about what the system refused to do."""
    place = f"{error.filename}: " if error.filename is not None else ""
    return f"{place}{error.strerror or first_line(error)}; mend that, then run the same command again"


class _Stream:
    """A stream whose failures are ``_failed``'s to judge: it raises, or what is printed from then on is dropped."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # typer would print into that if the encoding is ASCII
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As the stream's own."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._failed(error)
            return len(text)

    def flush(self) -> None:
        """As the stream's own."""
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:  # noqa: ARG002
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())  # as well what is still buffered, which Python writes when it ends
        os.close(null)


class _Errors(_Stream):
    """Warnings and progress, whose loss costs no results."""


class _Output(_Stream):
    """Results: whoever reads them may have had enough, but a full disk is not to look like an answer."""

    _refused: UserError | None = None

    def write(self, text: str) -> int:
        """As the stream's own."""
        if self._refused:
            raise self._refused
        return super().write(text)

    def _failed(self, error: OSError) -> None:
        super()._failed(error)
        if not isinstance(error, BrokenPipeError):
            self._refused = UserError(f"standard output cannot be written ({error.strerror}); redirect it elsewhere")
            raise self._refused from error
