"""One step of stage 1 on the perceptron VAE: forward, backward, and the optimiser's part."""

import torch
from timing import compare

from models.mlp import MLPVAE
from models.trainer import evidence
from runtime.randomness import Noise


def main() -> None:
    """Fused Adam against Adam, everything else alike."""
    torch.set_num_threads(1)
    x = torch.randn(128, 2)

    def step_with(**options: bool):
        model = MLPVAE(MLPVAE.Options(latents=2), (2,))
        optimizer = torch.optim.Adam(model.parameters(), **options)

        def run() -> None:
            for step in range(20):
                optimizer.zero_grad(set_to_none=True)
                (-evidence(model, x, [Noise(0, "benchmark", 0, step)]).elbo.mean()).backward()
                optimizer.step()

        return run

    compare({"20 steps, Adam": step_with(), "20 steps, fused Adam": step_with(fused=True)})


if __name__ == "__main__":
    main()
