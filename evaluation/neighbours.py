"""Which train images an encoder finds alike to a test image: the pictures behind the kNN score."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.normalize import normalize
from evaluation.features import Features
from evaluation.knn import nearest
from evaluation.labels import match_labels
from evaluation.pictures import picture
from tasks.encoders import Encoder


class Neighbour(NamedTuple):
    """Row among the train images, class name, cosine similarity, and whether the class is that of the query."""

    row: int
    name: str
    similarity: float
    right: bool | None  # None: nothing is known of classes


class Query(NamedTuple):
    """Row among the test images, its class name, and its neighbours, the nearest first."""

    row: int
    name: str
    neighbours: tuple[Neighbour, ...]


class QueryPicture(NamedTuple):
    """Data URIs of a query and its neighbours."""

    query: Query
    image: str
    near: list[tuple[Neighbour, str]]


def neighbours(train: Features, test: Features, rows: Sequence[int], k: int = 5) -> list[Query]:
    """The k nearest train images (cosine) of the test images in those rows; labels match by class name."""
    label, classes = match_labels(train.classes, train.label, test.classes, test.label)
    similarity, index = nearest(train.x, np.asarray(test.x[list(rows)]), min(k, len(train)))
    found = []
    for i, row in enumerate(rows):
        truth = int(label[row])
        near = (
            Neighbour(int(j), classes[train.label[j]], float(s), int(train.label[j]) == truth)
            for j, s in zip(index[i], similarity[i], strict=True)
        )
        found.append(Query(row, classes[truth], tuple(near)))
    return found


@torch.no_grad()
def neighbours_among(encoder: Encoder, images: Tensor, rows: Sequence[int], k: int = 5) -> list[Query]:
    """The k nearest others (cosine) of the images in those rows, among images [n c h w] in 0..255 without labels."""
    encoder.eval()
    config = encoder.config
    parts = torch.split(images, 64)
    x = torch.cat([encoder.features(normalize(part, config.mean, config.std)) for part in parts]).numpy()
    similarity, index = nearest(x, x[list(rows)], min(k + 1, len(x)))
    found = []
    for row, near, alike in zip(rows, index, similarity, strict=True):
        others = [Neighbour(int(j), "", float(s), None) for j, s in zip(near, alike, strict=True) if j != row]
        found.append(Query(row, "", tuple(others[:k])))
    return found


def draw_neighbours(
    queries: Sequence[Query], test_images: Tensor, train_images: Sequence[Tensor]
) -> list[QueryPicture]:
    """Pictures of the queries [b 3 h w] beside those of their neighbours, one [k 3 h w] per query."""
    return [
        QueryPicture(query, picture(image), [(n, picture(x)) for n, x in zip(query.neighbours, near, strict=True)])
        for query, image, near in zip(queries, test_images, train_images, strict=True)
    ]
