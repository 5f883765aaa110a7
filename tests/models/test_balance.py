"""The balancing of KL terms against NVAE's formula, written out."""

import pytest
import torch

from models.protocol import Group
from models.trainer import balance

LAYOUTS = {
    "one group": [(4,)],
    "flat groups": [(4,), (7,), (2,)],
    "one scale": [(3, 4, 4)] * 3,
    "two scales": [(3, 4, 4)] * 2 + [(3, 8, 8)] * 3,
    "two scales, other channels": [(20, 4, 4)] * 5 + [(2, 8, 8)],
    "three scales": [(3, 2, 2)] + [(3, 4, 4)] * 2 + [(3, 8, 8)] * 4,
    "maps that are not square": [(3, 2, 4)] * 2 + [(3, 4, 8)] * 3,
}


def layout(name):
    return [Group(k, shape, (1,)) for k, shape in enumerate(LAYOUTS[name])]


def written_out(divergences, groups):
    """γ_k ∝ (E |KL_k| + 0.01) Σ_j (E |KL_j| + 0.01) / α_k of mean 1; α_k is the maps' size over the groups of the scale."""
    sizes = []
    for group in groups:
        size = 1
        for side in group.latent[1:]:
            size *= side
        sizes.append(size)
    alphas = [size / sum(other == size for other in sizes) for size in sizes]
    smallest = min(alphas)
    kls = [sum(abs(kl) for kl in divergence.tolist()) / len(divergence) + 0.01 for divergence in divergences]
    gammas = [kl * sum(kls) / (alpha / smallest) for kl, alpha in zip(kls, alphas, strict=True)]
    return [gamma * len(gammas) / sum(gammas) for gamma in gammas]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_the_weights_are_nvaes(name, scale):
    groups = layout(name)
    noise = torch.Generator().manual_seed(0)
    divergences = [scale * (k + 1) * torch.randn(6, generator=noise) for k in range(len(groups))]  # of either sign
    found = balance(divergences, groups)
    assert found.tolist() == pytest.approx(written_out(divergences, groups), rel=1e-5)
    assert found.mean().item() == pytest.approx(1, rel=1e-5)


def test_two_scales_by_hand():
    """α = 16/2 and 64/1, so 1 and 8; equal KLs leave 1 : 1 : 1/8, of mean 17/24."""
    groups = [Group(0, (3, 4, 4), (1,)), Group(1, (3, 4, 4), (1,)), Group(2, (3, 8, 8), (1,))]
    found = balance([torch.full((5,), 2.0)] * 3, groups)
    assert found.tolist() == pytest.approx([24 / 17, 24 / 17, 3 / 17], rel=1e-6)


def test_a_group_without_kl_keeps_a_weight():
    found = balance([torch.zeros(4), torch.full((4,), 0.99)], layout("one scale")[:2])
    assert found.tolist() == pytest.approx([0.01 / 1.01 * 2, 1 / 1.01 * 2], rel=1e-5)


def test_no_gradient_flows_through_the_weights():
    divergences = [torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)]
    assert not balance(divergences, layout("one scale")[:2]).requires_grad
