"""Work over many rows, block by block, that survives being killed: sampling and likelihoods."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from runtime import checkpoints
from runtime.identity import Identity
from runtime.progress import Report, silent
from runtime.training import SAVE_SECONDS


def in_blocks(
    path: Path,
    identity: Identity,
    total: int,
    block: int,
    compute: Callable[[range], dict[str, Tensor]],
    report: Report = silent,
) -> dict[str, Tensor]:
    """Concatenate ``compute(rows)`` over blocks of rows, keeping what is done in ``path`` as it goes.

    Args:
        path: the result; it also holds the unfinished part, and a rerun with the same identity goes on from there.
        identity: what the rows are made from.
        total: number of rows.
        block: rows per call of ``compute``.
        compute: maps a range of rows to named tensors whose first dimension is the rows;
            it must not depend on the split.
        report: told of the progress.

    Returns:
        The named tensors, first dimension ``total``, and under ``seconds`` the time each row took (seconds, shared
        evenly within a block).
    """
    stored = checkpoints.load_current(path, identity)
    parts = [stored[0]] if stored is not None else []
    done = len(parts[0]["seconds"]) if parts else 0
    saved = time.monotonic()
    while done < total:
        rows = range(done, min(done + block, total))
        started = time.monotonic()
        part = compute(rows)
        per_row = (time.monotonic() - started) / len(rows)
        parts.append({name: value.detach().cpu() for name, value in part.items()})
        parts[-1]["seconds"] = torch.full((len(rows),), per_row, dtype=torch.float64)
        done = rows.stop
        report(done, total, "")
        if done == total or time.monotonic() - saved > SAVE_SECONDS:
            parts = [_concatenate(parts)]
            checkpoints.save(path, parts[0], identity, rows=done)
            saved = time.monotonic()
    return _concatenate(parts)


def _concatenate(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
