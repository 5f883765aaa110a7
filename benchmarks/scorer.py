"""Score M proposals in the context of each of B images: context once per image, against context with every proposal."""

import torch
from timing import compare
from torch import Tensor, nn

from models.protocol import Group
from priors.networks import MapScorer, NetworkOptions

IMAGES, PROPOSALS = 10, 100


class Concatenating(nn.Module):
    """The same network with its first layer over the concatenation of z and context."""

    def __init__(self, scorer: MapScorer):
        super().__init__()
        self.scorer = scorer
        z, context = scorer.see_z, scorer.see_context
        self.first = nn.Conv2d(z.in_channels + context.in_channels, z.out_channels, 3, padding=1)
        with torch.no_grad():
            self.first.weight.copy_(torch.cat([z.weight, context.weight], 1))
            self.first.bias.copy_(z.bias)

    def forward(self, z: Tensor, context: Tensor) -> Tensor:
        """(proposals, images, …) and (images, …) to (proposals, images)."""
        both = torch.cat([z, context.expand(len(z), *context.shape)], 2).flatten(0, 1)
        return self.scorer.judge(self.first(both)).view(z.shape[:2])


@torch.no_grad()
def main() -> None:
    """Groups of the shapes of a small and of a wide hierarchical VAE."""
    torch.set_num_threads(1)
    for latent, context, width in (
        ((4, 4, 4), (32, 4, 4), 32),
        ((20, 4, 4), (256, 4, 4), 64),
        ((20, 8, 8), (128, 8, 8), 64),
    ):
        scorer = MapScorer(NetworkOptions(width=width, depth=2), Group(1, latent, context)).eval()
        plain = Concatenating(scorer).eval()
        z, c = torch.randn(PROPOSALS, IMAGES, *latent), torch.randn(IMAGES, *context)
        assert torch.allclose(scorer(z, c), plain(z, c), atol=1e-4)
        print(f"z {latent}, context {context}, width {width}, {IMAGES} images x {PROPOSALS} proposals")
        compare({"context with every proposal": lambda: plain(z, c), "context once per image": lambda: scorer(z, c)})  # noqa: B023


if __name__ == "__main__":
    main()
