"""The weights of a language model for decoding, taken over from the layout of training.

    training: stacked over layers            decoding: a dict for each layer
    q_proj, k_proj, v_proj  [n, D, F]   ->   qkv      [3 F, D], in the order of shards on a mesh
    gate_proj, up_proj      [n, D, F]   ->   gate_up  [2 F, D]
    adapters (LoRA)                     ->   added to their kernels

Kernels are cast, or packed into 8 or 4 bits, on the way (`nn/quantized.py`), one after the other,
so that model and packed model are never held whole at once. What the forward pass makes of them is
in `cached_llm.py`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from metamorph_jax.models import lora
from metamorph_jax.models.llm.llama import LlamaConfig
from metamorph_jax.nn import quantized
from metamorph_jax.nn.linear import in_bfloat16
from metamorph_jax.sampling import WEIGHTS
from metamorph_jax.sampling.cached_llm import CachedLLM


def take_over(llm, weights: str = "auto", mesh: Mesh | None = None) -> tuple[CachedLLM, dict]:
    """The language model as decoding reads it; its parameters leave the `Llama` one by one.

    What was taken is a ShapeDtypeStruct in `llm` afterwards, so the most that is held at a time is
    the model and one stacked kernel. Adapters are added to their kernels.

    Args:
        llm: `Llama`; whoever needs it afterwards hands in another one, with variables of its own
            over the same arrays.
        weights: how kernels and the output table are kept, one of `WEIGHTS`; "auto": as the model
            computes, rounded to bfloat16 where its products are.
        mesh: to lie on; None: where the parameters are.

    Returns:
        (functions, weights). The weights are a dict: table: [V + n, D]; head: {w: the same, one
        array when tied and kept alike}; norm; layers: a dict each, with {w: [out, in]} for a
        kernel, beside it b: [out] where there is a bias and scale: float32[out] where w is int8.
        With "nf4", codes: uint8[out, n], two a byte, and blocks: float32[out, in / 64] stand in
        place of w, and the output table is int8. Where the model has a prefix, a layer has it as
        prefix: {k, v: [n, K, H]}. Where it has an insert, inserts: a state for each of its blocks,
        kernels as the model computes.

    Raises:
        ValueError: on an unknown kind of weights.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r} is none of {', '.join(WEIGHTS)}")
    model = CachedLLM(llm.cfg, 1 if mesh is None else mesh.shape["tensor"], llm.insert)
    return model, _Taking(model, weights, mesh).all_of(llm)


def kernel_dtype(cfg: LlamaConfig, weights: str):
    """The dtype in which kernels are kept; that in which they are best loaded to be packed."""
    if weights in quantized.METHODS:
        return jnp.dtype(jnp.bfloat16)
    if weights != "auto":
        return jnp.dtype(weights)
    return jnp.dtype(jnp.bfloat16) if in_bfloat16() else jnp.dtype(cfg.dtype)


class _Taking:
    """The work of `take_over`: kernels are unstacked one after the other, then fused by layer."""

    def __init__(self, model: CachedLLM, weights: str, mesh: Mesh | None):
        self.model, self.cfg, self.mesh = model, model.cfg, mesh
        self.method = weights if weights in quantized.METHODS else ""
        self.dtype = kernel_dtype(model.cfg, weights)
        self.compute = jnp.dtype(model.cfg.dtype)
        self._compiled = {}

    def all_of(self, llm) -> dict:
        attention, mlp = llm.layers.self_attn, llm.layers.mlp
        sources = {
            "qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
            "o": [attention.o_proj],
            "gate_up": [mlp.gate_proj, mlp.up_proj],
            "down": [mlp.down_proj],
        }
        layers = [{} for _ in range(self.cfg.layers)]
        for name, linears in sources.items():
            parts = [self._unstack(name, linear) for linear in linears]
            for layer in layers:
                layer[name] = self._fuse(name, [part.pop(0) for part in parts])
        norms = {"norm1": llm.layers.input_layernorm, "norm2": llm.layers.post_attention_layernorm}
        if self.cfg.qk_norm:
            norms |= {"q_norm": attention.q_norm, "k_norm": attention.k_norm}
        for name, module in norms.items():
            for layer, scale in zip(layers, self._rows(module.scale), strict=True):
                layer[name] = scale
        for layer, prefix in zip(layers, self._prefixes(llm.prefix), strict=False):
            layer["prefix"] = prefix
        table, head = self._tables(llm)
        (norm_scale,) = self._rows(llm.norm.scale, stacked=False)
        weights = {"table": table, "head": head, "norm": norm_scale, "layers": layers}
        if self.model.insert is not None:
            weights["inserts"] = self._blocks(llm.inserts)
        return weights

    def _run(self, key, function, arguments, specs):
        """`function` compiled once for `key`, its results where `specs` says."""
        if key not in self._compiled:
            where = None
            if self.mesh is not None:
                where = jax.tree.map(
                    lambda spec: NamedSharding(self.mesh, spec), specs,
                    is_leaf=lambda x: isinstance(x, P),
                )  # fmt: skip
            self._compiled[key] = jax.jit(function, out_shardings=where)
        return self._compiled[key](*arguments)

    def _specs(self, name: str, kept: dict) -> dict:
        return {leaf: self.model.spec(name, leaf) for leaf in kept}

    def _keep(self, w, method: str) -> dict:
        """A matrix [out, in] in the form in which it is kept."""
        if not method:
            return {"w": w.astype(self.dtype)}
        return _transposed(quantized.pack(w.T, method))

    def _unstack(self, name: str, linear) -> list[dict]:
        """The linear of each layer, [out, in]; its stacked leaves are given up."""
        graph, stack = nnx.split(linear)
        stack = jax.tree.map(lambda leaf: leaf, stack)  # variables of its own
        _give_up(linear)

        def one(stack, i):
            module = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[i], stack))
            packed_alike = quantized.is_packed(module) and module.method == self.method
            if packed_alike and not isinstance(module, lora.LoraLinear):
                leaves = {"kernel_codes": module.kernel_codes, "kernel_scale": module.kernel_scale}
                kept = _transposed({name: leaf[...] for name, leaf in leaves.items()})
            else:
                kept = self._keep(lora.kernel_of(module).T, self.method)
            if module.bias is not None:
                kept["b"] = module.bias[...].astype(self.compute)
            return kept

        leaves = [*_LEAVES[self.method]] + ["b"] * (linear.bias is not None)
        specs = self._specs(name, dict.fromkeys(leaves))
        key = object()  # of this linear alone
        found = [self._run(key, one, (stack, i), specs) for i in range(self.cfg.layers)]
        del self._compiled[key]
        return found

    def _fuse(self, name: str, parts: list[dict]) -> dict:
        """Linears as one, their outputs in the order of shards."""
        if len(parts) == 1:
            return parts[0]
        shards = self.model.mlp_shards if name == "gate_up" else self.model.head_shards

        def fuse(*parts):
            def join(*xs):
                cut = [x.reshape(shards, -1, *x.shape[1:]) for x in xs]
                return jnp.concatenate(cut, 1).reshape(-1, *xs[0].shape[1:])

            return jax.tree.map(join, *parts)

        return self._run(name, fuse, parts, self._specs(name, parts[0]))

    def _rows(self, variable, stacked: bool = True) -> list:
        """A vector of each layer."""
        value = variable[...]
        _give_up(variable)
        split = lambda x: [x[i] for i in range(len(x))] if stacked else [x]  # noqa: E731
        return self._run(object(), split, (value,), P(None))

    def _prefixes(self, prefix) -> list[dict]:
        """The keys and values of each layer; [] without a prefix."""
        if prefix is None:
            return []
        graph, state = nnx.split(prefix)

        def make(state):
            both = nnx.merge(graph, state)()
            k, v = (x.astype(self.compute) for x in both)
            return [{"k": k[i], "v": v[i]} for i in range(self.cfg.layers)]

        specs = [self._specs("prefix", {"k": 0, "v": 0})] * self.cfg.layers
        return self._run(object(), make, (state,), specs)

    def _blocks(self, inserts) -> list[nnx.State]:
        """The blocks of the insert, one by one."""
        count = self.model.insert.count(self.cfg.layers)
        state = jax.tree.map(lambda leaf: leaf, nnx.state(inserts))  # variables of its own
        specs = jax.tree.leaves(self.model.block_specs(state), is_leaf=lambda x: isinstance(x, P))
        leaves, form = jax.tree_util.tree_flatten_with_path(state)
        del state
        _give_up(inserts)
        blocks = [[] for _ in range(count)]
        for spec in specs:
            path, stack = leaves.pop(0)
            kernel = any(getattr(key, "key", None) == "kernel" for key in path)
            dtype = self.compute if kernel else stack.dtype
            split = lambda x, dtype=dtype: [x[i].astype(dtype) for i in range(count)]  # noqa: E731
            for block, leaf in zip(
                blocks, self._run(object(), split, (stack,), [P(*spec[1:])] * count), strict=True
            ):
                block.append(leaf)
        return [jax.tree.unflatten(form, block) for block in blocks]

    def _tables(self, llm) -> tuple[jax.Array, dict]:
        """(table of embeddings, output table as it is kept)."""
        pad = self.model.table_rows - self.cfg.tokens

        def whole(holder, value):
            value = value[: self.cfg.vocab_size].astype(self.compute)
            if self.cfg.added_tokens:
                value = jnp.concatenate([value, holder.astype(self.compute)])
            return jnp.pad(value, ((0, pad), (0, 0)))

        def take(holder, variable, transposed: bool):
            added = holder.added[...] if self.cfg.added_tokens else None
            value = variable[...]
            _give_up(holder)
            made = lambda a, v: whole(a, v.T if transposed else v)  # noqa: E731
            return self._run(object(), made, (added, value), self.model.spec("table"))

        table = take(llm.embed_tokens, llm.embed_tokens.embedding, False)
        bias = llm.head_bias()
        head = table if self.cfg.tied else take(llm.lm_head, llm.lm_head.kernel, True)
        kept = {"w": head}
        if self.method or head.dtype != self.dtype:
            method = "int8" if self.method else ""  # every id depends on it, so never fewer bits
            specs = self._specs("head", dict.fromkeys(_LEAVES[method]))
            kept = self._run(object(), lambda head: self._keep(head, method), (head,), specs)
        if bias is not None:
            join = lambda *parts: jnp.pad(jnp.concatenate(parts), (0, pad))  # noqa: E731
            parts = tuple(x for x in bias if x is not None)
            kept["b"] = self._run(object(), join, parts, self.model.spec("head", "b"))
        return table, kept


_LEAVES = {"": ("w",), "int8": ("w", "scale"), "nf4": ("codes", "blocks")}


def _transposed(packed: dict) -> dict:
    """What `quantized.pack` made of a kernel [in, out], as decoding keeps it."""
    codes, scale = packed["kernel_codes"].T, packed["kernel_scale"]
    if scale.ndim == 1:
        return {"w": codes, "scale": scale}
    return {"codes": codes, "blocks": scale.T}


def _give_up(holder) -> None:
    """Puts shapes in place of the arrays of a module or variable."""
    variables = [holder] if isinstance(holder, nnx.Variable) else [
        variable for _, variable in nnx.to_flat_state(nnx.state(holder))
    ]  # fmt: skip
    for variable in variables:
        value = variable.get_raw_value()
        variable.set_raw_value(jax.ShapeDtypeStruct(value.shape, value.dtype))
