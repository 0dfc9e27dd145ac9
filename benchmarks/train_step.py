"""One training step (forward, backward, AdamW), against the same step in torch.

    python benchmarks/train_step.py [--rounds 5] [--smoke] [--no-peer]

68 M parameters: hidden 512, 8 layers, 8 heads, MLP 2048, vocabulary 32000, untied; connector and
visual head of two layers. 2 rows of 512 positions, each with a context and an answer image of 64
tokens 1152 wide, and some 300 supervised positions. Text loss and cosine loss, no clipping, all
parameters train, float32. The peer is transformers' LlamaForCausalLM with two torch MLPs, logits
at all positions, and torch's fused AdamW; both take the same batch.

On CPUs with matrix units a second case multiplies in bfloat16 (weights, moments and sums stay
float32): `config.matmul_precision="bfloat16"` with full remat, against torch's autocast.
"""

import contextlib
import dataclasses

import common
import jax
import jax.numpy as jnp
import numpy as np

from metamorph_jax import sharding
from metamorph_jax.models.llm import llama
from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.platforms import has_matrix_units
from metamorph_jax.recipes import metamorph
from metamorph_jax.train import optim, state
from metamorph_jax.train.config import OptimConfig
from metamorph_jax.train.shards import to_devices
from metamorph_jax.train.step import make_step
from metamorph_jax.types import Batch, Images

RATE, WIDTH, P = 1e-4, 1152, 64
FULL = dict(llm="bench-68m", length=512, rows=2)
SMOKE = dict(llm="tiny", length=256, rows=2)


def make_batch(vocab: int, rows: int, L: int) -> Batch:
    """question with an image | answer text, then an image."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (rows, L)).astype(np.int32)
    slots = np.full((rows, L), -1, np.int32)
    text = np.full((rows, L), -1, np.int32)
    visual = np.full((rows, L), -1, np.int32)
    first, second = 10, L - P - 4
    slots[:, first : first + P] = np.arange(P)
    slots[:, second : second + P] = np.arange(P, 2 * P)
    begin = L - int(0.59 * L)  # of the answer: 300 of 512 positions
    text[:, begin : second - 1] = tokens[:, begin + 1 : second]
    visual[:, second - 1 : second + P - 1] = np.arange(P, 2 * P)
    text[:, second + P - 1 : L - 1] = tokens[:, second + P :]
    features = rng.standard_normal((rows, 2, P, WIDTH)).astype(np.float32)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    return Batch(
        tokens=tokens,
        positions=np.tile(np.arange(L, dtype=np.int32), (rows, 1)),
        segments=np.ones((rows, L), np.int32),
        text_targets=text,
        image_slots=slots,
        visual_targets=visual,
        sources=np.zeros((rows, L), np.int32),
        images=Images(np.ones((rows, 2), bool), np.zeros((rows, 2), np.int32), features=features),
    )


def model_config(llm: str, precision: str) -> metamorph.Config:
    remat = "full" if precision == "bfloat16" else "none"
    return metamorph.Config(
        llm=llm, vision=VisionConfig("none", feature_width=WIDTH, tokens=P), max_visual_targets=P,
        llm_options={"tied": False, "added_tokens": 0, "remat": remat},
    )  # fmt: skip


def ours(llm: str, batch: Batch, precision: str):
    """() -> loss, one step of ours; parameters and state."""
    cfg, mesh = model_config(llm, precision), sharding.make_mesh()
    make = lambda rngs: metamorph.create(cfg, rngs)  # noqa: E731
    parts, params, frozen = state.create(make, metamorph.STAGES["vpit"](cfg), mesh, 0)
    adamw = OptimConfig(RATE, clip_norm=None, schedule="constant", warmup=0)
    optimizer = optim.build(adamw, params, 1, 1)
    step = make_step(parts, optimizer, mesh=mesh)
    with jax.set_mesh(mesh):
        box = [state.start(params, parts, mesh, 0, optimizer, statistics=False)]
        data = to_devices(batch, mesh, len(batch.tokens))

    def run():
        with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
            box[0], report = step(box[0], frozen, data)
        return report["loss"]

    return run, params


def peer(llm: str, batch: Batch, params, precision: str):
    """() -> loss, one step in torch with the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(max(1, len(__import__("os").sched_getaffinity(0))))
    c = dataclasses.replace(llama.SIZES[llm], tied=False)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.tokens, hidden_size=c.width, intermediate_size=c.mlp_width,
            num_hidden_layers=c.layers, num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
            rope_theta=c.rope_theta, tie_word_embeddings=False, attn_implementation="sdpa",
        )
    )  # fmt: skip
    seq = torch.nn.Sequential
    connector = seq(
        torch.nn.Linear(WIDTH, c.width), torch.nn.GELU(), torch.nn.Linear(c.width, c.width)
    )
    head = seq(torch.nn.Linear(c.width, c.width), torch.nn.GELU(), torch.nn.Linear(c.width, WIDTH))
    _copy_weights(model, connector, head, params, c.layers)
    parts = torch.nn.ModuleList([model, connector, head])
    adam = torch.optim.AdamW(parts.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    t = {
        k: torch.from_numpy(np.ascontiguousarray(v)).long() if v.dtype == np.int32 else v
        for k, v in vars(batch).items()
        if v is not None
    }
    features = torch.from_numpy(batch.images.features).flatten(1, 2)
    rows = torch.arange(len(batch.tokens))[:, None].expand_as(t["tokens"])
    is_image, wants = t["image_slots"] >= 0, t["visual_targets"] >= 0
    target = features[rows[wants], t["visual_targets"][wants]]
    functional = torch.nn.functional

    cast = contextlib.nullcontext()
    if precision == "bfloat16":
        cast = torch.autocast("cpu", torch.bfloat16)

    def forward():
        embeds = model.model.embed_tokens(t["tokens"]).clone()
        images = connector(features).to(embeds.dtype)
        embeds[is_image] = images[rows[is_image], t["image_slots"][is_image]]
        hidden = model.model(inputs_embeds=embeds).last_hidden_state
        logits = model.lm_head(hidden).float()
        loss = functional.cross_entropy(
            logits.flatten(0, 1), t["text_targets"].flatten(), ignore_index=-1
        )
        predicted = head(hidden[wants]).float()
        return loss - functional.cosine_similarity(predicted, target, dim=-1).mean()

    def run():
        adam.zero_grad(set_to_none=True)
        with cast:
            loss = forward()
        loss.backward()
        adam.step()
        return float(loss.detach())

    return run


def _copy_weights(model, connector, head, params, layers: int) -> None:
    import torch

    given = lambda name: torch.from_numpy(np.array(params[name]))  # noqa: E731
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(given("llm.embed_tokens.embedding"))
        model.lm_head.weight.copy_(given("llm.lm_head.kernel").T)
        for name, p in model.model.layers.named_parameters():
            number, rest = name.split(".", 1)
            leaf = "scale" if "norm" in rest else "kernel"
            w = given(f"llm.layers.{rest.removesuffix('weight')}{leaf}")[int(number)]
            p.copy_(w.T if leaf == "kernel" else w)
        for module, part in ((connector, "connector"), (head, "head")):
            names = sorted(n for n in params if n.startswith(part + ".") and n.endswith("kernel"))
            for linear, name in zip((module[0], module[2]), names, strict=True):
                linear.weight.copy_(given(name).T)
                linear.bias.copy_(given(name.replace("kernel", "bias")))


def flops(params, batch: Batch) -> float:
    """Matrix products that a step can't do without: forward and twice that backward.

    The output table counts at supervised text positions, head and connector where they are needed.
    """
    size = lambda part: sum(  # noqa: E731
        p.size for n, p in params.items() if n.startswith(part) and n.endswith("kernel")
    )
    B, L = batch.tokens.shape
    total = size("llm.layers") * B * L + size("llm.lm_head") * (batch.text_targets >= 0).sum()
    total += size("head") * (batch.visual_targets >= 0).sum()
    total += size("connector") * B * 2 * P
    layers, _, D = params["llm.layers.self_attn.q_proj.kernel"].shape
    attention = 2 * layers * B * L * L / 2 * D  # causal: half of the square
    return 6.0 * float(total + attention)


def measure(size: dict, precision: str, args) -> common.Case:
    vocab = llama.SIZES[size["llm"]].vocab_size
    batch = make_batch(vocab, size["rows"], size["length"])
    step, params = ours(size["llm"], batch, precision)
    copies = {k: np.array(v) for k, v in params.items()}  # the first step gives them away
    runs = {"ours": step}
    losses = {"ours": float(step())}
    if not args.no_peer and common.has("torch", "transformers"):
        runs["peer"] = peer(size["llm"], batch, copies, precision)
        losses["peer"] = runs["peer"]()
        if abs(losses["ours"] - losses["peer"]) > (1e-3 if precision == "default" else 5e-2):
            raise SystemExit(f"the two don't compute the same loss: {losses}")
    times = common.interleaved(runs, args.rounds)
    dtype = jnp.float32 if precision == "default" else jnp.bfloat16
    peak = common.matmul_peak(512 if args.smoke else 2048, dtype)
    speed = flops(copies, batch) / times["ours"]
    name = "train_step" if precision == "default" else f"train_step_{precision}"
    case = common.emit(common.Case(name, "s", times["ours"], times.get("peer"), speed / peak))
    positions = batch.tokens.size / times["ours"]
    trained = sum(v.size for v in copies.values()) / 1e6
    print(f"{trained:.1f} M parameters, {positions:.0f} positions/s, {speed / 1e9:.1f} GFLOP/s of "
          f"{peak / 1e9:.1f} measured for a matrix product; loss {losses}")  # fmt: skip
    return case


def main():
    args = common.parser(__doc__.splitlines()[0]).parse_args()
    if args.smoke:
        args.rounds = 1
    precisions = ["default", "bfloat16"] if has_matrix_units() else ["default"]
    size = SMOKE if args.smoke else FULL
    common.report([measure(size, precision, args) for precision in precisions])


if __name__ == "__main__":
    main()
