"""`Generator`: from requests to replies, with batching, streaming and drawn images.

What is particular to a system (its policy, its chat markers, how it reads images) comes from its
recipe, which makes the generator; everything that generates talks to this class only: the command
`generate`, the Python API, evaluation.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np

from metamorph_jax.errors import UserError, WeightError
from metamorph_jax.sampling import beam, best_of, likelihood
from metamorph_jax.sampling.likelihood import Likelihood
from metamorph_jax.sampling.loop import Loop, State
from metamorph_jax.sampling.options import DEFAULTS, Options
from metamorph_jax.sampling.policy import Policy, TextPolicy
from metamorph_jax.sampling.prompt_reader import Prompt, PromptReader, batches
from metamorph_jax.sampling.prompts import Prompts
from metamorph_jax.sampling.requests import FAULTS, Request
from metamorph_jax.sampling.results import ImagePart, Reply, TextPart
from metamorph_jax.sampling.segments import BROKEN, WHY_BROKEN, Result, Text


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
        reader: reads its prompts.

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
        reader: PromptReader,
    ):
        self.loop, self.policy, self.prompts, self.reader = loop, policy, prompts, reader
        self.feature_shape = prompts.views.tokens, reader.width
        self.image_decoder = None
        held = (loop.weights, reader.weights)
        self._outline = jax.tree.map(lambda x: (x.shape, str(x.dtype)), held)

    # ---- replies

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

        if len({request.id for request in requests}) < len(requests):
            raise ValueError("two requests have the same id: ask for `replies`, which come with "
                             "their requests")  # fmt: skip
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

    def _all_prompts(self, requests, budget: int, failed):
        for request in requests:
            try:
                yield request, *self.prompt(request, budget)
            except FAULTS as error:
                failed(request, error)

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

    # ---- given answers, compared

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
        return likelihood.of_requests(self, requests, answers, failed, batch_size, closing)

    def likelihoods_about(
        self, images: np.ndarray, question: str, answers: Sequence[str], batch_size: int = 8
    ) -> list[list[Likelihood]]:
        """How likely each answer to a question is, about images that are visual tokens already.

        Args:
            images: float32[N, P, C], each read in a conversation of its own.
            question, answers: see `likelihood.about`.
            batch_size: images that are read together.

        Raises:
            ValueError: the question does not fit.
        """
        return likelihood.of_images(self, images, question, answers, batch_size)

    # ---- the pieces of all this, which recipes may replace

    def check(self, options: Options) -> None:
        """Raises ValueError, for the user, where this model can't decode as the options say."""
        if options.beams > 1:
            beam.check(self.policy_of(options))
        if options.best_of > 1:
            best_of.check(self, self.policy_of(options), options.temperature)

    def budget(self, options: Options) -> int:
        """New tokens that a reply may have."""
        return options.max_new_tokens or min(512, self.prompts.length // 2)

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
        return self.reader.embedded(*self.prompts.row(request, max_new_tokens))

    def policy_of(self, options: Options, requests: Sequence[Request] = ()) -> Policy:
        """The policy with which these requests, which ask for the same, are answered."""
        return self.policy(options.text(self.prompts.eos))

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
                f"{WHY_BROKEN} after {len(result.record) - 1} tokens of the reply, so it is not "
                "kept"
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

    # ---- what it consists of

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
        self.loop.weights = other.loop.weights
        self.reader.renew(other.reader)

    def release(self) -> None:
        """Gives up the weights, until `renew` brings others."""
        self.loop.weights = None
        self.reader.release()
