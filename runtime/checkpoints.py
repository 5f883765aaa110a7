"""Checkpoints: safetensors with JSON metadata. No pickle is ever read or written."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from runtime import hardware
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


class ContentDigest:
    """Digest of named tensors (names, shapes, types and bytes) that need not be in memory at once.

    Tensors have to come in the order of their names, each whole or in blocks of rows.
    """

    def __init__(self) -> None:
        self._state = hashlib.blake2b(digest_size=16)

    def begin(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        """The next tensor; its rows are to follow."""
        self._state.update(f"{name}{tuple(shape)}{dtype}".encode())

    def add(self, rows: Tensor) -> None:
        """The next rows of the tensor that was begun."""
        flat = rows.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            self._state.update(flat.view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """Of all that was added."""
        return self._state.hexdigest()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Content digest of named tensors: names, shapes, types and bytes."""
    state = ContentDigest()
    for name in sorted(tensors):
        state.begin(name, tensors[name].shape, tensors[name].dtype)
        state.add(tensors[name])
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
    document = describe(identity, digest(tensors), **metadata)
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={_KEY: json.dumps(document)})
        except SafetensorError as error:  # it carries no errno, only the operating system's text
            raise OSError(str(error)) from error


def describe(identity: Identity, content: str, **metadata: Any) -> dict[str, Any]:
    """The metadata document of a file: what it was made from and on, its content digest, and further JSON values."""
    made_on = {"device": hardware.device_name()} | metadata  # a copy names its original's
    return made_on | {
        "experiment": identity.experiment,
        "seed": identity.seed,
        "config": identity.config,
        "source": identity.source,
        "precision": identity.precision,
        "digest": content,
        "revision": revision(),
    }


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
    with _opened(path, made_by) as handle:
        document = _document(handle, path, made_by)
        # Copies: the handle's tensors are the file itself, mapped, and would change with it.
        tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118 (not a dict)
    if digest(tensors) != document["digest"]:
        raise UserError(f"{path} is corrupt (its contents do not match its digest); delete it and run: {made_by}")
    return tensors, document


def verify(path: Path, made_by: str) -> int:
    """Read all of a checkpoint and hold it against its digest. Returns the bytes read. Raises UserError as :func:`load`."""
    load(path, made_by)
    return path.stat().st_size


def load_document(path: Path, made_by: str) -> Metadata:
    """The metadata of a checkpoint whose contents are not read. Raises UserError as :func:`load` does."""
    with _opened(path, made_by) as handle:
        return _document(handle, path, made_by)


def load_tensor(path: Path, name: str, made_by: str) -> Tensor | None:
    """One tensor of a checkpoint whose others are not read; None if it has none of that name. Raises UserError."""
    with _opened(path, made_by) as handle:
        return handle.get_tensor(name).clone() if name in handle.keys() else None  # noqa: SIM118


@contextmanager
def _opened(path: Path, made_by: str) -> Iterator[Any]:
    """The file, whose header is whole; what goes wrong in the block is a UserError."""
    if not path.exists():
        raise UserError(f"{path} is missing; make it with: {made_by}")
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is corrupt or not a priorhole file; delete it and run: {made_by}") from error


def _document(handle: Any, path: Path, made_by: str) -> Metadata:
    document = json.loads((handle.metadata() or {})[_KEY])
    if not isinstance(document, dict):
        raise ValueError
    return Metadata(document, path, made_by)


def load_verified(path: Path, identity: Identity, made_by: str) -> tuple[dict[str, Tensor], Metadata]:
    """:func:`load`, and refuse a checkpoint of another configuration with the key that differs (UserError)."""
    tensors, document = load(path, made_by)
    require_configuration(path, document, identity, made_by)
    return tensors, document


def require_configuration(path: Path, document: Mapping[str, Any], identity: Identity, made_by: str) -> None:
    """Refuse what was made from another configuration than ``identity``, with the key that differs (UserError)."""
    difference = identity.difference(document["config"])
    if difference is not None:
        raise UserError(f"{path} belongs to another configuration ({difference}); make it anew with: {made_by}")


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
    require_same_precision(path, stored[1], identity)
    return stored


def require_same_precision(path: Path, document: Mapping[str, Any], identity: Identity) -> None:
    """Refuse to go on with what was begun in another precision than this machine computes in (UserError)."""
    if document["precision"] != identity.precision:
        raise UserError(
            f"{path} was begun in {document['precision']} and this machine computes in {identity.precision}: "
            "finish it on a machine like the first, or delete it to begin anew"
        )


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
    known = {"step", "seconds", "history", "held_out", "ended", "kept", "imported"} & document.keys()
    made_on = {"original": document["digest"], "device": document.get("device", "")}
    save(copy, small, identity, **made_on, **{name: document[name] for name in known})


def restore(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load tensors into a module, strictly. Raises UserError if names or shapes do not match."""
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the model: {last_line(error)}") from error
