"""The model that reads and speaks, with all that turns a request into its prompt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax import config
from metamorph_jax import recipe as recipes
from metamorph_jax.data import images
from metamorph_jax.data.chat import Chat, Markers
from metamorph_jax.data.interleave import build_row, read_place
from metamorph_jax.data.views import Single
from metamorph_jax.errors import UserError
from metamorph_jax.models.interleave import place_visual
from metamorph_jax.sampling.interleaved import Options, prepare
from metamorph_jax.sampling.requests import Request, picture_refs, place_pictures
from metamorph_jax.sampling.trained import load_trained

# Put in front of a prompt to ask for visual thinking: one of the wordings of training.
THINK = "Look closely before you answer. "


class Speaker:
    """A model with all that belongs to talking with it."""

    def __init__(self, model, tokenizer, data, preprocess, weights: str = "auto"):
        self.model, self.tokenizer, self.data = model, tokenizer, data
        self.preprocess = preprocess
        markers = Markers((model.image_start,), (model.image_end,))
        self.chat = Chat.of(tokenizer, data.row, markers)
        self.decoder = prepare(model, weights)
        ends = {self.chat.close, getattr(tokenizer, "eos_token_id", None)} - {None}
        self.options = Options(eos=tuple(sorted(ends)))
        self.context = data.row.length
        graph, self._weights = nnx.split(model)
        self._see = jax.jit(
            lambda weights, pixels: nnx.merge(graph, weights).visual_features(pixels)
        )

    def see(self, pixels: np.ndarray) -> np.ndarray:
        """float32[n, P, C] of uint8[n, h, w, 3], at numbers of pictures that are powers of two."""
        n = len(pixels)
        size = 1 << max(n - 1, 0).bit_length()
        padded = np.concatenate([pixels, np.zeros((size - n, *pixels.shape[1:]), np.uint8)])
        return np.asarray(self._see(self._weights, padded))[:n]

    def prompt(self, request: Request, max_new_tokens: int) -> np.ndarray:
        """float[L, D]: what the language model reads.

        Raises:
            ValueError, BadSample: with a message for the user.
        """
        refs = picture_refs(request)
        text = place_pictures((THINK if request.think else "") + request.prompt, len(refs))
        ids = self.chat.prompt([("user", text)])
        P = self.decoder.P
        room = self.context - max_new_tokens
        need = len(ids) + len(refs) * (P - 1)
        if need > room:
            words = len(ids) - len(refs)
            fit = max((room - words) // P, 0)
            raise ValueError(
                f"{len(refs)} pictures and {words} text tokens make {need} positions, but beside "
                f"{max_new_tokens} new tokens the context of {self.context} has room for "
                f"{max(room, 0)}: "
                + (f"{fit} pictures fit" if refs else "shorten the prompt or --max-new-tokens")
            )
        if refs and self.model.vision.tower is None:
            raise ValueError(
                "this model was trained on cached features and has no tower for pictures"
            )
        places = [read_place(*Single(P).plan())] * len(refs)
        row = build_row(ids, None, places, P, max(need, 1))
        embeds = self.model.embed_text(jnp.asarray(row.tokens))[None]
        if refs:
            loaded = images.load(refs, self.data.images.max_pixels)
            pixels = np.stack([self.preprocess(image) for image in loaded])
            visual = self.model.project(jnp.asarray(self.see(pixels)))
            visual = visual.reshape(1, -1, visual.shape[-1])
            embeds = place_visual(embeds, visual, jnp.asarray(row.image_slots)[None])
        return np.asarray(embeds[0], np.float32)


def load_speaker(
    workdir, checkpoint, config_spec=None, overrides=None, weights: str = "auto"
) -> Speaker:
    """The model that reads and speaks, from a workdir or from published weights.

    `weights`: how those of its language model are kept, see `layers.layout`.
    """
    if workdir:
        recipe, cfg, model, values = load_trained(workdir)
    else:
        values = config.load_config(config_spec, overrides).to_dict()
        recipe = recipes.find(values["recipe"])
        cfg = config.build(recipe.Config, values["model"], "config.model")
        cfg = dataclasses.replace(cfg, weights=checkpoint, tokenizer=cfg.tokenizer or checkpoint)
        model = recipe.create(cfg, nnx.Rngs(0))
        recipe.load_pretrained(model, cfg)
    for name in ("project", "predict_visual"):
        if not hasattr(model, name):
            raise UserError(f"the recipe {values['recipe']!r} does not generate text and pictures")
    data = config.build(recipe.Data, values["data"], "config.data")
    preprocess = data.images.change(recipe.input_spec(cfg).views).preprocess
    return Speaker(model, recipe.load_tokenizer(cfg), data, preprocess, weights)
