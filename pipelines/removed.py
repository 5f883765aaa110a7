"""What is moved aside rather than deleted: it can be days of work that a slip in params.yaml, or an update, gave up."""

import itertools
import os
import shlex
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from pipelines.workspace import Workspace
from runtime import checkpoints
from runtime.errors import UserError
from runtime.files import explained, remove_if_abandoned
from runtime.identity import Identity


def prune(workspace: Workspace, folder: Path, levels: Sequence[Collection[str]]) -> None:
    """Move aside what belongs to priors, samplers or seeds that the experiment no longer has, and say so in one line.

    Args:
        workspace: which knows where to (:meth:`Workspace.removed`).
        folder: a stage's output.
        levels: the names that stay: those in ``folder``, then those in each folder in it, and so on.
    """
    found = list(unnamed(folder, levels))
    gone = [path for path in found if path.suffix != ".tmp"]
    for path in found:
        if path.suffix == ".tmp":
            remove_if_abandoned(path)
    moves = [(path, move_aside(workspace, path)) for path in gone]
    if moves:
        names = ", ".join(str(path.relative_to(workspace.root)) for path in gone)
        place = workspace.removed(folder).relative_to(workspace.root)
        print(
            f"warning: params.yaml does not name {names} any more: moved to {place}, which can be deleted; "
            f"to take them back, name them again and, before the stage runs: {_back(workspace, moves)}",
            file=sys.stderr,
        )


def unnamed(folder: Path, levels: Sequence[Collection[str]]) -> Iterator[Path]:
    """What lies in ``folder`` and is not named; ``levels`` as for :func:`prune`."""
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        # A file belongs to the name before its suffixes, as seed-0.partial.safetensors does; a folder's name may have dots.
        name = path.name if path.is_dir() else path.name.split(".")[0]
        if name not in levels[0]:
            yield path
        elif path.is_dir() and len(levels) > 1:
            yield from unnamed(path, levels[1:])


def keep_outdated(workspace: Workspace, files: Mapping[Path, Identity]) -> None:
    """Move aside what a stage would write anew since it was made of other settings or by other code, and say so in one line.

    Args:
        workspace: which knows where to.
        files: what is about to be written, finished and unfinished, and from what; the caller holds their locks. What is
            not there, or broken and of no use to anyone, is left to who writes it.

    Raises:
        UserError: a file cannot be moved.
    """
    found = [(path, why) for path, identity in files.items() if (why := _outdated(path, identity))]
    moves = [(path, move_aside(workspace, path)) for path, _ in found]
    if moves:
        others = f" and {len(moves) - 1} more" if len(moves) > 1 else ""
        place = workspace.removed(moves[0][0]).parent.relative_to(workspace.root)
        print(
            f"note: {moves[0][0].relative_to(workspace.root)}{others} is of {found[0][1]}: moved to {place}, which can be "
            f"deleted; to go on with it, undo that and, before the stage runs: {_back(workspace, moves)}",
            file=sys.stderr,
        )


def _outdated(path: Path, identity: Identity) -> str | None:
    """What a file is of that is not of this identity; None where it is current, absent or broken."""
    if not path.exists():
        return None
    try:
        document = checkpoints.load_document(path, "")
        difference, source = identity.difference(document["config"]), document["source"]
    except UserError:
        return None
    if difference is not None:
        return f"another configuration ({difference})"
    return None if source == identity.source else "other code"


def move_aside(workspace: Workspace, path: Path) -> Path:
    """Move a file or folder under artifacts out of the stages' outputs. Returns where to; what lay there gets a number."""
    aside = workspace.removed(path)
    with explained(aside):
        aside.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(aside):
            numbers = (number for number in itertools.count(1) if not os.path.lexists(f"{aside}.{number}"))
            aside.rename(f"{aside}.{next(numbers)}")
        shutil.move(path, aside)
    return aside


def _back(workspace: Workspace, moves: Sequence[tuple[Path, Path]]) -> str:
    """The commands that undo moves."""
    relative = [(aside.relative_to(workspace.root), path.relative_to(workspace.root)) for path, aside in moves]
    return " && ".join(shlex.join(["mv", str(aside), str(path)]) for aside, path in relative)
