"""`Generator`: from requests to replies, with batching, streaming and drawn images.

What is particular to a system (its policy, its chat markers, how it reads images) comes from its
recipe, which makes the generator; everything that generates talks to this class only: the command
`generate`, the Python API, evaluation.
"""

import collections
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from metamorph_jax import sharding
from metamorph_jax.data.chat import Chat
from metamorph_jax.data.config import MAX_FRAMES, ImageConfig
from metamorph_jax.data.interleave import build_row, read_place
from metamorph_jax.data.sources.base import IMAGE, Turn
from metamorph_jax.data.views import Views
from metamorph_jax.errors import UserError, WeightError
from metamorph_jax.sampling import beam, best_of, likelihood
from metamorph_jax.sampling.beam import Beams
from metamorph_jax.sampling.likelihood import Likelihood
from metamorph_jax.sampling.loop import Loop, RowImages, State, bucket
from metamorph_jax.sampling.policy import Policy, TextPolicy
from metamorph_jax.sampling.requests import FAULTS, Request, as_sample
from metamorph_jax.sampling.results import ImagePart, Reply, TextPart
from metamorph_jax.sampling.segments import BROKEN, Result, Text
from metamorph_jax.sampling.text import Sampler
from metamorph_jax.types import NEWLINE, TEXT


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


@dataclasses.dataclass(frozen=True)
class Prompts:
    """How requests become rows, as in training.

    Attributes:
        chat: template, tokenizer and markers.
        views: how an image becomes views.
        images: limits of images that are read.
        length: most positions of prompt and reply together.
        think: text of a question -> the question that asks for the relevant detail first; None:
            the model was not trained to do so.
        frames: most frames of a video.
        ends: further ids that end a reply, of the model's generation config.
    """

    chat: Chat
    views: Views
    images: ImageConfig
    length: int
    think: Callable[[str], str] | None = None
    frames: int = MAX_FRAMES
    ends: tuple[int, ...] = ()

    @property
    def tokenizer(self):
        return self.chat.tokenizer

    @property
    def eos(self) -> tuple[int, ...]:
        """Ids that end a reply."""
        ends = {self.chat.close, self.tokenizer.eos_token_id, *self.ends}
        ends |= {stop[0] for stop in self.chat.stops if len(stop) == 1}
        return tuple(sorted(ends - {None}))

    def row(
        self,
        request: Request,
        max_new_tokens: int,
        write: Callable[[Sequence[Turn]], np.ndarray] | None = None,
        used: int = 0,
    ):
        """(`interleave.Row`, uint8[views, h, w, 3] or None) of a request.

        Args:
            write: the ids of its turns; None: `Chat.prompt`, a conversation that begins.
            used: positions that the conversation has taken so far.

        Raises:
            ValueError, BadSample: with a message for the user.
        """
        if request.think and self.think is None:
            raise ValueError("this model was not trained to draw a detail before it answers")
        sample = as_sample(request, self.think, self.frames, self.chat.template.lead)
        refs, ids = sample.images, (write or self.chat.prompt)(sample.turns)
        loaded = self.images.load(refs)
        places = [read_place(*self.views.plan(image.size)) for image in loaded]
        sizes = [len(place.slots) for place in places]
        need, room = len(ids) - len(refs) + sum(sizes), self.length - used
        if need > room - max_new_tokens:
            raise ValueError(_too_long(sizes, len(ids) - len(refs), max_new_tokens, room))
        row = build_row(ids, None, places, self.views.tokens, max(need, 1))
        pixels = [self.views.pixels(image) for image in loaded]
        return row, np.concatenate(pixels) if pixels else None

    def compared(self, request: Request, answers: Sequence[str], closing: bool = False):
        """(row, pixels) as `row`, and a `likelihood.Block` for each of the answers.

        Raises:
            ValueError, BadSample: with a message for the user.
        """
        blocks = []

        def write(turns):
            prompt, found = likelihood.split(self.chat, turns, answers, closing)
            blocks.extend(found)
            return prompt

        row, pixels = self.row(request, 1, write)
        self._check_room(row, blocks)
        return row, pixels, blocks

    def about(self, question: str, answers: Sequence[str]):
        """(row, blocks) as `compared`, of a question about an image whose visual tokens are there.

        Args:
            question: the image stands where it has `<image>`, else before it.

        Raises:
            ValueError: it does not fit.
        """
        text = question if IMAGE in question else f"{IMAGE}{self.chat.template.lead}{question}"
        ids, blocks = likelihood.split(self.chat, [("user", text)], answers)
        place = read_place(*self.views.plan(None))
        row = build_row(ids, None, [place], self.views.tokens, len(ids) + len(place))
        self._check_room(row, blocks)
        return row, blocks

    def _check_room(self, row, blocks: Sequence[likelihood.Block]) -> None:
        need = len(row) + max(len(block.ids) for block in blocks)
        if need > self.length:
            raise ValueError(
                f"prompt and answer make {need} positions, but the context has {self.length}"
            )


def _too_long(sizes: list[int], words: int, max_new_tokens: int, length: int) -> str:
    room = max(length - max_new_tokens, 0)
    advice = "shorten the prompt or --max-new-tokens"
    if sizes:
        fit = int((np.cumsum(sizes) + words <= room).sum())
        advice = f"{fit} images fit"
    return (
        f"{len(sizes)} images and {words} text tokens make {sum(sizes) + words} positions, but "
        f"beside {max_new_tokens} new tokens the context of {length} has room for {room}: {advice}"
    )


_BROKEN = "the model's logits are not finite (damaged weights, or numbers too large for its dtype)"


class Prompt(NamedTuple):
    """What a model reads before it answers.

    Attributes:
        embeds: float32[L, D]; ids: int32[L], -1 at visual tokens.
        images: for a model whose layers look at images, else None.
    """

    embeds: np.ndarray
    ids: np.ndarray
    images: RowImages | None = None


@dataclasses.dataclass
class Drawn:
    """What a generator that draws while it writes remembers of a row.

    Attributes:
        seed: of the row's first image.
        maps: of the images that the row has read, oldest first.
        images: uint8[h, w, 3] by guidance, of each image of the reply so far.
    """

    seed: int
    maps: list = dataclasses.field(default_factory=list)
    images: list[dict[float, np.ndarray]] = dataclasses.field(default_factory=list)


class Generator:
    """A model that answers requests.

    Args:
        loop: over its language model.
        policy: makes its policy from the one for text.
        prompts: how its requests are written.
        encoder: a module with `visual_features` (uint8[n, h, w, 3] -> float32[n, P, C]) and
            `project` (-> float[n, P, D]); None if the model can't read images.
        feature_width: C.
        newline: float32[D] embedding that stands at `NEWLINE` slots, where there are any.

    Attributes:
        feature_shape: (P, C) of an image's visual tokens.
        policy: see above.
        image_decoder: draws visual tokens (`load_image_decoder`), or None: nothing is drawn.
        prompts: may be replaced, for another length.
        modes: values of `Request.mode` that can be asked for.
        places: for images that the layers of a row look at, see `Loop.prefill`.
    """

    modes: tuple[str, ...] = ()
    places: int = 0

    def __init__(
        self,
        loop: Loop,
        policy: Callable[[TextPolicy], Policy],
        prompts: Prompts,
        encoder: nnx.Module | None = None,
        feature_width: int = 0,
        newline: np.ndarray | None = None,
    ):
        self._newline = newline
        self.feature_shape = prompts.views.tokens, feature_width
        self.loop, self.prompts, self.image_decoder = loop, prompts, None
        self.policy = policy
        self._see = self._project = self._encoder = None
        if encoder is not None:
            graph, self._encoder = nnx.split(encoder)
            merged = lambda weights: nnx.merge(graph, weights)  # noqa: E731
            whole = lambda x: sharding.constrain(x, None, None, None)  # noqa: E731
            self._see = jax.jit(lambda weights, x: whole(merged(weights).visual_features(x)))
            self._project = jax.jit(lambda weights, x: whole(merged(weights).project(x)))
        held = (loop.weights, self._encoder)
        self._outline = jax.tree.map(lambda x: (x.shape, str(x.dtype)), held)

    def set_steps(self, steps: int) -> None:
        """Has images drawn in so many steps of the diffusion sampler.

        Raises:
            UserError: nothing draws, or the sampler can't make so many.
        """
        if self.image_decoder is None:
            raise UserError("steps of the diffusion sampler need a model that draws: give its "
                            "image decoder, too (--decoder)")  # fmt: skip
        self.image_decoder.set_steps(steps)

    def renew(self, other: "Generator") -> None:
        """Takes the weights of another generator of the same model; what is compiled stays.

        Raises:
            ValueError: the other model's weights have other shapes or types.
        """
        mine, theirs = self._outline, other._outline
        if mine != theirs:
            raise ValueError("the weights are those of another model")
        self.loop.weights, self._newline = other.loop.weights, other._newline
        if self._see is not None:
            self._encoder = other._encoder

    def release(self) -> None:
        """Gives up the weights, until `renew` brings others."""
        self.loop.weights = None
        self._encoder = None

    def generate(
        self,
        requests: Sequence[Request],
        options: Options = DEFAULTS,
        stream: Callable[[np.ndarray], None] | None = None,
        draw: bool = True,
    ) -> list[Reply]:
        """Replies in the order of the requests, whose ids differ.

        Args:
            draw: have the image decoder draw images, if there is one.
            stream: given what the first request's reply consists of, as it comes: int32[n] ids, -1
                for a visual token. Only for a single request.

        Raises:
            ValueError, BadSample: a request can't be answered, or not with these options; with a
                message for the user.
        """

        def raise_it(request, error):
            raise error

        pairs = self.replies(requests, options, raise_it, stream, draw)
        found = {request.id: reply for request, reply in pairs}
        return [found[request.id] for request in requests]

    def replies(
        self,
        requests: Iterable[Request],
        options: Options,
        failed: Callable[[Request, Exception], None],
        stream: Callable[[np.ndarray], None] | None = None,
        draw: bool = True,
    ) -> Iterator[tuple[Request, Reply]]:
        """(request, reply) as batches get done, those of similar length together.

        Args:
            failed: told about a request that can't be answered, which is then left out.
            stream, draw: see `generate`.
        """
        self.check(options)
        groups: dict[tuple, list[Request]] = {}
        for request in requests:
            if options.beams > 1 and request.mode in ("image", "both"):
                failed(request, ValueError("beam search writes text only: it draws no image"))
                continue
            groups.setdefault((request.mode, request.rounds), []).append(request)
        for group in groups.values():
            yield from self._replies(group, options, failed, stream, draw)

    def _replies(self, requests: Sequence[Request], options: Options, failed, stream, draw):
        """`replies` to requests of one mode, which are decoded together."""
        count = options.best_of
        size = min(max(options.batch_size // count, 1), max(len(requests), 1))
        budget = self.budget(options)
        policy = self.policy_of(options, requests)
        asked = best_of.askable(self.prompts, requests, failed) if count > 1 else requests
        prompts = self._all_prompts(asked, budget, failed)
        for batch in batches(prompts, size):
            # A short batch is filled up, so that it needs no compilation of its own.
            used, fill = count * len(batch), count * (size - len(batch))
            rows = [Prompt(*prompt) for _, *prompt in batch for _ in range(count)]
            rows += rows[:1] * fill
            budgets = [budget] * used + [1] * fill
            seeds = [seed for request, *_ in batch for seed in options.seeds_of(request)]
            drawn = [Drawn(seed) for seed in seeds]
            results = self._results(
                rows, budgets, seeds + [0] * fill, policy, options, drawn, stream, draw
            )
            for first, (request, *_) in zip(range(0, used, count), batch, strict=True):
                mine = slice(first, first + count)
                try:
                    reply = self._kept(request, results[mine], drawn[mine], options, stream, draw)
                except WeightError as error:  # numbers that are not finite
                    failed(request, error)
                    continue
                yield request, reply

    def _kept(self, request, results, drawn, options: Options, stream, draw) -> Reply:
        """The reply to a request, of the `best_of` results that there are."""
        if len(results) == 1:
            return self.reply(results[0], options, drawn[0].seed, draw, drawn[0])
        candidates = best_of.choose(self, request, results)
        best, own = results[candidates.kept], drawn[candidates.kept]
        if stream is not None:
            stream(best.record)
        reply = self.reply(best, options, own.seed, draw, own)
        return dataclasses.replace(reply, candidates=candidates)

    def _results(self, rows, budgets, seeds, policy, options, drawn, stream, draw):
        """What each of these prompts is answered with."""
        embeds, ids, images = zip(*rows, strict=True)
        images = None if all(one is None for one in images) else images
        if options.beams > 1:
            results = beam.search(self.loop, embeds, budgets, policy, options.search, ids, images)
            if stream is not None:  # no reply is sure before the last step
                stream(results[0].record)
            return results
        if options.best_of > 1:  # it is not known yet which of them is kept
            stream = None
        more = {} if images is None else {"images": images, "places": self.places}
        for own, one in zip(drawn, images or (), strict=False):
            own.maps += one.each()
        return self.decode(
            embeds, budgets, policy, drawn, options, stream and (lambda new: stream(new[0])), draw,
            prompt_ids=ids, seeds=seeds, **more,
        )  # fmt: skip

    def decode(
        self, embeds, budgets, policy: Policy, drawn: Sequence[Drawn], options: Options,
        stream=None, draw: bool = True, **prompts,
    ) -> list[Result]:  # fmt: skip
        """What the rows of a batch emit; see `finish`, and for `prompts` `Loop.prefill`."""
        return self.loop(embeds, budgets, policy, stream=stream, **prompts)

    def finish(
        self, state: State, policy: Policy, drawn: Sequence[Drawn], options: Options,
        stream=None, draw: bool = True,
    ) -> State:  # fmt: skip
        """Advances until all rows are done; consumes `state`.

        Args:
            drawn: of the first rows, for generators that draw while they write; the others are not
                continued when they pause.
            stream: see `Loop.finish`.
            draw: whether images are to be drawn.
        """
        return self.loop.finish(state, policy, stream)

    def policy_of(self, options: Options, requests: Sequence[Request] = ()) -> Policy:
        """The policy with which these requests, which ask for the same, are answered."""
        return self.policy(options.text(self.prompts.eos))

    def scales(self, options: Options) -> tuple[float, ...]:
        """The scales of guidance with which the image decoder draws an image."""
        return options.guidance or (self.image_decoder.sampling.guidance,)

    @property
    def image_start(self) -> tuple[int, ...]:
        """Ids with which an image begins, for replies that are to begin with one."""
        return self.prompts.chat.markers.before

    @property
    def draws(self) -> bool:
        """Whether replies can have images."""
        return not isinstance(self.policy(DEFAULTS.text(())), TextPolicy)

    @property
    def projects(self) -> bool:
        """Whether visual tokens can be read."""
        return self._project is not None

    def check(self, options: Options) -> None:
        """Raises ValueError, for the user, where this model can't decode as the options say."""
        if options.beams > 1:
            beam.check(self.policy_of(options))
        if options.best_of > 1:
            best_of.check(self, self.policy_of(options), options.temperature)

    def likelihoods(
        self,
        requests: Iterable[Request],
        answers: Mapping[str, Sequence[str]],
        failed: Callable[[Request, Exception], None],
        batch_size: int = 8,
        closing: bool = False,
    ) -> Iterator[tuple[Request, list[Likelihood]]]:
        """(request, how likely each of its answers is) as batches get done.

        Args:
            answers: id of a request -> texts.
            failed: told about a request that can't be answered, which is then left out.
            batch_size: requests that are read together.
            closing: count the token that closes an answer, too.
        """
        requests = list(requests)
        size = min(batch_size, max(len(requests), 1))
        prompts = self._all_blocks(requests, answers, closing, failed)
        for batch in batches(prompts, size):
            filled = batch + [batch[0]] * (size - len(batch))  # needs no compilation of its own
            _, embeds, blocks, images = zip(*filled, strict=True)
            images = None if all(one is None for one in images) else images
            found = likelihood.of_batch(self.loop, embeds, blocks, images)
            for (request, *_), one in zip(batch, found, strict=False):
                if all(math.isfinite(answer.total) for answer in one):
                    yield request, one
                else:
                    failed(request, WeightError(f"{_BROKEN}, so its answers can't be compared"))

    def likelihoods_about(
        self, images: np.ndarray, question: str, answers: Sequence[str], batch_size: int = 8
    ) -> list[list[Likelihood]]:
        """How likely each answer to a question is, about images that are visual tokens already.

        Args:
            images: float32[N, P, C], each read in a conversation of its own.
            question, answers: see `Prompts.about`.
            batch_size: images that are read together.

        Raises:
            ValueError: the question does not fit.
        """
        row, blocks = self.prompts.about(question, answers)
        embeds, found = [self.placed(row, image[None]).embeds for image in images], []
        for start in range(0, len(images), batch_size):
            part = embeds[start : start + batch_size]
            filled = part + part[:1] * (batch_size - len(part))
            found += likelihood.of_batch(self.loop, filled, [blocks] * batch_size)[: len(part)]
        return found

    def _all_blocks(self, requests, answers, closing: bool, failed):
        for request in requests:
            try:
                row, pixels, blocks = self.prompts.compared(request, answers[request.id], closing)
                prompt = self.embedded(row, pixels)
                yield request, prompt.embeds, blocks, prompt.images
            except FAULTS as error:
                failed(request, error)

    def budget(self, options: Options) -> int:
        """New tokens that a reply may have."""
        return options.max_new_tokens or min(512, self.prompts.length // 2)

    def _all_prompts(self, requests, budget: int, failed):
        for request in requests:
            try:
                yield request, *self.prompt(request, budget)
            except FAULTS as error:
                failed(request, error)

    def prompt(self, request: Request, max_new_tokens: int) -> Prompt:
        """What the language model reads.

        Raises:
            ValueError, BadSample: with a message for the user.
        """
        if request.mode and request.mode not in self.modes:
            raise ValueError(
                f"mode {request.mode!r} can't be asked for: this model decides on its own whether "
                "it writes or draws"
            )
        return self.embedded(*self.prompts.row(request, max_new_tokens))

    def embedded(self, row, pixels: np.ndarray | None) -> Prompt:
        """As `prompt`, of what `Prompts.row` gives."""
        return self.placed(row, None if pixels is None else self.see(pixels))

    def placed(self, row, features: np.ndarray | None) -> Prompt:
        """As `embedded`, of visual tokens float32[n, P, C], which were seen or predicted."""
        embeds = self.loop.embed(row.tokens)
        visual = row.image_slots >= 0
        if features is not None:
            tokens = self.project(features).reshape(-1, embeds.shape[-1])
            embeds[visual] = tokens[row.image_slots[visual]]
            if self._newline is not None:
                embeds[row.image_slots == NEWLINE] = self._newline
        return Prompt(embeds, np.where(row.image_slots == TEXT, row.tokens, -1))

    def see(self, pixels: np.ndarray) -> np.ndarray:
        """float32[n, P, C] visual tokens of uint8[n, h, w, 3].

        Compiled at numbers of images that are powers of two.

        Raises:
            ValueError: the model can't read images.
        """
        if self._see is None:
            raise ValueError(
                "this model was trained on cached features and has no tower to read images with"
            )
        n = len(pixels)
        size = 1 << max(n - 1, 0).bit_length()
        padded = np.concatenate([pixels, np.zeros((size - n, *pixels.shape[1:]), np.uint8)])
        return np.asarray(self._run(self._see, padded))[:n]

    def project(self, features: np.ndarray) -> np.ndarray:
        """float32[n, P, D] what the language model reads of visual tokens float32[n, P, C]."""
        return np.asarray(self._run(self._project, features), np.float32)

    def _run(self, function, x):
        with jax.set_mesh(sharding.mesh_of(self._encoder)):
            return function(self._encoder, x)

    def reply(
        self, result: Result, options: Options, seed: int, draw: bool = True,
        own: Drawn | None = None,
    ) -> Reply:  # fmt: skip
        """What a row emitted as text and drawn images.

        Args:
            seed: of the first image; the next ones take those after it.
            own: what was drawn while the row was written.

        Raises:
            WeightError: its logits, or the values of an image, are not finite.
        """
        if (result.record == BROKEN).any():
            raise WeightError(
                f"{_BROKEN} after {len(result.record) - 1} tokens of the reply, so it is not kept"
            )
        parts = []
        for segment in result.segments:
            if isinstance(segment, Text):
                ids = segment.ids.tolist()
                parts.append(TextPart(self.prompts.tokenizer.decode(ids), tuple(ids)))
                continue
            number = sum(isinstance(part, ImagePart) for part in parts)
            if not np.isfinite(segment.features).all():
                raise WeightError(
                    f"the visual tokens of image {number} are not finite, so it is not kept: the "
                    "model's weights are damaged"
                )
            drawn = own.images[number] if own and number < len(own.images) else {}
            if draw and self.image_decoder is not None and segment.complete:
                one = self.image_decoder.draw
                for scale in self.scales(options):
                    if scale not in drawn:
                        drawn[scale] = one(segment.features, scale, seed + number)
            parts.append(ImagePart(segment.features, segment.complete, drawn))
        return Reply(tuple(parts), result.ended)


def batches(prompts: Iterable[tuple], size: int) -> Iterator[list]:
    """Groups (request, prompt, …) whose prompts fall into the same bucket."""
    waiting = collections.defaultdict(list)
    for item in prompts:
        group = waiting[bucket(len(item[1]))]
        group.append(item)
        if len(group) == size:
            yield list(group)
            group.clear()
    for group in waiting.values():
        if group:
            yield group
