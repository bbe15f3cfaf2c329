"""What a config means: values that follow from others, and combinations that cannot work."""

from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer

from datamodules.normalize import check_channels
from datamodules.recipes import Recipe
from datamodules.remote import check_url, is_remote
from pretrain.errors import RunError
from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder
from tasks.task import PretrainTask

# trivit decides these itself; a user who set one would be ignored, so it is refused with the key to use instead.
DERIVED = {
    "accumulate_grad_batches": "data.global_batch_size and data.device_batch_size",
    "max_epochs": "epochs",
    "min_epochs": "epochs",
    "max_time": "epochs or trainer.max_steps",
    "limit_train_batches": "trainer.max_steps",
    "overfit_batches": "trainer.max_steps",
    "logger": "wandb (metrics.csv is always written)",
    "log_every_n_steps": "log_every",
    "profiler": "nothing: metrics.csv says where the time goes",
    "enable_checkpointing": "checkpoint_every",
    "default_root_dir": "output",
    "fast_dev_run": "trainer.max_steps",
    "min_steps": "trainer.max_steps",
    "enable_progress_bar": "nothing: the bar becomes few lines in a log file",
    "enable_model_summary": "nothing: there is none",
    "num_sanity_val_steps": "trivit evaluate",
    "use_distributed_sampler": "nothing: the stream is shared by the ranks already",
    "sync_batchnorm": "nothing: ranks on GPUs share the statistics of BatchNorm always, on CPUs they cannot",
}


def check(config: Namespace) -> None:
    """RunError for the first combination of keys that cannot work; nothing is built or written for it."""
    if is_remote(config.data.train):
        check_url(config.data.train)  # first of all: later messages quote it
    if not config.output:
        raise RunError("--output is missing: name the folder of this run, for example --output runs/first")
    steps = config.trainer.max_steps
    if steps is not None and (steps == 0 or steps < -1):
        raise RunError(f"trainer.max_steps must be positive, not {steps}")
    if (config.epochs is None) == (steps is None or steps < 0):
        raise RunError("give the length of the run once: epochs, or trainer.max_steps")
    if config.epochs is not None and config.epochs <= 0:
        raise RunError(f"epochs must be positive, not {config.epochs}")
    for key, unit in (
        ("checkpoint_every", "optimiser steps"), ("log_every", "optimiser steps"),
        ("start_timeout", "seconds"), ("step_timeout", "seconds"),
    ):  # fmt: skip
        if config[key] < 1:
            raise RunError(f"{key} counts {unit} and must be at least 1, not {config[key]}")
    _check_strategy(config)
    defaults = {name: parameter.default for name, parameter in signature(Trainer).parameters.items()}
    for key, instead in DERIVED.items():
        value = config.trainer.get(key)
        if value is not None and value != defaults[key]:
            raise RunError(f"trainer.{key} follows from other settings; use {instead}")


def _check_strategy(config: Namespace) -> None:
    strategy, precision = config.trainer.strategy, str(config.trainer.precision)
    if (
        isinstance(strategy, str)
        and strategy.startswith(("fsdp", "modelparallel", "deepspeed"))
        and strategy != "fsdp2"
    ):
        raise RunError(f"trainer.strategy {strategy}: what shards the model here is called fsdp2")
    if strategy == "fsdp2" and precision in ("16", "16-mixed", "16-true"):
        raise RunError(f"trainer.precision {precision} does not go with fsdp2: take bf16-mixed or 32-true")


def fill_in(config: Namespace) -> None:
    """The encoder's input is what the data delivers: image size, channels, bits, mean and standard deviation.

    A table of class names is found from any folder, as evaluation and a resumed run will look for it.
    """
    captions = config.data.recipe.init_args.get("captions")
    if captions is not None and captions.class_names:
        captions.class_names = str(Path(captions.class_names).expanduser().resolve())
    encoder = config.model.init_args.encoder
    default = {f.name: f.default for f in fields(EncoderConfig)}
    crop = config.data.recipe.init_args.crop_size
    if encoder.image_size not in (default["image_size"], crop):
        raise RunError(
            f"model.encoder.image_size {encoder.image_size} is not data.recipe.crop_size {crop}; "
            "set the crop size only, the encoder follows it"
        )
    _check_patches(config)
    encoder.image_size = crop
    data = config.data
    check_channels(data.channels, data.bits, data.mean, data.std, data.train)
    if data.bits == 16 and config.trainer.precision in ("16-true", "bf16-true"):
        half = config.trainer.precision
        raise RunError(
            f"trainer.precision {half} rounds 16-bit images before they are normalised: use {half[:-4]}mixed"
        )
    for name, source in {"mean": "mean", "std": "std", "in_chans": "channels", "bits": "bits"}.items():
        if _plain(encoder[name]) not in (default[name], _plain(data[source])):
            raise RunError(f"model.encoder.{name} follows data.{source}; set data.{source} only")
        encoder[name] = data[source]


def _check_patches(config: Namespace) -> None:
    """The crops are whole numbers of patches; what a timm model takes is its own affair."""
    encoder, recipe = config.model.init_args.encoder, config.data.recipe.init_args
    patch = encoder.patch_size
    if encoder.arch.startswith("timm:") or patch < 1:
        return
    for name in ("crop_size", "local_size"):
        size = recipe.get(name)
        if size is not None and size > 0 and size % patch:
            near = [str(near) for near in (size // patch * patch, -(-size // patch) * patch) if near]
            raise RunError(
                f"data.recipe.{name} {size} is not a multiple of model.encoder.patch_size {patch}: the nearest are "
                f"{' and '.join(near)}"
            )


def check_parts(task: PretrainTask, recipe: Recipe) -> None:
    """RunError when the task learns from what the recipe does not make."""
    made = (*recipe.views, *(("text",) if recipe.captions is not None else ()))
    if missing := [name for name in task.learns_from if name not in made]:
        raise RunError(
            f"{type(task).__name__} learns from {', '.join(missing)}, but {type(recipe).__name__} makes "
            f"{', '.join(made)}: set data.recipe.class_path to the recipe of {task.objective}"
        )


def check_sizes(task: PretrainTask, recipe: Namespace) -> None:
    """RunError when a timm model cannot see a crop: some are built for one size; only trying it tells."""
    encoder = task.get_submodule(task.encoder_prefix.removesuffix("."))
    assert isinstance(encoder, Encoder)
    if encoder.config.timm_name is None or encoder.maskable:
        return
    arch, crop = encoder.config.arch, recipe.crop_size
    if reason := encoder.cannot_see(crop):
        raise RunError(
            f"{arch} cannot see images of {crop} pixels ({reason}): set another --data.recipe.crop_size, or take "
            "another model"
        )
    if recipe.get("local_views") and (reason := encoder.cannot_see(recipe.local_size)):
        raise RunError(
            f"{arch}, built for {crop} pixels, cannot see local views of {recipe.local_size}: set "
            f"--data.recipe.local_views 0 or --data.recipe.local_size {crop}"
        )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def max_steps(config: Namespace, steps_per_epoch: int) -> int:
    """Length of the run in optimiser steps."""
    if config.epochs is None:
        return int(config.trainer.max_steps)
    return max(1, round(float(config.epochs) * steps_per_epoch))
