"""Inception-v3 by the names of its published torch files.

    ours                                    published
    Mixed_5b.branch1x1.conv.kernel          Mixed_5b.branch1x1.conv.weight, [o, i, h, w]
    Mixed_5b.branch1x1.bn.scale             Mixed_5b.branch1x1.bn.weight
    Mixed_5b.branch1x1.bn.running_mean      the same
    fc.kernel                               fc.weight, [1008, 2048]

Dropped on purpose: batch normalisation's count of batches. The file is
`pt_inception-2015-12-05-6726825d.pth` of https://github.com/mseitzer/pytorch-fid/releases (95 MB);
it is a torch file, or the same tensors as safetensors.
"""

import os
from collections.abc import Mapping

import numpy as np

from metamorph_jax.convert import hf, names
from metamorph_jax.errors import MissingFile
from metamorph_jax.models.vision.inception import InceptionV3

FILE = "pt_inception-2015-12-05-6726825d.pth"


def load_inception(model: InceptionV3, tensors: Mapping[str, np.ndarray]) -> None:
    """Fills `model` in place from tensors by published name.

    Raises:
        WeightError: listing every key that is missing, left over or of another shape: torchvision's
            ImageNet weights, for one, have 1000 classes, and would give another distance.
    """
    names.load_torch_dict(model, tensors, ignore=lambda key: key.endswith("num_batches_tracked"))


def open_weights(path: str | os.PathLike) -> Mapping[str, np.ndarray]:
    """Published name -> array of a file of these weights, or of a folder with that file alone.

    Raises:
        MissingFile: it is not there; says where to get it.
    """
    if not os.path.exists(path):
        raise MissingFile(
            f"no Inception weights at {path}: fetch {FILE} from "
            "https://github.com/mseitzer/pytorch-fid/releases and name the file"
        )
    return hf.Tensors(path)
