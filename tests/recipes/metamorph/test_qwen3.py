"""MetaMorph from a Qwen3 and a SigLIP 2, against transformers' two models and torch's losses."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from metamorph_jax.convert.llama import export_llama
from metamorph_jax.recipes import metamorph as recipe
from tests.recipes.metamorph.tiny import TINY, P, change, grads, make, make_batch

ORACLE = "needs the oracle extra: pip install 'metamorph_jax[oracle]'"
SIDE, PATCH = 48, 16  # nine patches, of which bilinear resizing makes four tokens


def published(folder):
    """transformers' (Qwen3, SigLIP 2) with random weights, saved below the folder."""
    torch = pytest.importorskip("torch", reason=ORACLE)
    transformers = pytest.importorskip("transformers", reason=ORACLE)
    torch.manual_seed(0)
    llm = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64))  # fmt: skip
    tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=SIDE, patch_size=PATCH))  # fmt: skip
    with torch.no_grad():  # norms start as ones: make them tell
        for parameter in (*llm.parameters(), *tower.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    llm.save_pretrained(folder / "llm")
    tower.save_pretrained(folder / "tower")
    return llm.eval(), tower.eval()


def visual_tokens(tower, pixels):
    """float[N, P, C] of uint8[N, h, w, 3]: last layer, resized to 2 x 2, normalised."""
    import torch
    from torch.nn import functional as F

    x = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1
    with torch.no_grad():
        x = tower(x, output_hidden_states=True).hidden_states[-1]
    n = SIDE // PATCH
    x = x.transpose(1, 2).reshape(len(x), -1, n, n)
    x = F.interpolate(x, size=(2, 2), mode="bilinear", align_corners=False)
    return F.normalize(x.flatten(2).transpose(1, 2), dim=-1)


def mlp(linears, x):
    """Our linears in torch, with exact GELU between them."""
    import torch
    from torch.nn import functional as F

    for k, linear in enumerate(linears):
        kernel, bias = (torch.tensor(np.asarray(w[...])) for w in (linear.kernel, linear.bias))
        x = (F.gelu(x) if k else x) @ kernel + bias
    return x


def expected(model, llm, tower, batch):
    """The loss, as the paper has it: cross-entropy of answers minus cosines to visual tokens."""
    import torch
    from torch.nn import functional as F

    pixels = batch.images.pixels
    visual = visual_tokens(tower, pixels.reshape(-1, *pixels.shape[2:]))
    visual = visual.reshape(len(pixels), -1, visual.shape[-1])
    rows = torch.arange(len(pixels))[:, None]
    tables = [w.weight for w in (llm.get_input_embeddings(), llm.get_output_embeddings())]
    # Rows of the start and the end of an image: the mean of all.
    embed, head = (torch.cat([w, w.detach().mean(0, keepdim=True).expand(2, -1)]) for w in tables)
    slots = torch.from_numpy(batch.image_slots).long()
    seen = mlp(model.connector.linears, visual)[rows, slots.clamp(min=0)]
    tokens = torch.from_numpy(batch.tokens).long()
    embeds = torch.where(slots[..., None] >= 0, seen, embed[tokens])
    hidden = llm.model(inputs_embeds=embeds).last_hidden_state

    answers = torch.from_numpy(batch.text_targets).long()
    text = F.cross_entropy((hidden @ head.T).transpose(1, 2), answers, ignore_index=-1)
    targets = torch.from_numpy(batch.visual_targets).long()
    drawn = F.normalize(mlp(model.head.linears, hidden), dim=-1)
    cosine = (drawn * visual[rows, targets.clamp(min=0)]).sum(-1)
    return text - cosine[targets >= 0].mean()


def test_loss_and_gradients(tmp_path):
    llm, tower = published(tmp_path)
    vision = dict(weights=str(tmp_path / "tower"), tokens=P,
                  tower_options=dict(image_size=SIDE, patch=PATCH))  # fmt: skip
    cfg = change(TINY, vision, llm="auto", llm_weights=str(tmp_path / "llm"))
    model = make(cfg)
    recipe.load_pretrained(model, cfg)
    batch = make_batch()
    pixels = np.random.default_rng(1).integers(0, 256, (2, 2, SIDE, SIDE, 3)).astype(np.uint8)
    batch = dataclasses.replace(batch, images=dataclasses.replace(batch.images, pixels=pixels))

    theirs = expected(model, llm, tower, batch)
    theirs.backward()
    loss, _, found = grads(model, batch)
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-5)
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model.llm, nnx.Param))]
    ours = {path: nnx.Param(found[".".join(("llm", *map(str, path)))]) for path in paths}
    nnx.update(model.llm, nnx.from_flat_state(ours))
    named = export_llama(model.llm)
    wanted = {n: p.grad.numpy() for n, p in llm.named_parameters() if "embed" not in n}
    assert sum("q_norm" in name for name in wanted) == 2
    for name, gradient in wanted.items():
        np.testing.assert_allclose(
            named[name][: len(gradient)], gradient, atol=1e-4 * np.abs(gradient).max(), err_msg=name
        )
