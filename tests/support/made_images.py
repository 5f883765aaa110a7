"""Small data sets, drawn here, in the layouts that the real ones come in, and their entries in the registry."""

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
from PIL import Image

from datasets.registry import DATASETS, Preparer
from datasets.tfrecords import masked_checksum

CORNERS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def drawn(number, width=32, height=32):
    """An RGB image of its own: a disc somewhere on a background, both of some colour."""
    stream = np.random.default_rng(number)
    rows, columns = np.mgrid[:height, :width]
    inside = (rows - stream.integers(height)) ** 2 + (columns - stream.integers(width)) ** 2 < (min(width, height) / 3) ** 2
    colours = stream.integers(0, 256, (2, 3), dtype=np.uint8)
    return Image.fromarray(colours[inside.astype(int)])


def encoded(image, kind="JPEG", **options):
    """The bytes of an image's file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_zip(path, files):
    """A zip of contents by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_folder(path, files):
    """A folder of contents by name."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


def celeba(mirror, counts=(100, 80, 80)):
    """Like CelebA: a zip of 178x218 JPEGs and a partition. Returns the checksums for its entry."""
    total = sum(counts)
    names = [f"{number:06d}.jpg" for number in range(1, total + 1)]
    files = {f"img_align_celeba/{name}": encoded(drawn(i, 178, 218)) for i, name in enumerate(names)}
    write_zip(mirror / "celeba" / "img_align_celeba.zip", files)
    split = np.repeat([0, 1, 2], counts)
    partition = "".join(f"{name} {part}\n" for name, part in zip(names, split, strict=True)).encode()
    (mirror / "celeba" / "list_eval_partition.txt").write_bytes(partition)
    return {"list_eval_partition.txt": hashlib.md5(partition).hexdigest()}


def cifar10(mirror, counts=(180, 80), protocol=2):
    """Like CIFAR-10: six pickled batches in a compressed tar. Returns the checksums for its entry."""
    files, first = {"batches.meta": b"not read"}, 0
    sizes = [counts[0] // 5] * 5 + [counts[1]]
    for name, size in zip([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"], sizes, strict=True):
        images = np.stack([np.asarray(drawn(i)).transpose(2, 0, 1) for i in range(first, first + size)])
        batch = {"data": images.reshape(size, -1), "labels": [i % 10 for i in range(first, first + size)]}
        files[name], first = pickle.dumps(batch, protocol), first + size
    return cifar10_archive(mirror, files)


def cifar10_archive(mirror, files):
    """The compressed tar of batches by name. Returns the checksums for its entry."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    path, content = mirror / "cifar10" / "cifar-10-python.tar.gz", gzip.compress(file.getvalue(), mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return {path.name: hashlib.md5(content).hexdigest()}


def cifar10_jpeg(mirror, counts=(18, 8)):
    """Like its JPEG copy: a zip for training and one for test, of so many images in each of ten classes."""
    first = 0
    for part, count in zip(("train", "test"), counts, strict=True):
        files = {}
        for name in (f"{part}/class{c}/{i:04d}.jpg" for c in range(10) for i in range(count)):
            files[name], first = encoded(drawn(first), quality=75), first + 1
        write_zip(mirror / "cifar10-jpeg" / f"{part}.zip", files)


def celebahq(mirror, total=260, side=32):
    """Like CelebA-HQ as a folder of PNG images, numbered without leading zeros."""
    files = {f"{i}.png": encoded(drawn(i, side, side), "PNG") for i in range(total)}
    write_folder(mirror / "celebahq256" / "images", files)


def record(image):
    """One of GLOW's examples: shape, data, label and attr, by the rules of protocol buffers."""

    def message(number, content):
        return bytes([number << 3 | 2]) + varint(len(content)) + content

    def varint(value):
        return bytes([value & 0x7F | 0x80]) + varint(value >> 7) if value > 0x7F else bytes([value])

    pixels = np.asarray(image)
    features = {
        "attr": message(3, message(1, b"".join(varint(value) for value in [0, 1] * 20))),  # packed
        "data": message(1, message(1, pixels.tobytes())),
        "label": message(3, message(1, varint(0))),
        "shape": message(3, b"".join(b"\x08" + varint(value) for value in pixels.shape)),  # not packed
    }
    entries = (message(1, message(1, name.encode()) + message(2, value)) for name, value in features.items())
    return message(1, b"".join(entries))


def framed(content):
    """A record as its file holds it."""
    length = struct.pack("<Q", len(content))
    return b"".join((length, _checksum(length), content, _checksum(content)))


def _checksum(content):
    return struct.pack("<I", masked_checksum(content))


def celebahq_tfrecords(mirror, counts=(180, 80), side=32, shards=4):
    """Like GLOW's shards of CelebA-HQ."""
    first = 0
    for part, count in zip(("train", "validation"), counts, strict=True):
        folder = mirror / "celebahq256" / "celeba-tfr" / part
        folder.mkdir(parents=True)
        for shard, rows in enumerate(np.array_split(np.arange(first, first + count), shards)):
            content = b"".join(framed(record(drawn(i, side, side))) for i in rows)
            (folder / f"{part}-r08-s-{shard:04d}-of-{shards:04d}.tfrecords").write_bytes(content)
        first += count


HQ_COUNTS = {"train": 100, "validation": 80, "test": 80}


def write_all(mirror):
    """All of them. Returns their entries in the registry, by the real ones' names."""
    faces = celeba(mirror)
    cifar10_jpeg(mirror)
    celebahq(mirror)
    small = {
        "cifar10": replace(
            DATASETS["cifar10"], checksums=cifar10(mirror), prepare=Preparer("datasets.cifar10", {"validation": 80})
        ),
        "cifar10-jpeg": replace(DATASETS["cifar10-jpeg"], prepare=Preparer("datasets.folders", {"validation": 80})),
        "celebahq256": replace(
            DATASETS["celebahq256"], shape=(3, 32, 32), prepare=Preparer("datasets.celebahq", {"counts": HQ_COUNTS})
        ),
    }
    return small | {name: replace(DATASETS[name], checksums=faces) for name in ("celeba64", "celeba64-140")}
