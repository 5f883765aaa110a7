"""Images made worse, in the order in which an eye minds it."""

import io

import numpy as np
import torch
from PIL import Image
from torch.nn import functional


def compressed(image):
    """A colour image, uint8 (3, h, w), as JPEG of low quality leaves it."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=15)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def worsened(images, seed):
    """Images, uint8 (n, 3, h, w), as they are and ever worse, by what was done to them: floats, about in [0, 1]."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return {
        "real": images / 255,
        "compressed": torch.stack([compressed(image) for image in images]) / 255,
        "blurred": functional.avg_pool2d(images / 255, 5, stride=1, padding=2, count_include_pad=False),
        "noised": images / 255 + 0.3 * noise,
    }
