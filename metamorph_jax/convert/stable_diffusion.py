"""UNet and autoencoder of a Stable Diffusion folder as the start of a diffusion decoder.

unet/       UNet            vae/           autoencoder
scheduler/  compared        text_encoder/  the null condition: its output for the empty prompt
"""

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax import sharding
from metamorph_jax.convert import agree, clip_text, diffusion, hf
from metamorph_jax.data import tokenizers
from metamorph_jax.errors import ConfigError
from metamorph_jax.models.build import build
from metamorph_jax.models.diffusion.clip_text import CLIPTextModel
from metamorph_jax.models.diffusion.schedule import Schedule
from metamorph_jax.models.diffusion.vae import AutoencoderKL, VAEConfig


def load_parts(spec: str, schedule: Schedule, unet: nnx.Module | None, vae: nnx.Module | None):
    """Fills a UNet and an autoencoder in place; None leaves one out.

    Args:
        spec: folder or "hf:OWNER/NAME", `config.model.sd_weights`.
        schedule: that the UNet is trained with.

    Raises:
        ConfigError: the folder holds a model of another structure, or one that was trained with
            another schedule or to predict something else; names all differences.
    """
    folder, checks = hf.find(spec), []
    if unet is not None:
        checks.append(lambda: _changes(unet.cfg, folder / "unet", diffusion.unet_from_hf,
                                       "denoiser."))  # fmt: skip
        checks.append(lambda: _schedule_changes(schedule, folder))
    if vae is not None:
        checks.append(lambda: _changes(vae.cfg, folder / "vae", diffusion.vae_from_hf, "vae."))
    advice = "config.model.decoder must say the same, or sd_weights name another model"
    agree.require(spec, *checks, advice=advice)
    if unet is not None:
        diffusion.load_unet(unet, hf.Tensors(folder / "unet"))
    if vae is not None:
        diffusion.load_vae(vae, hf.Tensors(folder / "vae"))


def moment_function(spec: str, cfg: VAEConfig) -> Callable[[np.ndarray], np.ndarray]:
    """pixels uint8[N, h, w, 3] -> moments float32[N, h', w', 2c] of a folder's autoencoder (mean,
    logarithm of the variance), compiled, for filling caches. Pixels are scaled to [-1, 1].

    It runs on the first device of this process.

    Raises:
        ConfigError: the folder's autoencoder has another structure.
    """
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    fill = lambda vae: load_parts(spec, Schedule(), None, vae)  # noqa: E731
    graph, weights = nnx.split(build(lambda rngs: AutoencoderKL(cfg, rngs), mesh, 0, fill=fill))

    @jax.jit
    def compute(weights, pixels):
        return nnx.merge(graph, weights).moments(pixels.astype(jnp.float32) / 127.5 - 1)

    return lambda pixels: np.asarray(compute(weights, pixels))


def _changes(ours, folder: pathlib.Path, read, where: str) -> list[str]:
    """Where structures differ: another number of heads or groups would fit, and draw nonsense."""
    theirs = read(hf.read_config(folder))
    free = ("dtype", "sample_size", "upcast_attention", "remat")
    if type(ours) is not type(theirs):
        raise ConfigError(f"{where[:-1]} is not a {type(theirs).__name__}, as in {folder}")
    return agree.differences(ours, theirs, [n for n in vars(ours) if n not in free], where)


def _schedule_changes(ours: Schedule, folder: pathlib.Path) -> list[str]:
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return []
    theirs = diffusion.schedule_from_hf(hf.read_json(file))
    return agree.differences(ours, theirs, agree.SCHEDULE, "schedule.")


def empty_prompt(spec: str) -> np.ndarray | None:
    """float32[P, C]: what the text encoder makes of the empty prompt; None if the folder has none.

    Runs on the first device of this process.
    """
    folder = hf.find(spec)
    if not (folder / "text_encoder" / "config.json").is_file():
        return None
    cfg = clip_text.config_from_hf(hf.read_config(folder / "text_encoder"))
    length = cfg.max_position_embeddings
    ids = tokenizers.load(folder / "tokenizer")(
        "", padding="max_length", max_length=length, truncation=True, return_tensors="np"
    )["input_ids"]
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    tensors = hf.Tensors(folder / "text_encoder")
    make = lambda rngs: CLIPTextModel(cfg, rngs)  # noqa: E731
    model = build(make, mesh, 0, fill=lambda model: clip_text.load_clip_text(model, tensors))
    graph, weights = nnx.split(model)
    with jax.set_mesh(mesh):
        compute = jax.jit(lambda weights, ids: nnx.merge(graph, weights)(ids).last[0])
        return np.asarray(compute(weights, np.asarray(ids, np.int32)), np.float32)
