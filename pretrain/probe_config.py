"""What a run's probes are: `--probe.train DIR --probe.test DIR`."""

from dataclasses import dataclass

from pretrain.errors import RunError


@dataclass
class ProbeConfig:
    """Labelled images on which a run probes its encoder on the way.

    Args:
        train: labelled tars or class folders to learn from.
        test: the same to score on, with the same classes.
        every: optimiser steps between two probes; 0: as often as the time allows, when a row of metrics.csv is due.
        share: of the time that all this may take.
        train_images, test_images: so many, spread evenly over each set, always the same.
        k: neighbours that vote.
    """

    train: str = ""
    test: str = ""
    every: int = 0
    share: float = 0.02
    train_images: int = 2000
    test_images: int = 500
    k: int = 20

    def check(self) -> None:
        """RunError for what cannot work."""
        if not self.train or not self.test:
            raise RunError("probe needs both: --probe.train DIR --probe.test DIR")
        if self.every < 0 or not 0 < self.share < 1:
            raise RunError("probe.every counts steps (0: as time allows), and probe.share must be between 0 and 1")
        if min(self.test_images, self.k) < 1 or self.train_images < self.k:
            raise RunError("probe.test_images and probe.k must be at least 1, and probe.train_images at least probe.k")
