"""Encoded images in a folder or a zip, and their pixels. Worker processes import this, so it does without torch."""

import hashlib
import io
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from runtime.errors import UserError, first_line

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
MODES = {"1": "black and white", "L": "grey", "LA": "grey with alpha", "P": "of a palette", "RGBA": "RGB with alpha"}


@dataclass(frozen=True)
class Cut:
    """What is taken of an image: it is decoded, cropped, and scaled by PIL's bilinear filter, which is antialiased.

    Attributes:
        mode: PIL's, that it must have: ``RGB`` or ``L``.
        size: (width, height) that it must have, pixels.
        box: (left, top, right, bottom), pixels of the original; right and bottom are outside. None: all of it.
        target: (width, height) to scale the box to.
    """

    mode: str
    size: tuple[int, int]
    box: tuple[int, int, int, int] | None
    target: tuple[int, int]


@dataclass(frozen=True)
class Pictures:
    """The images, by their names' endings, that a folder holds at any depth, or a zip.

    Attributes:
        place: of the folder or zip.
        names: of the images inside, numbers in their order.
        stamp: another one when they change: of names, sizes, and checksums or times.
        read: the bytes of one of them. Raises UserError: it cannot be read.
    """

    place: Path
    names: Sequence[str]
    stamp: str
    read: Callable[[str], bytes]

    def label(self, name: str) -> str:
        """What an image is called in a message."""
        return f"{self.place}/{name}"

    @property
    def formats(self) -> list[str]:
        """Of the images."""
        return sorted({FORMATS[Path(name).suffix.lower()] for name in self.names})


def pictures(folder: Path, name: str, where: str) -> Pictures:
    """The images of ``NAME.zip`` in a folder, or else of the folder ``NAME`` in it.

    Args:
        folder, name: of the archive.
        where: what to do if it is missing or broken, for the message.

    Raises:
        UserError: there is neither, the zip is broken, or there are no images inside.
    """
    archive, unpacked = folder / f"{name}.zip", folder / name
    if archive.is_file():
        found = _in_zip(archive, where)
    elif unpacked.is_dir():
        found = _in_folder(unpacked)
    else:
        raise UserError(f"{archive} is missing, and so is the folder {unpacked}; {where}")
    if not found.names:
        raise UserError(f"{found.place} holds no images ({', '.join(FORMATS)}); {where}")
    return found


def refuse_page(path: Path, where: str) -> None:
    """Raises UserError if a file is a web page that was saved in the place of what it is called."""
    with open(path, "rb") as file:
        begin = file.read(512).lstrip().lower()
    if begin.startswith((b"<!doctype html", b"<html")):
        raise UserError(
            f"{path} is a web page (<!DOCTYPE html), as Google Drive sends when a quota is used up; delete it, and {where}"
        )


def _in_zip(path: Path, where: str) -> Pictures:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        refuse_page(path, where)
        raise UserError(f"{path} is corrupt or partial ({first_line(error)}); delete it, and {where}") from error
    entries = {entry.filename: entry for entry in archive.infolist() if _is_image(entry.filename)}
    names = sorted(entries, key=_numbers_in_order)

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except Exception as error:  # zipfile raises what its decompressors do
            raise UserError(f"{path}/{name} is corrupt ({first_line(error)}); replace {path}, and fetch again") from error

    return Pictures(path, names, _digest((name, entries[name].CRC, entries[name].file_size) for name in names), read)


def _in_folder(path: Path) -> Pictures:
    found = {}
    for folder, _, files in os.walk(path, followlinks=True):
        for file in files:
            whole = os.path.join(folder, file)
            if _is_image(name := os.path.relpath(whole, path)):
                found[name] = os.stat(whole)
    names = sorted(found, key=_numbers_in_order)

    def read(name: str) -> bytes:
        try:
            return (path / name).read_bytes()
        except OSError as error:
            raise UserError(f"{path / name} cannot be read ({error.strerror}); mend that, and fetch again") from error

    return Pictures(path, names, _digest((name, found[name].st_mtime_ns, found[name].st_size) for name in names), read)


def _is_image(name: str) -> bool:
    """By its ending, without what systems hide."""
    parts = Path(name).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and Path(name).suffix.lower() in FORMATS


def _numbers_in_order(name: str) -> list[Any]:
    """A key by which 2.png comes before 10.png."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


def _digest(entries: Any) -> str:
    state = hashlib.blake2b(digest_size=16)
    for entry in entries:
        state.update(repr(entry).encode())
    return state.hexdigest()


def stack(images: Sequence[tuple[str, bytes]], cut: Cut) -> np.ndarray:
    """The pixels of encoded images, (n, channels, height, width) uint8.

    Args:
        images: what each is called in messages, ending with its file's name, and its bytes.
        cut: what is taken of each.

    Raises:
        UserError: one is empty, corrupt, of another mode or size.
    """
    return np.stack([_pixels(label, content, cut) for label, content in images])


def size_of(label: str, content: bytes) -> tuple[int, int]:
    """Width and height of an encoded image in pixels. Raises UserError if it is none."""
    return _opened(label, content).size


def _pixels(label: str, content: bytes, cut: Cut) -> np.ndarray:
    image = _opened(label, content)
    if image.mode != cut.mode:
        kind = MODES.get(image.mode, image.mode)
        raise UserError(f"{label} is {kind}, not {MODES.get(cut.mode, cut.mode)}; replace it, and fetch again")
    if image.size != cut.size:
        there, wanted = ("x".join(map(str, size)) for size in (image.size, cut.size))
        raise UserError(f"{label} has {there} pixels, not {wanted}; replace it, and fetch again")
    try:
        image.load()
    except Exception as error:  # PIL's readers raise what their parsers do
        raise UserError(f"{label} is truncated or corrupt ({first_line(error)}); replace it, and fetch again") from error
    # Cropped first: PIL's own box would let the filter see what lies around it.
    part = image if cut.box is None else image.crop(cut.box)
    scaled = part if part.size == cut.target else part.resize(cut.target, Image.Resampling.BILINEAR)
    pixels = np.asarray(scaled)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _opened(label: str, content: bytes) -> Image.Image:
    """An image of which the header is read."""
    if not content:
        raise UserError(f"{label} is empty; replace it, and fetch again")
    kind = FORMATS[Path(label).suffix.lower()]
    try:
        return Image.open(io.BytesIO(content), formats=[kind])
    except Exception as error:  # as above
        raise UserError(f"{label} is not a {kind} image; replace it, and fetch again") from error
