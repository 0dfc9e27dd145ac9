"""Our modules against those of the library that their weights were made for, layer by layer.

Every function takes our module, the library's, and a numpy Generator for the inputs, and returns
name -> (ours, theirs): float32 arrays that should be equal. `check.py` judges them. Torch and what
stands on it is imported here only, when it is asked for (extra `oracle`).
"""

import pathlib
import re
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax.models.llm import llama as llm_models
from metamorph_jax.models.vision.vit import ViT
from metamorph_jax.nn import rope
from metamorph_jax.types import Conditioning

INSTALL = "pip install 'metamorph_jax[oracle]'"
LENGTH, BATCH = 24, 2

Rows = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> (ours, theirs)


# ---- the libraries


def oracle():
    """(torch, transformers), or an ImportError that says what to install."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise missing(error.name) from None
    return torch, transformers


def missing(name) -> ImportError:
    return ImportError(f"--check compares with {name}, which is not installed: {INSTALL}")


def transformers_model(kind: str) -> Callable:
    """folder -> the model of this class of transformers, in float32."""

    def load(folder: pathlib.Path):
        torch, transformers = oracle()
        model = getattr(transformers, kind).from_pretrained(
            str(folder), dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )
        return model.eval()

    return load


def diffusers_model(kind: str) -> Callable:
    """folder -> the model of this class of diffusers, in float32."""

    def load(folder: pathlib.Path):
        torch, _ = oracle()
        try:
            import diffusers.models as library
        except ImportError as error:
            raise missing(error.name) from None
        model = getattr(library, kind).from_pretrained(folder, torch_dtype=torch.float32)
        return model.eval()

    return load


def diffusers_from_config(fields: Mapping):
    """The model of diffusers that a config.json describes, with random weights."""
    oracle()
    try:
        import diffusers.models as library
    except ImportError as error:
        raise missing(error.name) from None
    return getattr(library, fields["_class_name"]).from_config(dict(fields))


def fill(model, tensors: Mapping) -> None:
    """Puts tensors into a torch model; ValueError for what is missing, but for tied and derived
    ones."""
    torch, _ = oracle()
    state = {k: torch.tensor(np.asarray(v, np.float32)) for k, v in tensors.items()}
    found = model.load_state_dict(state, strict=False)
    absent = [k for k in found.missing_keys if not re.search(r"rotary_emb|lm_head|head\.", k)]
    if absent:
        raise ValueError(f"{type(model).__name__}: not in the checkpoint: {', '.join(absent)}")


# ---- arrays


def to_torch(array):
    torch, _ = oracle()
    return torch.from_numpy(np.ascontiguousarray(array))


def _nchw(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)


def to_numpy(x) -> np.ndarray:
    return np.asarray(x.detach().float().numpy() if hasattr(x, "detach") else x, np.float32)


def run(function: Callable, *modules_and_arrays):
    """jit(function) with modules among the arguments."""
    split = [nnx.split(x) if isinstance(x, nnx.Module) else (None, x) for x in modules_and_arrays]
    graphs = [graph for graph, _ in split]

    def pure(*values):
        pairs = zip(graphs, values, strict=True)
        return function(*(v if g is None else nnx.merge(g, v) for g, v in pairs))

    return jax.jit(pure)(*(value for _, value in split))


def _layers(stack: nnx.Module, count: int, call: Callable, x) -> Iterable:
    """The state after each of `count` stacked layers; compiles one of them once."""
    graph, weights = nnx.split(stack)
    one = jax.jit(lambda w, x: call(nnx.merge(graph, w), x))
    for i in range(count):
        x = one(jax.tree.map(lambda w, i=i: w[i], weights), x)
        yield x


# ---- one function per kind of model


def vit(tower: ViT, model, rng, output=None) -> Rows:
    torch, _ = oracle()
    cfg = tower.cfg
    pixels = rng.normal(size=(BATCH, cfg.size, cfg.size, 3)).astype(np.float32)
    with torch.no_grad():
        out = model(to_torch(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    x = run(lambda t, p: t.embed(p), tower, jnp.asarray(pixels))
    rows = {"embeddings": (to_numpy(x), to_numpy(out.hidden_states[0]))}
    layers = _layers(tower.layers, cfg.held, lambda layer, x: layer(x), x) if cfg.held else ()
    for i, x in enumerate(layers):
        rows[f"layer {i}"] = (to_numpy(x), to_numpy(out.hidden_states[i + 1]))
    if not cfg.has_norm:
        return rows
    normed = run(lambda t, x: t.post_layernorm(x), tower, x)
    if cfg.layout == "clip":
        rows["pooled"] = (to_numpy(normed[:, 0]), to_numpy(out.pooler_output))
        return rows
    rows["final norm"] = (to_numpy(normed), to_numpy(out.last_hidden_state))
    if cfg.pool:
        pooled = run(lambda t, x: t.head(x), tower, normed)
        rows["pooled"] = (to_numpy(pooled), to_numpy(out.pooler_output))
    return rows


def hidden_states(llm: llm_models.Llama, embeds) -> tuple[list, jax.Array]:
    """(hidden states as transformers lists them, logits) of float[B, L, D], causal."""
    B, L, _ = embeds.shape
    cfg = llm.cfg
    freq = rope.frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    cos, sin = rope.angles(jnp.tile(jnp.arange(L), (B, 1)), freq)
    mask = jnp.tile(jnp.tril(jnp.ones((L, L), bool)), (B, 1, 1))
    x = embeds.astype(cfg.dtype)
    call = lambda layer, x: layer(x, cos, sin, mask)  # noqa: E731
    states = [x, *_layers(llm.layers, cfg.layers, call, x)]
    states[-1], logits = run(lambda m, x: (m.norm(x), m.logits(m.norm(x))), llm, states[-1])
    return states, logits


def llm_rows(states, logits, out) -> Rows:
    theirs = out.hidden_states
    rows = {"embeddings": (to_numpy(states[0]), to_numpy(theirs[0]))}
    rows |= {f"layer {i}": (to_numpy(states[i + 1]), to_numpy(theirs[i + 1]))
             for i in range(len(states) - 2)}  # fmt: skip
    rows[f"layer {len(states) - 2}, final norm"] = (to_numpy(states[-1]), to_numpy(theirs[-1]))
    rows["logits"] = (to_numpy(logits), to_numpy(out.logits))
    return rows


def llama(llm: llm_models.Llama, model, rng) -> Rows:
    torch, _ = oracle()
    ids = rng.integers(0, llm.cfg.tokens, (BATCH, LENGTH))
    with torch.no_grad():
        out = model(to_torch(ids), output_hidden_states=True)
    states, logits = hidden_states(llm, run(lambda m, t: m.embed_tokens(t), llm, jnp.asarray(ids)))
    rows = llm_rows(states, logits, out)
    packed = run(_packed_logits, llm, jnp.asarray(ids.reshape(1, -1)))
    rows["logits, packed"] = (to_numpy(packed.reshape(logits.shape)), to_numpy(out.logits))
    return rows


def _packed_logits(llm, ids):
    """Logits of BATCH samples of LENGTH that are packed into one row."""
    segments = jnp.repeat(jnp.arange(1, BATCH + 1), LENGTH)[None]
    mask = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool)) & (
        segments[:, :, None] == segments[:, None]
    )
    positions = jnp.tile(jnp.arange(LENGTH), BATCH)[None]
    return llm.logits(llm(llm.embed_tokens(ids), positions, mask))


def clip_text(tower, model, rng) -> Rows:
    torch, _ = oracle()
    cfg = tower.cfg
    ids = rng.integers(0, cfg.vocab_size, (BATCH, cfg.max_position_embeddings))
    end = cfg.vocab_size - 1 if cfg.eos_token_id == 2 else min(cfg.eos_token_id, cfg.vocab_size - 1)
    ids[:, -1] = end
    with torch.no_grad():
        out = model(to_torch(ids), output_hidden_states=True)

    def ours(tower, ids):
        out = tower(ids)
        return out.hidden, out.last, out.pooled

    hidden, last, pooled = run(ours, tower, jnp.asarray(ids))
    names = ["embeddings", *(f"layer {i}" for i in range(len(hidden) - 1))]
    # transformers 5 puts the final norm into its last entry; the last state is compared below.
    pairs = list(zip(names, hidden, out.hidden_states, strict=True))[:-1]
    rows = {name: (to_numpy(a), to_numpy(b)) for name, a, b in pairs}
    rows[f"{names[-1]}, final norm"] = (to_numpy(last), to_numpy(out.last_hidden_state))
    rows["pooled"] = (to_numpy(pooled), to_numpy(out.pooler_output))
    return rows


def _hooked(model, names: dict[str, str], call: Callable) -> dict:
    """Outputs of submodules (our name -> theirs) during call()."""
    torch, _ = oracle()
    seen, handles = {}, []
    for ours, theirs in names.items():
        keep = lambda _m, _i, out, ours=ours: seen.__setitem__(  # noqa: E731
            ours, out[0] if isinstance(out, tuple) else out
        )
        handles.append(model.get_submodule(theirs).register_forward_hook(keep))
    with torch.no_grad():
        seen["out"] = call()
    for handle in handles:
        handle.remove()
    return seen


def unet(unet, model, rng) -> Rows:
    cfg = unet.cfg
    side = min(cfg.sample_size, 32)  # what is compared doesn't need the full size
    x = rng.normal(size=(BATCH, side, side, cfg.in_channels)).astype(np.float32)
    context = rng.normal(size=(BATCH, 7, cfg.cross_attention_dim)).astype(np.float32)
    t = np.array([10, 700])

    def ours(unet, x, t, context):
        probes = {}
        out = unet(x, t, Conditioning(context), probes=probes)
        return probes | {"out": out}

    levels = len(cfg.block_out_channels)
    names = {"time_embedding": "time_embedding", "conv_in": "conv_in"}
    names |= {f"down_{i}": f"down_blocks.{i}" for i in range(levels)} | {"mid": "mid_block"}
    names |= {f"up_{i}": f"up_blocks.{i}" for i in range(levels)}
    theirs = _hooked(
        model, names, lambda: model(to_torch(_nchw(x)), to_torch(t), to_torch(context)).sample
    )
    found = run(ours, unet, *map(jnp.asarray, (x, t, context)))
    return _maps(found, theirs, [*names, "out"])


def vae(vae, model, rng) -> Rows:
    cfg = vae.cfg
    side = min(cfg.sample_size, 64)
    image = rng.uniform(-1, 1, (1, side, side, cfg.in_channels)).astype(np.float32)
    small = side // cfg.shrink
    latent = rng.normal(size=(1, small, small, cfg.latent_channels)).astype(np.float32)

    def encode(vae, x):
        seen, part = {}, vae.encoder
        y = seen["encoder.conv_in"] = part.conv_in(x)
        for i, block in enumerate(part.down_blocks):
            y = seen[f"encoder.down_blocks.{i}"] = block(y)
        seen["encoder.mid_block"] = part.mid_block(y)
        return seen | {"out": vae.moments(x)}

    def decode(vae, z):
        seen, part = {}, vae.decoder
        y = seen["decoder.conv_in"] = part.conv_in(vae.post_quant_conv(z))
        y = seen["decoder.mid_block"] = part.mid_block(y)
        for i, block in enumerate(part.up_blocks):
            y = seen[f"decoder.up_blocks.{i}"] = block(y)
        return seen | {"out": vae.decode(z)}

    rows = {}
    for title, function, x, call in (
        ("moments", encode, image, lambda x: model.encode(x).latent_dist.parameters),
        ("decoded", decode, latent, lambda x: model.decode(x).sample),
    ):
        found = run(function, vae, jnp.asarray(x))
        names = [name for name in found if name != "out"]
        names.sort(key=lambda n: ("conv_in" not in n, "mid" in n and "encoder" in n,
                                  "up" in n, n))  # fmt: skip
        given = to_torch(_nchw(x))
        theirs = _hooked(model, {n: n for n in names}, lambda g=given, c=call: c(g))
        found[title], theirs[title] = found.pop("out"), theirs.pop("out")
        rows |= _maps(found, theirs, [*names, title])
    return rows


def _maps(ours: dict, theirs: dict, names: Iterable[str]) -> Rows:
    """Feature maps, ours channels last."""
    flat = lambda x: _nchw(x) if np.ndim(x) == 4 else x  # noqa: E731
    return {n: (to_numpy(flat(ours[n])), to_numpy(theirs[n])) for n in names}
