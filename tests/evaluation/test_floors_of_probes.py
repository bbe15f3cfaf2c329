"""An encoder that training has spoiled is below its floors by every probe: floors are of other weights than its own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.probe_options import with_options
from evaluation.probes import ProbeSettings
from evaluation.score import evaluate
from tasks.encoder_files import save_encoder
from tasks.encoders import Encoder
from tests.evaluation.conftest import CONFIG
from tests.evaluation.test_dense import write_masked

ON_FEATURES = ("knn", "linear", "few_shot")
ON_IMAGES = ("linear_paper", "linear_mae", "attentive", "finetune", "corruptions")
QUICK = (
    "strengths=0.1", "few_shot.shots=10", "few_shot.shares=0.5", "few_shot.draws=1",
    "linear_paper.steps=8", "linear_paper.rates=2", "linear_paper.blocks=1", "linear_paper.batch_size=48",
    "linear_mae.epochs=4", "linear_mae.warmup_epochs=1", "linear_mae.batch_size=24", "linear_mae.base_rate=400",
    "attentive.epochs=3", "attentive.rates=1e-2", "attentive.batch_size=54", "attentive.head_width=8",
    "finetune.epochs=3", "finetune.warmup_epochs=1", "finetune.batch_size=48", "finetune.layer_decay=0.01",
    "finetune.base_rate=0.3", "finetune.mixup=0", "finetune.cutmix=0", "finetune.erase=0", "finetune.randaugment=",
    "corruptions.kinds=contrast", "corruptions.severities=1",
    "segmentation.steps=20", "segmentation.batch_size=10", "segmentation.rate=1e-2",
)  # fmt: skip


@pytest.fixture(scope="module")
def scores(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of an encoder that does not look at the images any more."""
    root = tmp_path_factory.mktemp("floors")
    spoiled = Encoder(CONFIG)
    with torch.no_grad():
        for parameter in spoiled.trunk.patch_embed.parameters():
            parameter.zero_()
    save_encoder(spoiled, root / "encoder.safetensors")
    masks = [write_masked(root / name, 30, seed) for seed, name in enumerate(("train", "test"))]
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIVIT_CACHE", str(root / "cache"))
        for train, test, probes in (
            (world / "train", world / "test", (*ON_FEATURES, *ON_IMAGES)),
            (*masks, ("segmentation",)),
        ):
            results = evaluate(
                root / "encoder.safetensors", train=train, test=test, probes=probes, workers=0, device="cpu",
                settings=with_options(ProbeSettings(), QUICK), progress=False, batch_size=64,
            )  # fmt: skip
            for floor, each in results.pop("floors").items():
                found.setdefault(floor, {}).update(each)
            found |= results
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("floor", "probe"),
    [*(("raw_pixels", probe) for probe in ON_FEATURES),
     *(("untrained", probe) for probe in (*ON_FEATURES, *ON_IMAGES, "segmentation"))],
)  # fmt: skip
def test_a_spoiled_encoder_is_below_its_floors(scores: dict[str, Any], floor: str, probe: str) -> None:
    number = "miou" if probe == "segmentation" else "top1"
    assert scores[probe][number] + 15 < scores[floor][probe][number]
