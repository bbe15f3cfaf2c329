"""Classifiers made of words (Radford et al. 2021, arXiv:2103.00020, section 3.1.4).

Axes: p = prompts, c = classes, b = images, e = joint width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.clip import CLIP

SCALE = 100.0  # of zero-shot logits, as open_clip has it, whatever the model learned


@torch.no_grad()
def encode_texts(clip: CLIP, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Texts -> vectors of length 1, [p e], on the model's device."""
    device = clip.logit_scale.device
    parts = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
    return torch.cat([clip.encode_text(clip.text.tokenizer(part).to(device)) for part in parts])


def class_weights(prompts: Tensor, classes: Tensor) -> Tensor:
    """Vectors of prompts [p e] -> of classes, [c e]: each prompt at length 1, their mean, at length 1 again.

    Args:
        prompts: every class has at least one.
        classes: int64 [p], the class of each prompt, 0 to c - 1.
    """
    prompts = F.normalize(prompts, dim=-1)
    sums = prompts.new_zeros(int(classes.max()) + 1, prompts.shape[1]).index_add_(0, classes, prompts)
    return F.normalize(sums / classes.bincount()[:, None], dim=-1)


def zero_shot_logits(images: Tensor, weights: Tensor) -> Tensor:
    """Vectors of images, of length 1 [b e], and of classes [c e] -> [b c]."""
    return SCALE * images @ weights.T
