import math

import pytest
import torch

from datasets.dataset import Dataset, ImageOptions
from datasets.registry import DATASETS, DatasetSpec
from models.distributions import DiagonalNormal
from models.mlp import MLPVAE
from models.protocol import Group
from models.residual import ResidualHVAE
from models.trainer import evidence
from priors import gmm, trainer
from priors.evalp import EnergyOptions
from priors.flow import FlowOptions
from priors.ncp import NoiseContrastivePrior
from priors.networks import NetworkOptions
from priors.protocol import FittedPrior, GroupPrior, Pair, Prior, TrainedPrior
from priors.registry import PRIORS, SAMPLERS
from priors.sampling import draw
from priors.trainer import Slot, TrainingBatches, learn, pairs
from runtime import checkpoints, hardware
from runtime.errors import UserError
from runtime.identity import Identity
from runtime.randomness import Noise, generator, initialising

OPTIONS = {
    "normal": {},
    "gmm": {"components": 3, "codes": 100, "batch": 50},
    "ncp": {"steps": 5, "batch": 8, "network": NetworkOptions(width=8, depth=1)},
    "flow": {"steps": 5, "batch": 8, "flow": FlowOptions(transforms=2, width=8, depth=1)},
    "evalp": {
        "steps": 5,
        "batch": 8,
        "energy": EnergyOptions(width=8),
        "flow": FlowOptions(transforms=2, width=8, depth=1),
    },
    "amortised": {},
}
SAMPLER_OPTIONS = {
    "ancestral": {},
    "sir": {"proposals": 6},
    "langevin": {"steps": 3, "step_size": 0.1, "metropolis": True},
    "sir-langevin": {"proposals": 6, "steps": 3, "step_size": 0.1, "metropolis": True},
    "joint-langevin": {"steps": 3, "step_size": 0.1, "metropolis": True},
}
MODELS = {
    "flat": lambda: MLPVAE(MLPVAE.Options(latents=3, width=8, likelihood="bernoulli"), (1, 8, 8)),
    "hierarchical": lambda: ResidualHVAE(
        ResidualHVAE.Options(groups_per_scale=[2, 1], latent_channels=2, width=8, halvings=1), (1, 8, 8)
    ),
}


class Pixels:
    """Random binary images."""

    views = 0

    def train_batch(self, size, seed, step):
        return (torch.rand(size, 1, 8, 8, generator=generator(seed, "pixels", step=step)) < 0.3).float()

    def examples(self, split, rows=slice(None)):
        return self.train_batch(20, 0, len(split))[rows]


def frozen(name):
    with initialising(0, name):
        model = MODELS[name]()
    return model.eval().requires_grad_(False)


def groups_of(method, model, seed=0):
    made = []
    for group in model.layout():
        with initialising(seed, method, group.k):
            made.append(PRIORS[method](PRIORS[method].Options(**OPTIONS[method]), group))
    return made


def learned(method, model, folder, chosen=None):
    groups = groups_of(method, model)
    below = Prior(model, [GroupPrior(GroupPrior.Options(), group) for group in model.layout()])
    slots = [
        Slot(k, groups[k], folder / f"k{k:02d}.safetensors", Identity("x", 0, {"k": k}))
        for k in chosen or range(model.groups)
    ]
    learn(below, slots, Pixels(), lambda *_: None)
    return Prior(model, groups, learned("evalp", model, folder / "below", chosen) if groups[0].on_proposal else None)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", PRIORS)
def test_every_prior_keeps_the_protocol(method, model, tmp_path):
    vae = frozen(model)
    prior, again = learned(method, vae, tmp_path / "a"), learned(method, vae, tmp_path / "b")
    below = Prior(vae, [GroupPrior(GroupPrior.Options(), group) for group in vae.layout()])
    found = pairs(below, Pixels().train_batch(5, 1, 0), 0, "test")
    for k, pair in enumerate(found):
        base = prior.base(k, pair.context)
        z = base.draw(Noise(0, "z", k), (7,))
        assert z.shape == (7, *pair.base.shape)
        assert base.log_prob(z).shape == (7, 5)
        ratio = prior.log_ratio(k, z, pair.context)
        assert ratio.shape == (7, 5)
        assert torch.allclose(prior.log_ratio(k, z[3], pair.context), ratio[3], atol=1e-5)
        assert torch.equal(again.log_ratio(k, z, pair.context), ratio)
        assert (ratio == 0).all() == prior.exact
        tensors, document = checkpoints.load(tmp_path / "a" / f"k{k:02d}.safetensors", "")
        other = groups_of(method, vae, seed=9)[k]
        other.load_state_dict(tensors)
        assert torch.equal(other.eval().log_ratio(z, pair.context), ratio)
        assert torch.equal(other.base(base, pair.context).log_prob(z), base.log_prob(z))
        assert document["seconds"] >= 0


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", [name for name, cls in PRIORS.items() if issubclass(cls, TrainedPrior)])
def test_gradients_reach_every_parameter_of_a_trained_prior(method, model):
    vae = frozen(model)
    below = Prior(vae, [GroupPrior(GroupPrior.Options(), group) for group in vae.layout()])
    for group, pair in zip(groups_of(method, vae), pairs(below, Pixels().train_batch(8, 1, 0), 0, "test"), strict=True):
        torch.stack(list(group.loss(pair, 4).values())).sum().backward()
        missing = [n for n, p in group.named_parameters() if p.grad is None or not p.grad.any()]
        assert missing == []


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("method", PRIORS)
@pytest.mark.parametrize("model", MODELS)
def test_every_sampler_draws_from_every_prior_on_every_model(method, sampler, model, tmp_path):
    vae = frozen(model)
    prior, by = learned(method, vae, tmp_path), SAMPLERS[sampler](SAMPLERS[sampler].Options(**SAMPLER_OPTIONS[sampler]))
    if by.refuses(prior.exact, prior.smooth):
        assert not prior.exact or not prior.smooth
        return
    whole, part = draw(vae, prior, by, range(6), 0, "mean"), draw(vae, prior, by, range(2, 4), 0, "mean")
    assert whole["x"].shape == (6, 1, 8, 8)
    for name, values in whole.items():
        assert torch.allclose(values[2:4], part[name], atol=1e-4), name
        assert torch.isfinite(values).all()
    for k in range(vae.groups):
        assert ((whole[f"ess/k{k:02d}"] > 0) & (whole[f"ess/k{k:02d}"] <= 1 + 1e-6)).all()


def test_a_group_learns_the_same_alone_as_with_the_others(tmp_path):
    vae = frozen("hierarchical")
    together = learned("ncp", vae, tmp_path / "together")
    alone = learned("ncp", vae, tmp_path / "alone", [1])
    for name, tensor in together.groups[1].state_dict().items():
        assert torch.equal(tensor, alone.groups[1].state_dict()[name]), name


@pytest.mark.parametrize("method", ["ncp", "flow", "evalp"])
def test_weights_decay_apart_from_the_gradients_step(method, tmp_path, monkeypatch):
    """AdamW (Loshchilov and Hutter, 2019), equation 12: w ← w − η (Adam's step) − η λ w."""
    vae, rate, decay, found = frozen("flat"), 0.01, 0.5, {}
    for name, more in (("start", {"learning_rate": 1e-12}), ("plain", {}), ("decayed", {"weight_decay": decay})):
        monkeypatch.setitem(OPTIONS, method, OPTIONS[method] | {"steps": 1, "learning_rate": rate} | more)
        found[name] = dict(learned(method, vae, tmp_path / name).groups[0].named_parameters())
    for name, start in found["start"].items():
        plain, decayed = found["plain"][name], found["decayed"][name]
        learns = not torch.allclose(plain, start)  # EvaLP's sampler has its first step later
        assert torch.allclose(plain - decayed, rate * decay * start * learns, atol=1e-6), name
        assert learns or method == "evalp"


def test_the_nce_optimum_of_two_normals_is_their_log_density_ratio():
    """A classifier that contains the true ratio, which is quadratic in z, finds it."""
    p = DiagonalNormal(torch.zeros(1, 1).double(), torch.ones(1, 1).double())
    q = DiagonalNormal(torch.ones(1, 1).double(), torch.full((1, 1), 0.5).double())
    prior = NoiseContrastivePrior(NoiseContrastivePrior.Options(steps=1, batch=2), Group(0, (1,), (0,))).double()

    class Quadratic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.Parameter(torch.zeros(3).double())

        def prepare(self, context):
            return context

        def forward(self, z, prepared):
            return (torch.stack([torch.ones_like(z), z, z**2], -1) @ self.weights)[..., 0]

    prior.classifier = Quadratic()
    draws = [one.draw(Noise(0, name), (200_000,))[:, 0] for name, one in (("q", q), ("p", p))]
    pair = Pair(*draws, torch.zeros(200_000, 0), p, draws[0], draws[0][:, 0])
    optimizer = torch.optim.LBFGS(prior.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = torch.stack(list(prior.loss(pair, 0).values())).sum()
        loss.backward()
        return loss

    assert closure().item() == pytest.approx(2 * math.log(2))
    optimizer.step(closure)
    # log q − log p = −(z−1)²/0.5 + z²/2 + ln 2 = (ln 2 − 2) + 4 z − 1.5 z²
    expected = torch.tensor([math.log(2) - 2, 4.0, -1.5]).double()
    assert torch.allclose(prior.classifier.weights, expected, atol=0.05)
    z = torch.linspace(-1, 2.5, 50).double()[:, None, None]
    ratio = prior.log_ratio(z, torch.zeros(1, 0))
    assert torch.allclose(ratio, q.log_prob(z) - p.log_prob(z), atol=0.08)


def test_the_mixture_finds_the_clusters_it_is_fitted_to():
    prior = PRIORS["gmm"](PRIORS["gmm"].Options(components=2), Group(0, (2,), (0,)))
    stream = torch.Generator().manual_seed(0)
    centres = torch.tensor([[-3.0, 0.0], [3.0, 1.0]])
    codes = centres[torch.arange(2000) % 2] + 0.2 * torch.randn(2000, 2, generator=stream)
    prior.fit(codes, 0)
    assert torch.allclose(prior.means[prior.means[:, 0].argsort()], centres, atol=0.05)
    context = torch.zeros(3, 0)
    assert prior.base(None, context).draw(Noise(0, "z"), (10,)).shape == (10, 3, 2)
    later = PRIORS["gmm"](PRIORS["gmm"].Options(), Group(1, (2,), (4,)))
    below = object()
    assert later.base(below, context) is below
    assert isinstance(prior, FittedPrior)


@pytest.mark.parametrize("k", [0, 1])
def test_a_mixture_can_be_fitted_to_posterior_means_and_by_default_to_samples(k):
    vae, options = frozen("hierarchical"), gmm.GaussianMixturePrior.Options
    below = Prior(vae, [GroupPrior(GroupPrior.Options(), group) for group in vae.layout()])
    samples, again, means = (
        trainer._codes(below, k, options(components=2, codes=8, batch=8, codes_of=kind), Pixels(), 0)
        for kind in ("sample", "sample", "mean")
    )
    x = Pixels().train_batch(8, 0, 0)
    assert torch.equal(samples, pairs(below, x, 0, "codes", 0)[k].posterior)
    assert torch.equal(samples, again)
    assert means.shape == samples.shape
    assert not torch.allclose(means, samples, atol=0.01)
    if k == 0:
        assert torch.equal(means, vae.posterior(0, vae.start(8), vae.encode(x)).mean)
    assert "codes_of" not in options().model_dump()  # what was fitted before there was a choice is as it was
    assert options(codes_of="mean").model_dump()["codes_of"] == "mean"


@pytest.mark.parametrize(("latent", "components", "codes"), [((1280,), 10, 12810), ((20, 16, 16), 1, 5121), ((3,), 2, 8)])
def test_a_covariance_of_more_latents_than_codes_is_refused(latent, components, codes):
    options = PRIORS["gmm"].Options
    with torch.device("meta"):
        PRIORS["gmm"](options(components=components, codes=codes), Group(0, latent, (0,)))
        PRIORS["gmm"](options(components=components, codes=10), Group(1, latent, (0,)))  # keeps the model's prior
        with pytest.raises(UserError, match=rf"need {codes} codes and not {codes - 1}; raise codes"):
            PRIORS["gmm"](options(components=components, codes=codes - 1), Group(0, latent, (0,)))


@pytest.mark.parametrize("lead", [(), (7,)])
def test_a_mixture_draws_the_same_however_many_factors_are_held_at_a_time(monkeypatch, lead):
    stream = torch.Generator().manual_seed(0)
    scales = torch.randn(3, 24, 24, generator=stream).tril()
    mixture = gmm.Mixture(torch.full((3,), 1 / 3), torch.randn(3, 24, generator=stream), scales, 5, (6, 2, 2))
    whole = mixture.draw(Noise(0, "z"), lead)
    assert whole.shape == (*lead, 5, 6, 2, 2)
    monkeypatch.setattr(gmm, "FACTORS_AT_ONCE", 2 * 24 * 24)
    assert torch.allclose(mixture.draw(Noise(0, "z"), lead), whole, rtol=1e-5, atol=1e-6)


def test_context_and_proposals_are_scored_as_if_they_were_concatenated():
    """The part of the first layer that sees the context is computed once; the score is that of every pair."""
    for group in (Group(0, (3,), (2,)), Group(1, (2, 4, 4), (5, 4, 4))):
        prior = NoiseContrastivePrior(NoiseContrastivePrior.Options(steps=1, batch=2), group).eval()
        z, context = torch.randn(4, 3, *group.latent), torch.randn(3, *group.context)
        together = prior.log_ratio(z, context)
        one_by_one = [[prior.log_ratio(z[m, i : i + 1], context[i : i + 1]).item() for i in range(3)] for m in range(4)]
        assert torch.allclose(together, torch.tensor(one_by_one), atol=1e-5)


@pytest.mark.parametrize("shape", [(4,), (4, 2, 2)])
def test_a_classifier_that_standardises_sees_codes_of_any_spread(shape):
    """Two clusters a coordinate against a Normal of the same moments, a twentieth of unit spread: chance is 1.386."""
    group, spread = Group(0, shape, (0,) if len(shape) == 1 else (1, 2, 2)), 0.05
    context, below = torch.zeros(256, *group.context), torch.zeros(256, *shape)

    def loss_after(steps, standardise):
        with initialising(0, "classifier"):
            network = NetworkOptions(width=16, depth=1, standardise=standardise)
            prior = NoiseContrastivePrior(NoiseContrastivePrior.Options(steps=1, batch=2, network=network), group)
        optimizer, stream = torch.optim.Adam(prior.parameters(), lr=4e-3), torch.Generator().manual_seed(0)
        for step in range(steps):
            normal = torch.randn(2, 256, *shape, generator=stream)
            pair = Pair(spread * (normal[0].sign() + 0.1 * normal[0]), spread * normal[1], context, None, below, below)
            loss = sum(prior.loss(pair, step).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        z = torch.cat([pair.posterior, pair.base])
        prior.eval()
        alone = torch.stack([prior.log_ratio(z[i : i + 1], context[:1])[0] for i in range(0, 512, 100)])
        assert torch.allclose(alone, prior.log_ratio(z, context.repeat(2, *(1 for _ in shape)))[::100], atol=1e-4)
        return loss.item()

    assert loss_after(300, True) < 0.6
    if len(shape) == 1:  # a map's first block has a batch norm of its own
        assert loss_after(300, False) > 1.2
    assert "standardise" not in NetworkOptions().model_dump()  # what was trained before there was a choice is as it was


def test_classifiers_learn_in_bf16_about_what_they_learn_in_fp32(tmp_path, monkeypatch):
    vae = frozen("hierarchical")
    exact = learned("ncp", vae, tmp_path / "fp32")
    monkeypatch.setattr(hardware, "gains_from_bf16", lambda kind: True)
    monkeypatch.setitem(OPTIONS, "ncp", OPTIONS["ncp"] | {"precision": "auto"})
    quick = learned("ncp", vae, tmp_path / "bf16")
    losses = []
    for k, (one, other) in enumerate(zip(exact.groups, quick.groups, strict=True)):
        assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in other.state_dict().values())
        assert any(not torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
        stored = (checkpoints.load(tmp_path / kind / f"k{k:02d}.safetensors", "")[1] for kind in ("fp32", "bf16"))
        losses.append([document["held_out"][-1][1] for document in stored])
    assert torch.tensor(losses)[:, 0] == pytest.approx(torch.tensor(losses)[:, 1], abs=0.02)


def test_the_first_groups_map_can_be_scored_as_a_whole():
    torch.manual_seed(0)
    network = NetworkOptions(width=4, depth=1, first=16)
    options = NoiseContrastivePrior.Options(steps=1, batch=2, network=network)
    first, later = (NoiseContrastivePrior(options, Group(k, (2, 4, 4), (3, 4, 4))).eval() for k in (0, 1))
    z, context = torch.randn(6, 4, 2, 4, 4), torch.randn(4, 3, 4, 4)
    assert first.log_ratio(z, context).shape == later.log_ratio(z, context).shape == (6, 4)
    assert torch.equal(first.log_ratio(z, context), first.log_ratio(z, context + 1))
    assert not torch.equal(later.log_ratio(z, context), later.log_ratio(z, context + 1))


@pytest.mark.parametrize("network", [{"halvings": 2}, {"context": False}, {"halvings": 1, "context": False}])
def test_blocks_that_halve_and_blind_classifiers_score_rows_independently(network):
    torch.manual_seed(0)
    options = NoiseContrastivePrior.Options(steps=1, batch=2, network=NetworkOptions(width=8, depth=1, **network))
    prior = NoiseContrastivePrior(options, Group(1, (2, 5, 5), (3, 5, 5))).eval()
    z, context = torch.randn(6, 4, 2, 5, 5), torch.randn(4, 3, 5, 5)
    scores = prior.log_ratio(z, context)
    assert scores.shape == (6, 4)
    assert torch.allclose(scores[2:3, 1:2], prior.log_ratio(z[2:3, 1:2], context[1:2]), atol=1e-5)
    blind = torch.allclose(scores, prior.log_ratio(z, context + 1), atol=1e-6)
    assert blind == (network.get("context") is False)


TRAINED = [name for name, method in PRIORS.items() if issubclass(method, TrainedPrior)]


def assert_finer_than_bf16(terms):
    assert {term.dtype for term in terms.values()} == {torch.float32}
    values = torch.stack(list(terms.values())).detach()
    assert (values != values.bfloat16().float()).any()  # by chance one may lie on the grid, all do not


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("loss", ["loss", "held_out_loss"])
def test_a_prior_takes_its_losses_in_float32_under_autocast(method, model, loss):
    vae = frozen(model)
    below = Prior(vae, [GroupPrior(GroupPrior.Options(), group) for group in vae.layout()])
    x = Pixels().train_batch(19, 1, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for group, pair in zip(groups_of(method, vae), pairs(below, x, 0, "test"), strict=True):
            assert_finer_than_bf16(getattr(group, loss)(pair, 4))


@pytest.mark.parametrize("model", MODELS)
def test_a_model_takes_its_evidence_in_float32_under_autocast(model):
    with initialising(0, model):
        vae = MODELS[model]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = evidence(vae, Pixels().train_batch(19, 1, 0), [Noise(0, "test", k) for k in range(vae.groups)])
    terms = {"reconstruction": parts.log_likelihood.mean()} | {f"kl/{k}": kl.mean() for k, kl in enumerate(parts.kl)}
    assert_finer_than_bf16(terms)


def test_held_out_losses_keep_no_graph(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        NoiseContrastivePrior,
        "held_out_loss",
        lambda self, pair, step: (seen.append(torch.is_grad_enabled()), self.loss(pair, step))[1],
    )
    learned("ncp", frozen("hierarchical"), tmp_path)
    assert seen
    assert not any(seen)


class Shown(Dataset):
    """Ten images of 8 x 8 levels, shown as they are or mirrored."""

    def __init__(self, monkeypatch):
        monkeypatch.setitem(DATASETS, "shown", DatasetSpec((1, 8, 8), "images", "", "", lambda raw: {}))
        levels = torch.randint(256, (14, 1, 8, 8), generator=generator(0, "levels"), dtype=torch.uint8)
        parts = dict(zip(("train", "validation", "test"), levels.split([10, 2, 2]), strict=True))
        super().__init__("shown", parts, "", ImageOptions(flip=True))


def counting(monkeypatch, model):
    """The sizes of the batches that the model encodes."""
    sizes, encode = [], model.encode

    def counted(x):
        sizes.append(len(x))
        return encode(x)

    monkeypatch.setattr(model, "encode", counted)
    return sizes


@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_of_training_images_is_what_the_encoder_makes_of_them(name, monkeypatch):
    model, data = frozen(name), Shown(monkeypatch)
    batches, sizes = TrainingBatches(model, data, 5, 3), counting(monkeypatch, model)
    for step in range(60):
        kept, x = batches.of(step), data.train_batch(5, 3, step)
        before = len(sizes)
        for feature, fresh in zip(kept, model.encode(x), strict=True):
            torch.testing.assert_close(feature, fresh)
        del sizes[before:]
    assert set(sizes) == {5}  # never part of a batch
    assert 4 <= len(sizes) < 40  # twenty views, five at a time
    seen = len(sizes)
    batches.of(60)
    assert len(sizes) == seen


def test_features_too_large_to_keep_are_made_anew(monkeypatch):
    model, data = frozen("hierarchical"), Shown(monkeypatch)
    needed = data.views * sum(feature[0].nbytes for feature in model.encode(data.examples("test")))
    monkeypatch.setattr(TrainingBatches, "KEPT_BYTES", needed - 1)
    batches, sizes = TrainingBatches(model, data, 5, 3), counting(monkeypatch, model)
    batches.of(0)
    assert all(torch.equal(batches.of(step), data.train_batch(5, 3, step)) for step in range(1, 60))
    assert len(sizes) == 1


def test_a_prior_learns_the_same_from_kept_features(monkeypatch, tmp_path):
    model, data = frozen("flat"), Shown(monkeypatch)
    below = Prior(model, [GroupPrior(GroupPrior.Options(), model.layout()[0])])
    trained = []
    for kept in (2**28, 0):
        monkeypatch.setattr(TrainingBatches, "KEPT_BYTES", kept)
        with initialising(0, "ncp"):
            prior = NoiseContrastivePrior(NoiseContrastivePrior.Options(**OPTIONS["ncp"] | {"steps": 60}), model.layout()[0])
        learn(below, [Slot(0, prior, tmp_path / f"{kept}.safetensors", Identity("x", 0))], data)
        trained.append(prior.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name])
