"""Stage 1 of the hierarchical model on this machine: images per second in bf16 autocast and in fp32."""

import torch
from timing import compare

from models.nvae import NVAE
from models.trainer import OPTIMIZERS, evidence
from runtime import hardware
from runtime.randomness import Noise

BATCH = 128


def main() -> None:
    """The shape of mnist-nvae-lite, a step of forward, backward and Adamax."""
    device = hardware.device()
    print(
        f"{hardware.device_name()}, {torch.get_num_threads()} threads; bf16 gains: {hardware.gains_from_bf16(device.type)}"
    )
    options = NVAE.Options(
        groups_per_scale=[10], latent_channels=1, width=48, patch=4, halvings=1, outer_cells=2, cells=1, expansion=3
    )
    x = (torch.rand(BATCH, 1, 28, 28, device=device) < 0.2).float()
    noise = [Noise(0, "benchmark", k, device=device) for k in range(10)]

    def step_in(kind: str):
        vae = NVAE(options, (1, 28, 28)).to(device)
        optimizer = OPTIMIZERS["adamax"](vae.parameters(), lr=1e-4)

        def run() -> None:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=kind == "bf16"):
                loss = -evidence(vae, x, noise).elbo.mean()
            loss.backward()
            optimizer.step()

        return run

    medians = compare({f"{BATCH} images, {kind}": step_in(kind) for kind in ("fp32", "bf16")}, rounds=7)
    print(", ".join(f"{name.split()[-1]}: {BATCH / seconds:.0f} images/s" for name, seconds in medians.items()))


if __name__ == "__main__":
    main()
