"""Oracles: samplers against distributions that are known exactly."""

import math

import pytest
import torch
from oracles import Known

from models.distributions import DiagonalNormal
from models.protocol import Group
from priors.gmm import Mixture
from priors.langevin import JointLangevin, Langevin, ResampledLangevin, chain_ess_fraction
from priors.samplers import Ancestral
from priors.sir import SIR
from runtime.randomness import Noise

ROWS = 20_000


def draw(sampler, prior, rows=None):
    context = torch.zeros(ROWS if rows is None else len(rows), 0)
    return sampler.draw(prior, 0, context, lambda purpose: Noise(0, purpose, rows=rows))


@pytest.mark.parametrize("metropolis", [False, True])
def test_langevin_finds_mean_and_variance_of_a_normal(metropolis):
    options = Langevin.Options(steps=150, step_size=0.1, metropolis=metropolis)
    drawn = draw(Langevin(options), Known(lambda z: -((z - 0.7) ** 2) / (2 * 0.6**2)))
    z = drawn.z[:, 0]
    assert z.mean().item() == pytest.approx(0.7, abs=0.02)
    # Without the correction the chain's variance is σ²/(1 − ε/4σ²), exactly, for a Normal.
    expected = 0.36 if metropolis else 0.36 / (1 - 0.1 / (4 * 0.36))
    assert z.var().item() == pytest.approx(expected, rel=0.04)
    assert (drawn.acceptance == 1).all() or metropolis
    assert not metropolis or 0.5 < drawn.acceptance.mean() < 1


def test_steps_after_resampling_bring_its_draw_to_the_target():
    """Five proposals of N(0, 1) cannot stand for N(2, 0.3²): what SIR keeps of them lies too near to 0, and too wide."""
    target = Known(lambda z: -((z - 2) ** 2) / (2 * 0.3**2))
    chain = {"steps": 40, "step_size": 0.05, "metropolis": True}
    resampled = draw(SIR(SIR.Options(proposals=5)), target).z[:, 0]
    both = draw(ResampledLangevin(ResampledLangevin.Options(proposals=5, **chain)), target)
    alone = draw(Langevin(Langevin.Options(**chain)), target).z[:, 0]
    assert abs(resampled.mean().item() - 2) > 0.5
    assert both.z.mean().item() == pytest.approx(2, abs=0.02)
    assert both.z.var().item() == pytest.approx(0.3**2, rel=0.05)
    assert abs(both.z.mean().item() - 2) < abs(alone.mean().item() - 2)
    assert (both.proposals == 5 + 40 + 1).all()


def test_langevin_finds_the_covariance_of_two_dimensions():
    precision = torch.linalg.inv(torch.tensor([[1.0, 0.6], [0.6, 0.8]]).double())

    class Correlated(Known):
        def base(self, k, context):
            zeros = torch.zeros(len(context), 2).double()
            return DiagonalNormal(zeros, torch.ones_like(zeros))

        def log_ratio(self, k, z, context):
            return -torch.einsum("...i,ij,...j", z, precision, z) / 2 - self.base(k, context).log_prob(z)

    drawn = draw(Langevin(Langevin.Options(steps=150, step_size=0.1, metropolis=True)), Correlated(None))
    assert torch.allclose(torch.cov(drawn.z.T), torch.linalg.inv(precision), atol=0.05)


class Ladder(torch.nn.Module):
    """Two groups of one coordinate: z_0 ~ N(0, 1), z_1 ~ N(0.5 z_0, 0.5²); the context is the last z."""

    groups = 2

    def layout(self):
        return [Group(k, (1,), (1,)) for k in range(2)]

    def start(self, batch):
        return torch.zeros(batch, 1)

    def advance(self, k, context, z):
        return z


class Pulled:
    """log r of group 1 is -(z_1 - 1)²/2, of group 0 nothing: the posterior of z_0 given an observation of z_1, jointly."""

    exact = False
    proposes = False

    def base(self, k, context):
        return DiagonalNormal(0.5 * context, torch.full_like(context, 1.0 if k == 0 else 0.5))

    def log_ratio(self, k, z, context):
        return -((z[..., 0] - 1) ** 2) / 2 if k else z.new_zeros(z.shape[:-1])


def test_joint_langevin_lets_an_earlier_group_answer_to_a_later_ones_ratio():
    """p(z_0, z_1) r(z_1) is Normal: its moments follow from conditioning on an observation of z_1 with variance 1."""
    options = JointLangevin.Options(steps=200, step_size=0.5, metropolis=True)
    _, (first, second) = JointLangevin(options).top_down(Ladder(), Pulled(), ROWS, lambda k: lambda name: Noise(0, name, k))
    variance = 0.5**2 + 0.25  # of z_1 under the base
    gain = torch.tensor([0.5, variance]) / (variance + 1)
    for z, mean, var in ((first.z, gain[0], 1 - 0.5 * gain[0]), (second.z, gain[1], variance * (1 - gain[1]))):
        assert z.mean().item() == pytest.approx(mean.item(), abs=0.03)
        assert z.var().item() == pytest.approx(var.item(), rel=0.04)
    assert torch.equal(first.acceptance, second.acceptance)
    assert 0.5 < first.acceptance.mean() < 1


def test_the_effective_sample_size_of_a_chain_is_that_of_its_autocorrelation():
    """A first-order autoregression with coefficient a has (1 − a)/(1 + a) of its states' worth."""
    noise = Noise(0, "chain").normal((4000,), (200,)).double()
    for a in (0.0, 0.5, 0.8):
        state, trace = noise[0], []
        for step in noise:
            state = a * state + math.sqrt(1 - a**2) * step
            trace.append(state)
        assert chain_ess_fraction(torch.stack(trace)).mean().item() == pytest.approx((1 - a) / (1 + a), rel=0.1)
    assert (chain_ess_fraction(torch.ones(50, 3)) == 1 / 50).all()


def test_ancestral_draws_a_mixture_with_its_weights():
    weights, means = torch.tensor([0.2, 0.8]), torch.tensor([[-6.0, 0.0], [2.0, 1.0]])
    scales = torch.tensor([[[0.5, 0.0], [0.3, 0.4]], [[1.0, 0.0], [0.0, 0.2]]])

    class Base(Known):
        exact = True

        def base(self, k, context):
            return Mixture(weights, means, scales, len(context), (2,))

    z = draw(Ancestral(Ancestral.Options()), Base(None)).z
    first = z[:, 0] < -3
    assert first.double().mean().item() == pytest.approx(0.2, abs=0.01)
    assert torch.allclose(torch.cov(z[first].T), scales[0] @ scales[0].T, atol=0.03)
    mixture = Base(None).base(0, torch.zeros(5, 0))
    assert mixture.mean.shape == mixture.variance.shape == (5, 2)
    assert torch.allclose(mixture.mean[0], z.mean(0), atol=0.06)
    assert torch.allclose(mixture.variance[0], z.var(0), rtol=0.05)
    ticks = torch.linspace(-10, 10, 401)
    density = mixture.log_prob(torch.cartesian_prod(ticks, ticks)[:, None].expand(-1, 5, -1))[:, 0]
    assert density.exp().sum().item() * (20 / 400) ** 2 == pytest.approx(1, abs=1e-3)


def test_ancestral_refuses_a_prior_that_corrects():
    assert "sir or langevin" in Ancestral(Ancestral.Options()).refuses(exact=False, smooth=True)
    assert Ancestral(Ancestral.Options()).refuses(exact=True, smooth=False) is None


def test_a_temperature_narrows_the_base_and_leaves_the_ratio(tmp_path):
    from models.mlp import MLPVAE
    from models.protocol import Tempered

    torch.manual_seed(0)
    model = MLPVAE(MLPVAE.Options(latents=2, width=8, likelihood="normal", initial_std=0.5), (2,))
    cold = Tempered(model, 0.5)
    context = cold.start(3)
    assert torch.equal(cold.prior(0, context).variance, 0.25 * model.prior(0, context).variance)
    z = torch.randn(3, 2)
    assert torch.equal(cold.decode(z).mean, model.decode(z).mean)
    assert torch.allclose(cold.decode(z).variance, 0.25 * model.decode(z).variance)
    assert torch.equal(Tempered(model, 0.5, decoder=False).decode(z).variance, model.decode(z).variance)
    assert torch.equal(cold.posterior(0, context, cold.encode(z)).mean, model.posterior(0, context, model.encode(z)).mean)


def test_readjusting_gathers_the_statistics_of_the_models_own_samples():
    from models.nvae import NVAE
    from models.protocol import Tempered
    from priors.protocol import GroupPrior, Prior
    from priors.sampling import draw, readjusted

    torch.manual_seed(0)
    model = NVAE(NVAE.Options(groups_per_scale=[2], latent_channels=1, width=8, halvings=1, cells=1), (1, 8, 8)).eval()
    model = Tempered(model.requires_grad_(False), 0.3)

    def prior(one):
        return Prior(one, [GroupPrior(GroupPrior.Options(), group) for group in model.layout()])

    sampler = Ancestral(Ancestral.Options())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adjusted = readjusted(model, prior, sampler, 100, 10, 0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    moved = {name for name, value in adjusted.state_dict().items() if not torch.equal(before[name], value)}
    assert moved
    assert all("running" in name or "num_batches" in name for name in moved)
    assert all("bottom_up" not in name and "stem" not in name for name in moved)  # samples are never encoded
    # The top-down cells' first batch norm now sees samples with about the statistics that it holds.
    seen = []
    first = adjusted.model.top_down[0][0].body[1]
    first.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    draw(adjusted, prior(adjusted), sampler, range(500), 1, "mean")
    assert torch.allclose(seen[0].mean((0, 2, 3)), first.running_mean, atol=0.1)
    assert torch.allclose(seen[0].var((0, 2, 3)), first.running_var, rtol=0.3, atol=0.01)
