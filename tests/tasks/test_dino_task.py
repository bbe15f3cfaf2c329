"""DINOTask in a Trainer: families of encoders, exact resume, starting from files, steps that must not happen."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from timm.models import build_model_with_cfg, register_model
from timm.models.swin_transformer import SwinTransformer

from tasks import load_encoder
from tasks.dino import IBOTConfig
from tasks.dino_head import HeadConfig
from tasks.dino_task import DINOTask
from tasks.encoder_config import EncoderConfig
from tasks.encoder_files import save_encoder
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tests.tasks.dino_runs import HEAD, TINY, Stop, Views, fit, same, state, tiny_task


@register_model
def swin_for_tests(pretrained: bool = False, **options: Any) -> SwinTransformer:
    """timm's smallest Swin has 27 million parameters."""
    sizes = {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 4, 4), "window_size": 7}
    return build_model_with_cfg(SwinTransformer, "swin_tiny_patch4_window7_224", pretrained, **sizes, **options)


FAMILIES = [  # the smallest that timm has of each
    pytest.param("test_vit", id="ViT"),
    pytest.param("test_convnext", id="ConvNeXt"),
    pytest.param("swin_for_tests", id="Swin"),
    pytest.param("xcit_nano_12_p16_224", id="XCiT"),
    pytest.param("pvt_v2_b0", id="PVT"),
    pytest.param("mobilevitv2_050", id="MobileViT"),
    pytest.param("vit_tiny_r_s16_p8_224", id="hybrid"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_and_gives_features(family: str, tmp_path: Path) -> None:
    task = tiny_task(EncoderConfig(arch=f"timm:{family}", image_size=64, pool="mean"), lr=1e-4)
    before = state(task.model)
    trainer = fit(task, 2, Views(batch=2, size=64, small=32, local_views=1), callbacks=[Outputs(seen := [])])
    assert len(seen) == 2 and all(value.isfinite() for out in seen for value in out.values())
    moved = [name for name, p in task.model.teacher.named_parameters() if not torch.equal(p, before[f"teacher.{name}"])]
    assert len(moved) > 0.9 * len(list(task.model.student.parameters()))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    encoder = load_encoder(tmp_path / "run.ckpt")
    assert same(state(encoder), state(task.model.teacher.encoder))  # DINO is evaluated by its teacher
    features = encoder.features(torch.randn(3, 3, 64, 64))
    assert features.shape == (3, encoder.feature_width) and features.isfinite().all()


class Outputs(Callback):
    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.seen.append({k: v.clone() for k, v in outputs.items()})


def everything(**changes: Any) -> DINOTask:
    """Every part that has a state or draws a number; what refuses accumulation apart."""
    encoder = replace(TINY, drop_path=0.3, registers=2, layer_scale=0.1)
    ibot = IBOTConfig(mask_probability=0.8, head=HeadConfig(12, 16, 8, norm_last_layer=False))
    settings = {"ibot": ibot, "warmup_teacher_temp_epochs": 2, "teacher_temp": 0.07, "freeze_last_layer_epochs": 1}
    return tiny_task(encoder, **{**settings, **changes})


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_resume_is_exact_and_the_teacher_too(stop_at: int, tmp_path: Path) -> None:
    whole, parts, seen_whole, seen_parts = everything(), everything(), [], []
    more = {"accumulate_grad_batches": 2}
    fit(whole, 5, callbacks=[Outputs(seen_whole)], **more)
    fit(parts, 5, callbacks=[Outputs(seen_parts), Stop(stop_at, tmp_path / "last.ckpt")], **more)
    assert len(seen_parts) == 2 * stop_at
    torch.manual_seed(99)
    resumed = everything(init_encoder="gone/since.ckpt")  # what a run started from is not needed to go on
    fit(resumed, 5, callbacks=[Outputs(seen_parts)], ckpt_path=tmp_path / "last.ckpt", **more)
    assert same(state(whole), state(resumed))
    assert all(same(a, b) for a, b in zip(seen_whole, seen_parts, strict=True))
    assert set(seen_whole[0]) == {
        "loss", "dino_loss", "ibot_loss", "teacher_entropy", "kl", "prototypes_used", "feature_std", "center_norm",
        "micro_batch", "ibot_teacher_entropy", "ibot_prototypes_used", "ibot_center_norm",
    }  # fmt: skip


def test_bf16_and_sgd_train() -> None:
    for changes, settings in (({}, {"precision": "bf16-mixed"}), ({"optimizer": "sgd"}, {}), ({"clip": "module"}, {})):
        task, seen = tiny_task(koleo_weight=0.1, targets="sinkhorn", **changes), list[Any]()
        fit(task, 3, callbacks=[Outputs(seen)], **settings)
        assert all(value.isfinite() for out in seen for value in out.values())
        assert "center_norm" not in seen[0] and all(p.dtype == torch.float32 for p in task.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "changes"),
    [
        pytest.param(replace(TINY, depth=12, drop_path=0.1), {}, id="ViT"),
        pytest.param(replace(TINY, depth=12, drop_path=0.1), {"ibot": IBOTConfig()}, id="iBOT"),
        pytest.param(
            EncoderConfig(arch="timm:convnext_atto", image_size=64, pool="mean", drop_path=0.1), {}, id="ConvNeXt"
        ),
    ],
)
def test_compiled_blocks_are_the_same_blocks(
    encoder: EncoderConfig, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as torch.compile does, without the minutes that generating code takes on a CPU: all of them, each time."""
    calls = [0]

    def count(graph: Any, inputs: Any) -> Any:
        def call(*args: Any) -> Any:
            calls[0] += 1
            return graph.forward(*args)

        return call

    compiling = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward: compiling(forward, backend=count, fullgraph=True))
    torch.compiler.reset()
    plain, compiled = (tiny_task(encoder, compile_blocks=on, **changes) for on in (False, True))
    assert list(plain.state_dict()) == list(compiled.state_dict())
    data = {"size": encoder.image_size, "small": encoder.image_size // 2}
    fit(plain, 3, Views(**data))
    assert calls == [0]
    fit(compiled, 3, Views(**data))
    blocks, passes = len(compiled.model.student.encoder.blocks), 3
    assert blocks >= 8 and calls == [3 * passes * blocks], "torch.compile gave some blocks up"
    for name, value in state(plain).items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-4, atol=1e-5)


class Watch(Callback):
    """Whether encoder, head and prototypes of the student moved in each step."""

    def __init__(self) -> None:
        self.moved: list[tuple[bool, bool, bool]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.before = state(pl_module.model.student)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        changed = [n for n, v in state(pl_module.model.student).items() if not torch.equal(v, self.before[n])]
        parts = ("encoder.", "head.mlp", "head.last_layer")
        self.moved.append(tuple(any(n.startswith(part) for n in changed) for part in parts))  # type: ignore[arg-type]


def test_what_is_frozen_does_not_move() -> None:
    watch = Watch()
    task = tiny_task(freeze_last_layer_epochs=1, head_warmup_epochs=1.5, min_lr=1e-2, weight_decay=0.5)
    fit(task, 5, callbacks=[watch])  # two steps an epoch
    assert watch.moved == [(False, True, False), (False, True, False), (False, True, True), *2 * [(True, True, True)]]


def test_layers_learn_at_their_own_rates() -> None:
    task = tiny_task(layer_decay=0.5, patch_embed_lr_scale=0.2, ibot=IBOTConfig())
    names = {id(p): name for name, p in task.model.student.named_parameters()}
    scale = {names[id(p)]: g["lr_scale"] for g in task.configure_optimizers().param_groups for p in g["params"]}
    assert scale["encoder.trunk.patch_embed.proj.weight"] == pytest.approx(0.5**3 * 0.2)
    assert scale["encoder.trunk.pos_embed"] == scale["mask_token"] == 0.5**3
    assert [scale[f"encoder.trunk.blocks.{i}.attn.qkv.weight"] for i in range(2)] == [0.25, 0.5]
    assert scale["encoder.trunk.norm.weight"] == scale["head.mlp.0.weight"] == 1
    with pytest.raises(TaskError, match="plain ViTs only"):
        tiny_task(EncoderConfig(arch="timm:test_convnext", image_size=32), layer_decay=0.9)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw, not fused", "sgd"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_reaches_neither_student_nor_teacher_nor_centre(optimizer: str, where: str) -> None:
    task = tiny_task(optimizer=optimizer.split(",")[0], betas=(0.0, 0.999) if optimizer == "sgd" else (0.9, 0.999))
    if "not fused" in optimizer:
        build = task.configure_optimizers
        task.configure_optimizers = lambda: torch.optim.AdamW(build().param_groups, fused=False)  # type: ignore[method-assign]

    class Poison(Callback):
        states: list[dict[str, torch.Tensor]]

        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            self.states = [state(task.model)]

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1 and where == "loss":
                batch["global_views"][0, 0] = float("nan")
            if batch_idx == 1 and where == "gradient":
                task.model.student.head.mlp[0].weight.register_hook(lambda g: g * float("inf"))  # type: ignore[index, operator]

        def on_train_batch_end(self, *_: Any) -> None:
            self.states.append(state(task.model))

    fit(task, 2, callbacks=[poison := Poison()])
    start, good, bad = poison.states
    assert not same(start, good) and all(value.isfinite().all() for value in bad.values())
    for name, value in good.items():
        still = name.startswith("student.") or (where == "loss" and name == "dino_targets.center")
        assert torch.equal(value, bad[name]) or not still, name  # the teacher goes on following the student


def test_start_from_an_encoder_alone(tmp_path: Path) -> None:
    """A file of another run, its position table resized: student and teacher get it, heads are new."""
    torch.manual_seed(5)
    other = Encoder(replace(TINY, image_size=32, positions="sincos2d", position_resize="mae", pool="mean"))
    save_encoder(other, tmp_path / "mae.safetensors")
    fresh = tiny_task()
    task = tiny_task(init_encoder=str(tmp_path / "mae.safetensors"), head_warmup_epochs=1)
    fit(task, 3, callbacks=[Stop(1, tmp_path / "one.ckpt")])
    blocks = {k: v for k, v in state(task.model.student.encoder.trunk).items() if k != "pos_embed"}
    assert all(torch.equal(v, other.trunk.state_dict()[k]) for k, v in blocks.items())
    assert task.model.student.encoder.trunk.pos_embed.shape == (1, 17, 24)
    assert same(state(task.model.student.encoder), state(task.model.teacher.encoder))
    assert not same(state(task.model.student.head), state(fresh.model.student.head))

    for encoder, words in ((replace(TINY, width=32), "width is 24 there, 32"), (replace(TINY, depth=3), "depth is 2")):
        with pytest.raises(TaskError, match=rf"init_encoder .*mae.safetensors does not fit: .*{words}"):
            fit(tiny_task(encoder, init_encoder=str(tmp_path / "mae.safetensors")), 1)


def test_start_from_whole_checkpoints(tmp_path: Path) -> None:
    """One of ours, and one under the authors' names, with what their training script saves beside the weights."""
    old = tiny_task()
    fit(old, 3, callbacks=[Stop(2, tmp_path / "ours.ckpt")])
    model = old.model
    authors = {
        who: {f"{prefix}{name.replace('encoder.trunk.', 'backbone.')}": v for name, v in branch.state_dict().items()}
        for who, branch, prefix in (("student", model.student, "module."), ("teacher", model.teacher, ""))
    }
    extra = {"epoch": 3, "args": argparse.Namespace(arch="vit_tiny", out_dim=16), "fp16_scaler": None}
    torch.save({**authors, "dino_loss": {"center": model.dino_targets.center}, **extra}, tmp_path / "authors.pth")
    for name in ("ours.ckpt", "authors.pth"):
        task = tiny_task(init_checkpoint=str(tmp_path / name), lr=0.0, base_lr=None, min_lr=0.0)
        fit(task, 1, callbacks=[Before(found := [])])
        assert same(found[0], state(model))
    torch.save({"teacher": authors["teacher"]}, tmp_path / "teacher.pth")
    with pytest.raises(TaskError, match="no full DINO checkpoint"):
        fit(tiny_task(init_checkpoint=str(tmp_path / "teacher.pth")), 1)
    with pytest.raises(TaskError, match=r"head\.prototypes is 16 there, 8 here"):
        fit(tiny_task(head=replace(HEAD, prototypes=8), init_checkpoint=str(tmp_path / "ours.ckpt")), 1)


def test_start_from_a_dino_with_other_targets_or_without_ibot(tmp_path: Path) -> None:
    """Centres are left behind by Sinkhorn-Knopp; iBOT with the same head begins with a mask token and a centre of 0."""
    own_head = IBOTConfig(head=HeadConfig(12, 16, 8))
    saved: dict[str, Any] = {}
    for name, ibot in (("plain", None), ("shared", IBOTConfig()), ("own", own_head)):
        task = tiny_task(ibot=ibot)
        fit(task, 3, callbacks=[Stop(2, tmp_path / f"{name}.ckpt")])
        saved[name] = state(task.model)
    added = {"student.mask_token", "teacher.mask_token", "ibot_targets.center"}
    centers = {"dino_targets.center", "ibot_targets.center"}
    for name, new, extra in (
        ("shared", {"ibot": IBOTConfig(), "targets": "sinkhorn"}, set()),
        ("own", {"ibot": own_head, "targets": "sinkhorn"}, set()),
        ("plain", {"targets": "sinkhorn"}, set()),
        ("plain", {"ibot": IBOTConfig()}, added),
        ("plain", {"ibot": IBOTConfig(), "targets": "sinkhorn"}, added - centers),
    ):
        fit(tiny_task(init_checkpoint=str(tmp_path / f"{name}.ckpt"), **new), 1, callbacks=[Before(found := [])])
        assert found[0].keys() - saved[name].keys() == extra and not any(found[0][key].any() for key in extra)
        kept = saved[name].keys() - (centers if new.get("targets") else set())
        assert all(torch.equal(found[0][key], saved[name][key]) for key in kept)
    for name, new, option in (
        ("shared", None, r"--model\.ibot\.head null$"),
        ("own", IBOTConfig(), r'--model\.ibot\.head "\{prototypes: 12, .*norm_last_layer: true\}"$'),
        ("plain", own_head, r"--model\.ibot null$"),
    ):
        with pytest.raises(TaskError, match=f"ibot is o.* To start from it set {option}"):
            fit(tiny_task(init_checkpoint=str(tmp_path / f"{name}.ckpt"), ibot=new), 1)


class Before(Callback):
    def __init__(self, found: list[Any]) -> None:
        self.found = found

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.found.append(state(pl_module.model))


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"koleo_weight": 0.1}, {"accumulate_grad_batches": 2}, "KoLeo cannot see across 2 accumulated"),
        ({"targets": "sinkhorn"}, {"accumulate_grad_batches": 2}, "Sinkhorn-Knopp cannot see across 2"),
        ({}, {"gradient_clip_val": 1.0}, "DINO has clip_grad"),
        ({}, {"precision": "bf16-true"}, "bf16-mixed"),
        (
            {"freeze_last_layer_epochs": 2},
            {},
            "freeze_last_layer_epochs 2 .4 steps. is not shorter than the run of 4",
        ),
        ({"warmup_teacher_temp_epochs": 3}, {}, "warmup_teacher_temp_epochs 3 .6 steps."),
        ({"head_warmup_epochs": 2.5}, {}, "head_warmup_epochs 2.5"),
        ({"warmup_epochs": 2}, {}, "warm-up of 4 steps"),
    ],
)
def test_what_a_run_contradicts(changes: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        fit(tiny_task(**changes), 4, **settings)


def test_all_phases_that_are_too_long_are_told_at_once_with_values_that_work() -> None:
    phases = {"warmup_epochs": 10.0, "freeze_last_layer_epochs": 1.0, "warmup_teacher_temp_epochs": 30}
    with pytest.raises(TaskError, match=r"warm-up of 1500 .*; model.freeze.*; model.warmup_t.*; shorten") as caught:
        tiny_task(**phases).check_schedule(60, 150)
    words = str(caught.value).partition("for example ")[2].replace("--model.", "").split()
    proposed = {name: float(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    assert list(proposed) == list(phases)
    tiny_task(**proposed).check_schedule(60, 150)


@pytest.mark.parametrize(
    "changes",
    [{"teacher_temp": 0}, {"teacher_momentum": 1.5}, {"clip_grad": -1}, {"init_encoder": "a", "init_checkpoint": "b"}],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any]) -> None:
    with pytest.raises(TaskError):
        tiny_task(**changes)


def test_it_builds_on_the_meta_device() -> None:
    with torch.device("meta"):
        task = DINOTask(
            EncoderConfig(arch="vit_huge", patch_size=14, positions="learned", position_resize="dino", pool="cls"),
            HeadConfig(131072), ibot=IBOTConfig(head=HeadConfig(131072)), lr=1e-3,
        )  # fmt: skip
    assert {p.device.type for p in task.parameters()} == {"meta"}
    assert sum(p.numel() for p in task.model.student.parameters()) > 6e8


@pytest.mark.slow
def test_two_ranks_train_as_one() -> None:
    """Global batch 8 on one rank and on two: the same student, teacher and centres."""
    one, two = (everything(clip_grad=0.3) for _ in range(2))
    for task in (one, two):
        task.double()
    fit(one, 5, Views(batch=8), precision="64-true")
    fit(two, 5, Views(batch=8), precision="64-true", devices=2, strategy="ddp_spawn", callbacks=None)
    for name, value in state(one).items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_temp": 0}, "^teacher_temp must be above 0, not 0$"),
        ({"warmup_teacher_temp": -0.5}, "^warmup_teacher_temp must be above 0, not -0.5$"),
        ({"teacher_momentum": 1.2}, "^teacher_momentum must be from 0 to 1, not 1.2$"),
        ({"clip_grad": -3}, "^clip_grad cannot be negative, but is -3$"),
        ({"head_warmup_epochs": -1}, "^head_warmup_epochs cannot be negative, but is -1$"),
    ],
)
def test_a_bad_setting_is_named_alone_with_its_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        tiny_task(**changes)
