"""A model that draws noise whose brightness comes from the id, and stand-ins for networks."""

import numpy as np

from metamorph_jax.eval import bench, tasks
from metamorph_jax.eval.images import features
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.results import ImagePart, Reply, TextPart


class Painter:
    """Attributes:
    asked: the requests, in order.
    """

    def __init__(self, *, fails=(), text: str = "", images: int = 1, modes=()):
        self.fails, self.text, self.images, self.asked = fails, text, images, []
        self.modes = modes

    def replies(self, requests, options, failed, stream=None, draw=True):
        assert draw
        for request in requests:
            self.asked.append(request)
            parts = [TextPart(self.text, (1,))] if self.text else []
            for k in range(self.images):
                seed = options.seed_of(request) + k
                pixels = np.random.default_rng(seed).normal(60 + seed % 120, 20, (32, 32, 3))
                pixels = pixels.clip(0, 255).astype(np.uint8)
                failing = request.id in self.fails
                parts.append(ImagePart(np.zeros((1, 1), np.float32), not failing,
                                       {} if failing else {3.0: pixels}))  # fmt: skip
                parts += [TextPart(f" {self.text} {k}", (1,))] if self.text else []
            yield request, Reply(tuple(parts), True)


def colours(image):
    """The mean colour, and the height: a network that a test can follow."""
    return np.array([*np.asarray(image).mean((0, 1)), image.size[1]], np.float32)


INCEPTION = features.Inception("stand-in", colours, lambda x: x, np.eye(4, dtype=np.float32))


class Clip(features.Extractor):
    """Of an image its mean colour, of a text three numbers from its letters."""

    length = 77

    def __init__(self):
        super().__init__("stand-in", lambda image: colours(image)[:3], lambda x: x)

    @staticmethod
    def texts(texts):
        rows = [[len(text), text.count("a") + 1, text.count("e") + 1] for text in texts]
        return np.array(rows, np.float32), 0


def run(spec, root, folder, painter):
    task = tasks.make(spec, root=str(root))
    result = bench.run_task(task, painter, folder, bench.Settings(Options()))
    assert result.scores.keys() <= task.score_names()
    return result
