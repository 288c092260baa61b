"""The image sets and their sizes, which shapes and schedules depend on before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageSet:
    """Sizes that shapes and schedules depend on, known without loading.

    Args:
        side: pixels. white: largest value. mean, std: of the training pixels after division by `white`.
        train, valid, test: images of each of the ten classes; `valid` is the end of the training images and counted in
            `train` as well.
    """

    side: int
    white: float
    mean: float
    std: float
    train: tuple[int, ...]
    valid: tuple[int, ...]
    test: tuple[int, ...]

    def train_counts(self, evaluate_on: str) -> list[int]:
        if evaluate_on == "test":
            return list(self.train)
        return [all_of - held for all_of, held in zip(self.train, self.valid, strict=True)]

    def held_out_counts(self, evaluate_on: str) -> list[int]:
        return list(self.test if evaluate_on == "test" else self.valid)

    def train_size(self, evaluate_on: str) -> int:
        return sum(self.train_counts(evaluate_on))

    def task_sizes(self, evaluate_on: str, tasks: int) -> list[int]:
        """Training images of each task, the classes being split in label order."""
        return _grouped(self.train_counts(evaluate_on), tasks)

    def held_out_task_sizes(self, evaluate_on: str, tasks: int) -> list[int]:
        return _grouped(self.held_out_counts(evaluate_on), tasks)


def _grouped(counts: list[int], tasks: int) -> list[int]:
    width = len(counts) // tasks
    return [sum(counts[task * width : (task + 1) * width]) for task in range(tasks)]


IMAGE_SETS = {
    # scikit-learn's digits in the published order: 1,437 to train (239 of them to validate), the last 360 to test
    "digits": ImageSet(
        side=8,
        white=16.0,
        mean=0.3054,
        std=0.3755,
        train=(143, 146, 142, 146, 144, 145, 144, 143, 141, 143),
        valid=(24, 26, 25, 25, 25, 22, 24, 25, 22, 21),
        test=(35, 36, 35, 37, 37, 37, 37, 36, 33, 37),
    ),
    # mean and std as the notebook (and PyTorch's MNIST example) has them
    "mnist": ImageSet(
        side=28,
        white=255.0,
        mean=0.1307,
        std=0.3081,
        train=(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
        valid=(991, 1064, 990, 1030, 983, 915, 967, 1090, 1009, 961),
        test=(980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
    ),
}
