"""NVAE against what its published implementation computes from the same weights, noise and images (parity/README.md)."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from datasets.dataset import _scaled
from models import nvae_released
from models.distributions import DiagonalNormal
from models.nvae import NVAE
from models.nvae_released import Released
from models.protocol import Tempered, descend, posterior_pass
from models.spectral import SpectralNorms, batch_norm_scales, filters, singular_vectors
from models.trainer import TrainOptions, balance, evidence, kl_weight
from priors.protocol import GroupPrior, Prior
from priors.samplers import GroupDraw, Sampler
from priors.sampling import readjusted
from runtime import checkpoints
from runtime.randomness import Noise

FOLDER = Path(__file__).parent / "parity"
NAMES = ["mnist", "cifar-normal", "cifar-mixture", "celeba64-flow", "celeba64-ada", "hq-5bit-flow2"]
WITHIN = 1e-5


def tensors(name):
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def settings(flags):
    """The options of the network that the flags describe."""
    gray, normal = flags["dataset"] == "mnist", flags["num_mixture_dec"] == 1
    return NVAE.Options(
        groups_per_scale=nvae_released.groups_per_scale(flags),
        latent_channels=flags["num_latent_per_group"],
        width=flags["num_channels_enc"],
        halvings=flags["num_preprocess_blocks"],
        outer_cells=flags["num_preprocess_cells"],
        cells=flags["num_cell_per_cond_enc"],
        flows=flags["num_nf"],
        likelihood="bernoulli" if gray else "pixel-normal" if normal else "logistic-mixture",
        bits=flags["num_x_bits"],
        released=True,
    )


class Parity:
    """One configuration: the network with given weights, in single and in double precision, and what it must make."""

    def __init__(self, name):
        state, metadata = tensors(f"official-{name}")
        self.flags = nvae_released.DEFAULTS | json.loads(metadata["config"])
        self.expected, self.metadata = tensors(f"expected-{name}")
        levels = self.expected["levels"]
        self.options, self.shape = settings(self.flags), tuple(levels.shape[1:])
        self.released = Released(Path(name), "", state, self.flags, {})
        self.model = NVAE(self.options, self.shape)
        self.names = nvae_released.names(self.model)
        checkpoints.restore(self.model, nvae_released.translate(self.released, self.model), Path(name))
        self.model.eval().requires_grad_(False)
        self.double = NVAE(self.options, self.shape).double()
        self.double.load_state_dict(self.model.state_dict())
        self.double.eval().requires_grad_(False)
        most = 1 if self.shape[0] == 1 else 2 ** self.flags["num_x_bits"] - 1
        self.x = self.expected.get("reduced_levels", levels).double() / most
        self.noise = [Given(self.expected[f"eps.{k}"]) for k in range(self.model.groups)]
        self.layout = self.model.layout()

    def rows(self, whole):
        """What the fixture keeps of maps."""
        rows = self.expected.get(f"rows.{whole.shape[-1]}")
        return whole if rows is None else whole[:, :, rows][:, :, :, rows]

    def decoded(self, model, context):
        """Logits and mean image, both over the padded image."""
        logits = model.output(context)
        return logits, logits.sigmoid() if self.shape[0] == 1 else model.decode(context).mean

    def check(self, name, found, rtol=0.0, atol=WITHIN):
        expected = self.expected[name]
        torch.testing.assert_close(
            found.double(), expected.double(), rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}"
        )

    def check_images(self, prefix, model, context):
        logits, mean = self.decoded(model, context)
        self.check(f"{prefix}logits", self.rows(logits))
        self.check(f"{prefix}logits_sum", logits.double().sum((2, 3)), 1e-5, 1e-3)
        self.check(f"{prefix}mean", self.rows(mean))


class Given(Noise):
    """Numbers that are given."""

    def __init__(self, numbers):
        self.numbers = numbers.float()

    def normal(self, lead, batch):
        return self.numbers


@cache
def parity(name):
    torch.manual_seed(0)
    return Parity(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_posterior_pass_is_the_published_one(name):
    one = parity(name)
    model = one.model
    features = model.encode(one.x.float())

    def choose(k, context):
        posterior, prior = model.posterior(k, context, features), model.prior(k, context)
        z = posterior.draw(one.noise[k])
        for letter, found in (("q", before_flow(posterior)), ("p", prior)):
            one.check(f"{letter}.mu.{k}", one.rows(found.base_dist.loc))
            one.check(f"{letter}.sigma.{k}", one.rows(found.base_dist.scale))
        one.check(f"z.{k}", one.rows(z))
        one.check(f"feature_sum.{k}", features[k].double().sum((2, 3)), 1e-5, 1e-4)
        one.check(f"context_sum.{k}", context.double().sum((2, 3)), 1e-5, 1e-4)
        return z

    one.check_images("", model, descend(model, 2, choose))


def before_flow(posterior):
    return posterior if isinstance(posterior, DiagonalNormal) else posterior._normal


def by_channel(posterior, prior, noise, z):
    """KL by channel, summed over positions and averaged over the batch."""
    normal = before_flow(posterior)
    if posterior is normal:
        each = torch.distributions.kl_divergence(normal.base_dist, prior.base_dist)
    else:
        each = normal.base_dist.log_prob(normal.draw(noise)) - prior.base_dist.log_prob(z)
    return each.sum((2, 3)).mean(0)


@pytest.mark.parametrize("name", NAMES)
def test_bounds_and_importance_weights_are_the_published_ones(name):
    one, parts = parity(name), []
    for model, x in ((one.model, one.x.float()), (one.double, one.x)):
        log_q, log_p, by_channels = [], [], []

        def visit(k, context, posterior, z, model=model, log_q=log_q, log_p=log_p, by_channels=by_channels):
            prior = model.prior(k, context)
            log_q.append(posterior.log_prob(z))
            log_p.append(prior.log_prob(z))
            by_channels.append(by_channel(posterior, prior, one.noise[k], z))

        log_likelihood = model.decode(posterior_pass(model, x, one.noise.__getitem__, visit)).log_prob(x)
        bound = evidence(model, x, one.noise)
        assert torch.equal(bound.log_likelihood, log_likelihood)
        found = {"log_q": torch.stack(log_q), "log_p": torch.stack(log_p)}
        found |= {"kl": torch.stack(bound.kl), "kl_diag": torch.stack(by_channels), "elbo": bound.elbo}
        log_iw = log_likelihood - found["log_q"].sum(0) + found["log_p"].sum(0)
        parts.append(found | {"log_likelihood": log_likelihood, "log_iw": log_iw})
    single, double = parts
    # In single precision, the mixture's difference of two sigmoids is good to a hundredth of a nat an image.
    mixture = one.options.likelihood == "logistic-mixture"
    for key in double:
        one.check(f"f64.{key}", double[key], 1e-8, 1e-6)
        one.check(key, single[key], WITHIN, 2e-2 if mixture and key in ("log_likelihood", "elbo", "log_iw") else 1e-5)


@pytest.mark.parametrize("temperature", ["1.0", "0.7"])
@pytest.mark.parametrize("name", NAMES)
def test_samples_of_the_prior_are_the_published_ones(name, temperature):
    one = parity(name)
    model = Tempered(one.model, float(temperature), decoder=False)

    def choose(k, context):
        z = model.prior(k, context).draw(one.noise[k])
        one.check(f"prior.t{temperature}.z.{k}", one.rows(z))
        return z

    one.check_images(f"prior.t{temperature}.", one.model, descend(model, 2, choose))


def test_levels_are_reduced_as_published():
    one = parity("hq-5bit-flow2")
    assert torch.equal(_scaled(one.expected["levels"], 5), one.x.float())


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_balanced_as_published(name):
    one = parity(name)
    equal = balance([torch.ones(2)] * one.model.groups, one.layout)
    one.check("alpha", equal.max() / equal, 1e-6)
    kl = evidence(one.double, one.x, one.noise).kl
    gamma = balance(kl, one.layout)
    for prefix in ("", "f64."):
        one.check(f"{prefix}gamma", gamma, 1e-6, 1e-6)
        one.check(f"{prefix}balanced_kl", 0.3 * (gamma[:, None] * torch.stack(kl)).sum(0), WITHIN, 0)


def test_spectral_norms_and_batch_norms_scales_are_the_published_ones():
    one, stacks = parity("cifar-normal"), json.loads(parity("cifar-normal").metadata["spectral_layers"])
    modules = dict(one.model.named_modules())
    for steps, before in ((4, 1), (40, 0)):
        norms = SpectralNorms(one.model)
        norms.steps += before  # 40 iterations at the first step, 4 at every other
        assert {shape: len(layers) for shape, layers in norms._layers.items()} == {k: len(v) for k, v in stacks.items()}
        for shape, layers in stacks.items():
            own = [modules[one.names[f"{layer}.weight"].removesuffix(".weight")] for layer in layers]
            start, matrices = one.expected[f"spectral.u0.{shape}"][..., None], torch.stack([filters(layer) for layer in own])
            getattr(norms, f"left_{shape}")[[norms._layers[shape].index(layer) for layer in own]] = start
            left, right = singular_vectors(matrices, start, steps)
            one.check(f"spectral.sigma{steps}.{shape}", (left.mT @ matrices @ right).flatten())
            if steps == 4:
                one.check(f"spectral.u4.{shape}", left[..., 0])
                one.check(f"spectral.v4.{shape}", right[..., 0])
        one.check(f"spectral.loss.{steps}", norms(), 1e-6)
    convolutions = [module for module in one.double.modules() if isinstance(module, nn.Conv2d)]
    exact = sum(torch.linalg.matrix_norm(filters(layer), 2) for layer in convolutions)
    one.check("f64.spectral.exact", exact, 1e-6)
    one.check("bn_loss", batch_norm_scales(one.model), 1e-6)


class Replayed(Sampler):
    """Draws from the base with numbers that are given, pass by pass."""

    def __init__(self, numbers):
        self.passes = [dict(enumerate(one)) for one in numbers]

    def draw(self, prior, k, context, streams):
        z = prior.base(k, context).draw(Given(self.passes[0].pop(k)))
        if not self.passes[0]:
            self.passes.pop(0)
        return GroupDraw(z, *[z.new_ones(len(z))] * 3)


def test_batch_norms_are_readjusted_as_published():
    one = parity("cifar-normal")
    numbers = [[one.expected[f"readjust.eps.{i}.{k}"] for k in range(3)] for i in range(3)]
    cold = Tempered(one.model, 0.7, decoder=False)

    def prior(model):
        return Prior(model, [GroupPrior(GroupPrior.Options(), group) for group in one.layout])

    model = readjusted(cold, prior, Replayed(numbers), 3, 2, 0).model
    state = model.state_dict()
    moved = {there for there, here in one.names.items() if not torch.equal(state[here], one.model.state_dict()[here])}
    known = {key.removeprefix("readjust.state.") for key in one.expected if key.startswith("readjust.state.")}
    assert {name for name in moved if "num_batches" not in name} == known
    for name in known:
        one.check(f"readjust.state.{name}", state[one.names[name]])
    context = descend(model, 2, lambda k, context: model.prior(k, context).draw(one.noise[k]))
    one.check_images("readjust.", model, context)


def test_the_kls_weight_waits_grows_and_has_a_floor_as_published():
    published = TrainOptions(steps=10_000, batch=1, learning_rate=1.0, kl_delay=1e-4, kl_floor=1e-4)
    for step in (0, 1, 2, 100, 2000, 3001, 9999):
        assert kl_weight(published, step) == pytest.approx(max(min((step - 1) / 3000, 1), 1e-4))
