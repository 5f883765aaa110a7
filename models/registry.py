"""Every model that params.yaml can name. A model is a HierarchicalVAE with an ``Options`` record: model(options, shape)."""

from typing import Any

from models.mlp import MLPVAE
from models.nvae import NVAE
from models.protocol import HierarchicalVAE
from models.residual import ResidualHVAE

MODELS: dict[str, Any] = {
    "mlp-vae": MLPVAE,
    "nvae": NVAE,
    "residual-hvae": ResidualHVAE,
}


def build(name: str, options: Any, data_shape: tuple[int, ...]) -> HierarchicalVAE:
    """An untrained model for data of shape ``data_shape`` (without the batch)."""
    return MODELS[name](options, data_shape)
