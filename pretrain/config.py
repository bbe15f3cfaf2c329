"""Configuration: YAML and command line into one checked whole (LightningCLI, jsonargparse).

Top level: `seed`, `epochs`, `output`, `checkpoint_every`, `checkpoint_async`, `log_every`, `log_keys`,
`float32_matmul`, `start_timeout`, `step_timeout`, `wandb`, `probe`, `allow_changes`; then `model` (a task of `tasks/`),
`data` (ShardDataModule) and `trainer` (lightning.pytorch.Trainer).
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import seed_everything
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from datamodules.errors import DataError
from datamodules.shard_datamodule import ShardDataModule
from pretrain.complaints import help_of_a_mapping, shorten
from pretrain.errors import RunError
from pretrain.nested_settings import leave_out_sizes, spell_nulls, what_stays
from pretrain.probe_config import ProbeConfig
from pretrain.run_directory import launched_rank
from tasks.errors import TaskError
from tasks.task import PretrainTask

SHIPPED = Path(__file__).resolve().parent.parent / "configs"
WITHOUT_CONFIG = (
    "--config", "-c", "--model", "--model.class_path", "--help", "-h", "--print_config", "--model.help",
    "--data.recipe.help",
)  # fmt: skip
DESCRIPTION = """Train an encoder by one of the tasks tasks.mae_task.MAETask, tasks.dino_task.DINOTask and
tasks.clip_task.CLIPTask, which a config names. Their options, as they are given here (--model.teacher_temp 0.05):
trivit pretrain --model.help tasks.dino_task.DINOTask. Where an option takes several settings or null they have a
help of their own, as --model.ibot.help and --data.recipe.color.help. Those of the crops: --data.recipe.help
datamodules.recipes.DINORecipe (MAERecipe, CLIPRecipe)."""


class PretrainCLI(LightningCLI):
    """Parses and checks; `pretrain.run` instantiates, so that bad input ends before anything is built."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
        super().__init__(
            PretrainTask,
            ShardDataModule,
            save_config_callback=None,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={
                "exit_on_error": False,
                "allow_abbrev": False,
                "prog": "trivit pretrain",
                "description": DESCRIPTION,
            },
            args=arguments,
            run=False,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The keys of a run."""
        parser.add_argument("--seed", type=int, default=0, help="of initialisation, data order, crops and masks")
        parser.add_argument("--epochs", type=float | None, default=None, help="length; or trainer.max_steps, not both")
        parser.add_argument("--output", type=str | None, default=None, help="folder of this run (required)")
        parser.add_argument("--checkpoint_every", type=int, default=1000, help="optimiser steps between checkpoints")
        parser.add_argument(
            "--checkpoint_async", type=bool, default=False, help="write them while training goes on; takes host memory"
        )
        parser.add_argument("--log_every", type=int, default=10, help="optimiser steps between rows of metrics.csv")
        parser.add_argument("--log_keys", type=bool, default=False, help="write each step's samples to samples.jsonl")
        parser.add_argument(
            "--float32_matmul", type=Literal["highest", "high", "medium"], default="high",
            help="float32 matrix products on GPUs: high is TF32, as the authors' PyTorch had it; highest all 24 bits",
        )  # fmt: skip
        parser.add_argument(
            "--start_timeout", type=int, default=300, help="seconds in which the ranks of a run must have met"
        )
        parser.add_argument(
            "--step_timeout", type=int, default=1800, help="seconds after which a rank that waits for others gives up"
        )
        parser.add_argument(
            "--wandb", type=Literal["online", "offline"] | None, default=None, help="also log to Weights & Biases"
        )
        parser.add_argument(
            "--probe", type=ProbeConfig | None, default=None, help="labelled images to probe the encoder on, on the way"
        )
        parser.add_argument(
            "--allow_changes", type=list[str], default=[], help="keys that may differ from the run being resumed"
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One seed for everything; a run has no validation loop."""
        parser.link_arguments("seed", "data.seed")
        parser.set_defaults({"trainer.max_steps": -1})

    def _set_seed(self) -> None:
        logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
        seed_everything(self.config.seed, workers=True, verbose=False)

    def instantiate_classes(self) -> None:
        """Left to `pretrain.run`."""


def parse(arguments: list[str]) -> tuple[PretrainCLI, Namespace]:
    """Command line (with `--config FILE_OR_SHIPPED_NAME`) -> parser and config; RunError in one line if it is wrong."""
    arguments = help_of_a_mapping(arguments) or arguments
    if not any(argument.partition("=")[0] in WITHOUT_CONFIG for argument in arguments):
        raise RunError(
            "--config is missing: give a YAML file or the name of a shipped one "
            f"({_shipped()}), for example trivit pretrain --config mae_demo --data.train DIR --output RUN"
        )
    found = find_configs(arguments)
    try:
        cli = PretrainCLI(spell_nulls(found))
    except (ArgumentError, argparse.ArgumentError) as error:
        raise RunError(shorten(str(error))) from error
    told = []
    if left_out := leave_out_sizes(cli.config, arguments):
        arch = cli.config.model.init_args.encoder.arch
        told = [f"{arch} has its own {', '.join(left_out)}: what --config says of them is left out"]
    told += what_stays(plain(cli.config), found)
    if told and launched_rank() == 0:
        print(*told, sep="\n", file=sys.stderr)
    return cli, cli.config


def instantiate(cli: PretrainCLI, config: Namespace) -> Namespace:
    """Build task, data and callbacks; jsonargparse buries the one line of a TaskError under a union of types."""
    try:
        return cli.parser.instantiate(config)  # type: ignore[no-any-return]
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, TaskError | DataError):
                raise cause from None
            cause = cause.__cause__
        raise


def find_configs(arguments: list[str]) -> list[str]:
    """Replace the bare name of a shipped config by its path; RunError when there is no such file."""
    found = list(arguments)
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-c"):
            continue
        if not equals:
            if i + 1 == len(arguments):
                raise RunError("--config needs the path or the name of a YAML file")
            value = arguments[i + 1]
        path = Path(value)
        if not path.is_file():
            path = SHIPPED / f"{value.removesuffix('.yaml')}.yaml"
        if not path.is_file():
            raise RunError(f"--config {value}: no such file, and no shipped config of that name ({_shipped()})")
        try:
            if not isinstance(yaml.safe_load(path.read_text()), dict):
                raise RunError(f"--config {path}: this is not a YAML mapping of settings")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RunError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from error
        if equals:
            found[i] = f"{flag}={path}"
        else:
            found[i + 1] = str(path)
    return found


def _shipped() -> str:
    return ", ".join(sorted(path.stem for path in SHIPPED.glob("*.yaml")))


def plain(config: Namespace) -> dict[str, Any]:
    """Nested dict of what YAML knows (lists for tuples), as it is written to config.yaml."""
    tree = config.as_dict()
    tree.pop("config", None)
    return yaml.safe_load(yaml.safe_dump(tree))  # type: ignore[no-any-return]
