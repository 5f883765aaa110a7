"""The rows of a long result in files of some thousand, each of them whole or absent: what a sampler draws.

A file is written once and never touched again. It is what a killed run goes on from, and what is read at a time, so neither
the time lost nor the memory needed grows with the number of rows.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from runtime import checkpoints
from runtime.blocks import Rows, timed
from runtime.checkpoints import Metadata
from runtime.errors import UserError
from runtime.identity import Identity
from runtime.progress import Report, silent

_NAME = re.compile(r"rows-(\d{8})-(\d{8})\.safetensors")


@dataclass(frozen=True)
class RowFile:
    """One file: where it is, which rows it holds, and its metadata."""

    path: Path
    rows: range
    document: Metadata


def spans(folder: Path) -> list[tuple[Path, range]]:
    """The files of a folder and the rows that each holds, in their order, by their names alone."""
    named = ((path, _NAME.fullmatch(path.name)) for path in sorted(folder.glob("rows-*.safetensors")))
    return [(path, range(int(name[1]), int(name[2]))) for path, name in named if name]


def stored(folder: Path, made_by: str) -> list[RowFile]:
    """The files of a folder in the order of their rows, by their headers alone.

    Raises:
        UserError: a file is corrupt.
    """
    return [RowFile(path, rows, checkpoints.load_document(path, made_by)) for path, rows in spans(folder)]


def gaps(files: Sequence[RowFile], total: int) -> list[range]:
    """The rows of ``total`` that no file holds, as stretches."""
    edges = [0, *itertools.chain.from_iterable((file.rows.start, file.rows.stop) for file in files), total]
    stretches = (range(first, min(last, total)) for first, last in zip(edges[::2], edges[1::2], strict=True))
    return [stretch for stretch in stretches if len(stretch)]


def fill(
    folder: Path,
    identity: Identity,
    total: int,
    per_file: int,
    block: int,
    compute: Callable[[range], Rows],
    report: Report = silent,
    part: range | None = None,
) -> None:
    """Compute the rows that a folder lacks.

    Files of this identity stay, however many rows they hold; others are deleted. Several processes may fill a folder,
    each a part of it.

    Args:
        folder: of the files.
        identity: what the rows are made from. It must not depend on ``total``, so that more rows can be added.
        total: number of rows.
        per_file: rows of a file, at most: the work that a kill can cost. Files begin at multiples of it.
        block: rows per call of ``compute``, at most. Blocks begin at multiples of it, so that files that hold whole blocks
            are the same rows to the last bit whatever their size: a convolution's can depend on how many it is given.
        compute: maps a range of rows to named tensors whose first dimension is the rows; it must not depend on the split.
            A tensor may be of the first of all rows alone, and be shorter, or left out. The names ``seconds`` and ``block``
            are taken (:func:`runtime.blocks.timed`).
        report: told of the progress.
        part: the rows that are wanted, of which a file begins with the first; all of them if absent. What begins outside it
            is left alone.

    Raises:
        UserError: the disk is full or not writable, or the work was begun in another precision.
    """
    files, wanted = [], range(total) if part is None else part
    replaced = within(folder, part)
    for path in sorted(folder.glob("*.safetensors")):
        current = _current(path, identity)
        if current is not None:
            files.append(current)
        elif path in replaced:
            path.unlink(missing_ok=True)
    inside = (range(max(gap.start, wanted.start), min(gap.stop, wanted.stop)) for gap in gaps(files, total))
    missing = [gap for gap in inside if len(gap)]
    for file in files if missing else ():
        checkpoints.require_same_precision(file.path, file.document, identity)
    total = len(wanted)
    done = total - sum(map(len, missing))
    for stretch in missing:
        first = stretch.start
        while first < stretch.stop:
            rows = range(first, min(stretch.stop, (first // per_file + 1) * per_file))
            parts = []
            for start in sorted({rows.start, *range(-(-rows.start // block) * block, rows.stop, block)}):
                parts.append(timed(compute, range(start, min((start // block + 1) * block, rows.stop)), start))
                done += len(parts[-1]["seconds"])
                report(done, total, "")
            path = folder / f"rows-{rows.start:08d}-{rows.stop:08d}.safetensors"
            checkpoints.save(path, _joined(parts), identity, rows=len(rows))
            first = rows.stop


def within(folder: Path, part: range | None) -> list[Path]:
    """The files of a folder that begin within a part of its rows; all, also what is named otherwise, if it is absent."""
    if part is None:
        return sorted(folder.glob("*.safetensors"))
    return [path for path, rows in spans(folder) if rows.start in part]


def _current(path: Path, identity: Identity) -> RowFile | None:
    """The file if it is of this very identity, code included; else None."""
    name = _NAME.fullmatch(path.name)
    try:
        document = checkpoints.load_document(path, "the same command again")
        current = document["digest"] and document["source"] == identity.source
        if name is None or not current or identity.difference(document["config"]):
            return None
    except UserError:
        return None
    return RowFile(path, range(int(name[1]), int(name[2])), document)


def _joined(parts: Sequence[Rows]) -> Rows:
    names = dict.fromkeys(itertools.chain.from_iterable(parts))
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}


def column(files: Sequence[RowFile], name: str, made_by: str) -> Tensor:
    """One named tensor of the files, first dimension the rows; of as many of the first rows as have it.

    Raises:
        UserError: a file is corrupt, or none has it.
    """
    parts = [part for file in files if (part := checkpoints.load_tensor(file.path, name, made_by)) is not None]
    if not parts:
        raise UserError(f"{files[0].path.parent} is of another version of priorhole, without {name}; run: {made_by}")
    return torch.cat(parts)
