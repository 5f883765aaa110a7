"""Folders of named arrays, written once and mapped into memory ever after: prepared data sets, features of images.

An array is a NumPy file (``NAME.npy``), which any tool opens; ``document.json``, written last, says what they are made from.
Opening reads no contents, whatever the size; :func:`verify` reads them all.
"""

import json
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.checkpoints import ContentDigest, Metadata, describe, require_configuration
from runtime.errors import UserError
from runtime.files import atomic_path, write_text
from runtime.identity import Identity

DOCUMENT = "document.json"
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Blocks:
    """An array that is made a block of rows at a time, since it need not fit into memory.

    Attributes:
        shape, dtype: of the whole.
        rows: its rows in their order, in blocks of any length.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Iterable[Tensor]

    @classmethod
    def of(cls, array: Tensor) -> "Blocks":
        """Those of an array that is there."""
        return cls(tuple(array.shape), array.dtype, array.split(ROWS_AT_ONCE))


class Mapped(dict[str, Tensor]):
    """Arrays that are mapped from files, by name. They are not to be changed."""

    def __init__(self, mapped: Mapping[str, np.memmap]):
        super().__init__({name: torch.from_numpy(array) for name, array in mapped.items()})
        self._maps = [array.base for array in mapped.values()]

    def release(self) -> None:
        """Give the memory of what was read back to the system; it is read again where it is asked for again."""
        for mapped in self._maps:
            if isinstance(mapped, mmap.mmap):
                mapped.madvise(mmap.MADV_DONTNEED)


def save(folder: Path, arrays: Mapping[str, Tensor | Blocks], identity: Identity, **metadata: Any) -> None:
    """Write arrays to a folder, one after the other, in the memory of a block of one.

    Args:
        folder: where to; what lies there is overwritten, and counts for nothing until all of it is written.
        arrays: by name, each with at least one row.
        identity: what they are made from.
        metadata: further JSON values to keep.

    Raises:
        UserError: the disk is full or not writable.
    """
    (folder / DOCUMENT).unlink(missing_ok=True)
    content, sizes = ContentDigest(), {}
    for name in sorted(arrays):
        array = arrays[name]
        blocks = Blocks.of(array) if isinstance(array, Tensor) else array
        content.begin(name, blocks.shape, blocks.dtype)
        with atomic_path(folder / f"{name}.npy") as temporary:
            with open(temporary, "wb") as file:
                numbers = torch.empty(0, dtype=blocks.dtype).numpy().dtype
                header = {"descr": numbers.str, "fortran_order": False, "shape": blocks.shape}
                np.lib.format.write_array_header_1_0(file, header)
                written = 0
                for rows in blocks.rows:
                    content.add(rows)
                    file.write(rows.contiguous().numpy().data)
                    written += len(rows)
            assert written == blocks.shape[0], f"{name}: {written} rows of {blocks.shape[0]}"
            sizes[name] = temporary.stat().st_size
    document = describe(identity, content.hexdigest(), bytes=sizes, **metadata)
    write_text(folder / DOCUMENT, json.dumps(document, indent=1) + "\n")


def load(folder: Path, made_by: str) -> tuple[Mapped, Metadata]:
    """Map the arrays of a folder into memory: milliseconds, and no contents are read.

    Args:
        folder: as :func:`save` left it.
        made_by: the command that makes it, for the error message.

    Returns:
        The arrays and the document.

    Raises:
        UserError: it is missing, a file of it is missing or of another size, or it is not one of ours.
    """
    if not (folder / DOCUMENT).exists():
        raise UserError(f"{folder} is missing; make it with: {made_by}")
    try:
        document = Metadata(dict(json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))), folder, made_by)
        if any((folder / f"{name}.npy").stat().st_size != size for name, size in document["bytes"].items()):
            raise ValueError
        # Copy-on-write: torch wants memory that could be written to, and the file stays as it is in any case.
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in document["bytes"]}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is corrupt or not a priorhole folder; delete it and run: {made_by}") from error
    return Mapped(arrays), document


def load_verified(folder: Path, identity: Identity, made_by: str) -> tuple[Mapped, Metadata]:
    """:func:`load`, and refuse a folder of another configuration with the key that differs (UserError)."""
    arrays, document = load(folder, made_by)
    require_configuration(folder, document, identity, made_by)
    return arrays, document


def load_current(folder: Path, identity: Identity) -> tuple[Mapped, Metadata] | None:
    """What a folder holds if it was made from this very identity, code included; None if absent, broken or stale."""
    try:
        arrays, document = load_verified(folder, identity, "the same command again")
        return (arrays, document) if document["digest"] and document["source"] == identity.source else None
    except UserError:
        return None


def verify(folder: Path, made_by: str) -> int:
    """Read all contents of a folder and hold them against its digest. Returns the bytes read.

    Raises:
        UserError: from :func:`load`, or the contents are not what was written.
    """
    arrays, document = load(folder, made_by)
    content = ContentDigest()
    for name in sorted(arrays):
        content.begin(name, arrays[name].shape, arrays[name].dtype)
        for rows in arrays[name].split(ROWS_AT_ONCE):
            content.add(rows)
            arrays.release()
    if content.hexdigest() != document["digest"]:
        raise UserError(f"{folder} is corrupt (its contents do not match its digest); delete it and run: {made_by}")
    return sum(document["bytes"].values())
