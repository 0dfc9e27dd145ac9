"""Parity with the library that a checkpoint was made for: `metamorph convert --check SPEC`.

Both sides read the same folder or file (`oracles` has the other one, from the `oracle` extra), get
the same inputs, and are compared layer by layer:

    language models    hidden states, logits, logits of two samples packed into one row
    towers             hidden states, final norm, SigLIP's and CLIP's picture vector
    text towers        hidden states, last state, pooled vector
    UNet               every block of one step; autoencoder: every block, moments, decoded picture
    LLaVA              tower, projected picture tokens, language model, logits with a picture
    MetaMorph          tower, connector, head and language model, each against its torch module

A difference counts relative to the larger of 1 and the largest value of the reference, since hidden
states of trained models have single channels in the thousands. Two float32 copies must fit into
memory.
"""

import re
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax.convert import llama as llama_names
from metamorph_jax.convert import oracles
from metamorph_jax.convert.oracles import oracle
from metamorph_jax.models.llm import llama
from metamorph_jax.models.vision.vit import ViT
from metamorph_jax.nn import rope
from metamorph_jax.types import Conditioning

Rows = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> (ours, theirs)
LENGTH, BATCH, SEED = 24, 2, 0


def run(spec: str, *, tolerance: float = 1e-4, dtype: str = "float32") -> bool:
    """Compares a checkpoint on both sides and prints a table of differences.

    Args:
        spec: as configs name weights: "hf:OWNER/NAME", a folder (of diffusers, too), a GGUF or
            ONNX file, "pkg:NAME".
        tolerance: largest accepted relative difference.
        dtype: that our side computes in; the reference is float32.

    Returns:
        Whether every difference is within the tolerance (and finite).

    Raises:
        ImportError: without torch, transformers, diffusers or onnxruntime; says what to install.
        ValueError: if a spec has no other side; says why.
    """
    oracle()
    good = True
    for pair in oracles.pairs(spec):
        title = f"{spec}{pair.title}: {pair.family.name}"
        print(f"{title}, ours ({dtype}) against {pair.library}", flush=True)
        good &= report(compare(pair, dtype), tolerance)
    return good


def report(rows: Rows, tolerance: float) -> bool:
    """Prints one line per entry; whether all are within the tolerance."""
    good = True
    width = max(len(name) for name in rows)
    print(f"  {'':<{width}}  largest difference     of values up to    relative")
    for name, (ours, theirs) in rows.items():
        if ours.shape != theirs.shape:
            print(f"  {name:<{width}}  shape {ours.shape}, expected {theirs.shape}")
            good = False
            continue
        difference = np.abs(np.float64(ours) - np.float64(theirs)).max()
        scale = np.abs(np.float64(theirs)).max()
        relative = difference / max(1.0, scale)
        fine = bool(relative <= tolerance)  # a NaN is not
        mark = "" if fine else f"  > {tolerance:g}"
        print(f"  {name:<{width}}  {difference:18.3e}  {scale:18.3e}  {relative:10.3e}{mark}")
        good &= fine
    print("  equal within the tolerance" if good else f"  DIFFERENT: above {tolerance:g}")
    return good


def compare(pair: oracles.Pair, dtype: str = "float32") -> Rows:
    """Loads both sides of one model and runs them on the same inputs."""
    family, changes = pair.family, dict(pair.changes)
    if dtype != "float32":
        changes["dtype"] = dtype
    cfg = family.config_from_hf(pair.fields, **changes)
    ours = nnx.eval_shape(lambda: family.create(cfg, rngs=nnx.Rngs(0)))
    family.load(ours, pair.tensors)
    theirs = pair.theirs()
    with jax.default_matmul_precision("highest"):
        return _COMPARE[family.name](ours, theirs, np.random.default_rng(SEED))


def _torch(array, **kw):
    torch, _ = oracle()
    return torch.from_numpy(np.ascontiguousarray(array))


def _nchw(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)


def _numpy(x) -> np.ndarray:
    return np.asarray(x.detach().float().numpy() if hasattr(x, "detach") else x, np.float32)


def _run(function: Callable, *modules_and_arrays):
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


def _vit(tower: ViT, model, rng, output=None) -> Rows:
    torch, _ = oracle()
    cfg = tower.cfg
    pixels = rng.normal(size=(BATCH, cfg.size, cfg.size, 3)).astype(np.float32)
    with torch.no_grad():
        out = model(_torch(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    x = _run(lambda t, p: t.embed(p), tower, jnp.asarray(pixels))
    rows = {"embeddings": (_numpy(x), _numpy(out.hidden_states[0]))}
    layers = _layers(tower.layers, cfg.held, lambda layer, x: layer(x), x) if cfg.held else ()
    for i, x in enumerate(layers):
        rows[f"layer {i}"] = (_numpy(x), _numpy(out.hidden_states[i + 1]))
    if not cfg.has_norm:
        return rows
    normed = _run(lambda t, x: t.post_layernorm(x), tower, x)
    if cfg.layout == "clip":
        rows["pooled"] = (_numpy(normed[:, 0]), _numpy(out.pooler_output))
        return rows
    rows["final norm"] = (_numpy(normed), _numpy(out.last_hidden_state))
    if cfg.pool:
        pooled = _run(lambda t, x: t.head(x), tower, normed)
        rows["pooled"] = (_numpy(pooled), _numpy(out.pooler_output))
    return rows


def _hidden(llm: llama.Llama, embeds) -> tuple[list, jax.Array]:
    """(hidden states as transformers lists them, logits) of float[B, L, D], causal."""
    B, L, _ = embeds.shape
    cfg = llm.cfg
    freq = rope.frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    cos, sin = rope.angles(jnp.tile(jnp.arange(L), (B, 1)), freq)
    mask = jnp.tile(jnp.tril(jnp.ones((L, L), bool)), (B, 1, 1))
    x = embeds.astype(cfg.dtype)
    call = lambda layer, x: layer(x, cos, sin, mask)[0]  # noqa: E731
    states = [x, *_layers(llm.layers, cfg.layers, call, x)]
    states[-1], logits = _run(lambda m, x: (m.norm(x), m.logits(m.norm(x))), llm, states[-1])
    return states, logits


def _llm_rows(states, logits, out) -> Rows:
    theirs = out.hidden_states
    rows = {"embeddings": (_numpy(states[0]), _numpy(theirs[0]))}
    rows |= {f"layer {i}": (_numpy(states[i + 1]), _numpy(theirs[i + 1]))
             for i in range(len(states) - 2)}  # fmt: skip
    rows[f"layer {len(states) - 2}, final norm"] = (_numpy(states[-1]), _numpy(theirs[-1]))
    rows["logits"] = (_numpy(logits), _numpy(out.logits))
    return rows


def _llama(llm: llama.Llama, model, rng) -> Rows:
    torch, _ = oracle()
    ids = rng.integers(0, llm.cfg.tokens, (BATCH, LENGTH))
    with torch.no_grad():
        out = model(_torch(ids), output_hidden_states=True)
    states, logits = _hidden(llm, _run(lambda m, t: m.embed_tokens(t), llm, jnp.asarray(ids)))
    rows = _llm_rows(states, logits, out)
    packed = _run(_packed_logits, llm, jnp.asarray(ids.reshape(1, -1)))
    rows["logits, packed"] = (_numpy(packed.reshape(logits.shape)), _numpy(out.logits))
    return rows


def _packed_logits(llm, ids):
    """Logits of BATCH samples of LENGTH that stand in one row."""
    segments = jnp.repeat(jnp.arange(1, BATCH + 1), LENGTH)[None]
    mask = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool)) & (
        segments[:, :, None] == segments[:, None]
    )
    positions = jnp.tile(jnp.arange(LENGTH), BATCH)[None]
    return llm.logits(llm(llm.embed_tokens(ids), positions, mask))


def _clip_text(tower, model, rng) -> Rows:
    torch, _ = oracle()
    cfg = tower.cfg
    ids = rng.integers(0, cfg.vocab_size, (BATCH, cfg.max_position_embeddings))
    end = cfg.vocab_size - 1 if cfg.eos_token_id == 2 else min(cfg.eos_token_id, cfg.vocab_size - 1)
    ids[:, -1] = end
    with torch.no_grad():
        out = model(_torch(ids), output_hidden_states=True)

    def ours(tower, ids):
        out = tower(ids)
        return out.hidden, out.last, out.pooled

    hidden, last, pooled = _run(ours, tower, jnp.asarray(ids))
    names = ["embeddings", *(f"layer {i}" for i in range(len(hidden) - 1))]
    # transformers 5 puts the final norm into its last entry; the last state is compared below.
    pairs = list(zip(names, hidden, out.hidden_states, strict=True))[:-1]
    rows = {name: (_numpy(a), _numpy(b)) for name, a, b in pairs}
    rows[f"{names[-1]}, final norm"] = (_numpy(last), _numpy(out.last_hidden_state))
    rows["pooled"] = (_numpy(pooled), _numpy(out.pooler_output))
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


def _unet(unet, model, rng) -> Rows:
    cfg = unet.cfg
    side = min(cfg.sample_size, 32)  # what is compared doesn't need the full picture
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
        model, names, lambda: model(_torch(_nchw(x)), _torch(t), _torch(context)).sample
    )
    found = _run(ours, unet, *map(jnp.asarray, (x, t, context)))
    return _maps(found, theirs, [*names, "out"])


def _vae(vae, model, rng) -> Rows:
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
        found = _run(function, vae, jnp.asarray(x))
        names = [name for name in found if name != "out"]
        names.sort(key=lambda n: ("conv_in" not in n, "mid" in n and "encoder" in n,
                                  "up" in n, n))  # fmt: skip
        given = _torch(_nchw(x))
        theirs = _hooked(model, {n: n for n in names}, lambda g=given, c=call: c(g))
        found[title], theirs[title] = found.pop("out"), theirs.pop("out")
        rows |= _maps(found, theirs, [*names, title])
    return rows


def _maps(ours: dict, theirs: dict, names: Iterable[str]) -> Rows:
    """Feature maps, ours channels last."""
    flat = lambda x: _nchw(x) if np.ndim(x) == 4 else x  # noqa: E731
    return {n: (_numpy(flat(ours[n])), _numpy(theirs[n])) for n in names}


def _llava(model, theirs, rng) -> Rows:
    torch, _ = oracle()
    tower = model.vision.tower
    rows = {f"tower, {k}": v for k, v in _vit(tower, theirs.model.vision_tower, rng).items()}
    side, token = tower.cfg.size, theirs.config.image_token_id
    P = model.feature_shape[0]
    pixels = rng.normal(size=(BATCH, side, side, 3)).astype(np.float32)
    ids = rng.integers(0, token, (BATCH, P + LENGTH))
    ids[:, 3 : 3 + P] = token
    with torch.no_grad():
        images = _torch(pixels.transpose(0, 3, 1, 2))
        projected = theirs.get_image_features(pixel_values=images)
        out = theirs(input_ids=_torch(ids), pixel_values=images, output_hidden_states=True)
    projected = getattr(projected, "pooler_output", projected)
    projected = torch.stack(list(projected)) if isinstance(projected, list | tuple) else projected

    def embed(model, pixels, ids):
        visual = model.project(model.visual_features(pixels))
        text = model.embed_text(ids)
        return visual, jax.lax.dynamic_update_slice(text, visual.astype(text.dtype), (0, 3, 0))

    visual, embeds = _run(embed, model, jnp.asarray(pixels), jnp.asarray(ids))
    rows["projected"] = (_numpy(visual), _numpy(projected).reshape(visual.shape))
    return rows | _llm_rows(*_hidden(model.llm, embeds), out)


def _metamorph(model, theirs, rng) -> Rows:
    """Each part against a torch module made from the same tensors."""
    from metamorph_jax.convert import metamorph

    torch, transformers = oracle()
    tensors = theirs
    rows = {}
    fields = llama_names.config_to_hf(model.llm.cfg)
    llm = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{k: v for k, v in fields.items() if k not in ("model_type", "architectures")},
            attn_implementation="eager",
        )
    )
    _fill(llm, {k: v for k, v in tensors.items() if not k.startswith(metamorph.OWN)})
    rows |= {f"llm, {k}": v for k, v in _llama(model.llm, llm.eval(), rng).items()}
    if model.vision.tower is not None:
        tower = _metamorph_tower(model.vision.tower, tensors)
        rows |= {f"tower, {k}": v for k, v in _vit(model.vision.tower, tower, rng).items()}
    for name, part, prefix in (
        ("connector", model.connector, metamorph.CONNECTOR),
        ("head", model.head, metamorph.HEAD),
    ):
        if part is None or not len(part.linears):
            continue
        x = rng.normal(size=(BATCH, 3, part.linears[0].kernel.shape[0])).astype(np.float32)
        network = _sequential(
            {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)},
            torch.nn.Softmax(-1) if getattr(part, "kind", "") == "mlpsoftmax" else torch.nn.GELU(),
        )
        with torch.no_grad():
            wanted = network(_torch(x))
        rows[name] = (_numpy(_run(lambda m, x: m(x), part, jnp.asarray(x))), _numpy(wanted))
    return rows


def _fill(model, tensors) -> None:
    """load_state_dict that lists what doesn't fit; tied and derived keys aside."""
    torch, _ = oracle()
    state = {k: torch.tensor(np.asarray(v, np.float32)) for k, v in tensors.items()}
    found = model.load_state_dict(state, strict=False)
    missing = [k for k in found.missing_keys if not re.search(r"rotary_emb|lm_head|head\.", k)]
    if missing:
        raise ValueError(f"{type(model).__name__}: not in the checkpoint: {', '.join(missing)}")


def _metamorph_tower(tower: ViT, tensors):
    from metamorph_jax.convert import metamorph, vit

    _, transformers = oracle()
    fields = vit.config_to_hf(tower.cfg)
    kind = fields.pop("architectures")[0]
    own = {k: v for k, v in fields.items() if k not in ("model_type", "torch_dtype")}
    config = getattr(transformers, kind.replace("Model", "Config"))(**own)
    model = getattr(transformers, kind)._from_config(config, attn_implementation="eager")
    cut = {
        k[len(metamorph.TOWER) :]: v for k, v in tensors.items() if k.startswith(metamorph.TOWER)
    }
    if kind.startswith("Dinov2"):  # transformers 5 has its own names for these in memory
        renamed = (("attention.attention.query", "attention.q_proj"),
                   ("attention.attention.key", "attention.k_proj"),
                   ("attention.attention.value", "attention.v_proj"),
                   ("attention.output.dense", "attention.o_proj"))  # fmt: skip
        for old, new in renamed:
            cut = {k.replace(old, new): v for k, v in cut.items()}
    wanted = set(model.state_dict())
    _fill(model, {n: v for k, v in cut.items() if (n := k.removeprefix("vision_model.")) in wanted})
    return model.eval()


def _sequential(tensors, between):
    """Linear, activation, Linear … of a torch Sequential's tensors."""
    torch, _ = oracle()
    weights = sorted(k for k in tensors if k.endswith("weight"))
    parts = []
    for key in weights:
        w, b = tensors[key], tensors[key.replace("weight", "bias")]
        linear = torch.nn.Linear(w.shape[1], w.shape[0])
        linear.weight.data, linear.bias.data = (
            torch.tensor(np.asarray(x, np.float32)) for x in (w, b)
        )
        parts += [between, linear]
    return torch.nn.Sequential(*parts[1:])


_COMPARE = {
    "llama": _llama, "qwen2": _llama, "qwen3": _llama, "siglip": _vit, "clip-vision": _vit,
    "dinov2": _vit, "clip-text": _clip_text, "sd-unet": _unet, "sd-vae": _vae, "llava": _llava,
    "metamorph": _metamorph,
}  # fmt: skip
