"""Images filed by class as they are read, the first of each class kept: [classes, images, side, side, channels]."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainables.family import BadValue


class ByClass:
    """Room for the first `kept` images of each class in file order.

    Args:
        classes, kept: how many.
        shape: of one image, [side, side, channels].
        dtype: of the images.
    """

    def __init__(self, classes: int, kept: int, shape: tuple[int, ...], dtype: type | np.dtype = np.uint8):
        self.images = np.zeros((classes, kept, *shape), dtype=dtype)
        self.found = np.zeros(classes, dtype=np.int64)

    def places(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For a block of zero-based labels: which of its images still have a place, and each one's place in its class.

        The places count as taken from then on.
        """
        kept = self.images.shape[1]
        order = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[order], np.arange(len(self.found)))
        rank = np.empty(len(labels), dtype=np.int64)
        rank[order] = np.arange(len(labels)) - starts[labels[order]]
        place = self.found[labels] + rank
        self.found = self.found + np.bincount(labels, minlength=len(self.found))
        wanted = np.flatnonzero(place < kept)
        return wanted, place[wanted]

    def add(self, images: np.ndarray, labels: np.ndarray) -> None:
        wanted, place = self.places(labels)
        self.images[labels[wanted], place] = images[wanted]

    def full(self, what: str, path: Path) -> np.ndarray:
        """The images, or `BadValue` where a class has too few; `path` is where they should have been."""
        kept = self.images.shape[1]
        if self.found.min() < kept:
            label = int(self.found.argmin())
            raise BadValue(
                f"{what}: {path} ends with {int(self.found[label])} images of class {label}, {kept} are needed: "
                "a file is incomplete, download it again"
            )
        return self.images


def first_of_each(images: np.ndarray, labels: np.ndarray, classes: int, kept: int) -> np.ndarray:
    """The first `kept` images of each zero-based class in file order, [classes, kept, ...]."""
    return np.stack([images[np.flatnonzero(labels == label)[:kept]] for label in range(classes)])
