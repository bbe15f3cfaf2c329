"""`trivit export` and `trivit tokenizer`: files for others, and for a run to come."""

import argparse

from pretrain.commands import Commands, add_command, add_group


def add_export(commands: Commands) -> None:
    """The encoder alone."""
    export = add_command(
        commands, "export", _export, "write the encoder of a run or checkpoint for others, and read it back"
    )
    export.add_argument("source", metavar="CHECKPOINT")
    export.add_argument("output", metavar="OUT", help="a name.safetensors or name.onnx; a folder for timm, open_clip")
    export.add_argument(
        "--format",
        choices=["safetensors", "timm", "onnx", "open_clip"],
        default="safetensors",
        help="default safetensors; timm: a folder for timm.create_model; open_clip: a folder, both towers of a CLIP",
    )
    export.add_argument(
        "--whole",
        action="store_true",
        help="not the encoder alone: heads, teacher, student, decoder, texts (safetensors)",
    )


def _export(arguments: argparse.Namespace, _: list[str]) -> int | None:
    from tasks.export import export

    done = export(arguments.source, arguments.output, arguments.format, whole=arguments.whole)
    print(arguments.output)
    print(f"reloaded: largest difference {done.difference:.1e} of {done.what}")
    return 0


def add_tokenizer(commands: Commands) -> None:
    """A vocabulary of one's own."""
    kinds = add_group(commands, "tokenizer", "a vocabulary of your own for CLIP")
    train = add_command(
        kinds, "train", _train_tokenizer, "learn a vocabulary (byte-level BPE) from the captions of a set"
    )
    train.add_argument("source", metavar="SHARDS", help="shards, or images with texts beside them")
    train.add_argument("output", metavar="OUT", help="the file to write, NAME.json; for --model.text.tokenizer")
    train.add_argument("--size", type=int, default=8192, help="at most so many ids (default 8,192)")
    train.add_argument("--captions", metavar="WHERE", help="txt (default; else captions in .json) or json:FIELD")
    train.add_argument(
        "--clean",
        choices=("lower", "canonicalize", "whitespace"),
        default="lower",
        help="small letters (default), also without punctuation, or as they are; as --model.text.clean",
    )


def _train_tokenizer(arguments: argparse.Namespace, _: list[str]) -> int | None:
    from pretrain.train_tokenizer import tokenizer_command

    tokenizer_command(arguments.source, arguments.output, arguments.size, arguments.captions, arguments.clean)
    return 0
