"""What the page talks to: the conversations of its visitors with one or two models.

Each model is loaded once. A visitor has one conversation with each model, whose cache lies on the
device; as a cache is large, only the latest `visitors` are kept. One turn is answered at a time.

    engine = Engine({"vpit": generator})
    for replies in engine.ask("visitor", Turn("What is this?", ("cat.jpg",)), Settings()):
        ...     # of each model, what it has said so far

Nothing here knows the page (`page.py`): a turn goes in, texts and images come out.
"""

import collections
import dataclasses
import io
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping

from PIL import Image

from metamorph_jax.data import images
from metamorph_jax.errors import BadSample, UserError, WeightError
from metamorph_jax.files import shown
from metamorph_jax.sampling.conversation import Conversation
from metamorph_jax.sampling.generator import Generator
from metamorph_jax.sampling.options import DEFAULTS, Options
from metamorph_jax.sampling.requests import FAULTS, Request, as_sample, checked
from metamorph_jax.sampling.results import Reply, Stream, TextPart

Part = str | Image.Image


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a visitor may send.

    Attributes:
        megabytes: of a file; pixels: of an image; images: of a turn; characters: of its text.
    """

    megabytes: int = 20
    pixels: int = 25_000_000
    images: int = 8
    characters: int = 20_000


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a visitor says: text, files of images, and whether the reply begins with an image."""

    text: str
    files: tuple[str, ...] = ()
    draw: bool = False


@dataclasses.dataclass(frozen=True)
class Settings:
    """How it is answered, see `generator.Options`; guidance None is that of the image decoder."""

    temperature: float = 0.0
    guidance: float | None = None
    seed: int = 0
    max_new_tokens: int = 256


@dataclasses.dataclass(frozen=True)
class Said:
    """What a model has said so far, or why it can't.

    Attributes:
        parts: texts and images in order.
        note: for the visitor, beside the reply or in place of it.
    """

    parts: tuple[Part, ...] = ()
    note: str = ""


@dataclasses.dataclass
class _Visitor:
    """The conversations of a visitor: model -> Conversation; and what was asked last.

    Attributes:
        turn: that was asked last; tries: how often it was answered again.
        before: model -> turns that its conversation had then.
    """

    talks: dict[str, Conversation] = dataclasses.field(default_factory=dict)
    turn: Turn | None = None
    tries: int = 0
    before: dict[str, int] = dataclasses.field(default_factory=dict)


class Engine:
    """Answers turns.

    Args:
        models: name -> generator, in the order of the page.
        options: of replies, where the settings of the page don't say otherwise.
        limits: of what may be sent.
        visitors: whose conversations are kept; the one that was silent longest begins anew.
    """

    def __init__(
        self,
        models: Mapping[str, Generator],
        options: Options = DEFAULTS,
        limits: Limits = Limits(),
        visitors: int = 4,
    ):
        if visitors < 1:
            raise UserError(f"--visitors must be at least 1, not {visitors}")
        self.models, self.limits, self._most = dict(models), limits, visitors
        self._options = options
        self._visitors: collections.OrderedDict[str, _Visitor] = collections.OrderedDict()
        self._forgotten: set[str] = set()
        self._one_at_a_time = threading.Lock()

    @property
    def draws(self) -> bool:
        """Whether a model's replies can have images."""
        return any(generator.draws for generator in self.models.values())

    @property
    def longest(self) -> int:
        """New tokens that a visitor may ask for."""
        return max(min(g.prompts.length for g in self.models.values()) // 2, 1)

    def guidance(self) -> float | None:
        """With which images are drawn where nothing else is asked for; None: none is drawn."""
        decoders = [g.image_decoder for g in self.models.values() if g.image_decoder is not None]
        return decoders[0].sampling.guidance if decoders else None

    def can_read(self, file: str) -> bool:
        """Whether an image is whole and within the limits."""
        try:
            images.decode(images.read_bytes(file), file, self.limits.pixels)
        except BadSample:
            return False
        return True

    def clear(self, visitor: str) -> None:
        """Forgets the conversations of a visitor."""
        with self._one_at_a_time:
            self._visitors.pop(visitor, None)
            self._forgotten.discard(visitor)

    def again(self, visitor: str, settings: Settings) -> Iterator[list[Said]]:
        """As `ask`, another reply to the last turn, which is taken back first.

        With a temperature above 0, or a drawing, chance gives another reply each time.
        """
        with self._one_at_a_time:
            known = self._visitors.get(visitor)
            if known is None or known.turn is None:
                yield [Said(note="There is no turn to answer again.")] * len(self.models)
                return
            for name, turns in known.before.items():
                if known.talks[name].turns > turns:
                    known.talks[name].undo()
            known.tries += 1
            yield from self._answer(known, settings, "")

    def ask(self, visitor: str, turn: Turn, settings: Settings) -> Iterator[list[Said]]:
        """What each model says to the next turn: more and more of it, at last the whole.

        A turn that can't be answered leaves the conversation as it was.
        """
        with self._one_at_a_time:
            known, note = self._known(visitor)
            known.turn, known.tries = turn, 0
            known.before = {name: talk.turns for name, talk in known.talks.items()}
            yield from self._answer(known, settings, note)

    def _known(self, visitor: str) -> tuple[_Visitor, str]:
        note = ""
        if visitor in self._forgotten:
            self._forgotten.discard(visitor)
            note = (f"The conversation begins anew: {self._most} other visitors spoke since, and "
                    "no more are kept.")  # fmt: skip
        known = self._visitors.setdefault(visitor, _Visitor())
        self._visitors.move_to_end(visitor)
        while len(self._visitors) > self._most:
            self._forgotten.add(self._visitors.popitem(last=False)[0])
        return known, note

    def _wrong(self, turn: Turn) -> str:
        """Why a turn is not answered, "" if it can be."""
        limits = self.limits
        if len(turn.text) > limits.characters:
            return f"The text has {len(turn.text)} characters; at most {limits.characters} fit."
        if len(turn.files) > limits.images:
            return f"{len(turn.files)} images in one turn; at most {limits.images} fit."
        if turn.draw and not turn.text.strip():
            return "Say what is to be drawn."
        try:
            for file in turn.files:
                if os.path.getsize(file) > limits.megabytes * 2**20:
                    raise ValueError(f"{shown(file)} is larger than {limits.megabytes} MB")
            request = checked(Request("0", turn.text, turn.files))
            images.sizes(as_sample(request).images, limits.pixels)
        except FAULTS as error:
            return _sentence(error, turn)
        return ""

    def _answer(self, known: _Visitor, settings: Settings, note: str) -> Iterator[list[Said]]:
        turn, said = known.turn, [Said() for _ in self.models]
        wrong = self._wrong(turn)
        if wrong:
            yield [Said(note=wrong) for _ in said]
            return
        for place, (name, generator) in enumerate(self.models.items()):
            try:
                talk = self._talk(known, name, generator, settings)
                for parts in self._say(talk, generator, turn, known.tries):
                    said[place] = Said(parts, note)
                    yield list(said)
            except (WeightError, *FAULTS) as error:
                said[place] = Said(note=_sentence(error, turn))
                yield list(said)

    def _talk(self, known, name, generator, settings: Settings) -> Conversation:
        """The visitor's conversation with a model, with these settings from now on."""
        drawn = generator.image_decoder is not None and settings.guidance is not None
        options = dataclasses.replace(
            self._options, max_new_tokens=min(settings.max_new_tokens, self.longest),
            temperature=settings.temperature, seed=settings.seed,
            guidance=(settings.guidance,) if drawn else (),
        )  # fmt: skip
        if name not in known.talks:
            known.talks[name] = Conversation(generator, options)
            known.before[name] = 0
        known.talks[name].change(options)
        return known.talks[name]

    def _say(self, talk, generator, turn: Turn, tries: int) -> Iterator[tuple[Part, ...]]:
        """The parts of one model's reply as they come; the work is done in a thread of its own."""
        heard, text = queue.SimpleQueue(), ""
        request = checked(Request("0", turn.text, turn.files, sample=tries))
        draw = turn.draw and generator.draws
        stream = Stream(generator, _Heard(heard.put))

        def work():
            try:
                heard.put(talk.say(request, stream, draw))
            except BaseException as error:  # for the thread that waits
                heard.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while isinstance(new := heard.get(), str):
                text += new
                yield (text,)
        finally:  # a visitor who left has to wait, too: the conversation is being changed
            worker.join()
        if isinstance(new, BaseException):
            raise new
        yield _parts(new, generator)


class _Heard(io.TextIOBase):
    """A text file that hands on what is written."""

    def __init__(self, put: Callable[[str], None]):
        self._put = put

    def write(self, text: str) -> int:
        if text:
            self._put(text)
        return len(text)


def _parts(reply: Reply, generator: Generator) -> tuple[Part, ...]:
    """Texts and drawn images of a reply, with a word where an image could not be drawn."""
    parts = []
    for part in reply.segments:
        if isinstance(part, TextPart):
            parts.append(part.text)
        elif part.drawn:
            parts.append(Image.fromarray(next(iter(part.drawn.values()))))
        elif not part.complete:
            parts.append("[an image, cut off: more new tokens are needed]")
        else:
            parts.append("[an image, not drawn: the demo was started without --decoder]")
    return tuple(part for part in parts if part != "")


def _sentence(error: Exception, turn: Turn) -> str:
    """What went wrong, without the folders of this machine."""
    text = shown(error, 1000)
    for file in turn.files:
        text = text.replace(shown(file, 1000), file.replace("\\", "/").rsplit("/", 1)[-1])
    if "has room" in text:
        text += "; clear the conversation to begin anew"
    return f"Not answered: {text}"
