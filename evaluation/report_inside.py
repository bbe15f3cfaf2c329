"""What a report shows of the inside of an encoder: where its tokens look, layer by layer, and what its patches say."""

import math
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from torch import Tensor

from datamodules.errors import DataError
from evaluation.attention import AttentionPicture, ClassAttention, class_attention, draw_class_attention
from evaluation.attention_depth import (
    HeadNumbers,
    attention_distance,
    attention_entropy,
    draw_attention_distance,
    draw_attention_entropy,
)
from evaluation.attention_rollout import attention_rollout, draw_rollout
from evaluation.errors import EvaluationError
from evaluation.patch_pca import draw_patch_components, patch_components
from evaluation.report_pictures import Section, open_data
from evaluation.run_files import Run
from tasks.encoders import Encoder
from tasks.errors import TaskError

EVEN = 0.9
"""Attention that covers more than this share of the patches, as exp(entropy) counts them, looks at nothing."""


WORK = 400_000_000_000
"""Multiply-adds that each picture over depth may take: 6 images of a ViT-L/16, 2 of a ViT-H/14, but always one."""
LEVEL = 1.2
"""What the patch that counts most must reach, an even share being 1, for a map of rollout to show anything."""
FEW = math.log(2)
"""Nats below which a head looks at less than two tokens."""


FEW_PATCHES = ": too few to show shapes, which larger images would"


class Inside(NamedTuple):
    """Sections of one run; None where there is nothing to show, for which `look` or `depth` has the reason."""

    look: Section
    depth: Section | None = None
    rollout: Section | None = None
    patches: Section | None = None


def inside_sections(run: Run, count: int, test_data: str | None) -> Inside:
    """Attention and patch components over `count` images of `test_data` (None: of the run's train images)."""
    from evaluation.pictures import sample_images
    from tasks.encoder_files import load_encoder

    try:
        encoder = load_encoder(run.source)
        images = sample_images(open_data(str(test_data or run.get("data.train"))).root, encoder.config, count)
    except (TaskError, DataError, EvaluationError) as error:
        return Inside(Section(run.name, f"No pictures of the inside of the encoder: {error}."))
    look, patches = _attention_section(run, encoder, images), _patch_section(run, encoder, images)
    of_one = encoder.num_patches * sum(parameter.numel() for parameter in encoder.parameters())
    few = images[: max(1, WORK // of_one)]
    try:
        return Inside(look, _depth_section(run, encoder, few), _rollout_section(run, encoder, few), patches)
    except TaskError:  # no attention between all tokens, as `look` says
        return Inside(look, patches=patches)
    except EvaluationError as error:
        return Inside(look, Section(run.name, f"No attention over depth: {error}."), patches=patches)


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
        "picture for each head. Bright is much, black is none, each picture by its own largest value; the numbers are "
        "the least and the most that a patch gets, 1 being an even share: where both are near 1, the texture means "
        f"nothing. {_spread(found)}{_whose(run)}"
    )
    if "DINO" not in str(run.get("model.class_path", "")) and encoder.config.pool == "mean":
        note += (
            " Features of this run are the mean of its patches and no loss is on its class token, so what that token "
            "looks at is a by-product."
        )
    return Section(run.name, note, found)


def _whose(run: Run) -> str:
    of_dino = "DINO" in str(run.get("model.class_path", ""))
    return " The encoder shown is the teacher's, as in all scores." if of_dino else ""


def _spread(found: list[AttentionPicture]) -> str:
    heads = [head for each in found for head in each.layers[-1]]
    share = float(np.mean([head.spread / head.patches for head in heads]))
    text = f"On average it covers {share:.0%} of the patches"
    return text + (": these heads look at nothing in particular." if share > EVEN else ".")


def _depth_section(run: Run, encoder: Encoder, images: Tensor) -> Section:
    distance, entropy = attention_distance(encoder, images), attention_entropy(encoder, images)
    note = (
        "Each ring is a head, the line their mean, dashes are attention that is even everywhere; mean over "
        f"{len(images)} image{'s' * (len(images) > 1)}."
    )
    drawn = (draw_attention_distance(distance), _distance_words(distance)), (
        draw_attention_entropy(entropy), _entropy_words(entropy)
    )  # fmt: skip
    return Section(run.name, note, [(Markup(svg), words) for svg, words in drawn])


def _distance_words(found: HeadNumbers) -> str:
    first, last = found.values.mean(1)[[0, -1]].tolist()
    return (
        "How far from a patch lies what it attends to. Short in the first layers and long in the last means that the "
        "encoder reads surroundings first and the whole picture later, as trained ones mostly do; all rings at the "
        f"dashes: heads look everywhere alike, as before training. Here the mean is {first:.0f} pixels in the first "
        f"layer and {last:.0f} in the last; even attention would be {found.even:.0f}."
    )


def _entropy_words(found: HeadNumbers) -> str:
    heads, narrow = found.values.numel(), int((found.values < FEW).sum())
    wide = int((found.values > found.even + math.log(EVEN)).sum())
    return (
        "Over how many tokens a head spreads: 0 is a single one, ln(tokens), the dashes, all of them alike. A head "
        "near 0 copies one token, often a neighbour or itself; one at the dashes looks at nothing in particular. "
        f"Here, of {heads} heads, {narrow} look at fewer than 2 tokens and {wide} at more than {EVEN:.0%} of all."
    )


def _rollout_section(run: Run, encoder: Encoder, images: Tensor) -> Section:
    found = attention_rollout(encoder, images)
    drawn = draw_rollout(found)
    note = (
        f"From which patches {found.source} comes, followed back through all layers: heads averaged, half of each "
        "layer passes straight on (attention rollout). White is the patch that counts most, black the one that counts "
        "least; below, how much that is, 1 being an even share. What stands out is what features come from. "
        "This knows of attention alone, not of what the layers compute."
    )
    if (most := max(each.most for each in drawn)) < LEVEL:
        note += f" Here no patch counts more than {most:.2f} times an even share: nothing stands out."
    return Section(run.name, note, drawn)


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
    rows, columns = found.values.shape[1:3]
    note += f" {images.shape[-1]} pixels are {rows} x {columns} patches{FEW_PATCHES if rows * columns <= 16 else ''}."
    note += _whose(run)
    return Section(run.name, note, draw_patch_components(found))
