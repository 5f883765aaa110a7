"""What stages of the experiment ``deep`` made, to be compared: trained and drawn tensors, and the table."""

import torch

from pipelines import results
from runtime import checkpoints


def made(folder):
    """The tensors of every file but what tells the time, by path."""
    paths = [*(folder / "artifacts" / "deep").rglob("*.safetensors"), *(folder / "data" / "features").rglob("*.safetensors")]
    found = {}
    for path in paths:
        tensors = checkpoints.load(path, "")[0]
        tensors.pop("seconds", None)
        found[path.relative_to(folder)] = tensors
    return found


def same(before, after):
    """Whether two of :func:`made` hold the same files with the same numbers."""
    return after.keys() == before.keys() and all(
        torch.equal(tensor, after[path][name]) for path, tensors in before.items() for name, tensor in tensors.items()
    )


def numbers(path):
    """The table but for times and revisions."""
    table = results.read(path, "")
    return table[~table.metric.str.contains("seconds")].drop(columns=["seconds", "revision"]).reset_index(drop=True)
