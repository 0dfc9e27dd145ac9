"""`Options`: how requests are answered, the same for every model."""

import dataclasses
import hashlib
import math

from metamorph_jax.sampling import best_of
from metamorph_jax.sampling.beam import Beams
from metamorph_jax.sampling.policy import TextPolicy
from metamorph_jax.sampling.requests import Request
from metamorph_jax.sampling.text import Sampler


@dataclasses.dataclass(frozen=True)
class Options:
    """How requests are answered.

    Attributes:
        max_new_tokens: visual tokens count; None: 512, or half of the length if that is less.
        temperature, top_k, top_p: see `text.Sampler`; the default is greedy.
        min_new_tokens, repetition_penalty: see `policy.TextPolicy`.
        seed: of text that is drawn by chance, and of drawings. Each request draws its own, by seed,
            id and sample: it gets the same reply whatever else is in the batch.
        guidance: scales with which each image is drawn; (): the one of the image decoder's config.
        batch_size: requests that are decoded together.
        beams: how many replies are written side by side, of which the likeliest is taken
            (`sampling/beam.py`); 1 writes one. Text only, and greedy.
        length_penalty, early_stopping: see `beam.Beams`.
        best_of: samples of a reply with images, of which the one that the model confirms is kept
            (`sampling/best_of.py`). They are decoded together, and count for `batch_size`.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    guidance: tuple[float, ...] = ()
    batch_size: int = 8
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    best_of: int = 1

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens "
                f"{self.max_new_tokens}"
            )
        if not all(map(math.isfinite, self.guidance)):
            raise ValueError(f"guidance must be finite, not {self.guidance}")
        if len(set(self.guidance)) < len(self.guidance):
            raise ValueError(f"guidance has a scale twice: {self.guidance}")
        self.text(())
        if self.search.count > 1 and self.temperature > 0:
            raise ValueError("beams take the likeliest tokens: with them, temperature must be 0")
        if not 1 <= self.best_of <= best_of.MOST:
            raise ValueError(f"best_of must be 1 to {best_of.MOST}, not {self.best_of}")
        if self.best_of > 1 and self.search.count > 1:
            raise ValueError("beams are for text and best_of is for images: give one of them")

    @property
    def search(self) -> Beams:
        return Beams(self.beams, self.length_penalty, self.early_stopping)

    def text(self, eos: tuple[int, ...]) -> TextPolicy:
        sampler = Sampler(self.temperature, self.top_k, self.top_p)
        return TextPolicy(sampler, eos, self.min_new_tokens, self.repetition_penalty)

    def seed_of(self, request: Request) -> int:
        """In [0, 2^31), of this request."""
        named = f"{self.seed}/{request.sample}/{request.id}".encode()
        return int.from_bytes(hashlib.sha256(named).digest()[:4], "big") >> 1

    def seeds_of(self, request: Request) -> list[int]:
        """Of the `best_of` samples that are made for a request: those that it would have by
        itself as sample n, n + 1, …, where n is `best_of` times its own number."""
        first = self.best_of * request.sample
        samples = range(first, first + self.best_of)
        return [self.seed_of(dataclasses.replace(request, sample=k)) for k in samples]


DEFAULTS = Options()
