"""scikit-learn's bundled 8x8 digits: 1 797 images, no download."""

from pathlib import Path

import torch
from torch import Tensor

from runtime.errors import UserError

PIXEL_SUM = 561_718.0  # of all images as scikit-learn ships them, 0 to 16 a pixel


def prepare(raw: Path) -> dict[str, Tensor]:  # noqa: ARG001 (nothing is downloaded)
    """Images as uint8, scaled from 0..16 to 0..255, and labels, in a fixed stratified split."""
    # Imported here, like scipy and scikit-learn elsewhere: a second in every process that never prepares digits.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    if digits.images.shape != (1797, 8, 8) or digits.images.sum() != PIXEL_SUM:
        raise UserError("scikit-learn's digits are not the ones expected; install the version in constraints.txt")
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).long()
    rest, test = train_test_split(range(len(images)), test_size=400, random_state=0, stratify=labels)
    train, validation = train_test_split(rest, test_size=200, random_state=0, stratify=labels[rest])
    splits = {"train": train, "validation": validation, "test": test}
    return {split: images[rows] for split, rows in splits.items()} | {
        f"{s}-labels": labels[rows] for s, rows in splits.items()
    }
