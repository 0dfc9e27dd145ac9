"""Vision towers, forward pass: seconds per image, against transformers on the same weights.

    python benchmarks/vision.py [--smoke] [--batch 4] [--rounds 3]

Both sides give the output of the last layer without the final norm. `limit_fraction` is the share
of the matrix-product speed measured in the same run.
"""

import dataclasses

import jax
import numpy as np
from common import Case, emit, has, interleaved, matmul_peak, parser, report
from flax import nnx

from metamorph_jax.convert.vit import export_vit
from metamorph_jax.models.vision import vit

CASES = ("siglip-so400m-384", "clip-l-336")
SMOKE = ("siglip-tiny", "clip-tiny")


def flops(cfg: vit.ViTConfig) -> float:
    """Floating-point operations of one image's matrix products."""
    T, D, F = cfg.tokens + cfg.class_token, cfg.width, cfg.mlp_width
    layer = 2 * T * (4 * D * D + 2 * D * F) + 4 * T * T * D
    return cfg.depth * layer + 2 * cfg.tokens * 3 * cfg.patch**2 * D


def torch_tower(cfg: vit.ViTConfig, tensors: dict):
    """transformers' tower with our weights: float32[N, h, w, 3] -> float32[N, T, D]."""
    import torch
    import transformers

    common = dict(hidden_size=cfg.width, intermediate_size=cfg.mlp_width, patch_size=cfg.patch,
                  num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads,
                  image_size=cfg.image_size)  # fmt: skip
    with torch.device("meta"):
        if cfg.layout == "siglip":
            config = transformers.SiglipVisionConfig(**common, vision_use_head=False)
            model = transformers.SiglipVisionModel(config)
        else:
            model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**common))
    names = model.state_dict().keys()
    if not any(k.startswith("vision_model.") for k in names):
        tensors = {k.removeprefix("vision_model."): v for k, v in tensors.items()}
    model = model.to_empty(device="cpu")
    tensors = {k: torch.tensor(v) for k, v in tensors.items()}
    loaded = model.load_state_dict(tensors, strict=False)
    missing = [k for k in loaded.missing_keys if "post_layernorm" not in k]
    if missing or loaded.unexpected_keys:
        raise ValueError(f"weights don't fit: {missing} {loaded.unexpected_keys}")
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1])[None])
    model.eval()

    def run(pixels):
        with torch.no_grad():
            x = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            return model(x, output_hidden_states=True).hidden_states[-1].numpy()

    return run


def bench(name: str, batch: int, rounds: int, peer: bool, peak: float) -> Case:
    cfg = dataclasses.replace(vit.SIZES[name], select_layer=-1)
    tower = vit.ViT(cfg, rngs=nnx.Rngs(0))
    tensors = export_vit(tower)
    graph, weights = nnx.split(tower)
    run = jax.jit(lambda weights, pixels: nnx.merge(graph, weights)(pixels))
    raw = np.random.default_rng(0).integers(0, 256, (batch, cfg.size, cfg.size, 3), np.uint8)
    pixels = np.asarray(vit.normalize_pixels(raw, cfg.mean, cfg.std))
    runs = {"ours": lambda: run(weights, raw)}
    if peer:
        theirs = torch_tower(cfg, tensors)
        runs["peer"] = lambda: theirs(pixels)
        a, b = np.asarray(run(weights, raw)), runs["peer"]()[:, int(cfg.class_token) :]
        worst = np.abs(a - b).max() / np.abs(b).max()
        if worst > 1e-3:
            raise ValueError(f"{name}: the two sides differ by {worst:.1e}")
    seconds = {k: v / batch for k, v in interleaved(runs, rounds).items()}
    fraction = flops(cfg) / seconds["ours"] / peak
    title = f"{name} batch {batch}"
    return emit(Case(title, "s/image", seconds["ours"], seconds.get("peer"), fraction))


def main():
    p = parser(__doc__.splitlines()[0], rounds=3)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--only", choices=CASES + SMOKE)
    args = p.parse_args()
    names = [args.only] if args.only else SMOKE if args.smoke else CASES
    peer = not args.no_peer and has("torch", "transformers")
    peak = matmul_peak(256 if args.smoke else 2048)
    report([bench(n, args.batch, 1 if args.smoke else args.rounds, peer, peak) for n in names])


if __name__ == "__main__":
    main()
