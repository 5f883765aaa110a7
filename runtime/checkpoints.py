"""Checkpoints: safetensors with JSON metadata. No pickle is ever read or written."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from runtime.errors import UserError, last_line
from runtime.files import atomic_path
from runtime.identity import Identity, revision

PARTIAL = ".partial.safetensors"
"""How the names of unfinished files end. An optimiser's moments may overflow on the way, and in them that is no fault."""

_KEY = "priorhole"  # safetensors metadata is a flat map of strings; ours is one JSON document under this key


class Metadata(dict[str, Any]):
    """A stored file's metadata. A key that it lacks, since another version wrote it, is a UserError, not a KeyError."""

    def __init__(self, document: dict[str, Any], path: Path, made_by: str):
        super().__init__(document)
        self._path, self._made_by = path, made_by

    def __missing__(self, key: str) -> Any:
        raise UserError(
            f"{self._path} was written by another version of priorhole, without its {key}; "
            f"delete it and run: {self._made_by}"
        )


def digest(tensors: dict[str, Tensor]) -> str:
    """Content digest of named tensors: names, shapes, types and bytes."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return state.hexdigest()


def save(path: Path, tensors: dict[str, Tensor], identity: Identity, **metadata: Any) -> None:
    """Write a checkpoint atomically.

    What is finished, which is any file that does not end in PARTIAL, has to be finite; but for ``rows`` that were computed
    (:func:`runtime.blocks.in_blocks`), among which are diagnostics that need not be: who computes them looks at the others.

    Args:
        path: where to. Its folder is made.
        tensors: contents, any shapes and devices.
        identity: what the contents were made from; a later :func:`load` checks it.
        metadata: further JSON values to keep (step, losses, seconds, rows, …).

    Raises:
        UserError: the disk is full or not writable, or numbers are not finite.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if "rows" not in metadata and not path.name.endswith(PARTIAL):
        _require_finite(path, tensors)
    document = metadata | {
        "experiment": identity.experiment,
        "seed": identity.seed,
        "config": identity.config,
        "source": identity.source,
        "precision": identity.precision,
        "digest": digest(tensors),
        "revision": revision(),
    }
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={_KEY: json.dumps(document)})
        except SafetensorError as error:  # it carries no errno, only the operating system's text
            raise OSError(str(error)) from error


def _require_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raises UserError for a tensor, of those that are to be written to ``path``, with NaN or infinite numbers."""
    for name, tensor in tensors.items():
        broken = int((~tensor.isfinite()).sum()) if tensor.is_floating_point() else 0
        if broken:
            raise UserError(
                f"{path} is not written: {broken} of the {tensor.numel()} numbers in {name} are not finite, so its training "
                "diverged; lower the learning rate or the gradient clip in params.yaml"
            )


def load(path: Path, made_by: str) -> tuple[dict[str, Tensor], Metadata]:
    """Read a checkpoint and verify its content digest.

    Args:
        path: the file.
        made_by: the command that makes it, for the error message.

    Returns:
        The tensors, and the metadata document (keys of :func:`save`).

    Raises:
        UserError: missing, truncated, corrupt, or not written by priorhole. So is reading a key that is not in the metadata,
            since another version wrote the file.
    """
    if not path.exists():
        raise UserError(f"{path} is missing; make it with: {made_by}")
    try:
        with safe_open(path, framework="pt") as handle:
            document = json.loads((handle.metadata() or {})[_KEY])
            # Copies: the handle's tensors are the file itself, mapped, and would change with it.
            tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is corrupt or not a priorhole file; delete it and run: {made_by}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} is corrupt or not a priorhole file; delete it and run: {made_by}")
    found = Metadata(document, path, made_by)
    if digest(tensors) != found["digest"]:
        raise UserError(f"{path} is corrupt (its contents do not match its digest); delete it and run: {made_by}")
    return tensors, found


def load_verified(path: Path, identity: Identity, made_by: str) -> tuple[dict[str, Tensor], Metadata]:
    """:func:`load`, and refuse a checkpoint of another configuration with the key that differs (UserError)."""
    tensors, document = load(path, made_by)
    difference = identity.difference(document["config"])
    if difference is not None:
        raise UserError(f"{path} belongs to another configuration ({difference}); make it anew with: {made_by}")
    return tensors, document


def load_current(path: Path, identity: Identity) -> tuple[dict[str, Tensor], Metadata] | None:
    """What ``path`` holds if it was made from this very identity, code included; None if absent, broken or stale."""
    if not path.exists():
        return None
    try:
        tensors, document = load_verified(path, identity, made_by="the same command again")
        return (tensors, document) if document["source"] == identity.source else None
    except UserError:
        return None


def load_unfinished(path: Path, identity: Identity) -> tuple[dict[str, Tensor], Metadata] | None:
    """:func:`load_current` of work to be gone on with.

    Raises:
        UserError: it was begun in another precision than this machine computes in, and would be of both.
    """
    stored = load_current(path, identity)
    if stored is None or "precision" not in stored[1]:  # which another version may have left out
        return None
    if stored[1]["precision"] != identity.precision:
        raise UserError(
            f"{path} was begun in {stored[1]['precision']} and this machine computes in {identity.precision}: "
            "finish it on a machine like the first, or delete it to begin anew"
        )
    return stored


def publish(path: Path, copy: Path) -> None:
    """Write a small copy of a finished checkpoint: matrices and filters in half precision, the rest as it is.

    Args:
        path: the checkpoint.
        copy: where to. Its metadata keep, under ``original``, the digest of what it was made from.

    Raises:
        UserError: the checkpoint is missing or corrupt, or the copy cannot be written.
    """
    tensors, document = load(path, "the stage that makes it")
    small = {name: tensor.half() if tensor.dim() >= 2 else tensor for name, tensor in tensors.items()}
    made_from = (document[key] for key in ("experiment", "seed", "config", "source", "precision"))
    identity = Identity(*made_from)
    known = {"step", "seconds", "history", "held_out", "ended", "kept"} & document.keys()
    save(copy, small, identity, original=document["digest"], **{name: document[name] for name in known})


def restore(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load tensors into a module, strictly. Raises UserError if names or shapes do not match."""
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the model: {last_line(error)}") from error
