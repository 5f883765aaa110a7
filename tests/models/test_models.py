import math

import pytest
import torch
from pydantic import ValidationError

from models.distributions import DiagonalNormal, kl_divergence
from models.mlp import MLPVAE
from models.protocol import descend, posterior_pass
from models.registry import MODELS, build
from models.residual import ResidualHVAE
from models.spectral import SpectralNorms, batch_norm_scales
from models.trainer import TrainOptions, balance, evidence
from runtime import checkpoints
from runtime.randomness import Noise, initialising

SMALL = {
    "conv-vae": [
        ({"latents": 3, "widths": [4, 6], "std": 0.3}, (1, 8, 8)),
        ({"latents": 3, "widths": [4, 6, 8], "kernel": 4, "std": 0.3, "learned_std": True}, (3, 32, 32)),
    ],
    "mlp-vae": [({"latents": 3, "width": 16}, (2,)), ({"latents": 3, "width": 16, "likelihood": "bernoulli"}, (1, 8, 8))],
    "nvae": [
        ({"groups_per_scale": [2, 1], "latent_channels": 2, "width": 4, "halvings": 1, "outer_cells": 1}, (1, 8, 8)),
        ({"groups_per_scale": [2], "latent_channels": 1, "width": 8, "patch": 4, "halvings": 1, "cells": 1}, (1, 28, 28)),
        (
            {
                "groups_per_scale": [1, 1, 1],
                "latent_channels": 2,
                "width": 4,
                "halvings": 1,
                "cells": 1,
                "base_prior": "fixed",
                "likelihood": "logistic-mixture",
            },
            (3, 16, 16),
        ),
        (
            {"groups_per_scale": [1, 1], "latent_channels": 2, "width": 8, "halvings": 1, "likelihood": "pixel-normal"}
            | {"flows": 1, "cells": 1, "outer_cells": 1, "decoder_width": 4, "decoder_cells": 2, "decoder_outer_cells": 2},
            (3, 8, 8),
        ),
        (
            {"groups_per_scale": [1], "latent_channels": 2, "width": 4, "halvings": 1, "squeeze_excitation": False},
            (1, 8, 8),
        ),
    ],
    "rae": [
        ({"latents": 3, "widths": [4, 6], "code_penalty": 0.1}, (1, 8, 8)),
        ({"latents": 3, "widths": [4, 6, 8], "kernel": 4, "code_penalty": 0.1, "regulariser": "spectral-norm"}, (3, 16, 16)),
    ],
    "residual-hvae": [
        ({"groups_per_scale": [2, 2], "latent_channels": 2, "width": 8, "halvings": 1}, (1, 8, 8)),
        ({"groups_per_scale": [3], "latent_channels": 1, "width": 8, "halvings": 3, "cells": 2}, (1, 28, 28)),
        (
            {"groups_per_scale": [1, 1, 1], "latent_channels": 2, "width": 8, "halvings": 2, "likelihood": "normal"},
            (3, 28, 28),
        ),
    ],
}
CASES = [(name, options, shape) for name in MODELS for options, shape in SMALL[name]]


def make(name, options, shape):
    with initialising(0, "test"):
        return build(name, MODELS[name].Options(**options), shape)


def noise(model, seed=0, rows=None):
    return [Noise(seed, "test", k, rows=rows) for k in range(model.groups)]


@pytest.mark.parametrize(("name", "options", "shape"), CASES)
def test_every_model_keeps_the_protocol(name, options, shape, tmp_path):
    model = make(name, options, shape).eval()
    x = torch.rand(5, *shape).round()
    layout = model.layout()
    assert [group.k for group in layout] == list(range(model.groups))
    features = model.encode(x)
    assert len(features) == model.groups
    seen = []

    def choose(k, context):
        prior, posterior = model.prior(k, context), model.posterior(k, context, features)
        assert context.shape == (5, *layout[k].context)
        z = posterior.draw(Noise(0, "z", k))
        assert z.shape == prior.mean.shape == (5, *layout[k].latent)
        assert prior.log_prob(z).shape == model.divergence(k, context, posterior, z).shape == (5,)
        assert prior.draw(Noise(0, "p", k), (7,)).shape == (7, 5, *layout[k].latent)
        seen.append(k)
        return z

    decoded = model.decode(descend(model, 5, choose))
    assert seen == list(range(model.groups))
    assert decoded.mean.shape == decoded.draw(Noise(0, "x")).shape == x.shape
    assert decoded.log_prob(x).shape == (5,)
    contexts = [model.start(2) for _ in range(2)]
    assert torch.equal(contexts[0][0], contexts[1][1])  # the first group's context is the same for every example


@pytest.mark.parametrize(("name", "options", "shape"), CASES)
def test_gradients_reach_every_parameter_and_seeds_and_files_repeat(name, options, shape, tmp_path):
    model, twin = make(name, options, shape), make(name, options, shape)
    x = torch.rand(4, *shape).round()
    loss = -evidence(model, x, noise(model)).elbo.mean()
    loss.backward()
    reached = {
        name: parameter.grad is not None and bool(parameter.grad.any())
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    missing = [name for name, found in reached.items() if not found and ".gate." not in name]  # four units may all be off
    assert missing == []
    assert torch.equal(loss, -evidence(twin, x, noise(twin)).elbo.mean())
    model.eval()
    loss = -evidence(model, x, noise(model)).elbo.mean()
    from runtime.identity import Identity

    checkpoints.save(tmp_path / "m.safetensors", model.state_dict(), Identity("x", 0))
    with initialising(1, "other"):
        other = build(name, MODELS[name].Options(**options), shape)
    checkpoints.restore(other, checkpoints.load(tmp_path / "m.safetensors", "")[0], tmp_path)
    assert torch.equal(loss, -evidence(other.eval(), x, noise(other)).elbo.mean())


@pytest.mark.parametrize(("name", "options", "shape"), CASES)
def test_rows_do_not_depend_on_the_batch_they_travel_in(name, options, shape):
    model = make(name, options, shape).double().eval()
    x = torch.rand(6, *shape).round().double()
    with torch.no_grad():
        whole, part = (
            posterior_pass(model, x[list(rows)], lambda k, rows=rows: Noise(0, "t", k, rows=rows))
            for rows in (range(6), range(2, 4))
        )
    assert torch.allclose(whole[2:4], part, atol=1e-10)


def test_the_analytic_kl_is_the_mean_log_ratio():
    q = DiagonalNormal(torch.full((1, 2), 0.3).double(), torch.full((1, 2), 0.5).double())
    p = DiagonalNormal(torch.zeros(1, 2).double(), torch.ones(1, 2).double())
    z = q.draw(Noise(0, "kl"), (200_000,))
    assert kl_divergence(q, p).item() == pytest.approx((q.log_prob(z) - p.log_prob(z)).mean().item(), abs=5e-3)
    one = -math.log(0.5) + (0.5**2 + 0.3**2 - 1) / 2
    assert kl_divergence(q, p).item() == pytest.approx(2 * one, abs=1e-7)


RESIDUAL = ("residual-hvae", *SMALL["residual-hvae"][0])


def test_the_residual_model_starts_at_its_prior_and_pads_what_does_not_divide():
    model = make(*RESIDUAL)
    parts = evidence(model, torch.rand(4, 1, 8, 8).round(), noise(model))
    assert all(kl.mean() < 1 for kl in parts.kl)
    assert (
        ResidualHVAE(
            ResidualHVAE.Options(groups_per_scale=[2, 1], latent_channels=1, width=4, halvings=3), (1, 28, 28)
        ).padded
        == 32
    )


def test_the_flat_model_has_one_group_and_no_context():
    (group,) = MLPVAE(MLPVAE.Options(latents=2), (2,)).layout()
    assert (group.k, group.latent, group.context) == (0, (2,), (0,))


def test_balancing_favours_groups_with_a_large_kl_and_has_mean_one():
    model = make(*RESIDUAL)
    gamma = balance([torch.full((3,), value) for value in (4.0, 1.0, 1.0, 0.0)], model.layout())
    assert gamma.mean().item() == pytest.approx(1)
    assert gamma[0] > gamma[1] > gamma[2] > gamma[3]


def test_every_cycle_of_stage_1_warms_up_to_its_own_rate_and_falls_to_a_hundredth_of_it():
    options = TrainOptions(steps=140, batch=1, learning_rate=1.0, warmup=10, restarts={90: 0.5})
    rates = [options.rate(step) for step in range(140)]
    assert rates[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
    assert rates[90:101] == pytest.approx([0.5 * rate for rate in rates[:11]])
    assert rates[89] == pytest.approx(0.01, abs=1e-3)
    assert rates[139] == pytest.approx(0.005, abs=1e-3)
    for wrong in ({140: 0.5}, {90: 0.5, 50: 0.5}):
        with pytest.raises(ValidationError, match="in the order of their steps"):
            TrainOptions(steps=140, batch=1, learning_rate=1.0, restarts=wrong)


@pytest.mark.parametrize(
    ("name", "options", "shape"), [case for case in CASES if case[0] in ("nvae", "residual-hvae") and "flows" not in case[1]]
)
def test_a_posterior_that_adds_nothing_is_the_prior_however_far_out_that_is(name, options, shape):
    """In the residual parameterisation the sum is clamped, once: a mean must not shrink on its way to the posterior."""
    model = make(name, options, shape).eval()
    with torch.no_grad():
        for heads, value in ((model.prior_heads, 3.0), (model.posterior_heads, 0.0)):
            for parameter in (tensor for key, tensor in heads.named_parameters() if key.endswith(("weight", "log_norm"))):
                parameter.fill_(
                    -60.0 if parameter.dim() == 1 else 1e-9
                )  # a learned norm of exp(-60), or a filter of nothing
            for bias in (tensor for key, tensor in heads.named_parameters() if key.endswith("bias")):
                bias.fill_(value)
        kl = evidence(model, torch.rand(4, *shape).round(), noise(model)).kl
    assert torch.stack(kl).abs().max() < 1e-4


def test_spectral_start_without_spectral_is_refused():
    common = {"steps": 1, "batch": 1, "learning_rate": 0.1}
    with pytest.raises(ValidationError, match="spectral_start does nothing without spectral"):
        TrainOptions(**common, spectral_start=1.0)
    assert TrainOptions(**common, spectral=0.1, spectral_start=1.0).spectral_start == 1.0


@pytest.mark.parametrize(("name", "options", "shape"), CASES)
def test_a_model_says_whether_it_has_convolutions_to_keep_smooth(name, options, shape):
    model = make(name, options, shape)
    assert model.convolutional == any(isinstance(layer, torch.nn.Conv2d) for layer in model.modules())
    assert torch.isfinite(batch_norm_scales(model))
    if model.convolutional:
        assert SpectralNorms(model)() > 0
