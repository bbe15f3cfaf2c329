"""`trivit shards`: write, check and look at tars."""

import argparse

from pretrain.commands import Commands, add_command, add_group


def add_shards(commands: Commands) -> None:
    """All of them."""
    kinds = add_group(commands, "shards", "write, check and look at tar shards")

    synth = add_command(kinds, "synth", _synth, "draw captioned, labelled images with masks by a program")
    synth.add_argument("directory", metavar="DIR")
    synth.add_argument("--samples", type=int, default=20_000)
    synth.add_argument("--size", type=int, default=64, help="pixels per side (default 64)")
    synth.add_argument("--seed", type=int, default=0)
    synth.add_argument(
        "--split", default="all", help="train, test or test_unseen leave pairs of shape and colour out (default: all)"
    )
    synth.add_argument(
        "--only",
        metavar="NAME=VALUE,...",
        default="",
        help="what all images have, as background=gradient: size, place, texture, background, rotation",
    )
    synth.add_argument("--samples-per-shard", type=int, help="default 1,000; fewer for a small set")

    pack = add_command(
        kinds, "pack", _pack, "pack class folders, a flat folder, a tar of either, or a table into shards"
    )
    pack.add_argument("source", metavar="SRC", help="a folder, a .tar, or a table of paths (.csv .tsv .jsonl .parquet)")
    pack.add_argument("directory", metavar="DIR")
    pack.add_argument("--resize", type=int, help="shorter side in pixels (default: bytes stay as they are)")
    pack.add_argument("--quality", type=int, default=90, help="JPEG quality when resizing (default 90)")
    pack.add_argument("--captions", help="table of file names and captions (default: the .txt, .json beside images)")
    for column in ("image", "caption", "label"):
        pack.add_argument(f"--{column}-column", metavar="NAME", help="of the table SRC (default: guessed, and said)")
    pack.add_argument("--samples-per-shard", type=int, help="default 1,000; fewer for a small set, so that cores share")
    pack.add_argument("--extend", action="store_true", help="add to the set in DIR; its shards and labels stay")

    verify = add_command(kinds, "verify", _verify, "read everything and tell what is wrong and where (exit code 1)")
    verify.add_argument("directory", metavar="DIR")

    inspect = add_command(kinds, "inspect", _inspect, "counts, sizes, keys and a contact sheet")
    inspect.add_argument("directory", metavar="DIR")
    inspect.add_argument("--sheet", help="where to write the contact sheet (default DIR/contact_sheet.png)")

    stats = add_command(kinds, "stats", _stats, "mean and standard deviation of each channel, for --data.mean and .std")
    stats.add_argument("directory", metavar="DIR")
    stats.add_argument("--samples", type=int, default=10_000, help="images to read, drawn at random (default 10,000)")
    stats.add_argument("--channels", type=int, default=3, help="of the images (default 3)")
    stats.add_argument("--bits", type=int, default=8, choices=(8, 16), help="of a channel (default 8)")


def _synth(arguments: argparse.Namespace, _: list[str]) -> int | None:
    from datamodules.synth import synth

    pairs = [pair.partition("=") for pair in arguments.only.split(",") if pair]
    synth(
        arguments.directory,
        samples=arguments.samples,
        size=arguments.size,
        seed=arguments.seed,
        split=arguments.split,
        only=[(name.strip(), value.strip()) for name, _, value in pairs],
        samples_per_shard=arguments.samples_per_shard,
    )
    return 0


def _pack(arguments: argparse.Namespace, _: list[str]) -> int | None:
    from datamodules.pack import pack

    pack(
        arguments.source,
        arguments.directory,
        resize=arguments.resize,
        quality=arguments.quality,
        captions=arguments.captions,
        columns={"image": arguments.image_column, "caption": arguments.caption_column, "label": arguments.label_column},
        samples_per_shard=arguments.samples_per_shard,
        extend=arguments.extend,
    )
    return 0


def _verify(arguments: argparse.Namespace, _: list[str]) -> int | None:
    from datamodules.verify import verify_command

    return verify_command(arguments.directory)


def _inspect(arguments: argparse.Namespace, _: list[str]) -> int | None:
    from datamodules.inspect_shards import inspect_command

    return inspect_command(arguments.directory, sheet=arguments.sheet)


def _stats(arguments: argparse.Namespace, _: list[str]) -> int | None:
    from datamodules.stats import stats_command

    return stats_command(
        arguments.directory, samples=arguments.samples, channels=arguments.channels, bits=arguments.bits
    )
