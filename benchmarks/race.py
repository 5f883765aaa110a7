"""SIR that stops once it is decided, against all M = 5 000 proposals on the same noise: draws that differ, and time saved.

First every group of mnist-nvae-lite's published classifiers, each in contexts that all M drew, beside the reference
(``reference.py``) where the classifier is convolutional. Then a classifier of CelebA-64's shape with random weights, its
score stretched to make the proposals' weights more and more uneven.
"""

import argparse
from pathlib import Path

import torch
from reference import Concatenating, sir
from sir import STACKS, OneGroup, timed
from timing import processor
from torch import Tensor

from models.distributions import DiagonalNormal
from models.folding import folded
from models.protocol import LearnedPrior, descend
from pipelines.config import read
from pipelines.recipe import Recipe
from pipelines.stored import Stored
from priors.ncp import NoiseContrastivePrior
from priors.networks import MapScorer
from priors.samplers import GroupDraw
from priors.sir import SIR
from runtime import hardware
from runtime.randomness import Noise

EXPERIMENT, PROPOSALS = "mnist-nvae-lite", 5000
EVERY = SIR(SIR.Options(proposals=PROPOSALS, precision="auto"))
EARLY = {ess: SIR(SIR.Options(proposals=PROPOSALS, until_ess=ess, precision="auto")) for ess in (10, 50, 200)}
SPREADS = (0.5, 1.0, 2.0, 3.0)


def draw(sampler: SIR, prior: LearnedPrior, k: int, context: Tensor) -> tuple[GroupDraw, float]:
    """What it draws, and the seconds it takes."""
    drawn: list[GroupDraw] = []

    def streams(stream: str) -> Noise:
        return Noise(0, f"sample-{stream}", k, rows=range(len(context)), device=context.device)

    seconds = timed(lambda: drawn.append(sampler.draw(prior, k, context, streams)))
    return drawn[0], seconds


class Tally:
    """Of some draws by all M, and of those that stop early."""

    def __init__(self) -> None:
        self.drawn, self.seconds = 0, 0.0
        self.reference: list[float] = []  # seconds of a draw
        self.early = {ess: {"differ": 0.0, "proposals": 0.0, "seconds": 0.0} for ess in EARLY}

    def add(self, prior: LearnedPrior, k: int, context: Tensor) -> GroupDraw:
        """Draw a group in some contexts, in every way; the draw of all M."""
        every, seconds = draw(EVERY, prior, k, context)
        self.drawn, self.seconds = self.drawn + len(context), self.seconds + seconds
        for ess, found in self.early.items():
            early, seconds = draw(EARLY[ess], prior, k, context)
            found["differ"] += (early.z != every.z).flatten(1).any(1).sum().item()
            found["proposals"] += early.proposals.sum().item()
            found["seconds"] += seconds
        return every

    def by_formula(self, scorer: MapScorer, base: DiagonalNormal, context: Tensor) -> None:
        """Time the reference, on one image."""
        plain = Concatenating(scorer).to(context.device)
        hardware.keep_freed_memory(False)  # it has a process's defaults, the engine the pipeline's
        self.reference.append(timed(lambda: sir(plain, base, context, PROPOSALS)))
        hardware.keep_freed_memory()

    def print(self, name: str) -> None:
        """A line for every effective sample size asked for; a share of 0 in n may in truth be 3 / n (95 %)."""
        reference = sum(self.reference) / len(self.reference)
        print(f"  {name}: the formula {1e3 * reference:.1f} ms a draw, all M {1e3 * self.seconds / self.drawn:.1f} ms")
        for ess, found in self.early.items():
            seconds, every = found["seconds"] / self.drawn, self.seconds / self.drawn
            print(f"    until ESS {ess:3d}: {found['differ']:4.0f} of {self.drawn} draws differ, "
                  f"{found['proposals'] / self.drawn:7.1f} proposals, {1e3 * seconds:8.3f} ms, "
                  f"{every / seconds:4.1f} x all M, {reference / seconds:5.1f} x the formula", flush=True)  # fmt: skip


@torch.no_grad()
def published(images: int) -> None:
    """mnist-nvae-lite's classifiers of seed 0."""
    stored = Stored(Recipe(read(Path("params.yaml")), EXPERIMENT, 0, Path.cwd()))
    prior, total = stored.prior("ncp"), Tally()
    print(f"\n{EXPERIMENT}, NCP, M = {PROPOSALS}, {images} images at a time")

    def choose(k: int, context: Tensor) -> Tensor:
        scorer = getattr(prior.groups[k], "classifier", None)
        if isinstance(scorer, MapScorer):
            total.by_formula(scorer, stored.vae.prior(k, context[:1]), context[:1])
        return total.add(prior, k, context).z

    descend(stored.vae, images, choose)
    total.print("all groups")


@torch.no_grad()
def stretched(images: int) -> None:
    """The smallest maps of CelebA-64."""
    shape = STACKS["CelebA-64"][0]
    print(
        f"\na group of {shape.channels}x{shape.side}x{shape.side} of CelebA-64, M = {PROPOSALS}, {images} images at a time"
    )
    torch.manual_seed(0)
    trained = shape.classifier()
    context = torch.randn(images, shape.context, shape.side, shape.side, device=hardware.device())
    assert isinstance(trained.classifier, MapScorer)
    spread = trained.log_ratio(OneGroup(trained).base(0, context).draw(Noise(0, "spread"), (100,)), context).std(0).mean()
    last = trained.classifier.judge[-1]
    weight = last.weight / spread
    for deviation in SPREADS:
        last.weight = torch.nn.Parameter(deviation * weight, requires_grad=False)
        group, tally = folded(trained), Tally()
        assert isinstance(group, NoiseContrastivePrior)
        every = tally.add(OneGroup(group), 0, context)
        tally.by_formula(trained.classifier, OneGroup(group).base(0, context[:1]), context[:1])
        tally.print(f"log r of sd {deviation:.1f}, ESS/M {every.ess.mean():.3f}")


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--celeba-images", type=int, default=20)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    hardware.keep_freed_memory()
    print(f"{processor()}, one thread")
    published(chosen.images)
    stretched(chosen.celeba_images)


if __name__ == "__main__":
    main()
