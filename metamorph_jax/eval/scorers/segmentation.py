"""Maps of labels, and how well their classes overlap: mIoU.

A label map is uint8[h, w]: 0 is unlabelled, k is class k, as in the annotations of ADE20K.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Pixels of each class, summed over images: int64[classes] each.

    Attributes:
        intersection: that have it in both maps.
        union: that have it in one of them at least.
    """

    intersection: np.ndarray
    union: np.ndarray

    @classmethod
    def of(cls, predicted: np.ndarray, truth: np.ndarray, classes: int) -> "Overlap":
        """The overlap of two maps of the same size.

        Pixels that the truth leaves unlabelled don't count; elsewhere, an unlabelled pixel of the
        prediction is of no class.

        Raises:
            ValueError: their sizes differ, or a label is larger than `classes`.
        """
        if predicted.shape != truth.shape:
            raise ValueError(f"maps of {predicted.shape} and {truth.shape} pixels")
        for what, labels in (("predicted", predicted), ("true", truth)):
            if labels.size and not 0 <= labels.min() <= labels.max() <= classes:
                raise ValueError(f"a {what} label is {labels.max()}, expected 0 to {classes}")
        known = truth > 0
        predicted, truth = predicted[known], truth[known]
        both = _count(truth[predicted == truth], classes)
        return cls(both, _count(predicted, classes) + _count(truth, classes) - both)

    def __add__(self, other: "Overlap") -> "Overlap":
        return Overlap(self.intersection + other.intersection, self.union + other.union)

    def miou(self) -> float:
        """Mean of the classes' intersection over union, in [0, 1]; one that is nowhere counts 0."""
        return float(np.mean(self.intersection / (self.union + 1e-10)))


def _count(labels: np.ndarray, classes: int) -> np.ndarray:
    """int64[classes]: how often each class stands there."""
    return np.bincount(labels.ravel(), minlength=classes + 1)[1:]
