"""What an encoder is, as plain data: the part of a run's YAML under `model.init_args.encoder`."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from tasks.errors import TaskError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Pool = Literal["cls", "mean", "cls+mean"]


class Size(NamedTuple):
    """Width, depth and attention heads of a published Vision Transformer."""

    width: int
    depth: int
    heads: int


# Touvron et al. 2021 (arXiv:2012.12877, Table 1): tiny, small; arXiv:2010.11929 (Table 1): the others.
SIZES = {
    "vit_tiny": Size(192, 12, 3),
    "vit_small": Size(384, 12, 6),
    "vit_base": Size(768, 12, 12),
    "vit_large": Size(1024, 24, 16),
    "vit_huge": Size(1280, 32, 16),
}


@dataclass(frozen=True)
class EncoderConfig:
    """An image encoder: a Vision Transformer described here, or any timm model by name.

    Args:
        arch: vit_tiny, vit_small, vit_base, vit_large, vit_huge, or `timm:NAME` (untrained weights) for any timm model;
            with timm only image_size, in_chans, bits, drop_path, drop_path_uniform, pool, mean, std and eval_resize
            apply, and the encoder's own `config` afterwards tells patch_size and class_token as the model has them.
        image_size: side of the square training images, in pixels.
        patch_size: side of a patch, in pixels; it divides image_size.
        width: channels of a token; None: the arch's.
        depth: number of blocks; None: the arch's.
        heads: attention heads; None: the arch's.
        mlp_ratio: hidden width of a block's MLP over `width`.
        in_chans: channels of an image.
        bits: of a channel in the image files, 8 or 16; how they are read, the encoder itself is the same.
        positions: `learned` table, fixed 2-D sine-cosine table (MAE), or rotary (the axial form of DINOv3).
        position_resize: how a table is stretched to another grid: as the authors of `mae`, `dino` or `open_clip` do.
        class_token: whether there is one.
        registers: further prefix tokens without a position (Darcet et al. 2024, arXiv:2309.16588).
        layer_scale: initial value of LayerScale; None: no LayerScale.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        drop_path_uniform: the same in all blocks instead (DINOv2).
        norm_eps: epsilon of every LayerNorm.
        qkv_bias: whether query, key and value have a bias.
        pre_norm: a LayerNorm before the first block, and no bias in the patch embedding (CLIP).
        activation: of the MLPs; `quick_gelu` is x * sigmoid(1.702 x) (OpenAI's CLIP weights).
        pool: how tokens become one feature vector in evaluation.
        mean: per-channel mean that images were normalised with, in units of [0, 1].
        std: per-channel standard deviation, likewise.
        eval_resize: shorter side in pixels before the centre crop in evaluation; None: round(image_size / 0.875).
    """

    arch: str = "vit_base"
    image_size: int = 224
    patch_size: int = 16
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float = 4.0
    in_chans: int = 3
    bits: Literal[8, 16] = 8
    positions: Literal["learned", "sincos2d", "rope"] = "sincos2d"
    position_resize: Literal["mae", "dino", "open_clip"] = "mae"
    class_token: bool = True
    registers: int = 0
    layer_scale: float | None = None
    drop_path: float = 0.0
    drop_path_uniform: bool = False
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    pre_norm: bool = False
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    pool: Pool = "mean"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    eval_resize: int | None = None

    @property
    def timm_name(self) -> str | None:
        """The model's name for timm, or None for a Vision Transformer described by the other fields."""
        return self.arch.removeprefix("timm:") if self.arch.startswith("timm:") else None

    @property
    def size(self) -> Size:
        """Width, depth and heads after the arch filled in what was left out; TaskError for an unknown arch."""
        if self.arch not in SIZES:
            raise TaskError(f"unknown encoder arch {self.arch!r}: use one of {', '.join(SIZES)} or timm:NAME")
        base = SIZES[self.arch]
        return Size(self.width or base.width, self.depth or base.depth, self.heads or base.heads)

    @property
    def resize(self) -> int:
        """Shorter side, in pixels, that evaluation resizes to before the centre crop of image_size."""
        return self.eval_resize or round(self.image_size / 0.875)

    def at(self, image_size: int) -> "EncoderConfig":
        """The same encoder for another image size; eval_resize keeps its ratio to the image size."""
        eval_resize = self.eval_resize and round(self.eval_resize * image_size / self.image_size)
        return replace(self, image_size=image_size, eval_resize=eval_resize)

    def check(self) -> None:
        """Raises TaskError, one line, for what cannot be built."""
        if len(self.mean) != self.in_chans or len(self.std) != self.in_chans:
            raise TaskError(f"encoder.mean and encoder.std need in_chans = {self.in_chans} values each")
        if not 0 <= self.drop_path < 1:
            raise TaskError(f"encoder.drop_path must be in [0, 1), not {self.drop_path}")
        if self.timm_name is not None:
            if (self.width, self.depth, self.heads) != (None, None, None):
                raise TaskError(f"encoder.arch {self.arch} fixes width, depth and heads: leave them out")
            return
        width, depth, heads = self.size
        sizes = {
            "image_size": self.image_size, "patch_size": self.patch_size, "in_chans": self.in_chans, "width": width,
            "depth": depth, "heads": heads,
        }  # fmt: skip
        if wrong := [f"encoder.{name} {size}" for name, size in sizes.items() if size < 1]:
            raise TaskError(f"{' and '.join(wrong)} must be positive")
        if self.registers < 0:
            raise TaskError(f"encoder.registers {self.registers} cannot be negative: 0 is none, DINOv2 has 4")
        if self.image_size % self.patch_size:
            raise TaskError(f"patch_size {self.patch_size} does not divide image_size {self.image_size}")
        if width % heads:
            raise TaskError(f"{heads} heads do not divide encoder width {width}")
        if self.positions == "sincos2d" and width % 4:
            raise TaskError(f"sine-cosine positions need a width divisible by 4, not {width}")
        if self.positions == "rope" and (width // heads) % 4:
            raise TaskError(f"rotary positions need width / heads divisible by 4, not {width // heads}")
        if self.pool != "mean" and not self.class_token:
            raise TaskError(f"encoder.pool {self.pool!r} needs a class token: set class_token, or pool: mean")
