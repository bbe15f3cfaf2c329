"""Bad input to `trivit pretrain`: one line, exit code 2, nothing written."""

from pathlib import Path

import pytest

from pretrain.config import find_configs, parse
from pretrain.errors import RunError
from tests.pretrain.conftest import pretrain

# what is added to a working command line, and words that the one line must hold
BAD = {
    "unknown top-level key": (["--speed", "9"], ["speed"]),
    "unknown model key": (["--model.mask_ration", "0.5"], ["mask_ration"]),
    "unknown encoder key": (["--model.encoder.widht", "32"], ["widht"]),
    "unknown data key": (["--data.batch", "32"], ["batch"]),
    "unknown trainer key": (["--trainer.max_step", "3"], ["max_step"]),
    "unknown task": (["--model", "tasks.nothing.Task"], ["tasks.nothing"]),
    "a word for a number": (["--trainer.max_steps", "many"], ["max_steps"]),
    "a recipe of another objective": (
        ["--data.recipe", "datamodules.recipes.DINORecipe", "--data.recipe.crop_size", "16"],
        ["MAETask learns from image", "DINORecipe makes global_views, local_views", "recipe of mae"],
    ),
    "both lengths": (["--epochs", "3"], ["epochs", "max_steps"]),
    "negative steps": (["--trainer.max_steps=-5"], ["trainer.max_steps must be positive, not -5"]),
    "another way to shard": (["--trainer.strategy", "fsdp"], ["trainer.strategy fsdp", "fsdp2"]),
    "sharded in float16": (["--trainer.strategy", "fsdp2", "--trainer.precision", "16-mixed"], ["bf16-mixed"]),
    "no length": (["--trainer.max_steps", "-1"], ["epochs", "max_steps"]),
    "negative epochs": (["--trainer.max_steps", "-1", "--epochs", "-2"], ["epochs"]),
    "both rates": (["--model.base_lr", "1e-3"], ["lr", "base_lr"]),
    "no rate": (["--model.lr", "null"], ["lr", "base_lr"]),
    "warm-up longer than the run": (
        ["--model.warmup_steps", "100", "--trainer.max_steps", "90"],
        ["model.warmup_steps 100", "run of 90 steps", "--model.warmup_steps 9"],
    ),
    "warm-up epochs longer than the run": (
        ["--model.warmup_epochs", "2", "--model.warmup_steps", "null"],
        ["model.warmup_epochs 2: a warm-up of 12 steps", "--model.warmup_epochs 0.13"],
    ),
    "both warm-ups": (["--model.warmup_epochs", "1"], ["warmup_epochs", "warmup_steps"]),
    "batch not divisible": (["--data.global_batch_size", "17", "--data.lanes", "4"], ["17"]),
    "batch larger than the data": (["--data.global_batch_size", "1024"], ["1024", "96"]),
    "batch of nothing": (["--data.global_batch_size", "0"], ["global_batch_size"]),
    "patch against image": (["--model.encoder.patch_size", "5"], ["5", "16"]),
    "crop against patches": (
        ["--data.recipe.crop_size", "18"],
        ["data.recipe.crop_size 18", "model.encoder.patch_size 4", "the nearest are 16 and 20"],
    ),
    "crop smaller than a patch": (["--data.recipe.crop_size", "3"], ["the nearest are 4"]),
    "rows are ours": (["--trainer.log_every_n_steps", "2"], ["log_every"]),
    "crop against encoder": (["--model.encoder.image_size", "48"], ["48", "16", "crop_size"]),
    "mask ratio": (["--model.mask_ratio", "1.5"], ["mask_ratio"]),
    "no such data": (["--data.train", "/no/such/folder"], ["/no/such/folder"]),
    "accumulation is ours": (["--trainer.accumulate_grad_batches", "2"], ["device_batch_size"]),
    "epochs are ours": (["--trainer.max_epochs", "2"], ["epochs"]),
    "log of nothing": (["--log_every", "0"], ["log_every"]),
    "BatchNorm is ours": (
        ["--trainer.sync_batchnorm", "true"],
        ["sync_batchnorm", "GPUs share", "on CPUs they cannot"],
    ),
    "bar is ours": (["--trainer.enable_progress_bar", "false"], ["enable_progress_bar"]),
    "mean follows the data": (["--model.encoder.mean", "[0.5,0.5,0.5]"], ["data.mean"]),
    "an accelerator that is not here": (["--trainer.accelerator", "tpu"], ["trainer"]),
    "no device": (["--trainer.devices", "0"], ["trainer"]),
    "no such accelerator": (["--trainer.accelerator", "abacus"], ["abacus"]),
    "wandb mode": (["--wandb", "maybe"], ["wandb"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_2(
    case: str, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    added, words = BAD[case]
    assert pretrain(*small, "--output", tmp_path / "run", *added) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trivit: ")]
    assert len(lines) == 1 and len(lines[0]) < 400, lines
    assert all(word in lines[0] for word in words), lines[0]
    assert not (tmp_path / "run").exists()


def test_output_is_needed(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(*small) == 2
    assert "--output" in capsys.readouterr().err


def test_config_is_needed_and_the_shipped_ones_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain() == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in ("--config", "mae_demo", "mae_vitb16_in1k", "--output"))


def test_config_by_bare_name_or_path(tmp_path: Path) -> None:
    by_name = find_configs(["--config", "mae_tin40"])[1]
    assert Path(by_name).name == "mae_tin40.yaml" and Path(by_name).is_file()
    assert find_configs(["--config=mae_tin40.yaml"]) == [f"--config={by_name}"]
    own = tmp_path / "own.yaml"
    own.write_text("seed: 1\n")
    assert find_configs(["--config", str(own)]) == ["--config", str(own)]


@pytest.mark.parametrize("text", [None, "- a\n- list\n", "seed: [1\n", b"\xff\xfe\x00"])
def test_a_bad_config_file_is_named(text: str | bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RunError, match=r"bad\.yaml"):
        find_configs(["--config", str(path)])
    with pytest.raises(RunError, match="--config needs"):
        find_configs(["--config"])


def test_one_seed_for_model_and_data(small: list[str]) -> None:
    _, config = parse([*small, "--seed", "7"])
    assert config.seed == config.data.seed == 7


def test_null_takes_away_what_a_config_says() -> None:
    """Also of what is nested, where jsonargparse would read the text None; the other values stay."""
    command = ["--config", "clip_tin40", "--data.train", "x", "--output", "y", "--model.encoder.width", "null"]
    command += [
        "--model.encoder.heads=null",
        "--model.text.vocab_size",
        "null",
        "--epochs",
        "null",
        "--model.base_lr=null",
    ]
    model = parse([*command, "--model.init_args.encoder.depth", "null", "--model.lr", "1"])[1].model.init_args
    assert (model.encoder.width, model.encoder.heads, model.encoder.depth, model.encoder.patch_size) == (None,) * 3 + (
        8,
    )
    assert (model.text.vocab_size, model.text.width, model.lr) == (None, 128, 1)


def test_a_timm_model_on_the_command_line_needs_no_sizes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Swin or ConvNeXt in the place of a shipped config's encoder; who gives a size to one is told."""
    command = ["--config", "dino_tin40", "--data.train", "x", "--output", "y"]
    for chosen in (
        ["--model.encoder.arch", "timm:test_vit"],
        ["--model.init_args.encoder.arch=timm:test_vit"],
        ["--model.encoder", "{arch: timm:test_vit, drop_path: 0.2}"],
    ):
        encoder = parse([*command, *chosen])[1].model.init_args.encoder
        assert (encoder.arch, encoder.width, encoder.depth, encoder.heads) == ("timm:test_vit", None, None, None)
        assert encoder.pool == "mean" and encoder.eval_resize == 64
        said = capsys.readouterr().err.splitlines()
        assert said[0] == "timm:test_vit has its own width, depth, heads: what --config says of them is left out"
        assert len(said) == (2 if "--model.encoder" in chosen else 1)
    asked = parse([*command, "--model.encoder.arch", "timm:test_vit", "--model.encoder.width", "32"])[1]
    assert asked.model.init_args.encoder.width == 32  # EncoderConfig refuses it
    plain = parse([*command, "--model.encoder.arch", "vit_small"])[1].model.init_args.encoder
    assert (plain.width, plain.depth) == (192, 6)


OF_THE_CONFIG = {
    "arch": "vit_tiny", "width": 192, "depth": 6, "heads": 3, "patch_size": 8, "positions": "learned",
    "position_resize": "dino", "pool": "mean", "drop_path": 0.1, "eval_resize": 64,
}  # fmt: skip
STAYS = "what else --config says of it stays: "


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["--model.encoder", "{depth: 4, drop_path: 0.0, arch: vit_small}"],
            "--model.encoder sets depth, drop_path, arch; " + STAYS + "width 192, heads 3, patch_size 8, positions "
            "learned, position_resize dino, pool mean, eval_resize 64",
        ),
        (
            ["--model.head={prototypes: 64, hidden_width: 32}", "--model.head.bottleneck_width", "16"],
            "--model.head sets prototypes, hidden_width; " + STAYS + "layers 3, norm_last_layer True",
        ),
        (["--model.encoder", str({**OF_THE_CONFIG, "width": 96})], None),
        (["--model.ibot", "{weight: 0.5}"], None),
        (["--model.encoder.depth", "4", "--model.encoder.width", "null"], None),
        (
            ["--data.recipe.init_args.color", "{hue: 0.5}", "--data.recipe.local_views", "2"],
            None,  # dino_tin40 says nothing of colours
        ),
        (
            ["--data.recipe", "{class_path: datamodules.recipes.DINORecipe, init_args: {local_views: 2}}"],
            "--data.recipe sets class_path, local_views; " + STAYS + "crop_size 64, scale [0.4, 1.0], local_size 32, "
            "local_scale [0.05, 0.4], color_on workers",
        ),
        (
            ["--data.recipe", "{class_path: datamodules.recipes.MAERecipe, init_args: {hflip: 0.0}}"],
            "--data.recipe sets class_path, hflip; " + STAYS + "crop_size 64, scale [0.4, 1.0]",
        ),
    ],
)
def test_what_stays_beside_a_mapping_is_told(
    given: list[str], said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mapping on the command line changes what it names: nobody trains half of another encoder unawares."""
    _, config = parse(["--config", "dino_tin40", "--data.train", "x", "--output", "y", *given])
    assert capsys.readouterr().err.splitlines() == ([] if said is None else [said])
    encoder = config.model.init_args.encoder
    assert encoder.patch_size == 8 and encoder.pool == "mean"  # of the config, whatever is given


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--help"], ["tasks.mae_task.MAETask", "tasks.clip_task.CLIPTask", "--model.help tasks.dino_task.DINOTask"]),
        (["--model.help", "tasks.dino_task.DINOTask"], ["--model.teacher_temp", "temperature of the teacher"]),
        (["--model.help=tasks.mae_task.MAETask"], ["--model.mask_ratio"]),
        (["--data.recipe.help", "datamodules.recipes.DINORecipe"], ["--data.recipe.local_views"]),
    ],
)
def test_options_of_the_tasks_can_be_found(
    asked: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """`--help` names the tasks and how to see their options, which needs no config."""
    with pytest.raises(SystemExit) as end:
        pretrain(*asked)
    said = capsys.readouterr().out
    assert end.value.code == 0 and all(word in " ".join(said.split()) for word in words), said[:2000]
