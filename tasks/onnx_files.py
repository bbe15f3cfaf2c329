"""An encoder as one ONNX file: normalised images in, feature vectors and patch tokens out; any batch, one image size.

The file's metadata says how its images were normalised and what the encoder is. Needs the extra `trivit[onnx]`.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tasks.encoders import Encoder
from tasks.errors import TaskError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONE_FILE = 2_000_000_000  # bytes; a protobuf holds no more than 2 GiB, larger weights go into NAME.onnx.data


def need_onnx() -> None:
    """TaskError unless all that the export and its check need is installed."""
    if lacking := [name for name in PACKAGES if find_spec(name) is None]:
        raise TaskError(f'--format onnx needs {", ".join(lacking)}: pip install "trivit[onnx]"')


class _Outputs(nn.Module):
    """What the file computes: images [b c h w] -> features [b f], patches [b n d]."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.encoder(images)
        return self.encoder.pool(tokens), tokens.patches


@torch.no_grad()
def write_onnx(encoder: Encoder, path: Path) -> None:
    """Writes input `images` [b c h w], of the encoder's image size, and outputs `features` [b f], `patches` [b n d].

    Raises:
        TaskError: an operation of the encoder has no ONNX counterpart, or the file cannot be written.
    """
    config, outputs = encoder.config, _Outputs(encoder).eval()
    images = torch.zeros(2, config.in_chans, config.image_size, config.image_size)
    outputs(images)  # tables that are made when first needed must not be made while the exporter watches
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                outputs,
                (images,),
                input_names=["images"],
                output_names=["features", "patches"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter has many of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TaskError(f"ONNX cannot express {config.arch}: {reason}") from error
    told = {"mean": list(config.mean), "std": list(config.std), "resize": config.resize, "crop": config.image_size}
    program.model.metadata_props.update({"trivit": json.dumps(asdict(config)), "images": json.dumps(told)})
    size = sum(value.numel() * value.element_size() for value in encoder.state_dict().values())
    try:
        program.save(path, external_data=size > ONE_FILE)
    except OSError as error:
        raise TaskError(f"cannot write {path}: {error}") from error


def run_onnx(path: Path, images: Tensor) -> list[Tensor]:
    """What ONNX Runtime makes of normalised images [b c h w] on the CPU: features [b f], patch tokens [b n d]."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(found) for found in session.run(["features", "patches"], {"images": images.numpy()})]


def onnx_of_trivit(path: Path) -> bool:
    """Whether a file is an ONNX export of ours."""
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # protobuf's own, for whatever else the file is
        return False
    return any(entry.key == "trivit" for entry in model.metadata_props)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes about its own workings; errors are raised anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
