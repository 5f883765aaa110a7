import torch
from torch import nn

from models.folding import folded
from models.nvae import NVAE, DecoderCell
from models.protocol import by_posterior, descend
from runtime.randomness import Noise


def decode(vae, x):
    with torch.no_grad():
        return vae.decode(descend(vae, len(x), by_posterior(vae, x, lambda k: Noise(0, "fold", k)))).mean


def test_a_folded_model_computes_the_same_with_fewer_norms():
    torch.manual_seed(0)
    options = {"groups_per_scale": [1, 2], "latent_channels": 2, "width": 8, "halvings": 1}
    vae = NVAE(NVAE.Options(**options), (1, 16, 16))
    norms = [module for module in vae.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    vae.eval()
    x = (torch.rand(3, 1, 16, 16) < 0.3).float()
    before = decode(vae, x)
    small = folded(vae)
    assert torch.allclose(decode(small, x), before, atol=1e-5)
    assert torch.equal(decode(vae, x), before)  # the original is as it was
    cells = sum(isinstance(module, DecoderCell) for module in vae.modules())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in small.modules()) == len(norms) - 3 * cells
