"""Features of images, which FID and KID are computed from, kept by the digest of what they are of.

Those of a data set's own images are made once for all experiments on it; those of samples, once for each file of them.
"""

from collections.abc import Callable
from functools import cache, cached_property

import torch
from torch import Tensor

from metrics import features
from metrics.features import FeatureNetwork
from pipelines.samples import Samples
from pipelines.stored import Stored
from runtime import arrays, checkpoints
from runtime.arrays import Blocks
from runtime.files import exclusive
from runtime.identity import Identity, source_digest
from runtime.progress import Report
from runtime.rowfiles import RowFile

IMAGES_AT_ONCE = 2000


@cache
def _loaded(network: Callable[[], FeatureNetwork]) -> FeatureNetwork:
    """A pretrained network: its weights are read and verified once a process, not once a file of samples."""
    return network()


class Features:
    """A feature network, and what it has seen of one experiment.

    Args:
        stored: one of the experiment's seeds.
        name: of the network, as params.yaml has it.
        report: told of the progress.
    """

    def __init__(self, stored: Stored, name: str, report: Report):
        self._stored, self._name, self._report = stored, name, report
        self._folder = stored.recipe.workspace.features(stored.dataset.name)
        self._lock = f"features/{stored.dataset.name}"

    @cached_property
    def network(self) -> FeatureNetwork:
        """The network; the small classifier is trained, or found trained, on the data set's training images."""
        data = self._stored.dataset
        if self._name in features.PRETRAINED:
            return _loaded(features.PRETRAINED[self._name])
        training, held_out = (
            features.Labelled(lambda rows, split=split: data.images(split, rows), data.labels(split))  # type: ignore[misc]
            for split in ("train", "validation")
        )
        with exclusive(self._stored.recipe.workspace.locks, self._lock, wait=True):
            path = self._folder / "own.safetensors"
            return features.OwnClassifier(data.name, training, held_out, path, self._identity(), self._report)

    @cached_property
    def reference(self) -> Tensor:
        """Of the images that FID and KID hold samples against, (n, features), mapped from the disk."""
        options = self._stored.recipe.experiment.evaluate
        return self.of_data(options.reference, options.reference_images)

    def of_data(self, split: str, most: int | None = None) -> Tensor:
        """Of the images of a split of the data set, (n, features), mapped from the disk.

        Args:
            split: whose.
            most: of so many first images; of all if absent, or if there are fewer.
        """
        data, network = self._stored.dataset, self.network
        size = min(data.size(split), most or data.size(split))
        first = f"-{size}" if size < data.size(split) else ""
        folder, identity = self._folder / f"{network.name}-{split}{first}", self._identity(network=network.digest)
        with exclusive(self._stored.recipe.workspace.locks, self._lock, wait=True):
            found = arrays.load_current(folder, identity)
            if found is None:

                def blocks():
                    for rows in torch.arange(size).split(IMAGES_AT_ONCE):
                        yield network(data.images(split, rows))
                        data.release()
                        self._report(int(rows[-1]) + 1, size, f"features of {split} images")

                width = network(data.images(split, slice(1))).shape[1]
                arrays.save(folder, {"features": Blocks((size, width), torch.float32, blocks())}, identity)
        return arrays.load_verified(folder, identity, "the same command again")[0]["features"]

    def of_samples(self, drawn: Samples, name: str) -> Tensor:
        """Of samples, (n, features), file by file.

        Args:
            drawn: the samples.
            name: of them within the experiment and the seed.
        """
        return torch.cat([self.of_file(drawn, file, name) for file in drawn.files])[: drawn.total]

    def of_file(self, drawn: Samples, file: RowFile, name: str) -> Tensor:
        """Of the samples of one file, (n, features); arguments as for :meth:`of_samples`."""
        recipe, network = self._stored.recipe, self.network
        folder = recipe.workspace.measured(recipe.name) / name / f"seed-{recipe.seed}" / network.name
        path = folder / file.path.name
        identity = self._identity(network=network.digest, file=file.document["digest"])
        found = checkpoints.load_current(path, identity)
        if found is not None:
            return found[0]["features"]
        seen = network(drawn.whole(file))
        checkpoints.save(path, {"features": seen}, identity, rows=len(seen))
        self._report(min(file.rows.stop, drawn.total), drawn.total, f"features of {name}")
        return seen

    def _identity(self, **made_from: str) -> Identity:
        config = made_from | {"dataset digest": self._stored.dataset.digest}
        return Identity(self._stored.dataset.name, 0, config, source_digest("metrics.features"))
