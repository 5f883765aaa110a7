"""The flat models of images: sizes, losses and regularisers as published, and what cannot be built."""

import itertools
import math

import pytest
import torch
from torch import nn

from models.conv_vae import ConvVAE
from models.rae import RAE
from models.trainer import evidence
from runtime import training
from runtime.errors import UserError
from runtime.identity import Identity
from runtime.randomness import Noise, initialising
from runtime.training import Trainee

NOISE = [Noise(0, "test")]
WIDTHS = [128, 256, 512, 1024]


def convolutions(kernel, widths):
    """Parameters of convolutions from one width to the next, each with a batch norm's scale and shift."""
    return sum(kernel**2 * before * after + 2 * after for before, after in itertools.pairwise(widths))


@pytest.mark.parametrize(
    ("shape", "kernel", "latents", "last", "ups"),
    [((3, 64, 64), 5, 64, 4, [1024, 512, 256, 128]), ((3, 32, 32), 4, 128, 2, [1024, 512, 256])],
    ids=["CelebA-64", "CIFAR-10"],
)
def test_the_networks_are_as_large_as_published(shape, kernel, latents, last, ups):
    with torch.device("meta"):
        model = ConvVAE(ConvVAE.Options(latents=latents, kernel=kernel), shape)
    encoder = convolutions(kernel, [3, *WIDTHS]) + (1024 * last**2 + 1) * 2 * latents
    decoder = (latents + 1) * 1024 * 64 + convolutions(kernel, ups) + kernel**2 * ups[-1] * 3 + 3
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count == encoder + decoder


def small(kind, seed=0, **more):
    with initialising(seed, "test"):
        return kind(kind.Options(latents=3, widths=[4, 6], **more), (3, 16, 16))


def test_a_fixed_decoder_is_a_normal_with_the_given_spread():
    model, x = small(ConvVAE, std=0.2).eval(), torch.rand(5, 3, 16, 16)
    decoded = model.decode(torch.randn(5, 3))
    assert ((decoded.mean > 0) & (decoded.mean < 1)).all()
    expected = torch.distributions.Normal(decoded.mean, 0.2).log_prob(x).sum((1, 2, 3))
    assert torch.allclose(decoded.log_prob(x), expected)
    assert not model.likelihood.log_std.requires_grad
    assert small(ConvVAE, std=0.2, learned_std=True).likelihood.log_std.requires_grad


def test_an_autoencoders_loss_is_squared_error_and_half_the_codes_square():
    model, x = small(RAE, code_penalty=0.7), torch.rand(5, 3, 16, 16)
    parts = evidence(model, x, NOISE)
    z = model.encode(x)[0]
    error = (model.decode(z).mean - x).square().sum((1, 2, 3))
    constant = 3 * 16 * 16 * 0.5 * math.log(2 * math.pi * 0.5)
    assert torch.allclose(-parts.log_likelihood, error + constant, rtol=1e-5)
    assert torch.allclose(parts.kl[0], 0.7 * 0.5 * z.square().sum(1))


def test_an_autoencoder_draws_its_code_and_has_no_density():
    model, x = small(RAE, code_penalty=0.1).eval(), torch.rand(5, 3, 16, 16)
    code = model.posterior(0, model.start(5), model.encode(x))
    assert not model.stochastic
    assert torch.equal(code.draw(NOISE[0]), code.mean)
    assert code.draw(NOISE[0], (4,)).shape == (4, 5, 3)
    assert not code.variance.any()
    with pytest.raises(UserError, match="deterministic encoder has no density"):
        code.log_prob(code.mean)


def test_regularisers_are_their_formulas():
    x = torch.rand(4, 3, 16, 16)
    assert small(RAE, code_penalty=0.1).penalties(x) == {}
    model = small(RAE, code_penalty=0.1, regulariser="l2", weight=0.3)
    kernels = [layer.weight for layer in model.decoder.layers if isinstance(layer, nn.Linear | nn.ConvTranspose2d)]
    assert len(kernels) == 3
    assert model.penalties(x)["l2"].item() == pytest.approx(0.3 * sum(kernel.square().sum().item() for kernel in kernels))
    model = small(RAE, code_penalty=0.1, regulariser="gradient-penalty", weight=0.3).eval().double()
    z, step = model.encode(x.double())[0], 1e-5

    def energy(code):
        with torch.no_grad():
            return model.decoder.layers(code).sigmoid().square().sum((1, 2, 3))

    slopes = [(energy(z + step * unit) - energy(z - step * unit)) / (2 * step) for unit in torch.eye(3).double()]
    expected = 0.3 * torch.stack(slopes).square().mean().item()
    found = model.penalties(x.double())["gradient-penalty"]
    assert found.item() == pytest.approx(expected, rel=5e-3)  # in single precision from the sigmoid on
    found.backward()
    assert model.decoder.layers[0].weight.grad.abs().sum() > 0


def test_spectral_norms_of_both_networks_come_to_one():
    model, x = small(RAE, code_penalty=0.1, regulariser="spectral-norm"), torch.rand(4, 3, 16, 16)
    for _ in range(30):  # a power iteration each
        evidence(model, x, NOISE)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) == 4
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_spectral_norms_are_one_of_averaged_weights_too(tmp_path):
    model = small(RAE, code_penalty=0.1, regulariser="spectral-norm").double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainee = Trainee("vae", model, optimizer, lambda _: 0.05, tmp_path / "vae.safetensors", Identity("toy", 0), ema=0.99)
    trainee.settle, draws = model.settle, torch.Generator().manual_seed(0)

    def losses(step, active):
        x = torch.rand(4, 3, 16, 16, generator=draws, dtype=torch.float64)
        for parameter in model.parameters():  # so that singular vectors turn
            noise = torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
            parameter.data += 0.2 * parameter.detach().abs().mean() * noise
        return [{"square": model.decode(model.encode(x)[0]).mean.sub(x).square().sum()}]

    training.train([trainee], 40, losses)
    averaged = [value for name, value in trainee.average.module.named_buffers() if name.endswith((".0._u", ".0._v"))]
    assert min(value.norm().item() for value in averaged) < 0.99  # which is what is to be mended
    trainee.finish()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    assert len(layers) == 6
    for layer in layers:
        unit = layer.parametrizations.weight[0]
        assert unit._u.norm().item() == pytest.approx(1) == unit._v.norm().item()
        axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
        matrix = layer.weight.detach().movedim(axis, 0).flatten(1)
        assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kind", [ConvVAE, RAE])
@pytest.mark.parametrize(
    ("shape", "widths", "message"),
    [
        ((1, 28, 28), [4, 6, 8], "images of side 28 are not 8, 16, 32"),
        ((3, 64, 64), [4, 6, 8], "need 4 of them at least, and there are 3"),
        ((1, 8, 8), [4] * 5, "halve a side of 8 to nothing"),
        ((1, 8, 16), [4, 6], "needs square images"),
        ((2,), [4, 6], "needs square images"),
    ],
)
def test_what_cannot_be_built_is_one_line(kind, shape, widths, message):
    more = {"code_penalty": 0.1} if kind is RAE else {}
    with pytest.raises(UserError, match=message):
        kind(kind.Options(latents=2, widths=widths, **more), shape)
