"""Every model that params.yaml can name. A model is a HierarchicalVAE with an ``Options`` record: model(options, shape)."""

from typing import Any

from models.conv_vae import ConvVAE
from models.mlp import MLPVAE
from models.nvae import NVAE
from models.protocol import HierarchicalVAE
from models.rae import RAE
from models.residual import ResidualHVAE

MODELS: dict[str, Any] = {
    "conv-vae": ConvVAE,
    "mlp-vae": MLPVAE,
    "nvae": NVAE,
    "rae": RAE,
    "residual-hvae": ResidualHVAE,
}


def build(name: str, options: Any, data_shape: tuple[int, ...]) -> HierarchicalVAE:
    """An untrained model for data of shape ``data_shape`` (without the batch)."""
    return MODELS[name](options, data_shape)
