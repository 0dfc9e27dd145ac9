"""Stable Diffusion's UNet with MMFS on its skips and its middle (MM-Interleaved).

Tian et al. 2024, arXiv 2401.10208. The down path and the middle run as they are; then every skip
and the output of the middle receive what their pixels find in the feature maps of earlier images,
as in a ControlNet, and the up path takes the edited ones:

    queries = LayerNorm(skip as tokens) + sin-cos table of the pixel
    skip    = skip + conv1x1(MMFS(queries, LayerNorm(maps), reference = pixel centres))

The 1x1 convolutions start at zero. Offsets are in pixels of the skip, where the maps have their
nominal sides. The table is defined on the UNet's own grid, and resized for coarser skips.

The maps' projected values depend neither on x nor on t, so `prepare` makes them once for all
sampling steps. In training with `unet.remat` they are part of what is recomputed.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from metamorph_jax.config import check_numbers
from metamorph_jax.models.diffusion.blocks import LayerNorm, conv, over_batch, zeros
from metamorph_jax.models.diffusion.unet import UNet, UNetConfig
from metamorph_jax.models.mmfs import MMFS, MMFSConfig, Values, centres
from metamorph_jax.nn import recompute
from metamorph_jax.nn.sincos import resize_table, table_2d
from metamorph_jax.types import Conditioning

_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class UNetMMFSConfig:
    """Defaults: MM-Interleaved's, for images of 512 pixels.

    Attributes:
        unet: gives the computation's dtype and whether blocks are recomputed, too.
        value_width: channels of the feature maps.
        inner_width, heads, points: of every MMFS, see `MMFSConfig`.
        sides: nominal side of each map of an image, finest first.
        relative_rows: one more than the most images that an image may look at.
        middle_base: side of the grid in whose cells the middle's offsets are measured; 0: its own.
            The reference takes an eighth of `sample_size` whatever the UNet's depth, which is the
            same for Stable Diffusion.
        method: of `nn.deformable.sample`.

    Raises:
        ValueError: a side of the UNet's maps is odd, or channels have no 2-D sin-cos table.
    """

    unet: UNetConfig = UNetConfig.sd21(sample_size=64)
    value_width: int = 1024
    inner_width: int = 1024
    heads: int = 16
    points: int = 8
    sides: tuple[int, ...] = (64, 32, 16, 8)
    relative_rows: int = 10
    middle_base: int = 0
    method: str = "auto"

    def __post_init__(self):
        check_numbers(self, "value_width inner_width heads points sides relative_rows")
        depth = len(self.unet.block_out_channels)
        if self.unet.sample_size % 2 ** (depth - 1):
            raise ValueError(
                f"unet.sample_size {self.unet.sample_size} can't be halved {depth - 1} times"
            )
        if odd := [c for c in self.unet.block_out_channels if c % 4]:
            raise ValueError(f"unet.block_out_channels {odd}: expected multiples of 4")

    @property
    def in_channels(self) -> int:
        return self.unet.in_channels

    @property
    def out_channels(self) -> int:
        return self.unet.out_channels

    @property
    def sample_size(self) -> int:
        return self.unet.sample_size

    @property
    def cross_attention_dim(self) -> int:
        return self.unet.cross_attention_dim

    def mmfs(self, channels: int, base: int) -> MMFSConfig:
        """Of a map of so many channels, with offsets in cells of a grid of this side."""
        return MMFSConfig(
            width=channels, value_width=self.value_width, out_width=channels,
            inner_width=self.inner_width, heads=self.heads, points=self.points, sides=self.sides,
            base=base, relative_rows=self.relative_rows, init="uniform", offset_range=1.0,
            method=self.method, dtype=self.unet.dtype,
        )  # fmt: skip


def skips_of(cfg: UNetConfig) -> list[tuple[int, int]]:
    """(channels, side) of every skip, in the order of `UNet.down`."""
    sizes, side = [(cfg.block_out_channels[0], cfg.sample_size)], cfg.sample_size
    for level, channels in enumerate(cfg.block_out_channels):
        sizes += [(channels, side)] * cfg.layers_per_block
        if level < len(cfg.block_out_channels) - 1:
            side //= 2
            sizes.append((channels, side))
    return sizes


class MMFSBlock(nnx.Module):
    """What one map of the UNet receives from the feature maps of images."""

    def __init__(self, cfg: UNetMMFSConfig, channels: int, base: int, rngs: nnx.Rngs):
        dtype = cfg.unet.dtype
        self.grid = cfg.sample_size
        self.query_norm = LayerNorm(channels, rngs, dtype, eps=_NORM_EPS)
        self.feat_norm = LayerNorm(cfg.value_width, rngs, dtype, eps=_NORM_EPS)
        self.mmfs = MMFS(cfg.mmfs(channels, base), rngs=rngs)
        self.conv = conv(channels, channels, 1, rngs, dtype, kernel_init=zeros)

    def project(self, maps: tuple) -> Values:
        """What the queries sample of maps, each float[B, M, h, w, value_width]."""
        return self.mmfs.project(tuple(self.feat_norm(m) for m in maps))

    def __call__(self, x, source, mask):
        """float[n, h, w, C], to be added to x, which is like it.

        Args:
            source: maps or what `project` made of them, of B rows, where n is a multiple of B: row
                i of x looks at row i mod B.
            mask: bool[B, M].
        """
        values = source if isinstance(source, Values) else self.project(source)
        n, h, w, C = x.shape
        B, Q = len(values.array), n // len(values.array) * h * w
        table = resize_table(table_2d(self.grid, C), h)
        tokens = self.query_norm(x.reshape(n, h * w, C)) + jnp.asarray(table, x.dtype)
        # Rows that look at the same image become one, as the two halves of guidance do.
        queries = tokens.reshape(-1, B, h * w, C).swapaxes(0, 1).reshape(B, Q, C)
        reference = jnp.tile(centres(h, w), (1, n // B, 1, 1))
        found = self.mmfs(queries, values, mask, reference)
        found = found.reshape(B, -1, h * w, C).swapaxes(0, 1).reshape(n, h, w, C)
        return self.conv(found)


class MMFSNet(nnx.Module):
    """The blocks of all skips and of the middle."""

    def __init__(self, cfg: UNetMMFSConfig, rngs: nnx.Rngs):
        self.remat = cfg.unet.remat
        skips = skips_of(cfg.unet)
        channels, side = skips[-1]
        self.mmfs_down_blocks = nnx.List([MMFSBlock(cfg, *size, rngs) for size in skips])
        self.mmfs_mid_block = MMFSBlock(cfg, channels, cfg.middle_base or side, rngs)

    def blocks(self) -> list[MMFSBlock]:
        """Those of the skips, then that of the middle."""
        return [*self.mmfs_down_blocks, self.mmfs_mid_block]

    def project(self, maps: tuple) -> tuple[Values, ...]:
        """Of every block."""
        return tuple(block.project(maps) for block in self.blocks())

    def __call__(self, skips, middle, maps: tuple, mask=None):
        """(skips, middle), edited.

        Args:
            skips: list of float[n, h, w, C] as `UNet.down` gives them; middle: float[n, h, w, C].
            maps: feature maps, finest first, each float[B, M, h, w, C] with n a multiple of B; or
                what `project` made of them.
            mask: bool[B, M] which images are there, or None for all.
        """
        blocks = self.blocks()
        ready = isinstance(maps[0], Values)
        sources = maps if ready else (maps,) * len(blocks)
        if mask is None:
            mask = jnp.ones((maps[0].array if ready else maps[0]).shape[:2], bool)
        edited = [
            over_batch(x + recompute.call(block, self.remat, x, source, mask))
            for x, block, source in zip([*skips, middle], blocks, sources, strict=True)
        ]
        return edited[:-1], edited[-1]


class UNetMMFS(nnx.Module):
    """A denoiser that reads `Conditioning.maps` beside the context."""

    def __init__(self, cfg: UNetMMFSConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.unet = UNet(cfg.unet, rngs)
        self.mmfs_module = MMFSNet(cfg, rngs)

    def prepare(self, condition: Conditioning) -> Conditioning:
        """The condition with keys and values of all cross attentions as its context, and with the
        projected values of all blocks as its maps: once for all sampling steps.

        Raises:
            ValueError: see `check`.
        """
        self.check(condition)
        values = self.mmfs_module.project(condition.maps)
        return dataclasses.replace(self._with_keys(condition), maps=values)

    def _with_keys(self, condition: Conditioning) -> Conditioning:
        bare = dataclasses.replace(condition, maps=(), maps_mask=None)
        context = self.unet.prepare(bare).context
        return dataclasses.replace(condition, context=context)

    def check(self, condition: Conditioning) -> None:
        """Raises ValueError for a condition whose maps are not of this model's kind."""
        cfg, maps = self.cfg, condition.maps
        if len(maps) != len(cfg.sides) or any(m.shape[-1] != cfg.value_width for m in maps):
            raise ValueError(
                f"Conditioning.maps of shapes {[m.shape for m in maps]}; expected {len(cfg.sides)}"
                f" [B, images, h, w, {cfg.value_width}], all masked where there is no image"
            )
        if maps[0].shape[1] >= cfg.relative_rows:
            raise ValueError(
                f"maps of {maps[0].shape[1]} images a row, but relative_rows={cfg.relative_rows}"
                f" is enough for {cfg.relative_rows - 1}"
            )

    def __call__(self, x, t, condition: Conditioning):
        """The prediction, float32[n, h, w, c].

        Args:
            x: float[n, h, w, c], h = w.
            t: [n] or a scalar.
            condition: context float[n, P, D], maps of n rows or of a divisor B of n, see
                `MMFSBlock`; or what `prepare` made of it.
        """
        if not isinstance(condition.context, dict):
            self.check(condition)
            condition = self._with_keys(condition)
        temb = self.unet.time(t, len(x))
        y, skips = self.unet.down(x, temb, condition)
        y = self.unet.mid(y, temb, condition)
        skips, y = self.mmfs_module(skips, y, condition.maps, condition.maps_mask)
        return self.unet.up(y, skips, temb, condition)
