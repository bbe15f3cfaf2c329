import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evaluation.errors import EvaluationError
from evaluation.finetune import Classifier, Finetune, classifier, finetune, groups_of
from evaluation.finetune_views import FinetuneRecipe
from evaluation.ranks import top
from tasks.encoder_config import EncoderConfig
from tasks.encoder_files import load_encoder
from tasks.encoders import Encoder
from tests.conftest import Golden
from tests.evaluation.conftest import CONFIG
from tests.evaluation.test_frozen_heads import data_of


@pytest.mark.golden("mae_schedules")
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_groups_are_those_of_the_authors(golden: Golden, pool: str) -> None:
    c = golden.config["finetune"]
    m, want = c["model"], golden.values["finetune_param_groups"][f"global_pool_{str(pool == 'mean').lower()}"]
    config = EncoderConfig(
        width=m["embed_dim"], depth=m["depth"], heads=m["num_heads"], image_size=m["img_size"],
        patch_size=m["patch_size"], mlp_ratio=m["mlp_ratio"], qkv_bias=m["qkv_bias"], pool=pool,
    )  # fmt: skip
    model = classifier(Encoder(config), m["num_classes"], drop_path=0.1)
    settings = Finetune(weight_decay=c["weight_decay"], layer_decay=c["layer_decay"], base_rate=1.0)
    groups = groups_of(model, settings, batch_size=256)
    place = {id(parameter): group for group in groups for parameter in group["params"]}
    ours = {
        name.removeprefix("trunk."): (place[id(parameter)]["lr"], place[id(parameter)]["weight_decay"])
        for name, parameter in model.named()
    }
    theirs = {name: (recorded["lr_scale"], recorded["weight_decay"]) for name, recorded in want["params"].items()}
    assert ours.keys() == theirs.keys()
    for name, (scale, decay) in theirs.items():
        assert ours[name] == pytest.approx((scale, decay), abs=1e-12), name


def test_a_copy_learns_positions_and_drops_paths_and_the_encoder_stays() -> None:
    torch.manual_seed(0)
    encoder = Encoder(replace(CONFIG, depth=2))
    model = classifier(encoder, 6, drop_path=0.3)
    assert model.encoder.trunk.pos_embed.requires_grad and not encoder.trunk.pos_embed.requires_grad
    assert model.encoder.trunk.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)
    assert isinstance(model.encoder.trunk.norm, nn.Identity) and isinstance(encoder.trunk.norm, nn.LayerNorm)
    assert model.head.weight.std() < 1e-4, "training begins with all classes alike"
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        raw = model.eval().encoder(images).patches.mean(1)
        torch.testing.assert_close(model.head(nn.functional.layer_norm(raw, (24,), eps=1e-6)), model(images))


def test_views_follow_from_the_keys_and_leave_other_randomness_alone() -> None:
    recipe = FinetuneRecipe(16, "rand-m9-mstd0.5-inc1", (0.5, 0.5, 0.5))
    images = [torch.randint(0, 256, (3, 20, 24), dtype=torch.uint8) for _ in range(6)]
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002
    first = recipe(images, np.arange(6))["image"]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index] # noqa: NPY002
    assert torch.equal(first, recipe(images, np.arange(6))["image"])
    assert torch.equal(first[2:4], recipe(images[2:4], np.array([2, 3]))["image"])
    assert not torch.equal(first, FinetuneRecipe(16, "", (0.5, 0.5, 0.5))(images, np.arange(6))["image"])
    with pytest.raises(EvaluationError, match="none that timm knows"):
        FinetuneRecipe(16, "autumn-m9", (0.5, 0.5, 0.5))


def test_it_learns_and_repeats(world: Path, cache: Path, encoder_file: Path) -> None:
    encoder = load_encoder(encoder_file)
    data = data_of(world / "train", world / "test", encoder)
    config = Finetune(
        epochs=6, warmup_epochs=1, batch_size=48, base_rate=2e-2, layer_decay=0.9, mixup=0.2, cutmix=0.0, erase=0.1,
        randaugment="rand-m1-n1", drop_path=0.05,
    )  # fmt: skip
    state = torch.get_rng_state()
    found = finetune(encoder, data, config)
    assert torch.equal(torch.get_rng_state(), state)
    assert (found.steps, found.batch_size) == (30, 48) and top(found.rank) > 60
    again = finetune(encoder, data, replace(config))
    assert np.array_equal(found.rank, again.rank)


def test_it_is_scored_in_the_precision_that_it_was_trained_in(world: Path, cache: Path, encoder_file: Path) -> None:
    encoder = load_encoder(encoder_file)
    half = data_of(world / "train", world / "test", encoder, precision="bfloat16")
    seen: dict[bool, set[bool]] = {True: set(), False: set()}
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen[module.training].add(torch.is_autocast_enabled("cpu"))
        if isinstance(module, Classifier) else None
    )  # fmt: skip
    finetune(encoder, half, Finetune(epochs=1, warmup_epochs=0, batch_size=48, randaugment=""))
    hook.remove()
    assert seen == {True: {True}, False: {True}}


def test_what_cannot_be_tuned_is_one_line(world: Path, cache: Path, encoder_file: Path) -> None:
    data = data_of(world / "train", world / "test", load_encoder(encoder_file))
    for wrong in (Finetune(epochs=5), Finetune(base_rate=0.0), Finetune(layer_decay=0.0), Finetune(drop_path=1.0)):
        with pytest.raises(EvaluationError, match="finetune needs"):
            finetune(load_encoder(encoder_file), data, wrong)
    with pytest.raises(EvaluationError, match="plain Vision Transformer"):
        finetune(Encoder(EncoderConfig(arch="timm:resnet10t", image_size=16)), data, Finetune())
    grey = Encoder(replace(CONFIG, in_chans=1, mean=(0.5,), std=(0.2,)))
    with pytest.raises(EvaluationError, match="3 channels and 8 bits"):
        finetune(grey, data, Finetune())
