"""DINO's projection head: features to logits over prototypes (Caron et al. 2021, arXiv:2104.14294, appendix C).

Axes: r = rows (class tokens of views and images, and hidden patches), d = width of a feature, e = bottleneck,
k = prototypes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.errors import TaskError


@dataclass(frozen=True)
class HeadConfig:
    """A projection head.

    Args:
        prototypes: k, the number of outputs.
        hidden_width: of the MLP's inner layers.
        bottleneck_width: e, of the normalised vector before the last layer.
        layers: linear layers before the last one, at least 1.
        batch_norm: BatchNorm after the inner layers.
        norm_last_layer: keep every prototype at length 1 (steadier); False lets the student learn the lengths.
    """

    prototypes: int = 65536
    hidden_width: int = 2048
    bottleneck_width: int = 256
    layers: int = 3
    batch_norm: bool = False
    norm_last_layer: bool = True

    def check(self) -> None:
        """TaskError, one line, for what cannot be built."""
        if min(self.hidden_width, self.bottleneck_width, self.layers) < 1:
            raise TaskError("head sizes (hidden_width, bottleneck_width, layers) must be positive")
        if self.prototypes < 2:
            raise TaskError(f"head.prototypes must be at least 2, not {self.prototypes}: one prototype teaches nothing")


class WeightNormLinear(nn.Module):
    """A linear layer without bias: its rows are directions `weight_v` times lengths `weight_g`, the authors' names.

    Args:
        inputs: e.
        outputs: k.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(outputs, 1))
        self.weight_v = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """[r e] -> [r k]."""
        # One fused kernel, which keeps only the lengths for the backward pass. The weights of 65,536 prototypes are
        # smaller than their logits, so it is they that are scaled.
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class DINOHead(nn.Module):
    """MLP, normalisation, prototypes.

    Args:
        width: d.
        config: sizes.

    Raises:
        TaskError: sizes that cannot be built.
    """

    def __init__(self, width: int, config: HeadConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        # A bfloat16 logit is off by up to 0.002, which a teacher's temperature of 0.04 makes 5% of a probability. The
        # teacher has few rows, so DINO sets this for it: its last layer leaves autocast.
        self.exact_logits = False
        layers: list[nn.Module] = []
        for i in range(config.layers - 1):
            layers.append(nn.Linear(width if i == 0 else config.hidden_width, config.hidden_width))
            if config.batch_norm:
                layers.append(nn.BatchNorm1d(config.hidden_width))
            layers.append(nn.GELU())
        bottleneck = nn.Linear(config.hidden_width if layers else width, config.bottleneck_width)
        self.mlp: nn.Module = nn.Sequential(*layers, bottleneck) if layers else bottleneck
        self.last_layer = WeightNormLinear(config.bottleneck_width, config.prototypes)
        self.last_layer.weight_g.requires_grad_(not config.norm_last_layer)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fills every parameter as the authors do: truncated normal 0.02, random directions of length 1."""
        for part in self.mlp.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
            elif isinstance(part, nn.BatchNorm1d):
                part.reset_parameters()
        bound = self.config.bottleneck_width**-0.5
        nn.init.uniform_(self.last_layer.weight_v, -bound, bound)
        nn.init.ones_(self.last_layer.weight_g)

    def forward(self, features: Tensor) -> Tensor:
        """Features [r d] -> logits [r k]."""
        x = self.mlp(features)
        x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
        if not self.exact_logits:
            return self.last_layer(x)  # type: ignore[no-any-return]
        with torch.autocast(x.device.type, enabled=False):
            return self.last_layer(x)  # type: ignore[no-any-return]
