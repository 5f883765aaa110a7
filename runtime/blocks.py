"""Work over many rows, block by block, that survives being killed: likelihoods, some numbers for each test example."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime import checkpoints, hardware
from runtime.identity import Identity
from runtime.progress import Report, silent
from runtime.training import SAVE_SECONDS

Rows = dict[str, Tensor]
"""Named tensors whose first dimension is the rows."""


def partial_path(path: Path) -> Path:
    """Where the unfinished part of ``path`` is kept: beside it, so that ``path`` itself is whole or absent."""
    return path.with_name(path.stem + checkpoints.PARTIAL)


def in_blocks(
    path: Path,
    identity: Identity,
    total: int,
    block: int,
    compute: Callable[[range], Rows],
    report: Report = silent,
) -> Rows:
    """Concatenate ``compute(rows)`` over blocks of rows, keeping what is done beside ``path`` as it goes.

    A rerun with the same identity goes on from what is kept. ``path`` is written once, when all rows are there; a file of
    another identity, or of fewer rows, that lies there before is deleted.

    Args:
        path: the result.
        identity: what the rows are made from.
        total: number of rows, at least 1.
        block: rows per call of ``compute``.
        compute: maps a range of rows to named tensors whose first dimension is the rows;
            it must not depend on the split. The names ``seconds`` and ``block`` are taken.
        report: told of the progress.

    Returns:
        The named tensors, first dimension ``total``; under ``seconds`` the time each row took (float64, seconds, shared
        evenly within a block) and under ``block`` the index of the block that it was timed in (int64): rows of a block
        share one measurement (:func:`mean_and_error_over_blocks`).

    Raises:
        UserError: the disk is full or not writable, or the work was begun in another precision.
    """
    partial = partial_path(path)
    whole = _stored(checkpoints.load_current(path, identity))
    if whole is not None and _length(whole) == total:
        partial.unlink(missing_ok=True)
        return whole
    path.unlink(missing_ok=True)
    begun = _stored(checkpoints.load_unfinished(partial, identity))
    parts = [begun] if begun is not None and _length(begun) <= total else []
    done = sum(map(_length, parts))
    index = int(parts[0]["block"].max()) + 1 if parts else 0
    saved = time.monotonic()
    while done < total:
        rows = range(done, min(done + block, total))
        parts.append(timed(compute, rows, index))
        done, index = rows.stop, index + 1
        if done < total and time.monotonic() - saved > SAVE_SECONDS:
            parts = [_concatenate(parts)]
            checkpoints.save(partial, parts[0], identity, rows=done)
            saved = time.monotonic()
        report(done, total, "")
    found = _concatenate(parts)
    checkpoints.save(path, found, identity, rows=total)
    partial.unlink(missing_ok=True)
    return found


def join(path: Path, identity: Identity, parts: Mapping[Path, Identity], block: int) -> None:
    """Put files of :func:`in_blocks` together, one behind the other, as if all their rows had been computed at once.

    Nothing is done unless all of them are there.

    Args:
        path, identity: the result, which is kept if it is there.
        parts: the files in the order of their rows, and what they are made from; they are deleted.
        block: rows per block; each part but the last holds whole blocks.
    """
    if _stored(checkpoints.load_current(path, identity)) is None:
        found, index = list[Rows](), 0
        for part, made_from in parts.items():
            rows = _stored(checkpoints.load_current(part, made_from))
            if rows is None:
                return
            found.append(rows | {"block": rows["block"] + index})
            index += -(-_length(rows) // block)
        whole = _concatenate(found)
        checkpoints.save(path, whole, identity, rows=_length(whole))
    for part in parts:
        part.unlink(missing_ok=True)


def timed(compute: Callable[[range], Rows], rows: range, index: int) -> Rows:
    """``compute(rows)`` on the CPU, with ``seconds`` and ``block``.

    Returns:
        What was computed; under ``seconds`` the time that each row took (rows,), shared evenly; under ``block`` the index.
    """
    started = hardware.clock()
    part = compute(rows)
    per_row = (hardware.clock() - started) / len(rows)
    found = {name: value.detach().cpu() for name, value in part.items()}
    found["seconds"] = torch.full((len(rows),), per_row, dtype=torch.float64)
    found["block"] = torch.full((len(rows),), index, dtype=torch.int64)
    return found


def mean_and_error_over_blocks(seconds: Tensor, block: Tensor) -> tuple[float, float, int]:
    """Mean over rows that were timed in blocks, its standard error, and the number of blocks.

    A block's rows share one time, so the blocks are what is independent. The error is that of a mean of their means with
    their rows as weights: √(B / (B − 1) Σ_b (n_b / n)² (m_b − m)²).

    Args:
        seconds: time of each row (n,).
        block: index of the block that each row was timed in (n,).

    Returns:
        The mean over rows and its error, in the unit of ``seconds``, and B. The error is NaN for a single block, which says
        nothing of how blocks differ.
    """
    _, owner, sizes = block.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, owner, seconds.double())
    mean, count = sums.sum() / len(seconds), len(sizes)
    if count < 2:
        return mean.item(), math.nan, count
    variance = count / (count - 1) * ((sums - sizes * mean) / len(seconds)).square().sum()
    return mean.item(), variance.sqrt().item(), count


def _stored(found: tuple[Rows, dict[str, Any]] | None) -> Rows | None:
    """The rows of a checkpoint that :func:`in_blocks` wrote; else None."""
    return found[0] if found is not None and {"seconds", "block"} <= found[0].keys() else None


def _length(rows: Rows) -> int:
    return len(rows["seconds"])


def _concatenate(parts: list[Rows]) -> Rows:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
