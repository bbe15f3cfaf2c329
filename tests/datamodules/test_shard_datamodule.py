import contextlib
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch

from datamodules.errors import DataError
from datamodules.recipes import CLIPRecipe, MAERecipe
from datamodules.sample_captions import CaptionConfig
from datamodules.shard_datamodule import Layout, ShardDataModule
from tests.datamodules.pictures import write_pictures


class Notes(L.LightningModule):
    """Notes what reaches `training_step`."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.notes = []

    def training_step(self, batch, batch_idx):
        assert batch["image"].dtype == self.dtype
        note = (batch_idx, self.global_step, batch["step"], batch["epoch"], batch["key"], batch["rng"].tolist())
        self.notes.append(note)
        return self.layer(batch["image"].mean((2, 3))).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class SaveAt(L.Callback):
    """Saves at the end of an optimiser step, where `pretrain` does."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def trainer_of(max_steps, accumulate, *callbacks, **options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(
        max_steps=max_steps, max_epochs=-1, accumulate_grad_batches=accumulate, use_distributed_sampler=False,
        accelerator="cpu", callbacks=list(callbacks), **(quiet | options),
    )  # fmt: skip


def fit(data, max_steps, *callbacks, ckpt_path=None, **options):
    module = Notes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "You're resuming from a checkpoint that ended before the epoch ended")
        trainer = trainer_of(max_steps, data.layout(1).accumulate, *callbacks, **options)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module.notes, trainer


def keys_of(notes, step):
    return [key for note in notes if note[2] == step for key in note[4]]


def data_of(root, workers=0, **options):
    settings = {"global_batch_size": 24, "device_batch_size": 12, "seed": 5} | options
    return ShardDataModule(str(root), MAERecipe(8), workers=workers, **settings)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [1, 4, 6, 10])
def test_resume_goes_on_exactly_where_the_run_was(picture_set, tmp_path, at, workers):
    """4 steps an epoch: in the first epoch, at its end, in the second one, and at the very last step."""
    whole, trainer = fit(data_of(picture_set), 10, SaveAt(at, tmp_path / "a.ckpt"))
    assert [note[:4] for note in whole] == [(i, i // 2, i // 2, i // 8) for i in range(20)]
    assert trainer.global_step == 10
    rest, trainer = fit(data_of(picture_set, workers), 10, ckpt_path=tmp_path / "a.ckpt")
    assert rest == whole[2 * at :]
    assert trainer.global_step == 10


def test_a_finished_run_can_be_made_longer(picture_set, tmp_path):
    whole, _ = fit(data_of(picture_set), 7)
    fit(data_of(picture_set), 5, SaveAt(5, tmp_path / "a.ckpt"))
    rest, _ = fit(data_of(picture_set), 7, ckpt_path=tmp_path / "a.ckpt")
    assert rest == whole[10:]


def test_an_interrupted_step_is_done_again(picture_set, tmp_path):
    """A stop between the micro-batches of a step saves nothing: the last checkpoint counts."""
    whole, _ = fit(data_of(picture_set), 5)

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 6:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(data_of(picture_set), 5, SaveAt(3, tmp_path / "a.ckpt"), Stop())
    rest, _ = fit(data_of(picture_set), 5, ckpt_path=tmp_path / "a.ckpt")
    assert rest == whole[6:]


def test_another_accumulation_resumes_with_the_same_global_batches(picture_set, tmp_path):
    whole, _ = fit(data_of(picture_set), 6, SaveAt(3, tmp_path / "a.ckpt"))
    rest, _ = fit(data_of(picture_set, device_batch_size=24), 6, ckpt_path=tmp_path / "a.ckpt")
    assert [note[:4] for note in rest] == [(i, i, i, i // 4) for i in range(3, 6)]
    assert [note[4] for note in rest] == [keys_of(whole, step) for step in range(3, 6)]
    fewer, _ = fit(data_of(picture_set, device_batch_size=4), 6, ckpt_path=tmp_path / "a.ckpt")
    assert [note[:4] for note in fewer] == [(i, i // 6, i // 6, i // 24) for i in range(18, 36)]
    assert [keys_of(fewer, step) for step in range(3, 6)] == [keys_of(whole, step) for step in range(3, 6)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 6}, "seed was 5, now it is 6"),
        ({"global_batch_size": 12}, "global_batch_size was 24, now it is 12"),
        ({"lanes": 2}, "lanes was 24, now it is 2"),
        ({"window": 1, "seed": 4}, "seed was 5, now it is 4; data.window was 4, now it is 1"),
    ],
)
def test_another_order_under_a_checkpoint_is_refused(picture_set, tmp_path, options, message):
    fit(data_of(picture_set), 2, SaveAt(2, tmp_path / "a.ckpt"))
    with pytest.raises(DataError, match=rf"{message}.*--allow_changes '\[data\.\w+(,data\.\w+)*\]'"):
        fit(data_of(picture_set, **options), 3, ckpt_path=tmp_path / "a.ckpt")
    data = data_of(picture_set, **options)
    data.allow_changes = ["data.recipe", "data.window"]
    with pytest.raises(DataError, match=message.split(";")[0]):
        fit(data, 3, ckpt_path=tmp_path / "a.ckpt")
    data = data_of(picture_set, **options)
    data.allow_changes = [f"data.{name}" for name in options]
    notes, _ = fit(data, 3, ckpt_path=tmp_path / "a.ckpt")
    assert {note[2] for note in notes} == {2}


def test_other_data_under_a_checkpoint_is_refused(picture_set, own_pictures, tmp_path):
    fit(data_of(picture_set), 2, SaveAt(2, tmp_path / "a.ckpt"))
    with pytest.raises(DataError, match=r"other data: this run was trained on .*\[data\.train\]"):
        fit(data_of(own_pictures), 3, ckpt_path=tmp_path / "a.ckpt")


def test_the_state_is_small_and_plain(picture_set, tmp_path):
    fit(data_of(picture_set), 2, SaveAt(2, tmp_path / "a.ckpt"))
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["ShardDataModule"]
    data = data_of(picture_set)
    assert state == {
        "step": 2, "seed": 5, "manifest": data.manifest.hash, "global_batch_size": 24, "lanes": 24, "window": 4,
        "train": str(picture_set), "samples": 100, "unnamed": data.manifest.unnamed_hash,
    }  # fmt: skip


def test_a_set_that_got_names_is_the_same_unless_captions_say_them(own_pictures):
    """A copy behind a URL may lack them, and sets that were indexed long ago do."""
    (own_pictures / "manifest.json").unlink()  # made anew it has no names, since labels are numbers
    bare = data_of(own_pictures)
    before = bare.state_dict()
    older = {name: value for name, value in before.items() if name != "unnamed"}
    (own_pictures / "classes.txt").write_text("cat\ndog\nowl\n")
    named = data_of(own_pictures)
    assert named.manifest.hash != bare.manifest.hash == named.manifest.unnamed_hash
    for state in (before, older):
        named.load_state_dict(state)
    bare.load_state_dict(named.state_dict())
    with pytest.raises(DataError, match="other data"):
        bare.load_state_dict({**older, "manifest": named.manifest.hash})
    for captions in (CaptionConfig(templates=("a {}",)), CaptionConfig()):
        data = ShardDataModule(
            str(own_pictures), CLIPRecipe(8, captions=captions), global_batch_size=24, device_batch_size=12, seed=5
        )
        with pytest.raises(DataError, match="other data") if captions.templates else contextlib.nullcontext():
            data.load_state_dict(before)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_stop_the_run_in_one_line(own_pictures, tmp_path, workers):
    data = data_of(own_pictures, workers, bad_sample_budget=0.2)
    data.bad_samples_file = tmp_path / "bad_samples.jsonl"
    data.setup()
    data.manifest.path(2).unlink()
    with pytest.raises(DataError, match=r"bad samples in .* are more than data.bad_sample_budget 0.2") as caught:
        fit(data, 20)
    assert "\n" not in str(caught.value)
    assert 9 <= len(data.bad_samples_file.read_text().splitlines()) <= 10


def test_layout(picture_set):
    data = data_of(picture_set, global_batch_size=96, device_batch_size=20)
    assert data.layout(1) == Layout(96, 16, 6)
    assert data.layout(4) == Layout(24, 12, 2)
    assert data.layout(8) == Layout(12, 12, 1)
    with pytest.raises(DataError, match=r"global_batch_size 96 cannot be divided by 7 ranks: .* 91 or 98"):
        data.layout(7)
    with pytest.raises(DataError, match="divided by 100 ranks: the nearest that can are 100"):
        data.layout(100)


@pytest.mark.parametrize(
    ("batch", "device", "ranks", "advice"),
    [
        (31, 30, 1, "31 micro-batches of 1: take data.global_batch_size 30 or 32, or data.device_batch_size 31"),
        (62, 30, 2, "31 micro-batches of 1: take data.global_batch_size 60 or 64, or data.device_batch_size 31"),
        (74, 20, 1, "37 micro-batches of 2: take data.global_batch_size 72 or 75, or data.device_batch_size 37"),
    ],
)
def test_micro_batches_that_are_too_small_are_refused(picture_set, batch, device, ranks, advice):
    data = data_of(picture_set, global_batch_size=batch, device_batch_size=device)
    with pytest.raises(DataError, match=f"device_batch_size {device} would be {advice}"):
        data.layout(ranks)
    for better in re.findall(r"global_batch_size (\d+) or (\d+)", advice)[0]:
        layout = data_of(picture_set, global_batch_size=int(better), device_batch_size=device).layout(ranks)
        assert 2 * layout.micro_batch >= device or layout.accumulate == 1
    larger = int(advice.split()[-1])
    assert data_of(picture_set, global_batch_size=batch, device_batch_size=larger).layout(ranks).micro_batch == larger


def test_a_batch_that_fits_or_halves_is_taken(picture_set):
    assert data_of(picture_set, global_batch_size=32, device_batch_size=30).layout(1) == Layout(32, 16, 2)
    assert data_of(picture_set, global_batch_size=31, device_batch_size=31).layout(1) == Layout(31, 31, 1)
    assert data_of(picture_set, global_batch_size=3, device_batch_size=256).layout(1) == Layout(3, 3, 1)


def test_order_and_manifest_are_there_without_a_trainer(picture_set):
    data = data_of(picture_set)
    assert data.steps_per_epoch == 4
    assert data.manifest.num_samples == 100


def test_precision_of_the_model_is_that_of_the_images(picture_set):
    fit(data_of(picture_set), 1, precision="64-true")
    fit(data_of(picture_set), 1, precision="bf16-mixed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 0}, "global_batch_size 0 must be at least 1"),
        ({"device_batch_size": 0}, "device_batch_size 0"),
        ({"workers": -1}, "workers -1"),
        ({"bad_sample_budget": 1.5}, "bad_sample_budget 1.5"),
        ({"std": (0.1, 0.0, 0.1)}, "std above 0"),
        ({"mean": (0.1,)}, "one number for each of 3 channels"),
    ],
)
def test_bad_numbers(picture_set, options, message):
    with pytest.raises(DataError, match=message):
        data_of(picture_set, **options)


def test_what_only_the_data_tells(picture_set, tmp_path):
    with pytest.raises(DataError, match="between 1 and the number of samples, 100"):
        data_of(picture_set, global_batch_size=101).setup()
    with pytest.raises(DataError, match="lanes 5 must divide"):
        data_of(picture_set, lanes=5).setup()
    with pytest.raises(DataError, match=r"nowhere"):
        data_of(tmp_path / "nowhere").setup()


def test_a_trainer_that_does_not_fit(picture_set):
    with pytest.raises(DataError, match=r"accumulate_grad_batches is 1, but .* needs 2"):
        trainer_of(3, 1).fit(Notes(), datamodule=data_of(picture_set))
    with pytest.raises(DataError, match=r"set trainer.max_steps"):
        trainer_of(-1, 2).fit(Notes(), datamodule=data_of(picture_set))


RANK = """
import json, sys
from pathlib import Path
from tests.datamodules.test_shard_datamodule import Notes, SaveAt, data_of, trainer_of
root, out = map(Path, sys.argv[1:])
data, module = data_of(root, 1), Notes()
trainer = trainer_of(6, data.layout(2).accumulate, SaveAt(3, out / "two.ckpt"), devices=2, strategy="ddp")
trainer.fit(module, datamodule=data, ckpt_path=out / "one.ckpt", weights_only=True)
(out / f"rank{trainer.global_rank}.json").write_text(json.dumps(module.notes))
"""


@pytest.mark.slow
def test_two_ranks_go_on_with_the_batches_of_one_and_one_with_those_of_two(picture_set, tmp_path):
    alone, _ = fit(data_of(picture_set), 6, SaveAt(2, tmp_path / "one.ckpt"))
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, str(script), str(picture_set), str(tmp_path)],
        check=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [note[:4] for note in ranks[0]] == [[i, i, i, i // 4] for i in range(2, 6)]
    for i, step in enumerate(range(2, 6)):
        assert ranks[0][i][4] + ranks[1][i][4] == keys_of(alone, step)
    rest, _ = fit(data_of(picture_set), 6, ckpt_path=tmp_path / "two.ckpt")
    assert rest == alone[6:]


def test_a_plain_folder_of_images_is_packed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIVIT_CACHE", str(tmp_path / "cache"))
    from tests.datamodules.pictures import jpeg

    (tmp_path / "photos").mkdir()
    for i in range(30):
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(jpeg(i))
    data = data_of(tmp_path / "photos")
    notes, _ = fit(data, 1)
    assert len(set(notes[0][4] + notes[1][4])) == 24
    assert data.manifest.num_samples == 30


def test_a_set_of_the_same_content_elsewhere_resumes(picture_set, tmp_path):
    """Moving the data is allowed: the state names content, not paths."""
    whole, _ = fit(data_of(picture_set), 4, SaveAt(2, tmp_path / "a.ckpt"))
    moved = write_pictures(tmp_path / "moved", 100, 16)
    rest, _ = fit(data_of(moved), 4, ckpt_path=tmp_path / "a.ckpt")
    assert rest == whole[4:]
