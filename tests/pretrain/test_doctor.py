"""`trivit doctor`: what it finds, and what it exits with."""

import re
from pathlib import Path

import pytest

from pretrain import doctor as doctor_module
from pretrain.cli import main
from tests.pretrain.conftest import SMALL, pretrain
from tests.pretrain.processes import SMALL_DINO


def doctor(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main(["doctor", *map(str, arguments)])
    return code, capsys.readouterr().out


def test_the_machine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = doctor(capsys)
    assert "Python 3." in said and "torch " in said and re.search(r"\d+ CPU cores .* GiB memory", said)
    assert code == 0 and said.endswith("nothing wrong was found\n")
    assert "GiB free for a run in this folder" in said


def test_a_run_on_gpus_that_are_not_here(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes", "2", "--gpus-per-node", "4", "--gpu", "h100", "--network", "0.001"]
    code, said = doctor(capsys, *SMALL, "--data.train", drawn, "--output", tmp_path / "new" / "run", *options)
    assert code == 0
    assert "global batch 16 = 8 ranks x 2 x 1 accumulated" in said
    assert "96 images in 3 shards, 6 steps an epoch" in said
    assert "3 shards for 8 ranks" in said
    assert re.search(r"of 79\.6 GiB with 2 images at once: weights [\d.]+ MiB, .*DDP's buckets", said)
    assert re.search(r"GFLOP an image, 3\d% of it forward", said)
    assert re.search(r"images/s, .* for 8 steps, if 40% of the peak", said)
    assert re.search(r"gradients travel .* not hidden behind computing; a GPU is \d+% as fast", said)
    assert re.search(r"feeding a node takes about [\d,.]+ cores", said)
    assert "bf16-mixed" in said
    assert not (tmp_path / "new").exists(), "it only looks"


def test_a_sharded_run(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpus-per-node", "8", "--gpu", "h100", "--trainer.strategy"]
    told = {}
    for strategy in ("ddp", "fsdp2"):
        code, told[strategy] = doctor(capsys, *SMALL, *options, strategy)
        assert code == 0
    sizes = {name: float(re.search(r"optimiser ([\d.]+) MiB", said)[1]) for name, said in told.items()}  # type: ignore[index]
    assert sizes["fsdp2"] == pytest.approx(sizes["ddp"] / 8, rel=0.02)
    assert re.search(r"blocks gathered in full [\d.]+ MiB", told["fsdp2"]) and "buckets" not in told["fsdp2"]
    assert re.search(r"weights and gradients travel .* a step", told["fsdp2"])


def test_what_cannot_work_is_found_and_told(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = doctor(capsys, *SMALL, "--data.train", drawn, "--gpus-per-node", "3")
    assert code == 1 and "global_batch_size 16 cannot be divided by 3 ranks" in said and "1 to mend" in said
    code, said = doctor(capsys, *SMALL, "--data.train", tmp_path / "nothing")
    assert code == 1 and re.search(r"wrong .*nothing", said)
    code, said = doctor(capsys, *SMALL, "--data.train", drawn, "--model.warmup_steps", "8")
    assert code == 1 and "a warm-up of 8 steps is not shorter than the run of 8 steps" in said
    code, said = doctor(capsys, *SMALL, "--gpu", "v100", "--trainer.precision", "bf16-mixed")
    assert code == 1 and "this GPU has no bfloat16: --trainer.precision 16-mixed" in said


REFUSED = {
    "BatchNorm on a part of CLIP's batch": (
        ["--config", "clip_demo", "--data.global_batch_size", 32, "--data.device_batch_size", 16],
        "BatchNorm would see the 16 pairs of a micro-batch",
    ),
    "KoLeo and accumulation": (
        [*SMALL_DINO, "--model.koleo_weight", 0.1, "--data.device_batch_size", 8],
        "KoLeo cannot see across 2 accumulated",
    ),
    "16-bit weights": ([*SMALL_DINO, "--trainer.precision", "bf16-true"], "16-bit weights cannot follow an EMA"),
    "one size only": (
        ["--config", "dino_demo", "--model.encoder.arch", "timm:efficientformerv2_s0", "--data.recipe.crop_size", 64,
         "--data.recipe.local_size", 32, "--data.recipe.local_views", 1, "--data.global_batch_size", 8],
        "cannot see local views of 32: set --data.recipe.local_views 0",
    ),
    "another recipe": (
        [*SMALL, "--data.recipe", "datamodules.recipes.DINORecipe", "--data.recipe.crop_size", 16],
        "MAETask learns from image, but DINORecipe makes",
    ),
    "no weights to start from": ([*SMALL_DINO, "--model.init_encoder", "nowhere"], "nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_start_refuses_is_told_beforehand(
    case: str, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, told = REFUSED[case]
    options = [*options, "--trainer.accelerator", "cpu"]
    assert pretrain(*options, "--data.train", drawn, "--data.workers", 0, "--output", tmp_path / "run") == 2
    refusal = capsys.readouterr().err.splitlines()[-1].removeprefix("trivit: ")
    code, said = doctor(capsys, *options, "--gpu", "h100")
    assert told in refusal and code == 1 and f"  wrong  {refusal}\n" in said and "1 to mend" in said


def test_how_many_gpus_koleo_needs(capsys: pytest.CaptureFixture[str]) -> None:
    """No --output was given: its stand-in is not told."""
    koleo = [*SMALL_DINO, "--data.global_batch_size", 32, "--data.device_batch_size", 4, "--model.koleo_weight", 0.1]
    code, said = doctor(capsys, *koleo, "--nodes", 2, "--gpus-per-node", 2, "--gpu", "h100")
    assert code == 1 and "raise data.device_batch_size to 8, use 8 devices instead of 4, or go without" in said
    assert "GiB free for a run in this folder" in said and "unnamed" not in said
    for remedy in (["--data.device_batch_size", 8], ["--nodes", 4]):
        code, said = doctor(capsys, *koleo, "--nodes", 2, "--gpus-per-node", 2, "--gpu", "h100", *remedy)
        assert code == 0, said


def test_a_batch_of_clip_on_more_ranks_is_whole_again(capsys: pytest.CaptureFixture[str]) -> None:
    options, told = REFUSED["BatchNorm on a part of CLIP's batch"]
    code, said = doctor(capsys, *options, "--gpus-per-node", 2, "--gpu", "h100")
    assert code == 0 and told not in said, said


def test_a_run_that_does_not_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = doctor_module.gpu_called("t4")._replace(memory=0.0024)
    monkeypatch.setattr(doctor_module, "gpu_called", lambda name: small)
    code, said = doctor(capsys, *SMALL, "--gpu", "tiny", "--data.global_batch_size", "64")
    found = re.search(r"It does not fit: --data.device_batch_size (\d+) or less", said)
    assert code == 1 and found and 0 < int(found[1]) < 64
    code, said = doctor(capsys, *SMALL, "--gpu", "tiny", "--data.global_batch_size", found[1])
    assert code == 0, said


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--gpu", "hall9000"], "--gpu hall9000: not known"),
        (["--nodes", "0"], "--nodes must be positive"),
        (["--mfu", "40"], "--mfu is a share of the peak"),
        (["--config", "mae_dem"], "no such file"),
        ([*SMALL, "--model.depht", "3"], "no setting 'depht'"),
    ],
)
def test_bad_input_is_one_line(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *options]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1
