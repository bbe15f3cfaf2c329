"""Health of CLIP on cases whose numbers are known."""

import pytest
import torch
import torch.nn.functional as F

from tasks.clip_health import clip_health


def test_perfect_pairs_that_have_nothing_to_do_with_each_other() -> None:
    vectors = torch.eye(8)
    health = clip_health(vectors, vectors)
    assert health["alignment"] == pytest.approx(0, abs=1e-6) and health["positive_similarity"] == pytest.approx(1)
    assert health["hardest_negative"] == pytest.approx(0) and health["modality_gap"] == pytest.approx(0)
    assert health["uniformity"] == pytest.approx(-4)  # all squared distances are 2


def test_collapse_and_gap() -> None:
    image, text = F.normalize(torch.ones(8, 4), dim=1), -F.normalize(torch.ones(8, 4), dim=1)
    health = clip_health(image, text)
    assert health["alignment"] == pytest.approx(4) and health["modality_gap"] == pytest.approx(2)
    assert health["uniformity"] == pytest.approx(0, abs=1e-5) and health["hardest_negative"] == pytest.approx(-1)


def test_shuffled_pairs_have_their_match_as_hardest_negative() -> None:
    vectors = torch.eye(300)
    health = clip_health(vectors.bfloat16(), vectors.roll(1, dims=0))
    assert health["positive_similarity"] == 0 and health["hardest_negative"] == pytest.approx(255 / 256)
    assert all(value.isfinite() and value.ndim == 0 for value in health.values())


def test_one_pair_has_no_other_to_be_told_from() -> None:
    vector = F.normalize(torch.ones(1, 4), dim=1)
    health = clip_health(vector, vector)
    assert set(health) == {"alignment", "modality_gap", "positive_similarity"}
    assert health["alignment"] == pytest.approx(0, abs=1e-6) and health["modality_gap"] == 0
    assert all(value.isfinite() for value in clip_health(vector.repeat(2, 1), vector.repeat(2, 1)).values())
