"""Masked autoencoder (He et al. 2022, arXiv:2111.06377).

Axes: b = images, c = channels, h w = pixels, n = patches, k = visible ones, m = n - k hidden ones, p = prefix tokens,
d = encoder width, e = decoder width, s = c * patch_size^2 numbers of a patch.

The decoder never puts the tokens back in their places: attention does not care for the order as long as every token
carries its position. Prefix and visible tokens come first and hidden ones last, so that in training the last block and
the prediction are computed for the hidden patches only, which are the only ones the loss looks at.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.encoder_files import checkpoint_path, config_from_dict, load_strictly, read_checkpoint
from tasks.encoders import Encoder, Tokens
from tasks.errors import TaskError
from tasks.masks import split_patches, visible_patches
from tasks.original_files import encoder_config, encoder_state, mae_names
from tasks.positions import sincos2d_table
from tasks.vit import ViTBlock, init_vit, last, patch_rows


class MAEOutput(NamedTuple):
    """What one pass of MAE gives."""

    loss: Tensor  # scalar, float32 or better
    pred: Tensor | None  # [b n s], each patch in (row, column, channel) order; None where only the loss was asked for
    mask: Tensor  # [b n], 1 = hidden
    latent: Tokens  # of the visible patches, in ascending order of their noise; without a gradient


class MAE(nn.Module):
    """Encoder over visible patches, light decoder over all of them, loss over the hidden ones.

    Args:
        encoder: a plain Vision Transformer.
        decoder_width: channels of a decoder token, divisible by 4 and by decoder_heads.
        decoder_depth: decoder blocks, at least 1.
        decoder_heads: attention heads of the decoder.
        mask_ratio: share of the patches that is hidden.
        norm_pix_loss: predict each patch after subtracting its mean and dividing by its standard deviation.

    Raises:
        TaskError: sizes that do not fit, or an encoder that cannot hide patches.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
    ) -> None:
        super().__init__()
        config = encoder.config
        if not encoder.maskable:
            raise TaskError(f"MAE hides patches, which {config.arch} cannot: take a plain ViT (vit_base, timm:vit_...)")
        if decoder_width % 4 or decoder_width % decoder_heads:
            raise TaskError(f"decoder_width {decoder_width} is not divisible by 4 and by decoder_heads {decoder_heads}")
        if decoder_depth < 1:
            raise TaskError("decoder_depth must be at least 1")
        if not 0 < visible_patches(encoder.num_patches, mask_ratio) < encoder.num_patches:
            raise TaskError(f"mask_ratio {mask_ratio} must show some of {encoder.num_patches} patches and hide some")
        self.encoder = encoder
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss
        self.decoder_heads = decoder_heads
        self.patch_size, self.in_chans = config.patch_size, config.in_chans
        self.decoder_embed = nn.Linear(encoder.width, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        table = torch.empty(1, encoder.num_prefix + encoder.num_patches, decoder_width)
        self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)
        norm = partial(nn.LayerNorm, eps=config.norm_eps)
        self.decoder_blocks = nn.ModuleList(
            ViTBlock(decoder_width, decoder_heads, config.mlp_ratio, qkv_bias=config.qkv_bias, norm_layer=norm)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm(decoder_width)
        self.decoder_pred = nn.Linear(decoder_width, self.in_chans * self.patch_size**2)
        self._init_decoder()

    def settings(self) -> dict[str, Any]:
        """The arguments besides the encoder, as plain values."""
        return {
            "decoder_width": self.decoder_embed.out_features,
            "decoder_depth": len(self.decoder_blocks),
            "decoder_heads": self.decoder_heads,
            "mask_ratio": self.mask_ratio,
            "norm_pix_loss": self.norm_pix_loss,
        }

    def init_weights(self) -> None:
        """Fills every parameter and table anew, the encoder's too; also after `to_empty` from the meta device."""
        self.encoder.init_weights()
        self._init_decoder()

    @torch.no_grad()
    def _init_decoder(self) -> None:
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_norm, self.decoder_pred):
            init_vit(part)
        nn.init.normal_(self.mask_token, std=0.02)
        width = self.decoder_pos_embed.shape[2]
        self.decoder_pos_embed.copy_(sincos2d_table(width, self.encoder.grid, self.encoder.num_prefix)[None])

    def forward(self, images: Tensor, noise: Tensor, *, loss_only: bool = False) -> MAEOutput:
        """Hides the patches with the largest noise and predicts them.

        Args:
            images: normalised, [b c h w], of the encoder's image size.
            noise: [b n], any real numbers; ties go by place.
            loss_only: spare the predictions of visible patches, which the loss does not need; `pred` is then None.
        """
        keep, hide = split_patches(noise, self.mask_ratio)
        latent = self.encoder(images, keep)
        tokens = self.decode(latent, keep, hide, hidden_only=loss_only)
        pred = self._predict(last(tokens, hide.shape[1]))
        loss = self._loss(images, pred, hide)
        mask = torch.ones_like(noise).scatter_(1, keep, 0)
        # FSDP2 hangs a hook on all that a sharded model gives with a gradient, and warns of views, which these are.
        latent = Tokens(*(tokens.detach() for tokens in latent))
        if loss_only:
            return MAEOutput(loss, None, mask, latent)
        everything = self._predict(tokens[:, self.encoder.num_prefix :])
        places = torch.cat([keep, hide], dim=1).argsort(dim=1)
        pred = everything.gather(1, places[:, :, None].expand_as(everything))
        return MAEOutput(loss, _pixels_last(pred, self.in_chans), mask, latent)

    def decode(self, latent: Tokens, keep: Tensor, hide: Tensor, *, hidden_only: bool) -> Tensor:
        """Decoder tokens after the final norm: prefix, visible and hidden [b p+k+m e], or the hidden alone [b m e]."""
        prefix = self.encoder.num_prefix
        seen = self.decoder_embed(torch.cat([latent.prefix, latent.patches], dim=1))
        of_prefix, of_patches = torch.split(self.decoder_pos_embed[0], [prefix, self.encoder.num_patches])
        of_seen, of_hidden = F.embedding(keep, of_patches), F.embedding(hide, of_patches)
        of_seen = torch.cat([of_prefix.expand(len(seen), -1, -1), of_seen], dim=1)
        x = torch.cat([seen + of_seen, (self.mask_token + of_hidden).to(of_seen.dtype)], dim=1)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_blocks[-1](x, None, hide.shape[1] if hidden_only else None)
        return self.decoder_norm(x)  # type: ignore[no-any-return]

    def patchify(self, images: Tensor) -> Tensor:
        """Images [b c h w] -> patches [b n s] in (row, column, channel) order, as `pred`."""
        return _pixels_last(patch_rows(images, self.patch_size), self.in_chans)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Patches [b n s] in (row, column, channel) order -> square images [b c h w]."""
        b, n, _ = patches.shape
        side, p, c = round(n**0.5), self.patch_size, self.in_chans
        pixels = patches.reshape(b, side, side, p, p, c).permute(0, 5, 1, 3, 2, 4)
        return pixels.reshape(b, c, side * p, side * p)

    def _predict(self, tokens: Tensor) -> Tensor:
        """Decoder tokens -> patches in (channel, row, column) order; permuting the weight is cheaper than pixels."""
        weight, bias = self.decoder_pred.weight, self.decoder_pred.bias
        weight = weight.view(self.patch_size**2, self.in_chans, -1).transpose(0, 1).flatten(0, 1)
        return F.linear(tokens, weight, bias.view(self.patch_size**2, self.in_chans).t().flatten())

    def _loss(self, images: Tensor, pred: Tensor, hide: Tensor) -> Tensor:
        """Mean squared error over hidden patches [b m s] of the whole batch, in float32 or better (section 3)."""
        with torch.autocast(images.device.type, enabled=False):
            pred = pred.to(torch.promote_types(pred.dtype, torch.float32))
            target = patch_rows(images, self.patch_size, hide).to(pred.dtype)
            if self.norm_pix_loss:
                # The authors divide by sqrt(unbiased variance + 1e-6), layer_norm (one kernel) by the biased one.
                s = target.shape[-1]
                gain = torch.full((s,), (1 - 1 / s) ** 0.5, dtype=target.dtype, device=target.device)
                target = F.layer_norm(target, (s,), gain, None, 1e-6 * (1 - 1 / s))
            return F.mse_loss(pred, target)


def load_mae(
    source: str | Path, *, heads: int | None = None, decoder_heads: int = 16, norm_pix_loss: bool = True
) -> MAE:
    """A MAE with its weights, on the CPU, in evaluation mode.

    Args:
        source: a run's directory, its checkpoint, or the authors' .pth with the decoder in it.
        heads: encoder heads of an original file whose size is not a published one.
        decoder_heads: of an original file.
        norm_pix_loss: of an original file, which does not tell.

    Raises:
        TaskError: nothing there, no MAE, or keys that are missing or unexpected.
    """
    path = checkpoint_path(source)
    content = read_checkpoint(path)
    if "trivit" in content:
        about = content["trivit"]
        if about["objective"] != "mae":
            raise TaskError(f"{source} was trained with {about['objective']}, not with MAE: it reconstructs nothing")
        mae = MAE(Encoder(config_from_dict(about["encoder"], str(source))), **about["model"])
        state = {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}
    else:
        of_encoder, author = encoder_state(content, str(source))
        config = encoder_config(of_encoder, author, str(source), heads)
        if author != "mae" or "mask_token" not in content["model"]:
            raise TaskError(f"{source} has no decoder, so it reconstructs nothing: take the file with it")
        state = mae_names(content["model"])
        depth = len({name.split(".")[1] for name in state if name.startswith("decoder_blocks.")})
        mae = MAE(Encoder(config), state["mask_token"].shape[2], depth, decoder_heads, norm_pix_loss=norm_pix_loss)
    load_strictly(mae, state, str(source))
    return mae.eval()


def _pixels_last(patches: Tensor, channels: int) -> Tensor:
    """Patches in (channel, row, column) order -> (row, column, channel)."""
    b, n, s = patches.shape
    return patches.reshape(b, n, channels, s // channels).transpose(2, 3).flatten(2)
