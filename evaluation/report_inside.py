"""What a report shows of the inside of an encoder: where its class token looks, and what its patches say."""

import numpy as np
from torch import Tensor

from datamodules.errors import DataError
from evaluation.attention import AttentionPicture, ClassAttention, class_attention, draw_class_attention
from evaluation.errors import EvaluationError
from evaluation.patch_pca import draw_patch_components, patch_components
from evaluation.report_pictures import Section, open_data
from evaluation.run_files import Run
from tasks.encoders import Encoder
from tasks.errors import TaskError

EVEN = 0.9
"""Attention that covers more than this share of the patches, as exp(entropy) counts them, looks at nothing."""


def inside_sections(run: Run, count: int, test_data: str | None) -> tuple[Section, Section | None]:
    """Attention and patch components over images of `test_data` (None: of the run's train images).

    Where neither can be shown, the first says why and there is no second.
    """
    from evaluation.pictures import sample_images
    from tasks.encoder_files import load_encoder

    try:
        encoder = load_encoder(run.path)
        images = sample_images(open_data(str(test_data or run.get("data.train"))).root, encoder.config, count)
    except (TaskError, DataError, EvaluationError) as error:
        return Section(run.name, f"No pictures of the inside of the encoder: {error}."), None
    return _attention_section(run, encoder, images), _patch_section(run, encoder, images)


def _attention_section(run: Run, encoder: Encoder, images: Tensor) -> Section:
    try:
        _, weights = class_attention(encoder, images)
    except (TaskError, EvaluationError) as error:
        return Section(run.name, f"No attention of a class token: {error}.")
    # one photograph in every layer: of a ViT-H all of them would be 512 pictures each
    found = draw_class_attention(ClassAttention(images[:1], weights[:, :1]))
    found += draw_class_attention(ClassAttention(images[1:], weights[-1:, 1:]))
    note = (
        f"The attention that the class token gives to each patch in the last layer (of {len(found[0].layers)}), a "
        "picture for each head. Bright is much, black is none, each picture by its own largest value. " + _spread(found)
    )
    if "DINO" not in str(run.get("model.class_path", "")) and encoder.config.pool == "mean":
        note += (
            " Features of this run are the mean of its patches and no loss is on its class token, so what that token "
            "looks at is a by-product."
        )
    return Section(run.name, note, found)


def _spread(found: list[AttentionPicture]) -> str:
    heads = [head for each in found for head in each.layers[-1]]
    share = float(np.mean([head.spread / head.patches for head in heads]))
    text = f"On average it covers {share:.0%} of the patches"
    return text + (": these heads look at nothing in particular." if share > EVEN else ".")


def _patch_section(run: Run, encoder: Encoder, images: Tensor) -> Section:
    try:
        found = patch_components(encoder, images)
    except EvaluationError as error:
        return Section(run.name, f"No components of patches: {error}.")
    first, second, third = (f"{share:.0%}" for share in found.shares)
    note = (
        "The first three principal components of all patches of these images together as red, green and blue, then "
        "each alone as brightness. What looks alike, in one image or in two, is alike for the encoder. They hold "
        f"{first}, {second} and {third} of the variance."
    )
    return Section(run.name, note, draw_patch_components(found))
