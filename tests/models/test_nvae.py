import copy

import pytest
import torch
import yaml

from datasets.registry import spec
from models.distributions import DiagonalNormal
from models.layers import NormalisedConv2d
from models.nvae import NVAE
from models.nvae_flow import MaskedConv2d, ShiftedNormal, flow
from models.spectral import SpectralNorms, batch_norm_scales, filters
from models.trainer import OPTIMIZERS, TrainOptions, evidence, kl_weight, spectral_weight
from runtime.identity import ROOT
from runtime.randomness import Noise

EXPERIMENTS = yaml.safe_load((ROOT / "params.yaml").read_text())["experiments"]

# The papers' models in params.yaml: groups, side of the coarsest maps, millions of parameters.
PAPER = {
    "mnist-nvae": (10, 4, 44.11),
    "cifar10-nvae": (30, 16, 130.74),
    "celeba64-nvae": (15, 8, 65.01),
    "celeba64-nvae-mixture": (35, 8, 153.28),
    "celebahq256-nvae": (20, 8, 365.37),
    "celebahq256-nvae-mixture": (36, 8, 330.80),
}


def built(name, **changes):
    """The model of an experiment, and its data's shape."""
    options = {key: value for key, value in EXPERIMENTS[name]["model"].items() if key != "name"}
    shape = spec(EXPERIMENTS[name]["dataset"]).shape
    return NVAE(NVAE.Options(**(options | changes)), shape), shape


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_build_at_full_width(name):
    with torch.device("meta"):
        model, _ = built(name)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert (model.groups, model.initial.shape[-1], round(millions, 2)) == PAPER[name]


@pytest.mark.parametrize("name", ["cifar10-nvae-mixture", "celeba64-nvae", "celebahq256-nvae-mixture"])
def test_the_papers_models_train_at_reduced_width(name):
    model, shape = built(name, width=4, latent_channels=1, groups_per_scale=[2, 1], halvings=1, cells=1, outer_cells=1)
    optimizer = OPTIMIZERS["adamax"](model.parameters(), lr=1e-3)
    before = copy.deepcopy(model.state_dict())
    x = torch.randint(32, (2, *shape)) / 31
    loss = -evidence(model, x, [Noise(0, "t", k) for k in range(3)]).elbo.mean()
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_scales_of_batch_norms_count_whatever_processes_make_of_them():
    model = NVAE(NVAE.Options(groups_per_scale=[2], latent_channels=1, width=4, halvings=1, cells=1), (1, 8, 8))
    alone = batch_norm_scales(model)
    assert alone > 0
    assert torch.equal(batch_norm_scales(torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)), alone)


def test_no_warm_up_is_the_whole_kl_from_the_first_step():
    options = {"steps": 10, "batch": 2, "learning_rate": 1e-3}
    assert [kl_weight(TrainOptions(**options, kl_warmup=0), step) for step in range(3)] == [1, 1, 1]
    assert [kl_weight(TrainOptions(**options, kl_warmup=0, kl_delay=0.2), step) for step in range(4)] == [0, 0, 1, 1]
    assert [kl_weight(TrainOptions(**options, kl_warmup=0.2), step) for step in range(4)] == [0, 0.5, 1, 1]


def test_a_new_model_starts_at_its_prior():
    model = NVAE(NVAE.Options(groups_per_scale=[3], latent_channels=2, width=8, halvings=1), (1, 8, 8)).eval()
    parts = evidence(model, torch.rand(4, 1, 8, 8).round(), [Noise(0, "t", k) for k in range(3)])
    assert all(kl.mean() < 3 for kl in parts.kl)


def test_a_fixed_base_prior_is_the_same_in_every_group():
    model = NVAE(NVAE.Options(groups_per_scale=[3], latent_channels=2, width=8, halvings=1, base_prior="fixed"), (1, 8, 8))
    for k in range(3):
        prior = model.prior(k, model.start(2))
        assert torch.equal(prior.mean, torch.zeros(2, 2, 4, 4))
        assert torch.equal(prior.variance, torch.full((2, 2, 4, 4), 1.01) ** 2)


@pytest.mark.parametrize(("groups", "halvings"), [([10], 3), ([2, 2], 2), ([2], 1)])
def test_mnist_is_padded_however_often_it_is_halved(groups, halvings):
    model = NVAE(NVAE.Options(groups_per_scale=groups, latent_channels=1, width=2, halvings=halvings, cells=1), (1, 28, 28))
    assert model.padded == 32
    assert NVAE(NVAE.Options(groups_per_scale=groups, latent_channels=1, width=2, halvings=1), (1, 8, 8)).padded == 8


def test_a_flows_density_is_known_where_it_was_drawn_and_its_shifts_keep_volume():
    shifts = flow(2, 1).double()
    for layer in shifts.modules():
        if isinstance(layer, MaskedConv2d):
            torch.nn.init.normal_(layer.log_norm)
    drawn = ShiftedNormal(DiagonalNormal(torch.zeros(1, 2, 3, 3).double(), torch.ones(1, 2, 3, 3).double()), shifts)
    z = drawn.draw(Noise(0, "t"), (4,))
    assert drawn.log_prob(z).shape == (4, 1)
    with pytest.raises(ValueError, match="own last draw"):
        drawn.log_prob(z.clone())
    jacobian = torch.autograd.functional.jacobian(lambda x: shifts(x.view(1, 2, 3, 3)).flatten(), torch.randn(18).double())
    assert torch.linalg.det(jacobian).item() == pytest.approx(1)
    assert not torch.equal(jacobian, torch.eye(18).double())


def test_a_normalised_convolution_keeps_its_function_until_its_norms_move():
    layer = NormalisedConv2d(3, 4, 3)
    norms = layer.effective_weight.flatten(1).norm(dim=1)
    assert torch.allclose(norms, layer.log_norm.exp(), rtol=1e-4)
    with torch.no_grad():
        layer.weight.mul_(7)
    assert torch.allclose(layer.effective_weight.flatten(1).norm(dim=1), norms, rtol=1e-3)


def test_spectral_norms_are_the_largest_singular_values_and_their_gradient_flows():
    model = NVAE(NVAE.Options(groups_per_scale=[2, 1], latent_channels=2, width=8, halvings=1), (1, 8, 8))
    norms = SpectralNorms(model)
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)]
    exact = sum(torch.linalg.matrix_norm(filters(layer), 2) for layer in layers)
    for _ in range(30):
        found = norms()
    assert found.item() == pytest.approx(exact.item(), rel=0.01)
    assert found.item() <= exact.item() * (1 + 1e-5)  # power iteration approaches from below
    found.backward()
    assert all(layer.weight.grad is not None for layer in layers)
    scales = [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        scales[0].weight[0] = -3
    assert batch_norm_scales(model).item() == pytest.approx(len(scales) + 2)


def test_the_regularisers_weight_comes_log_linearly_from_its_start():
    settings = {"steps": 1, "batch": 1, "learning_rate": 1.0, "spectral": 0.01}
    assert spectral_weight(TrainOptions(**settings), 0.3) == pytest.approx(0.01)
    annealed = TrainOptions(**settings, spectral_start=10.0)
    assert [spectral_weight(annealed, w) for w in (0, 1 / 3, 1)] == pytest.approx([10, 1, 0.01])
