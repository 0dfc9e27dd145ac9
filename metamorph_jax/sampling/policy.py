"""What a row emits: the protocol between the decoding loop and a recipe, and the policy for text.

The loop (`sampling/loop.py`) reads one position of every row and has hidden states; a policy turns
them into what is emitted. It is a frozen dataclass of pure functions that is compiled into the
loop, so two equal policies share a compilation; what it remembers of a row is a pytree that the
loop carries.
"""

import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from metamorph_jax.sampling.cached_llm import CachedLLM
from metamorph_jax.sampling.segments import BROKEN, Result, Text
from metamorph_jax.sampling.text import Sampler


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Emission:
    """What the rows emit in one step.

    Attributes:
        ids: int32[B] recorded: a text id, a negative mark that the policy's `read` knows, `BROKEN`
            if the logits were not finite (the row has to stop then), or `NOTHING` if the row emits
            nothing in this step (it has to pause then).
        value: float32[B, C] recorded beside it.
        embed: float[B, D] embedding that the row reads next.
        pause: bool[B] the row waits until something is appended to it (`Loop.extend`).
        stop: bool[B] the row ends here.
    """

    ids: jax.Array
    value: jax.Array
    embed: jax.Array
    pause: jax.Array
    stop: jax.Array


@dataclasses.dataclass(frozen=True)
class Step:
    """What a policy is told about the rows.

    Attributes:
        active: bool[B] rows whose emission counts; the others are done or pause.
        count: int32[B] what each row has emitted so far.
        keys: keys[B] random keys of this step, one a row.
        forced: int32[B] the text id to take in place of one's own, or -1.
    """

    active: jax.Array
    count: jax.Array
    keys: jax.Array
    forced: jax.Array


@dataclasses.dataclass(frozen=True)
class Model:
    """The model as a policy sees it: functions together with their weights.

    Attributes:
        llm, weights: see `cached_llm`.
        parts: weights of the recipe's other modules, which its policy knows how to use.
    """

    llm: CachedLLM
    weights: dict
    parts: Any

    def embed(self, ids: jax.Array) -> jax.Array:
        """float[B, D] of int32[B] ids."""
        return self.llm.embed(self.weights, ids)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32[V, B] of hidden states float[D, B]."""
        return self.llm.logits(self.weights, hidden)


class Policy(Protocol):
    """How a recipe decodes.

    Attributes:
        width: C, of the values that are recorded; 0 for none.
        extra_steps: a row may emit so many more than its budget says.
        visual: whether these values are visual tokens as the model reads them.
        varies: whether chance decides them.
    """

    width: int
    extra_steps: int
    visual: bool
    varies: bool

    def init(self, rows: int, prompt_ids: jax.Array, vocabulary: int) -> Any:
        """What the policy remembers, each leaf [B, ...].

        `prompt_ids` is int32[B, L]: ids that the prompts hold, -1 where there is none;
        `vocabulary` the number of ids.
        """
        ...

    def emit(self, memory: Any, hidden: jax.Array, step: Step, model: Model) -> tuple:
        """(memory, `Emission`) from hidden states float[D, B] after the final norm."""
        ...

    def read(self, record, values, ended: bool) -> Result:
        """What one row emitted: int32[n] record without `NOTHING`, float32[n, C] values."""
        ...


@dataclasses.dataclass(frozen=True)
class TextPolicy:
    """Text only.

    Attributes:
        sampler: how ids are drawn.
        eos: ids that end a row.
        min_new_tokens: no eos id is drawn before a row has emitted so many.
        repetition_penalty: scores of ids that stand in the prompt or were emitted are divided by it
            if positive and multiplied otherwise (Keskar et al. 2019); 1 changes nothing. This and
            `min_new_tokens` come before temperature, top-k and top-p, as in Hugging Face's
            `generate`.
    """

    sampler: Sampler = Sampler()
    eos: tuple[int, ...] = ()
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0

    width = 0
    extra_steps = 0
    visual = varies = False

    def __post_init__(self):
        if self.min_new_tokens < 0:
            raise ValueError(f"min_new_tokens must not be negative, not {self.min_new_tokens}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty must be positive and finite, not {self.repetition_penalty}"
            )

    def init(self, rows: int, prompt_ids, vocabulary: int):
        """bool[B, V] ids that were seen, or None where nothing depends on them."""
        if self.repetition_penalty == 1:
            return None
        # What is not an id goes to a place after the last one, which is cut off.
        where = jnp.where(prompt_ids < 0, vocabulary, prompt_ids)
        seen = jnp.zeros((rows, vocabulary + 1), bool)
        return seen.at[jnp.arange(rows)[:, None], where].set(True)[:, :-1]

    def emit(self, memory, hidden, step: Step, model: Model):
        ids = self.forced(self.choose(memory, hidden, step, model), step)
        no = jnp.zeros(ids.shape, bool)
        none = jnp.zeros((len(ids), 0), jnp.float32)
        emitted = Emission(ids, none, model.embed(ids), no, self.finishes(memory, ids))
        return self.remember(memory, ids), emitted

    def read(self, record, values, ended: bool) -> Result:
        words = [token for token in record.tolist() if token >= 0 and token not in self.eos]
        segments = (Text.of(words),) if words else ()
        return Result(segments, record[record >= 0], values, record, bool(ended))

    # ---- pieces that the policies of recipes take

    def choose(self, seen, hidden, step: Step, model: Model) -> jax.Array:
        """int32[B] ids drawn from the logits of hidden states float[D, B], or `BROKEN`."""
        logits = model.logits(hidden)
        if seen is None and not self.min_new_tokens and self.sampler.greedy:
            ids = jnp.argmax(logits, axis=0).astype(jnp.int32)
        else:
            ids = self.sampler(self.scores(logits.T, seen, step.count), step.keys)
        return jnp.where(sound(logits, axis=0), ids, BROKEN)

    def scores(self, logits, seen, count) -> jax.Array:
        """float32[B, V] logits after penalty and minimum length."""
        if seen is not None:
            seen = jnp.pad(seen, ((0, 0), (0, logits.shape[1] - seen.shape[1])))
            penalty = self.repetition_penalty
            lower = jnp.where(logits < 0, logits * penalty, logits / penalty)
            logits = jnp.where(seen, lower, logits)
        if self.min_new_tokens and self.eos:
            early = jnp.where(count < self.min_new_tokens, -jnp.inf, 0.0)
            logits = logits.at[:, jnp.array(self.eos)].add(early[:, None])
        return logits

    def forced(self, ids, step: Step) -> jax.Array:
        return jnp.where(step.forced >= 0, step.forced, ids)

    def remember(self, seen, ids):
        return None if seen is None else seen.at[jnp.arange(len(ids)), ids].set(True)

    def ends(self, ids) -> jax.Array:
        """bool: whether ids are among `eos`, or `BROKEN`."""
        return jnp.isin(ids, jnp.array((*self.eos, BROKEN), jnp.int32))

    def finishes(self, memory, ids) -> jax.Array:
        """bool[B]: whether rows end with these ids, before which they have this memory."""
        return self.ends(ids)

    def completes(self, ids, count) -> jax.Array:
        """bool[...]: whether the first `count` of int32[..., M] ids end a row as a whole."""
        return jnp.zeros(ids.shape[:-1], bool)

    @property
    def endings(self) -> int:
        """Of the continuations of a row by one id, how many end it at most."""
        return len(self.eos)


@dataclasses.dataclass(frozen=True)
class StoppingPolicy(TextPolicy):
    """Text that also ends at a text, for models that were not taught an id that ends a turn.

    Attributes:
        stops: each of them ids that end a row when they come one after another (`Chat.stops`).
    """

    stops: tuple[tuple[int, ...], ...] = ()

    def init(self, rows: int, prompt_ids, vocabulary: int):
        """(see `TextPolicy.init`, int32[B, n] the last ids of each row)."""
        last = jnp.full((rows, max(map(len, self.stops))), -1, jnp.int32)
        return super().init(rows, prompt_ids, vocabulary), last

    def choose(self, memory, hidden, step: Step, model: Model) -> jax.Array:
        return super().choose(memory[0], hidden, step, model)

    def remember(self, memory, ids):
        return super().remember(memory[0], ids), _with_last(memory[1], ids)

    def finishes(self, memory, ids) -> jax.Array:
        last = _with_last(memory[1], ids)
        found = [(last[:, -len(stop) :] == jnp.array(stop)).all(axis=1) for stop in self.stops]
        return super().finishes(memory, ids) | jnp.stack(found).any(axis=0)

    def completes(self, ids, count) -> jax.Array:
        found = super().completes(ids, count)
        for stop in self.stops:
            n = len(stop)
            if n <= ids.shape[-1]:
                at, axis = jnp.maximum(count - n, 0), ids.ndim - 1
                last = jax.lax.dynamic_slice_in_dim(ids, at, n, axis)
                found |= (last == jnp.array(stop, jnp.int32)).all(axis=-1) & (count >= n)
        return found

    @property
    def endings(self) -> int:
        return len(self.eos) + len(self.stops)

    def read(self, record, values, ended: bool) -> Result:
        """The text up to the first stop."""
        ids = record.tolist()
        at = next((k for k in range(len(ids)) if self._stops_at(ids, k)), len(ids))
        result = super().read(record[:at], values[:at], ended or at < len(ids))
        return dataclasses.replace(result, ids=record, record=record)

    def _stops_at(self, ids: list[int], k: int) -> bool:
        return any(tuple(ids[k : k + len(stop)]) == stop for stop in self.stops)


def stopping(text: TextPolicy, stops: tuple[tuple[int, ...], ...]) -> TextPolicy:
    """Text that ends at one of these stops, too; those of a single id are among its `eos`."""
    longer = tuple(stop for stop in stops if len(stop) > 1)
    fields = {field.name: getattr(text, field.name) for field in dataclasses.fields(TextPolicy)}
    fields["eos"] = tuple(sorted({*text.eos, *(stop[0] for stop in stops if len(stop) == 1)}))
    return StoppingPolicy(**fields, stops=longer) if longer else TextPolicy(**fields)


def _with_last(last, ids):
    """int32[B, n] the last ids of rows that emit these ids: int32[B] now."""
    return jnp.concatenate([last[:, 1:], ids[:, None]], axis=1)


def sound(logits: jax.Array, axis: int) -> jax.Array:
    """Whether logits over `axis` are numbers to choose by: none is NaN, and the largest finite."""
    return jnp.isfinite(jnp.max(logits, axis=axis))  # the largest of any and a NaN is NaN


__all__ = [
    *("BROKEN", "Emission", "Model", "NOTHING", "Policy", "Step"),
    *("StoppingPolicy", "TextPolicy", "sound", "stopping"),
]
