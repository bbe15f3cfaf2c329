"""What is said of a setting that cannot be read: what to write instead, in one line; and the help that it names."""

import pytest

from pretrain.config import parse
from pretrain.errors import RunError
from tests.pretrain.conftest import pretrain

OF_DINO = ["--config", "dino_demo", "--data.train", "x", "--output", "y"]


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--model.ibot", "true", ["takes settings, not true: give --model.ibot.weight 1.0 (also", "or null"]),
        ("--model.ibot.head", "true", ["give --model.ibot.head.prototypes", '--model.ibot.head "{}" for the defaults']),
        ("--data.recipe.color", "0.4", ["not 0.4: give --data.recipe.color.brightness 0.4 (also contrast, "]),
        ("--model.koleo", "0.1", ["no setting 'koleo'; did you mean koleo_weight?"]),
        (
            "--model.mask_ratio", "0.75",
            ["did you mean ibot.mask_ratio? Alone it is an option of tasks.mae_task.MAETask"],
        ),
        ("--model.decoder_depth", "2", ["'decoder_depth', which is an option of tasks.mae_task.MAETask"]),
        ("--model.encoder.widht", "32", ["did you mean encoder.width?"]),
        ("--model.prototypes", "32", ["did you mean head.prototypes?"]),
        ("--trainer.precision", "float16", ["trainer.precision must be one of", "16-mixed, ", "bf16, not float16"]),
        ("--model.clip", "both", ["model.clip must be one of parameter, module, not both"]),
    ],
)  # fmt: skip
def test_what_to_write_instead(option: str, value: str, said: list[str]) -> None:
    with pytest.raises(RunError) as refused:
        parse([*OF_DINO, option, value])
    line = str(refused.value)
    assert all(words in line for words in said) and "\n" not in line and len(line) < 300, line


@pytest.mark.parametrize("given", [["--model.ibot.weight", "1"], ["--model.ibot", "{}"]])
def test_what_is_named_as_the_remedy_is_one(given: list[str]) -> None:
    assert parse([*OF_DINO, *given])[1].model.init_args.ibot.weight == 1


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--model.ibot.help"], "--model.ibot.mask_probability"),
        (["--config", "dino_demo", "--model.ibot.head.help"], "--model.ibot.head.bottleneck_width"),
        (["--model.help", "tasks.dino_task.DINOTask", "--model.ibot.help"], "--model.ibot.mask_probability"),
        (["--data.recipe.color.help"], "--data.recipe.color.gray_probability"),
    ],
)
def test_mappings_that_may_be_null_have_a_help(
    asked: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        pretrain(*asked)
    assert end.value.code == 0 and words in capsys.readouterr().out
