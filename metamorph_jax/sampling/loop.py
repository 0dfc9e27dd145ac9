"""The mechanics of decoding: one `lax.while_loop` over a static cache.

Every row of a batch is on its own: it has its own slots in the cache, its own position and its own
budget, and it can pause while others continue. What is emitted is a recipe's policy
(`sampling/policy.py`).

    slot            0  1  2  3  4  5  6  7  8
    row 0           p  p  p  p  p  A  B  .  .      p prompt, A B … emitted and read again,
    row 1           p  p  A  B  C  .  .  .  .      . not yet filled: no one may look there

`prefill` reads prompts, `advance` repeats steps until all rows are done or pause, `extend` appends
a block of embeddings to some rows: an image that was drawn, or the next turn of a chat. A model
whose layers look at images (`models.llm.llama.Insert`) gets their maps with both (`RowImages`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from metamorph_jax import sharding
from metamorph_jax.sampling.cached_llm import NOWHERE, CachedLLM, PlacedImages
from metamorph_jax.sampling.policy import Model, Policy, Step
from metamorph_jax.sampling.segments import NOTHING, Result
from metamorph_jax.sampling.text import row_keys, step_keys

BUCKETS = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What the loop carries. M is the capacity in new tokens, S the slots of the cache.

    Attributes:
        keys, values: of each layer, see `cached_llm`.
        length: int32[B] slots that are filled; also the position of what is read next.
        embed: [B, D] embedding of what was emitted last; unread: bool[B] it is still to be read.
        count: int32[B] how many were emitted; budget: int32[B] how many may be.
        paused: bool[B] waits for `extend`; done: bool[B]; ended: bool[B] by the policy.
        memory: the policy's.
        rng: keys[B].
        record: int32[B, M]; recorded: float32[B, M, C]; forced: int32[B, M].
        images: what the layers look at, of a model with an insert; else None.
        states: [B, S, D] hidden states at the filled slots, where the loop keeps them; else None.
    """

    keys: list[jax.Array]
    values: list[jax.Array]
    length: jax.Array
    embed: jax.Array
    unread: jax.Array
    count: jax.Array
    budget: jax.Array
    paused: jax.Array
    done: jax.Array
    ended: jax.Array
    memory: Any
    rng: jax.Array
    record: jax.Array
    recorded: jax.Array
    forced: jax.Array
    images: PlacedImages | None = None
    states: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class RowImages:
    """Images that the layers of a row look at, with the prompt or block in which they stand.

    Attributes:
        maps: a tuple of float[m, h, w, C], as the blocks of the insert take them; also of m = 0
            images, where later ones are to have places.
        start: m positions in the prompt or block, ascending: of each image's first visual token.
        documents: positions at which a document begins, which sees no image before.
    """

    maps: tuple
    start: Sequence[int]
    documents: Sequence[int] = ()

    def each(self) -> list[tuple]:
        """The maps of each image, a tuple of float[h, w, C]."""
        return [tuple(x[k] for x in self.maps) for k in range(len(self.start))]


def bucket(length: int, buckets: Sequence[int] = BUCKETS) -> int:
    """The smallest bucket that holds `length` positions."""
    for size in buckets:
        if length <= size:
            return size
    raise ValueError(f"a prompt of {length} positions fits no bucket (largest: {buckets[-1]})")


def layout(prompts, max_new_tokens, policy: Policy, buckets: Sequence[int] = BUCKETS):
    """(int32[B] lengths of prompts, int32[B] budgets, positions to pad prompts to, capacity).

    Raises:
        ValueError: a prompt or budget is empty, or a prompt fits no bucket.
    """
    budget = np.broadcast_to(np.asarray(max_new_tokens, np.int32), (len(prompts),))
    if budget.min() < 1:
        raise ValueError("max_new_tokens must be at least 1")
    budget = budget + policy.extra_steps
    lengths = np.array([len(p) for p in prompts], np.int32)
    if lengths.min() < 1:
        raise ValueError("a prompt is empty")
    capacity = -(-int(budget.max()) // 8) * 8
    return lengths, budget, bucket(int(lengths.max()), buckets), capacity


class Loop:
    """Decodes with one model; keep it, for it holds the compiled loops.

    Args:
        llm, weights: see `llm_weights.take_over`.
        parts: weights of the recipe's other modules, for its policy.
        mesh: that the weights lie on; None: one device, wherever they are.
        keeps_states: have the state hold the hidden states of all that was read.
    """

    def __init__(
        self, llm: CachedLLM, weights: dict, parts: Any = None, mesh: Mesh | None = None,
        keeps_states: bool = False,
    ):  # fmt: skip
        self.llm, self.mesh, self.keeps_states = llm, mesh, keeps_states
        self.weights = {"llm": weights, "parts": parts}
        static = ("policy", "capacity", "slots", "places")
        self._prefill = jax.jit(self._run_prefill, static_argnames=static)
        self._extend = jax.jit(
            self._run_extend, static_argnames=("policy", "turn"), donate_argnames=("state",)
        )
        self._advance = jax.jit(
            self._run_loop, static_argnames=("policy",), donate_argnames=("state",)
        )
        self._read = jax.jit(self._run_read)
        self._embed = jax.jit(llm.embed)

    # ---- one call

    def __call__(
        self,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int | Sequence[int],
        policy: Policy,
        *,
        stream: Callable[[list[np.ndarray]], None] | None = None,
        chunk: int = 16,
        **options,
    ) -> list[Result]:
        """Decodes a batch.

        Args:
            prompts, max_new_tokens, policy, options: see `prefill`.
            stream: called after every `chunk` steps with the rows' new records.

        Returns:
            One `Result` a row.
        """
        state = self.prefill(prompts, max_new_tokens, policy, **options)
        return self.results(self.finish(state, policy, stream, chunk), policy)

    def finish(self, state: State, policy: Policy, stream=None, chunk: int = 16) -> State:
        """Advances until all rows are done or pause; consumes `state`, see `__call__`."""
        if stream is None:
            return self.advance(state, policy)
        shown = np.zeros(len(state.count), int)
        while True:
            record, count, waits = self.read(state.record, state.count, state.done | state.paused)
            stream([row[a:b] for row, a, b in zip(record, shown, count, strict=True)])
            shown = count
            if waits.all():
                return state
            state = self.advance(state, policy, chunk)

    def prefill(
        self,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int | Sequence[int],
        policy: Policy,
        *,
        seeds: Sequence[int] | None = None,
        prompt_ids: Sequence[np.ndarray] | None = None,
        forced_ids: np.ndarray | None = None,
        buckets: Sequence[int] = BUCKETS,
        slots: int | None = None,
        images: Sequence[RowImages | None] | None = None,
        places: int = 0,
    ) -> State:
        """The state after the prompts are read and the first token of each row is emitted.

        Args:
            prompts: per row float[L, D], the embeddings that the language model reads first.
            max_new_tokens: budget, one for all rows or one each; visual tokens count.
            policy: decides what is emitted.
            seeds: one a row, for sampling; default 0, 1, …
            prompt_ids: per row int[n] text ids in the prompt, for a repetition penalty.
            forced_ids: int32[B, n]; the id to take at step s of a row if it writes text then, -1 to
                let the model choose.
            buckets: lengths that prompts are padded to.
            slots: of the cache; default: as many as these prompts and budgets take.
            images: per row, for a model with an insert.
            places: for images of a row, at least; where more come, the oldest are forgotten.

        Raises:
            ValueError: a prompt or budget is empty, the slots don't suffice, or there are images
                that the model has no use for.
        """
        B = len(prompts)
        lengths, budget, L, capacity = layout(prompts, max_new_tokens, policy, buckets)
        if slots is not None and int((lengths + budget).max()) > slots:
            raise ValueError(f"{int((lengths + budget).max())} positions don't fit {slots} slots")
        forced = np.full((B, capacity), -1, np.int32)
        if forced_ids is not None:
            forced_ids = np.asarray(forced_ids, np.int32)[:, :capacity]
            forced[:, : forced_ids.shape[1]] = forced_ids
        seeds = np.arange(B) if seeds is None else np.asarray(seeds)
        with self.on_mesh():
            return self._prefill(
                self.weights, padded(prompts, L, np.float32, 0), lengths, budget,
                seeds.astype(np.uint32), padded(prompt_ids or [()] * B, L, np.int32, -1), forced,
                self.joined(images), policy=policy, capacity=capacity,
                slots=max(L + capacity, slots or 0), places=places,
            )  # fmt: skip

    def joined(self, rows: Sequence[RowImages | None] | None):
        """The images of rows as compiled functions take them; None: there are none.

        Returns:
            (maps: a tuple of float32[B, m, h, w, C]; their start and end int32[B, m], the place of
            the first document int32[B]), `NOWHERE` where there is none. m is a power of two.
        """
        given = [row for row in rows or () if row is not None]
        if not given:
            return None
        if self.llm.insert is None:
            raise ValueError("images were given, but the layers of this model look at none")
        most = max(1, *(len(row.start) for row in given))
        m, B = 1 << (most - 1).bit_length(), len(rows)
        maps = tuple(np.zeros((B, m, *x.shape[1:]), np.float32) for x in given[0].maps)
        start, end = np.full((2, B, m), NOWHERE, np.int32)
        first = np.full(B, NOWHERE, np.int32)
        for b, row in enumerate(rows):
            if row is None:
                continue
            n, begins = len(row.start), sorted(row.documents)
            for to, x in zip(maps, row.maps, strict=True):
                to[b, :n] = x
            start[b, :n] = row.start
            end[b, :n] = [min((d for d in begins if d >= s), default=NOWHERE) for s in row.start]
            first[b] = min(begins, default=NOWHERE)
        return maps, start, end, first

    def advance(self, state: State, policy: Policy, steps: int | None = None) -> State:
        """Repeats steps until all rows are done or pause, or so many were made.

        Consumes `state`.
        """
        steps = np.int32(2**31 - 1 if steps is None else steps)
        with self.on_mesh():
            return self._advance(self.weights, state, steps, policy=policy)

    def extend(
        self,
        state: State,
        embeddings: Sequence[np.ndarray],
        rows: Sequence[int],
        policy: Policy,
        max_new_tokens: int | None = None,
        buckets: Sequence[int] = BUCKETS,
        images: Sequence[RowImages | None] | None = None,
    ) -> State:
        """Appends embeddings to rows; each of them then emits its next token.

        What a row emitted last is read first. Consumes `state`.

        Args:
            embeddings: one float[n, D] for each of `rows`, n at least 1.
            rows: which rows; the others stay as they are.
            max_new_tokens: a new budget, for the next turn of a chat: the rows' records begin
                anew. None: the rows continue under the budget they have.
            images: of each of `rows`, for a model with an insert.

        Raises:
            ValueError: it does not fit into the cache, or the record, or an image has no place.
        """
        B, empty = len(state.length), np.zeros((0, self.llm.cfg.width), np.float32)
        block = _spread(embeddings, rows, B, empty)
        lengths = np.array([len(x) for x in block], np.int32)
        for row in rows:
            if not lengths[row]:
                raise ValueError(f"nothing to append to row {row}")
        turn = max_new_tokens is not None
        budget = max_new_tokens + policy.extra_steps if turn else 0
        self._check_room(state, lengths, budget if turn else None)
        n = bucket(int(lengths.max()), buckets)
        looks = [None] * B if images is None else _spread(images, rows, B, None)
        _check_places(state, looks)
        with self.on_mesh():
            return self._extend(
                self.weights, state, padded(block, n, np.float32, 0), lengths, np.int32(budget),
                self.joined(looks), policy=policy, turn=turn,
            )  # fmt: skip

    def _check_room(self, state: State, lengths: np.ndarray, budget: int | None) -> None:
        """Raises ValueError where blocks int32[B], and the tokens that rows may emit after them,
        don't fit.

        Args:
            budget: a new one, with which records begin anew; None: the rows have theirs.
        """
        filled, given, count, unread = self.read(
            state.length, state.budget, state.count, state.unread
        )
        if budget is not None and budget > state.record.shape[1]:
            raise ValueError(f"records have {state.record.shape[1]} places, not {budget}")
        left = given - count if budget is None else budget
        need = int(np.where(lengths, filled + unread + lengths + left, 0).max())
        slots = state.values[0].shape[-2]
        if need > slots:
            raise ValueError(f"{need} positions don't fit the cache, which has {slots} slots")

    def results(self, state: State, policy: Policy) -> list[Result]:
        """What the rows emitted, since the prompt or since the last turn began."""
        rows = self.read(state.record, state.recorded, state.count, state.ended)
        return [
            policy.read(record[:count], values[:count], ended)
            for record, values, count, ended in zip(*rows, strict=True)
        ]

    def read(self, *arrays) -> tuple[np.ndarray, ...]:
        """Arrays of the state on every host."""
        with self.on_mesh():
            return jax.device_get(self._read(arrays))

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """float32[n, D] of int[n] ids."""
        n = bucket(max(len(ids), 1))
        padded = np.zeros(n, np.int32)
        padded[: len(ids)] = ids
        with self.on_mesh():
            embeds = self._embed(self.weights["llm"], padded)
        return np.array(self.read(embeds)[0], np.float32)[: len(ids)]

    def on_mesh(self):
        """A context in which functions of the weights are called."""
        return jax.set_mesh(self.mesh or sharding.mesh_of(self.weights))

    # ---- what is compiled

    def _run_read(self, arrays):
        return jax.tree.map(lambda x: sharding.constrain(x, *(None,) * x.ndim), arrays)

    def _run_prefill(
        self, weights, embeds, lengths, budget, seeds, prompt_ids, forced, images=None,
        *, policy, capacity, slots, places=0,
    ):  # fmt: skip
        B, dtype = len(lengths), weights["llm"]["table"].dtype
        embeds = sharding.constrain(embeds.astype(dtype), "act_batch", None, None)
        placed = None
        if images is not None:
            placed = self.llm.place(weights["llm"], *images[:3], places)
        keys, values, hidden, *states = self.llm.read_prompts(
            weights["llm"], embeds, lengths, slots, placed, whole=self.keeps_states
        )
        states = [jnp.pad(x, ((0, 0), (0, slots - x.shape[1]), (0, 0))) for x in states]
        no, zero = jnp.zeros(B, bool), jnp.zeros(B, jnp.int32)
        state = State(
            keys=keys,
            values=values,
            length=lengths,
            embed=jnp.zeros((B, self.llm.cfg.width), dtype),
            unread=no,
            count=zero,
            budget=budget,
            paused=no,
            done=no,
            ended=no,
            memory=policy.init(B, prompt_ids, self.llm.cfg.tokens),
            rng=row_keys(seeds),
            record=jnp.full((B, capacity), NOTHING, jnp.int32),
            recorded=jnp.zeros((B, capacity, policy.width), jnp.float32),
            forced=forced,
            images=placed,
            states=states[0] if states else None,
        )
        return self._emit(weights, state, hidden, ~no, policy)

    def _run_extend(
        self, weights, state: State, block, lengths, budget, images=None, *, policy, turn: bool
    ):
        s, rows = state, lengths > 0
        if turn:
            s = dataclasses.replace(
                s,
                count=jnp.where(rows, 0, s.count),
                budget=jnp.where(rows, budget, s.budget),
                ended=s.ended & ~rows,
                memory=_where(rows, policy.init(len(rows), jnp.full((len(rows), 1), -1),
                                                self.llm.cfg.tokens), s.memory),
            )  # fmt: skip
        # What was emitted last stands before the block; where it was read, the block moves up.
        block = jnp.concatenate([s.embed[:, None], block.astype(s.embed.dtype)], axis=1)
        first = jnp.where(s.unread, 0, 1)
        order = jnp.minimum(jnp.arange(block.shape[1]) + first[:, None], block.shape[1] - 1)
        block = jnp.take_along_axis(block, order[:, :, None], axis=1)
        lengths = jnp.where(rows, lengths + s.unread, 0)
        placed = self._with_more(weights, s, images)
        keys, values, hidden, *states = self.llm.read_block(
            weights["llm"], s.keys, s.values, s.length, block, lengths, placed,
            whole=self.keeps_states,
        )  # fmt: skip
        s = dataclasses.replace(
            s,
            keys=keys,
            values=values,
            length=s.length + lengths,
            paused=s.paused & ~rows,
            done=jnp.where(rows, s.count >= s.budget, s.done),
            images=placed,
            states=_kept(s.states, s.length, lengths, *states),
        )
        return self._emit(weights, s, hidden, rows & ~s.done, policy)

    def _with_more(self, weights, s: State, images) -> PlacedImages | None:
        """The images of the rows and those of a block that is appended to them."""
        if images is None or s.images is None:
            return s.images
        maps, start, end, first = images
        at = s.length + s.unread  # where the block begins
        shift = lambda x: jnp.where(  # noqa: E731
            x < NOWHERE, x + at.reshape(-1, *(1,) * (x.ndim - 1)), NOWHERE
        )
        new = self.llm.place(weights["llm"], maps, shift(start), shift(end))
        return s.images.before(shift(first)).and_then(new)

    def _run_loop(self, weights, state: State, steps, *, policy):
        def more(carry):
            s, made = carry
            return (made < steps) & ~(s.done | s.paused).all()

        def body(carry):
            s, made = carry
            return self.step(weights, s, policy), made + 1

        return lax.while_loop(more, body, (state, jnp.int32(0)))[0]

    def step(self, weights, s: State, policy: Policy) -> State:
        """Reads each row's last token and emits its next; what the loop repeats."""
        active = ~(s.done | s.paused)
        # Rows that wait write into their next slot, too, but no one may look there.
        keys, values, hidden = self.llm.read_token(
            weights["llm"], s.keys, s.values, s.length, s.embed, s.images
        )
        own = [hidden.T[:, None]] if self.keeps_states else []
        states = _kept(s.states, s.length, active, *own)
        s = dataclasses.replace(
            s, keys=keys, values=values, length=s.length + active, states=states
        )
        return self._emit(weights, s, hidden, active, policy)

    def _emit(self, weights, s: State, hidden, active, policy: Policy) -> State:
        """Has the policy decide what the active rows emit, from float[D, B] hidden states."""
        B, M = s.record.shape
        at = jnp.minimum(s.count, M - 1)[:, None]
        step = Step(
            active, s.count, step_keys(s.rng, s.count),
            jnp.take_along_axis(s.forced, at, axis=1)[:, 0],
        )  # fmt: skip
        model = Model(self.llm, weights["llm"], weights["parts"])
        memory, out = policy.emit(s.memory, hidden, step, model)
        emits = active & (out.ids != NOTHING)
        where = jnp.where(emits, s.count, M)  # M: dropped
        rows = jnp.arange(B)
        count = s.count + emits
        return dataclasses.replace(
            s,
            embed=jnp.where(emits[:, None], out.embed, s.embed),
            unread=jnp.where(active, emits, s.unread),
            count=count,
            paused=s.paused | (active & out.pause),
            done=s.done | (active & (out.stop | (count >= s.budget))),
            ended=s.ended | (active & out.stop),
            memory=_where(active, memory, s.memory),
            record=s.record.at[rows, where].set(out.ids, mode="drop"),
            recorded=s.recorded.at[rows, where].set(out.value, mode="drop"),
        )


def _kept(states, filled, lengths, new=None):
    """States [B, S, D] with the first `lengths` of new: [B, n, D] after those that are filled."""
    if new is None:
        return states
    at = jnp.arange(new.shape[1])
    slots = jnp.where(at < lengths[:, None], filled[:, None] + at, states.shape[1])
    return states.at[jnp.arange(len(states))[:, None], slots].set(new, mode="drop")


def _where(rows, new, old):
    """`new` for these rows, `old` for the others, of pytrees with leaves [B, ...]."""
    choose = lambda a, b: jnp.where(rows.reshape(-1, *(1,) * (a.ndim - 1)), a, b)  # noqa: E731
    return jax.tree.map(choose, new, old)


def _spread(values: Sequence, rows: Sequence[int], count: int, missing) -> list:
    """One for each of so many rows: the values for `rows`, `missing` for the others."""
    spread = [missing] * count
    for row, value in zip(rows, values, strict=True):
        spread[row] = value
    return spread


def _check_places(state: State, images: Sequence[RowImages | None]) -> None:
    """Raises ValueError where a row gets more images than it has places for."""
    most = max((len(x.start) for x in images if x is not None), default=0)
    places = 0 if state.images is None else state.images.start.shape[1]
    if most > places:
        raise ValueError(f"{most} images don't fit the {places} places of a row")


def padded(rows: Sequence, length: int, dtype, fill) -> np.ndarray:
    """[B, length, ...] of rows [n, ...], filled up on the right; longer ones are cut."""
    rows = [np.asarray(row, dtype)[:length] for row in rows]
    out = np.full((len(rows), length, *rows[0].shape[1:]), fill, dtype)
    for to, row in zip(out, rows, strict=True):
        to[: len(row)] = row
    return out
