"""A CLIP training step, as a run takes it, against the same step composed of open_clip's own model and loss.

Same sizes, weights, batch (synthetic) and optimiser, one thread; the losses of the first steps are compared,
so that both do the same work. Ours counts captions and computes its health figures, as in a run. Speed is by CPU time,
in turns within one run; memory is what a process of its own grows to.

Run: python -m benchmarks.clip_step
"""

import itertools
import math
import random
from typing import Any, NamedTuple

import torch
import yaml
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from torch.optim import AdamW

from benchmarks.steps import Step, TaskStep, step_rows, task_of
from benchmarks.table import Row, show
from pretrain.config import SHIPPED
from tasks.encoder_files import load_strictly
from tasks.open_clip_names import our_names
from tasks.tokenizer import Tokenizer

WORDS = ("a", "photo", "of", "the", "dog", "and", "cat", "on", "green", "grass", "beside", "an", "old", "red", "house")


class Setting(NamedTuple):
    """Sizes, by a YAML of ours with options and in open_clip's terms; captions have from `words[0]` to `words[1]`."""

    name: str
    config: str
    options: tuple[str, ...]
    theirs: dict[str, Any]
    batch: int
    words: tuple[int, int]


_SMALL = (
    "clip_vitb16",
    ("--model.encoder.arch", "vit_small", "--model.text.width", "384", "--model.text.heads", "6",
     "--model.joint_width", "384"),
    {"embed_dim": 384, "vision_cfg": {"image_size": 224, "layers": 12, "width": 384, "patch_size": 16},
     "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 384, "heads": 6, "layers": 12}},
    16,
)  # fmt: skip
_TIN40 = {
    "embed_dim": 128, "vision_cfg": {"image_size": 64, "layers": 6, "width": 192, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}  # fmt: skip
SETTINGS = (
    Setting("ViT-S/16, 224 px, batch 16, captions fill all 77 ids", *_SMALL, (80, 80)),
    Setting("ViT-S/16, 224 px, batch 16, captions of 5 to 20 words", *_SMALL, (5, 20)),
    Setting("TIN-40 towers, 64 px, batch 128, captions fill all 16 ids", "clip_tin40", (), _TIN40, 128, (20, 20)),
)


def measure(rounds: int = 3) -> list[Row]:
    """Images per CPU second and peak memory of each setting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = [row for setting in SETTINGS for row in step_rows("CLIP step", setting, ours, theirs, "open_clip", rounds)]
    torch.set_num_threads(threads)
    return rows


def batch_of(setting: Setting, more: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [b 3 h h] and ids [b t + more]."""
    random.seed(0)
    side, length = setting.theirs["vision_cfg"]["image_size"], setting.theirs["text_cfg"]["context_length"]
    captions = [" ".join(random.choices(WORDS, k=random.randint(*setting.words))) for _ in range(setting.batch)]
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(setting.batch, 3, side, side, generator=draw, device="cpu")
    return images, Tokenizer(context_length=length + more)(captions)


def build(setting: Setting) -> CLIP:
    """open_clip's model, the same every time."""
    torch.manual_seed(0)
    return CLIP(**setting.theirs)


def ours(setting: Setting, *options: str, device: str = "cpu", autocast: torch.dtype | None = None) -> TaskStep:
    """Our task as the run of a YAML builds it, with open_clip's initial weights."""
    task = task_of(setting.config, *setting.options, *options).model
    load_strictly(task.model, our_names(build(setting).state_dict()), "open_clip")
    images, ids = batch_of(setting, more=1)  # as our loader hands it over, to tell captions that are too long
    batch = {"image": images.to(device), "text": ids, "rng": torch.arange(setting.batch, device="cpu")}
    return TaskStep(task, setting.batch, lambda: dict(batch), device, autocast)


def theirs(setting: Setting) -> Step:
    """What open_clip's training does in a step, with the rates and the fused optimiser of ours."""
    told = yaml.safe_load((SHIPPED / f"{setting.config}.yaml").read_text())["model"]["init_args"]
    model, loss_of = build(setting).train(), ClipLoss()
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim >= 2) == decays], "weight_decay": decay}
        for decays, decay in ((False, 0.0), (True, told["weight_decay"]))
    ]
    optimizer = AdamW(groups, lr=told["lr"], betas=told["betas"], eps=told["eps"], fused=True)
    images, ids = (each.to(torch.get_default_device()) for each in batch_of(setting))
    steps = itertools.count(1)

    def step() -> float:
        rate = told["lr"] * next(steps) / told["warmup_steps"]
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(*model(images, ids))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return float(loss.item())

    return step


def main() -> None:
    """Print the table."""
    print(show(measure()))


if __name__ == "__main__":
    main()
