"""MAE pretraining as a LightningModule (He et al. 2022, arXiv:2111.06377, Table 8 for the defaults)."""

from typing import Any

from torch import Tensor, nn

from tasks.drop_path import drop_path_keys
from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder
from tasks.mae import MAE
from tasks.masks import random_noise
from tasks.task import PretrainTask


class MAETask(PretrainTask):
    """Masked autoencoding of images.

    Args:
        encoder: a plain Vision Transformer.
        decoder_width: channels of a decoder token.
        decoder_depth: decoder blocks.
        decoder_heads: attention heads of the decoder.
        mask_ratio: share of the patches that is hidden.
        norm_pix_loss: predict each patch after normalising it by its own mean and deviation.
        lr: peak learning rate; exactly one of lr and base_lr.
        base_lr: peak learning rate for a global batch of 256; scaled linearly with the batch.
        min_lr: learning rate at the end.
        warmup_epochs: epochs, also fractions of one, in which the rate rises to its peak at the beginning.
        warmup_steps: the same in optimiser steps; give one of the two, null for the other (both null: no warm-up).
        weight_decay: of matrices and tokens; vectors and biases have none.
        betas: AdamW's averaging rates.
        compile_blocks: compile each block of encoder and decoder (torch.compile).
        activation_checkpointing: compute each block again in the backward pass instead of keeping what it computed.
    """

    objective = "mae"
    model: MAE

    def __init__(
        self,
        encoder: EncoderConfig,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        lr: float | None = None,
        base_lr: float | None = None,
        min_lr: float = 0.0,
        warmup_epochs: float | None = None,
        warmup_steps: int | None = None,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
        compile_blocks: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(lr, base_lr, min_lr, warmup_epochs, warmup_steps, weight_decay, betas)
        self.model = MAE(Encoder(encoder), decoder_width, decoder_depth, decoder_heads, mask_ratio, norm_pix_loss)
        self.compile_blocks, self.activation_checkpointing = compile_blocks, activation_checkpointing

    @property
    def blocks(self) -> list[nn.Module]:
        """Of encoder and decoder."""
        return [*self.model.encoder.blocks, *self.model.decoder_blocks]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The loss of one micro-batch {"image": float [b c h w], "rng": int64 [b]}."""
        noise = random_noise(batch["rng"], self.model.encoder.num_patches, "mae mask")
        with drop_path_keys(self.model.encoder, batch["rng"]):
            return {"loss": self.model(batch["image"], noise, loss_only=True).loss}

    def model_settings(self) -> dict[str, Any]:
        """MAE's arguments besides the encoder."""
        return self.model.settings()
