"""The arithmetic of a model, counted by us, in FLOPs per step over all devices.

Convention: a multiply-add is 2; matrix products and convolutions only. Per weight of a product and
position: 2 forward, 2 for the gradient of its input where something before it is trained, 2 for
its own gradient where it is trained. Causal attention counts half of all pairs, segments of packed
rows don't count less. Every position counts as one that has a text target. What is computed twice
to save memory (rematerialisation) is no model FLOP; it is `again`, and MFU bounds suffer from it.
"""

import dataclasses
import math

import jax
import jax.extend
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Flops:
    """`model` is what MFU counts; `again` what the chips compute on top."""

    model: float
    again: float
    by_part: dict[str, float]


def count(program) -> Flops:
    """FLOPs of a `programs.Program`."""
    model, parts = program.model, {}
    again = 0.0
    if hasattr(model, "llm"):
        again = _language(program, parts)
    if hasattr(model, "denoiser"):
        again += _decoder(program, parts)
    return Flops(sum(parts.values()), again, parts)


def _language(program, parts) -> float:
    cfg = program.model.llm.cfg
    positions = program.positions
    layer = cfg.width * (cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim
    layer += cfg.heads * cfg.head_dim * cfg.width + 3 * cfg.width * cfg.mlp_width
    products = 2.0 * layer * cfg.layers * positions
    head = 2.0 * cfg.width * cfg.tokens * positions
    pair = 4.0 * cfg.heads * cfg.head_dim * cfg.layers  # scores and mixing, of one pair
    if not program.training:
        length = program.length
        parts["llm"] = products + pair * positions * length
        parts["head table"] = head
        return 0.0
    length = program.batch.tokens.shape[1]
    pairs = pair * positions * length / 2
    trained = lambda name: any(n.startswith(name) for n in program.trained_names)  # noqa: E731
    layers_trained = trained("llm.layers")
    parts["llm"] = products * (3 if layers_trained else 2) + pairs * 3
    table_trained = trained("llm.lm_head.kernel") or (
        cfg.tied and trained("llm.embed_tokens.embedding")
    )
    parts["head table"] = head * (3 if table_trained else 2)
    twice = {"none": 0.0, "dots": pairs, "attention": products}
    again = twice.get(cfg.remat, products + pairs)
    if program.mesh.size > 1:
        again += head  # the loss multiplies with the table twice
    again += _pictures(program, parts, trained)
    return again


def _pictures(program, parts, trained) -> float:
    """Tower, connector and visual head of a MetaMorph model."""
    model, batch, again = program.model, program.batch, 0.0
    if getattr(batch, "image_valid", None) is None or not batch.image_valid.shape[1]:
        return again
    pictures = math.prod(batch.image_valid.shape)
    if batch.pixels is not None:
        one = jax.ShapeDtypeStruct((1, *batch.pixels.shape[2:]), jnp.uint8)
        forward = of_function(model, lambda m, x: m.visual_features(x), one) * pictures
        parts["tower"] = forward * (3 if trained("tower") else 1)
        again += forward if trained("tower") and model.tower.cfg.remat else 0.0
    tokens, width = model.feature_shape
    x = jax.ShapeDtypeStruct((1, tokens, width), jnp.float32)
    forward = of_function(model, lambda m, x: m.project(x), x) * pictures
    parts["connector"] = forward * (3 if trained("connector") else 2)
    if getattr(model, "head", None) is None:
        return again
    limit = program.model_cfg.max_visual_targets
    predicting = batch.tokens.shape[0] * (limit or batch.tokens.shape[1])
    x = jax.ShapeDtypeStruct((1, 1, model.llm.cfg.width), jnp.float32)
    forward = of_function(model, lambda m, x: m.predict_visual(x), x) * predicting
    parts["visual head"] = forward * (3 if model.loss_coefs["visual"] else 1)
    return again


def _decoder(program, parts) -> float:
    model, batch, cfg = program.model, program.batch, program.model.cfg
    rows = batch.image.shape[0]
    trained = lambda name: any(n.startswith(name) for n in program.trained_names)  # noqa: E731
    one = lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)  # noqa: E731
    if cfg.vae:
        encode = lambda m, x: m.vae.encode(x.astype(jnp.float32)).mean  # noqa: E731
        parts["autoencoder"] = of_function(model, encode, one(batch.image)) * rows
    if batch.pixels is not None:
        tower = of_function(model, lambda m, x: m.tower(x), one(batch.pixels))
        parts["tower"] = tower * rows
    features = batch.features
    if features is None:
        tokens = model.tower.reducer.cfg
        features = jax.ShapeDtypeStruct((1, tokens.tokens_out, tokens.width_out), jnp.float32)
    project = lambda m, x: m.context(x)  # noqa: E731
    parts["projector"] = of_function(model, project, one(features)) * rows * 3
    context = nnx.eval_shape(lambda m, x: m.context(x), model, one(features))
    side = cfg.sample_side
    x = jax.ShapeDtypeStruct((1, side, side, cfg.sample_channels), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    forward = of_function(model, lambda m, *a: m.denoise(*a), x, t, context) * rows
    parts["denoiser"] = forward * (3 if trained("denoiser") else 2)
    return forward if getattr(cfg.denoiser, "remat", False) else 0.0


def of_function(model, f, *args) -> float:
    """FLOPs of products and convolutions in f(model, *args), given as shapes."""
    graph, state = nnx.split(model)
    jaxpr = jax.make_jaxpr(lambda s, *a: f(nnx.merge(graph, s), *a))(state, *args)
    return _of_jaxpr(jaxpr.jaxpr)


def _of_jaxpr(jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name, out = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
            total += 2.0 * math.prod(out.shape) * inner
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * math.prod(out.shape) * math.prod(kernel.shape) / features
        times = eqn.params.get("length", 1) if name == "scan" else 1
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            total += times * _of_jaxpr(inner)
    return total
