"""scikit-learn's bundled handwritten digits: 1,797 images of 8x8, ten classes (UCI Optdigits test set, CC BY 4.0)."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits as _load_digits


def load_digits() -> dict[str, np.ndarray]:
    """Images uint8 [1797, 8, 8] with values 0..16, labels uint8 [1797], in the published order."""
    bundle = _load_digits()
    return {"images": bundle.images.astype(np.uint8), "labels": bundle.target.astype(np.uint8)}
