"""Cached decoding of interleaved text and visual tokens against Hugging Face's `generate`.

    python benchmarks/decode.py [--rounds 5] [--smoke] [--no-peer]

68 M parameters: width 512, 8 layers, 8 heads, MLP 2048, vocabulary 32000, untied head; prompts of
200 positions, 200 new tokens: one start id, 64 visual tokens, 135 further text ids (forced, since
random weights never start an image; logits are computed all the same). The peer decodes 200 text
ids with its dynamic cache. Both times include the prompt. float32, greedy, batch 1 and 8.

On CPUs with matrix units the same again with weights in bfloat16: ours as under
`config.matmul_precision="bfloat16"`, the peer's model in torch.bfloat16.

`limit_fraction`: bytes of weights and filled cache that a step has to read, over what the memory of
this machine gave to a matrix-vector product in the same call, as a share of the time per step
(without the prompt's pass).
"""

import common
import jax
import numpy as np
from flax import nnx

from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.platforms import has_matrix_units
from metamorph_jax.recipes import metamorph as recipe
from metamorph_jax.recipes.metamorph.decoding import VisualParts, make_loop, make_policy
from metamorph_jax.sampling.policy import TextPolicy
from metamorph_jax.sampling.segments import VISUAL

PROMPT, NEW, TOKENS, WIDTH = 200, 200, 64, 1152


def make_loops(size: str, tokens: int, precision: str):
    """(loop, policy) with random weights; free ids never hit start or end."""
    cfg = recipe.Config(llm=size, vision=VisionConfig("none", feature_width=WIDTH, tokens=tokens))
    with jax.default_matmul_precision(precision):
        model = recipe.create(cfg, nnx.Rngs(0))
        parts = VisualParts(model)
        return make_loop(model, parts), make_policy(parts, TextPolicy())


def forced(policy, vocabulary: int, batch: int, new: int, tokens: int) -> np.ndarray:
    """Ids of all text steps; the image begins in the middle."""
    ids = np.random.default_rng(1).integers(10, vocabulary, (batch, new))
    ids[:, (new - tokens) // 2] = policy.parts.start
    return ids.astype(np.int32)


def bytes_read(loop, batch: int, prompt: int, new: int, tokens: int) -> float:
    """What all steps after the prompt's pass must read at least."""
    nbytes = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    llm = loop.weights["llm"]
    cfg = loop.llm.cfg
    slot = 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * llm["table"].dtype.itemsize
    filled = sum(range(prompt + 1, prompt + new))
    steps = new - 1
    return (
        steps * nbytes(llm["layers"])
        + (steps - tokens) * nbytes(llm["head"])
        + tokens * nbytes(loop.weights["parts"])
        + batch * slot * filled
    )


def make_peer(cfg, prompt: int, new: int, batch: int, precision: str):
    """Hugging Face's generate with a cache, on the same shapes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=cfg.width,
            intermediate_size=cfg.mlp_width,
            num_hidden_layers=cfg.layers,
            num_attention_heads=cfg.heads,
            num_key_value_heads=cfg.kv_heads,
            vocab_size=cfg.vocab_size,
            max_position_embeddings=4096,
            eos_token_id=None,
            bos_token_id=None,
            pad_token_id=0,
        )
    ).eval()
    if precision == "bfloat16":
        model = model.to(torch.bfloat16)
    ids = torch.randint(10, cfg.vocab_size, (batch, prompt))

    def run():
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True,
                max_new_tokens=new, min_new_tokens=new,
            )  # fmt: skip
        assert out.shape[1] == prompt + new
        return None

    return run


def measure(batch: int, precision: str, shape: tuple, bandwidth: float, args) -> common.Case:
    size, prompt, new, tokens = shape
    loop, policy = make_loops(size, tokens, precision)
    cfg = loop.llm.cfg
    rng = np.random.default_rng(0)
    prompts = list(rng.normal(size=(batch, prompt, cfg.width)).astype(np.float32))
    ids = forced(policy, cfg.vocab_size, batch, new, tokens)

    def ours():
        with jax.default_matmul_precision(precision):
            results = loop(prompts, new, policy, forced_ids=ids)
        assert all((r.record == VISUAL).sum() == tokens for r in results)
        assert all(len(r.record) == new for r in results)

    def read_prompt():
        with jax.default_matmul_precision(precision):
            return loop.prefill(prompts, new, policy, forced_ids=ids).embed

    runs = {"ours": ours, "prompt": read_prompt}
    if not args.no_peer and common.has("torch", "transformers"):
        runs["peer"] = make_peer(cfg, prompt, new, batch, precision)
    times = common.interleaved(runs, args.rounds)
    needed = bytes_read(loop, batch, prompt, new, tokens) / bandwidth
    made = batch * new
    return common.emit(
        common.Case(
            f"decode_b{batch}" + ("" if precision == "default" else f"_{precision}"),
            "tokens/s",
            made / times["ours"],
            made / times["peer"] if "peer" in times else None,
            needed / (times["ours"] - times["prompt"]),
        )
    )


def main():
    args = common.parser(__doc__.splitlines()[0]).parse_args()
    shape = ("bench-68m", PROMPT, NEW, TOKENS)
    if args.smoke:
        shape, args.rounds = ("tiny", 20, 12, 4), 1
    bandwidth = common.memory_bandwidth(*((16, 1) if args.smoke else ()))
    print(f"memory: {bandwidth / 1e9:.1f} GB/s")
    precisions = ["default", "bfloat16"] if has_matrix_units() else ["default"]
    common.report([measure(b, p, shape, bandwidth, args) for p in precisions for b in (1, 8)])


if __name__ == "__main__":
    main()
