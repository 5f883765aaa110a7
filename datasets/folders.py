"""Images in ``train.zip`` and ``test.zip``, or in folders of these names: for the data sets that come like this.

They lie in a folder called after the data set, in the mirror or among the downloads. Images in subfolders are of classes
called after those; classes are numbered in alphabetical order.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath

import torch
from torch import Tensor

from datasets import decoding
from datasets.mnist import MIRROR
from datasets.pictures import cut_for, decoded, place, provenance, refuse_count, splits
from datasets.registry import Prepared, Request
from runtime.arrays import Blocks
from runtime.errors import UserError


def prepare(
    request: Request,
    validation: int,
    counts: Mapping[str, int] | None = None,
    size: Sequence[int] | None = None,
    box: Sequence[int] | None = None,
) -> Prepared:
    """The images, and labels where there are several classes.

    They are dealt out class by class, the first image of each, the second of each, and so on, so that any stretch of them is
    a sample of all classes. The last ``validation`` of the training images are for validation.

    Args:
        request: of the data set.
        validation: how many images.
        counts: of images that ``train`` and ``test`` must have; any if absent.
        size: (width, height) that each must have, pixels; those of the data set's shape if absent.
        box: (left, top, right, bottom) that is cut out before it is scaled to the shape; all of it if absent.

    Raises:
        UserError: an archive is missing, incomplete or broken, or an image is not what it should be.
    """
    folder, cut = place(request, request.name), cut_for(request.shape, size, box)
    where = f"{MIRROR} must name a folder that holds {request.name}/train.zip and {request.name}/test.zip, or such folders"
    sources = {part: decoding.pictures(folder, part, where) for part in ("train", "test")}
    for part, source in sources.items():
        refuse_count(source.place, len(source.names), (counts or {}).get(part, len(source.names)))
    classes = {part: sorted({_class(name) for name in source.names}) for part, source in sources.items()}
    several = max(map(len, classes.values())) > 1  # else the folder, if there is one, is called as it happens to be
    if several and classes["train"] != classes["test"]:
        odd = sorted(set(classes["train"]) ^ set(classes["test"]))
        raise UserError(f"{folder}: {odd[0]!r} is a class in one of train and test alone; mend that, and fetch again")
    if not 0 < validation < len(sources["train"].names):
        raise UserError(f"{sources['train'].place} holds {len(sources['train'].names)} images, too few to validate on some")
    arrays: dict[str, Tensor | Blocks] = {}
    for part, source in sources.items():
        names = _dealt(source.names)
        held_out = validation if part == "train" else 0
        sizes = {part: len(names) - held_out} | ({"validation": held_out} if held_out else {})
        arrays |= splits(request.shape, decoded(request, part, source, names, cut), sizes)
        if several:
            labels = torch.tensor([classes["train"].index(_class(name)) for name in names])
            arrays |= {
                f"{split}-labels": found for split, found in zip(sizes, labels.split(list(sizes.values())), strict=True)
            }
    return Prepared(arrays, provenance([*sources.values()]))


def _class(name: str) -> str:
    return PurePath(name).parent.name


def _dealt(names: Sequence[str]) -> list[str]:
    """Names, in order within each class, so that the classes alternate."""
    before, keys = Counter[str](), {}
    for name in names:
        keys[name] = before[_class(name)], _class(name)
        before[_class(name)] += 1
    return sorted(names, key=keys.__getitem__)
