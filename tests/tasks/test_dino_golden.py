"""DINO against the authors' recorded numbers: three training steps, schedules, clipping, through DINOTask."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.data import DataLoader

from tasks.dino_files import our_name
from tasks.dino_head import HeadConfig
from tasks.dino_schedules import cosine, ramp
from tasks.dino_task import DINOTask
from tasks.encoder_config import EncoderConfig
from tasks.gradients import clip_gradients
from tests.conftest import GOLDEN, Golden


def other(golden: Golden, name: str) -> Golden:
    """The fixture of another name and the same variant."""
    return Golden(GOLDEN / golden.path.name.replace(golden.about["fixture"], name))


def golden_task(c: dict[str, Any], **changes: Any) -> DINOTask:
    """The task that a YAML with the fixture's numbers builds, in float64."""
    vit, head = c["vit"], c["head"]
    encoder = EncoderConfig(
        arch="vit_small",
        image_size=vit["img_size"][0],
        patch_size=vit["patch_size"],
        width=vit["embed_dim"],
        depth=vit["depth"],
        heads=vit["num_heads"],
        mlp_ratio=vit["mlp_ratio"],
        qkv_bias=vit["qkv_bias"],
        norm_eps=vit["layer_norm_eps"],
        positions="learned",
        position_resize="dino",
        pool="cls",
    )
    sizes = HeadConfig(
        prototypes=head["out_dim"],
        hidden_width=head["hidden_dim"],
        bottleneck_width=head["bottleneck_dim"],
        layers=head["nlayers"],
        batch_norm=head["use_bn"],
        norm_last_layer=head["norm_last_layer"],
    )
    settings: dict[str, Any] = {
        "student_temp": c["student_temp"],
        "teacher_temp": c["teacher_temp"],
        "warmup_teacher_temp": c["warmup_teacher_temp"],
        "warmup_teacher_temp_epochs": c["warmup_teacher_temp_epochs"],
        "center_momentum": c["center_momentum"],
        "teacher_momentum": c["momentum_teacher"],
        "freeze_last_layer_epochs": c["freeze_last_layer"],
        "clip_grad": c["clip_grad"],
        "optimizer": "sgd",
        "betas": (0.0, 0.0),
        "lr": c["lr"],
        "min_lr": c["lr"],
        "weight_decay": c["wd"][0],
        "weight_decay_end": c["wd"][1],
    }
    return DINOTask(encoder, sizes, **{**settings, **changes}).double()


class Crops(LightningDataModule):
    """The fixture's crops, in `accumulate` micro-batches a step."""

    seed = 0

    def __init__(self, golden: Golden, accumulate: int = 1) -> None:
        super().__init__()
        c, crops = golden.config, golden.group("crops.")
        self.global_batch_size, self.steps_per_epoch = c["batch"], c["niter_per_ep"]
        self.batches = []
        for step in range(c["steps"]):
            views = [crops[f"step{step}.{j}"].chunk(accumulate) for j in range(2 + c["n_local"])]
            for part in zip(*views, strict=True):
                rng = torch.arange(len(part[0]))
                batch = {"global_views": torch.stack(part[:2]), "rng": rng}
                if c["n_local"]:
                    batch["local_views"] = torch.stack(part[2:])
                self.batches.append(batch)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]


class Recorder(Callback):
    """What a step did, under the fixture's names."""

    def __init__(self, task: DINOTask) -> None:
        self.steps: list[dict[str, Any]] = []
        self.now: dict[str, Any] = {}
        self.logits: dict[str, list[Tensor]] = {"student": [], "teacher": []}
        for name, branch in (("student", task.model.student), ("teacher", task.model.teacher)):
            branch.head.register_forward_hook(
                lambda _m, _i, out, name=name: self.logits[name].append(out.detach().clone())
            )
        clip = task.configure_gradient_clipping

        def recorded(optimizer: Any, **limits: Any) -> None:
            self.now["raw"] = {n: p.grad.clone() for n, p in task.model.student.named_parameters() if p.requires_grad}
            clip(optimizer, **limits)
            self.now["clipped"] = {n: p.grad for n, p in task.model.student.named_parameters() if p.requires_grad}

        task.configure_gradient_clipping = recorded  # type: ignore[method-assign]
        self.task = task

    def on_train_batch_start(self, trainer: Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.now.setdefault("center_before", self.task.model.dino_targets.center.clone())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.now.setdefault("losses", []).append(outputs["loss"].detach())
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.now["center_after"] = self.task.model.dino_targets.center.clone()
        self.now["state"] = {k: v.clone() for k, v in self.task.model.state_dict().items()}
        self.now["logits"] = {k: torch.cat(v) for k, v in self.logits.items()}
        self.logits = {"student": [], "teacher": []}
        self.steps.append(self.now)
        self.now = {}


def train(task: DINOTask, data: Crops, total: int, accumulate: int = 1) -> Recorder:
    recorder = Recorder(task)
    trainer = Trainer(
        accelerator="cpu", max_steps=total, max_epochs=-1, limit_train_batches=len(data.batches), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[recorder, OneEpoch()], accumulate_grad_batches=accumulate,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    return recorder


class OneEpoch(Callback):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = True


def start(task: DINOTask, golden: Golden) -> None:
    state = {our_name(k): v for k, v in golden.group("student.").items()}
    teacher = {our_name(k): v for k, v in golden.group("teacher.").items()} or state
    task.model.student.load_state_dict(state)
    task.model.teacher.load_state_dict(teacher)


def off(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours.double() - theirs).abs().max().item()


@pytest.mark.golden("dino_init")
def test_three_steps_are_the_authors(golden: Golden) -> None:
    c, want, final = golden.config, other(golden, "dino_steps"), other(golden, "dino_final")
    task = golden_task(c)
    start(task, golden)
    steps = train(task, Crops(golden), c["epochs"] * c["niter_per_ep"]).steps
    assert len(steps) == c["steps"] == len(want.values["steps"])
    order = [our_name(name) for name in want.values["grad_norm_order"]]
    for i, (step, about) in enumerate(zip(steps, want.values["steps"], strict=True)):
        out = want.group(f"out.step{i}.")
        assert off(step["losses"][0], out["loss"]) < 1e-9
        assert off(step["logits"]["student"], out["student_output"]) < 1e-8
        assert off(step["logits"]["teacher"], out["teacher_output"]) < 1e-8
        assert off(step["center_before"], out["center_before"]) < 1e-8
        assert off(step["center_after"], out["center_after"]) < 1e-8
        assert list(step["raw"]) == order
        assert off(torch.stack([g.norm() for g in step["raw"].values()]), out["grad_norms"]) < 1e-8
        cancelled = [our_name(name) for name in about["grads_cancelled"]]
        assert [name for name, gradient in step["clipped"].items() if gradient is None] == cancelled
        for name, clipped in zip(order, out["grad_norms_clipped"], strict=True):
            gradient = step["clipped"][name]
            assert name in cancelled or abs(gradient.norm() - clipped) < 1e-8
        raw = {our_name(k): v for k, v in want.group(f"grad.step{i}.").items()}
        assert raw or i
        for name, gradient in raw.items():
            assert off(step["raw"][name], gradient) < 1e-9, name
    after_epoch_0 = steps[c["niter_per_ep"] - 1]["state"]
    for who in ("student", "teacher"):
        for name, value in want.group(f"mid.{who}_after_epoch0.").items():
            assert off(after_epoch_0[f"{who}.{our_name(name)}"], value) < 1e-8, name
        wanted = {our_name(k): v for k, v in final.group(f"{who}.").items()}
        assert wanted.keys() == getattr(task.model, who).state_dict().keys()
        for name, value in wanted.items():
            assert off(steps[-1]["state"][f"{who}.{name}"], value) < 1e-8, name


@pytest.mark.golden("dino_init")
def test_the_same_three_steps_with_accumulation(golden: Golden) -> None:
    """Centre and teacher move once per optimiser step: two micro-batches give what one batch gives."""
    c, final = golden.config, other(golden, "dino_final")
    want = other(golden, "dino_steps")
    task = golden_task(c)
    start(task, golden)
    steps = train(task, Crops(golden, accumulate=2), c["epochs"] * c["niter_per_ep"], accumulate=2).steps
    assert len(steps) == c["steps"]
    for i, step in enumerate(steps):
        # Lightning hands callbacks the loss already divided by the number of micro-batches
        assert off(torch.stack(step["losses"]).sum(), want.group(f"out.step{i}.")["loss"]) < 1e-8
        assert off(step["center_after"], want.group(f"out.step{i}.")["center_after"]) < 1e-8
    for name, value in final.group("teacher.").items():
        assert off(task.model.teacher.state_dict()[our_name(name)], value) < 1e-8, name


@pytest.mark.golden("dino_steps")
def test_schedules_and_groups_of_the_recorded_run(golden: Golden) -> None:
    c = golden.config
    task, total = golden_task(c), c["epochs"] * c["niter_per_ep"]
    assert [task.teacher_temp_at(e) for e in range(c["epochs"])] == pytest.approx(
        golden.values["teacher_temp_schedule"], abs=1e-12
    )
    assert [task.momentum_at(i, total) for i in range(total)] == pytest.approx(
        golden.values["momentum_schedule"], abs=1e-12
    )
    assert [task.weight_decay_at(i, total) for i in range(total)] == golden.values["weight_decay_schedule"]
    named = {id(p): name for name, p in task.model.student.named_parameters()}
    groups = {named[id(p)]: g["decays"] for g in task.configure_optimizers().param_groups for p in g["params"]}
    assert groups == {our_name(name): group == 0 for name, group in golden.values["param_group"].items()}


@pytest.mark.golden("dino_schedules")
def test_schedules_and_clipping(golden: Golden) -> None:
    for name, s in golden.config["cosine_scheduler"].items():
        total, warmup = s["epochs"] * s["niter_per_ep"], s["warmup_epochs"] * s["niter_per_ep"]
        values = (s["base_value"], s["final_value"], warmup, s["start_warmup_value"])
        ours = [cosine(i, total, *values) for i in range(total)]
        assert off(torch.tensor(ours, dtype=torch.float64), golden.group("schedule.")[name]) < 1e-12
    for name, s in golden.config["teacher_temp"].items():
        length, ends = s["warmup_teacher_temp_epochs"], (s["warmup_teacher_temp"], s["teacher_temp"])
        ours = [ramp(epoch, length, *ends) for epoch in range(s["nepochs"])]
        assert off(torch.tensor(ours, dtype=torch.float64), golden.group("teacher_temp.")[name]) < 1e-12
    before, after = golden.group("clip.in.grad."), golden.group("clip.out.grad.")
    parameters = {name: Parameter(torch.zeros_like(gradient)) for name, gradient in before.items()}
    for name, gradient in before.items():
        parameters[name].grad = gradient.clone()
    parameters["without a gradient"] = Parameter(torch.zeros(1))
    order = golden.values["clip_order"]
    norms = clip_gradients([[parameters[name]] for name in [*order, "without a gradient"]], golden.config["clip"])
    assert norms.tolist() == pytest.approx(golden.values["clip_norms"], abs=1e-12)
    for name in order:
        gradient = parameters[name].grad
        assert gradient is not None and off(gradient, after[name]) < 1e-12


@pytest.mark.golden("dino_schedules")
def test_the_task_follows_the_schedules(golden: Golden) -> None:
    """What the optimiser is really given, from a YAML's numbers."""
    s = golden.config["cosine_scheduler"]
    lr, total = s["lr"], s["lr"]["epochs"] * s["lr"]["niter_per_ep"]
    encoder = EncoderConfig(width=8, depth=1, heads=1, image_size=8, patch_size=4, position_resize="dino")
    task = DINOTask(
        encoder, HeadConfig(8, 8, 4), base_lr=lr["base_value"] * 256 / 4, min_lr=lr["final_value"],
        warmup_epochs=lr["warmup_epochs"], weight_decay=s["weight_decay"]["base_value"],
        weight_decay_end=s["weight_decay"]["final_value"], teacher_momentum=s["momentum"]["base_value"],
    )  # fmt: skip
    seen = {"lr": [], "weight_decay": [], "momentum": []}

    class Data(LightningDataModule):
        seed, global_batch_size, steps_per_epoch = 0, 4, lr["niter_per_ep"]

        def train_dataloader(self) -> DataLoader[Any]:
            view = torch.randn(2, 4, 3, 8, 8)
            return DataLoader([{"global_views": view, "rng": torch.arange(4)}] * total, batch_size=None)  # type: ignore[list-item]

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            groups = trainer.optimizers[0].param_groups
            assert len({group["lr"] for group in groups}) == 1
            seen["lr"].append(groups[0]["lr"])
            seen["weight_decay"].append(next(g["weight_decay"] for g in groups if g["decays"]))
            assert all(g["weight_decay"] == 0 for g in groups if not g["decays"])

    moved = task.model.update_teacher
    task.model.update_teacher = lambda momentum: (seen["momentum"].append(momentum), moved(momentum))  # type: ignore[method-assign]
    Trainer(
        accelerator="cpu", max_steps=total, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Watch()],
    ).fit(task, datamodule=Data())  # fmt: skip
    if lr["start_warmup_value"]:
        del seen["lr"]  # no option of the authors' program: its warm-up begins at 0
    for name, values in seen.items():
        assert off(torch.tensor(values, dtype=torch.float64), golden.group("schedule.")[name]) < 1e-12, name


def test_the_head_is_the_authors_formula() -> None:
    """norm_last_layer off: lengths are learned, and go into the logits."""
    task = golden_task_small(norm_last_layer=False)
    head: Any = task.model.student.head
    assert head.last_layer.weight_g.requires_grad and not task.model.teacher.head.last_layer.weight_g.requires_grad
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 2)
    x = torch.randn(5, 8)
    bottleneck = nn.functional.normalize(head.mlp(x), dim=-1)
    weight = head.last_layer.weight_g * nn.functional.normalize(head.last_layer.weight_v, dim=1)
    torch.testing.assert_close(head(x), bottleneck @ weight.T)


def golden_task_small(**head: Any) -> DINOTask:
    torch.manual_seed(0)
    encoder = EncoderConfig(width=8, depth=1, heads=1, image_size=8, patch_size=4, position_resize="dino")
    return DINOTask(encoder, HeadConfig(**{"prototypes": 8, "hidden_width": 8, "bottleneck_width": 4, **head}), lr=1e-3)
