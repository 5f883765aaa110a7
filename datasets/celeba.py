"""CelebA's aligned faces, 178x218 JPEGs: cropped, and scaled to the shape of the data set.

Whose crop it is makes another data set: NVAE's has 148 pixels, RAE's 140, and FIDs on the two are not to be compared.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePath

from datasets import decoding
from datasets.decoding import Pictures
from datasets.mnist import MIRROR
from datasets.pictures import cut_for, decoded, place, provenance, require_original, splits
from datasets.registry import Prepared, Request
from runtime.errors import UserError, first_line
from runtime.torchvision_ops import import_torchvision

SIZE = (178, 218)
IMAGES, PARTITION = "img_align_celeba", "list_eval_partition.txt"
SPLITS = {"0": "train", "1": "validation", "2": "test"}


def prepare(request: Request, box: Sequence[int]) -> Prepared:
    """The images of the three splits that ``list_eval_partition.txt`` gives: 162 770, 19 867 and 19 962.

    The zip itself may be packed by anybody, since it is distributed in several forms; it has to hold the images that the
    partition names, each of the right size, and no others.

    Args:
        request: of the data set.
        box: (left, top, right, bottom) that is cut out, pixels.

    Raises:
        UserError: naming the file that is missing, incomplete or broken, and where to get it.
    """
    folder = place(request, "celeba")
    where = (
        f"get {IMAGES}.zip and {PARTITION} by browser from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, and put them "
        f"into {folder}, or into the folder celeba of one that {MIRROR} names"
    )
    if folder.is_relative_to(request.raw):
        _download(folder, where)
    require_original(folder / PARTITION, request.checksums[PARTITION], where)
    pictures = decoding.pictures(folder, IMAGES, where)
    listed = [line.split() for line in (folder / PARTITION).read_text(encoding="ascii").splitlines() if line.strip()]
    names = _names(pictures, [name for name, _ in listed], where)
    of_split = defaultdict(list)
    for name, (_, split) in zip(names, listed, strict=True):
        of_split[SPLITS[split]].append(name)
    ordered = [name for split in SPLITS.values() for name in of_split[split]]
    rows = decoded(request, IMAGES, pictures, ordered, cut_for(request.shape, SIZE, box))
    counts = {split: len(of_split[split]) for split in SPLITS.values()}
    return Prepared(splits(request.shape, rows, counts), provenance([pictures]))


def _names(pictures: Pictures, listed: Sequence[str], where: str) -> list[str]:
    """Where the images are, at whatever depth, that the partition names. Raises UserError: other ones are."""
    found = {PurePath(name).name: name for name in pictures.names}
    missing = [name for name in listed if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{pictures.place} lacks {missing[0]}{more} of the {len(listed)} images that {PARTITION} names; {where}"
        )
    if len(pictures.names) != len(listed):
        raise UserError(
            f"{pictures.place} holds {len(pictures.names)} images, and {PARTITION} names {len(listed)}; "
            f"delete what does not belong there, or {where}"
        )
    return [found[name] for name in listed]


def _download(folder: Path, where: str) -> None:
    """Fetch what is not there by torchvision's means. Raises UserError if it cannot be had."""
    there = {PARTITION: (folder / PARTITION).exists()}
    there[f"{IMAGES}.zip"] = (folder / f"{IMAGES}.zip").exists() or (folder / IMAGES).is_dir()
    if all(there.values()):
        return
    torchvision = import_torchvision()
    for number, checksum, name in torchvision.datasets.CelebA.file_list:
        if not there.get(name, True):
            try:
                torchvision.datasets.utils.download_file_from_google_drive(number, str(folder), name, checksum)
            except Exception as error:  # gdown, which torchvision calls, has errors of its own
                raise UserError(f"{name} cannot be downloaded ({first_line(error)}); {where}") from error
