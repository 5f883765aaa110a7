import torch
from torch import nn

from models.folding import folded
from models.nvae import NVAE, DecoderCell
from models.protocol import Group, posterior_pass
from priors.networks import MapScorer, NetworkOptions
from runtime.randomness import Noise


def decode(vae, x):
    with torch.no_grad():
        return vae.decode(posterior_pass(vae, x, lambda k: Noise(0, "fold", k))).mean


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


def test_a_folded_classifier_keeps_its_scores_and_their_gradients():
    """Swish in place must not spoil what Langevin dynamics differentiates."""
    torch.manual_seed(0)
    scorer = MapScorer(NetworkOptions(width=8, depth=2, halvings=1), Group(1, (2, 4, 4), (3, 4, 4)))
    for norm in (module for module in scorer.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 2)
        norm.running_mean.normal_()
    scorer.eval().requires_grad_(False)
    z, context = torch.randn(5, 2, 4, 4, requires_grad=True), torch.randn(5, 3, 4, 4)
    found = [model(z, model.prepare(context)) for model in (scorer, folded(scorer))]
    gradients = [torch.autograd.grad(scores.sum(), z)[0] for scores in found]
    assert torch.allclose(*found, atol=1e-5)
    assert torch.allclose(*gradients, atol=1e-5)
