"""scikit-learn's bundled handwritten digits: 1,797 images of 8x8, ten classes (UCI Optdigits test set, CC BY 4.0)."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np

from trainables.datasets.cache import cached


def load_digits(cache_dir: Path | None = None) -> dict[str, np.ndarray]:
    """Images uint8 [1797, 8, 8] with values 0..16, labels uint8 [1797], in the published order.

    cache_dir: the node's cache folder; scikit-learn takes a second to import, a copy there none. None reads its own.
    """
    if cache_dir is None:
        return _bundled()
    name = f"digits-sklearn{importlib.metadata.version('scikit-learn')}"
    return {key: np.array(array) for key, array in cached(cache_dir, name, [], _bundled).items()}  # 115 kB


def _bundled() -> dict[str, np.ndarray]:
    from sklearn import datasets

    bundle = datasets.load_digits()
    return {"images": bundle.images.astype(np.uint8), "labels": bundle.target.astype(np.uint8)}
