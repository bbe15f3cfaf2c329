"""A user's own vocabulary, and texts that are hard to read."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from tasks.errors import TaskError
from tasks.text_tower import trim
from tasks.tokenizer import Tokenizer, train_bpe

CAPTIONS = ["A red circle on blue", "two green squares", "ein großer grüner Kreis", "红色的圆"] * 20


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "words.json"
    train_bpe(CAPTIONS, path, vocab_size=400)
    return path


def test_own_vocabulary(words: Path) -> None:
    tokenizer = Tokenizer(str(words), context_length=12)
    ids = tokenizer(["a red circle", "A  Red Circle ", "", "zebra 🦓", "a red circle " * 9])
    assert ids.shape == (5, 12) and ids.dtype == torch.int64
    assert torch.equal(ids[0], ids[1]) and tokenizer.vocab_size <= 400
    end = tokenizer.vocab_size - 1
    assert tokenizer.end_id == end == ids.max()  # the text tower looks for the largest id
    assert (ids[:, 0] == end - 1).all() and (ids == end).sum(dim=1).tolist() == [1] * 5
    assert ids[0].tolist().index(end) == 4  # each word was learned whole
    assert ids[2, :3].tolist() == [end - 1, end, 0] and ids[4, -1] == end
    assert (ids[3] > 0).sum() > 6  # what was never seen falls into bytes
    assert trim(ids[:3]).shape == (3, 8)


def test_it_travels_by_content(words: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(str(words), context_length=12)
    gone = Tokenizer(str(tmp_path / "gone.json"), context_length=12, json=tokenizer.content())
    assert torch.equal(pickle.loads(pickle.dumps(gone))(CAPTIONS[:4]), tokenizer(CAPTIONS[:4]))
    assert len(pickle.dumps(Tokenizer())) < 500  # loader workers read CLIP's vocabulary themselves
    assert Tokenizer().content() is None


def test_training_does_not_depend_on_the_day(words: Path, tmp_path: Path) -> None:
    train_bpe(iter(CAPTIONS), tmp_path / "again.json", vocab_size=400)
    assert (tmp_path / "again.json").read_text() == words.read_text()


def test_a_vocabulary_with_another_end(tmp_path: Path) -> None:
    """As SigLIP's: no start, padding with the id of the end."""
    model = {"type": "WordLevel", "vocab": {"<unk>": 0, "</s>": 1, "cat": 2, "dog": 3}, "unk_token": "<unk>"}
    end = {"id": "</s>", "ids": [1], "tokens": ["</s>"]}
    sequence, special = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [sequence, special],
        "pair": [],
        "special_tokens": {"</s>": end},
    }
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": processor, "decoder": None, "model": model,
    }  # fmt: skip
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer(str(path), context_length=4, clean="canonicalize", pad_id=1)
    ids = tokenizer(["Cat, dog!", "", "cat cat cat cat", "cat cat cat"])
    assert ids.tolist() == [[2, 3, 1, 1], [1, 1, 1, 1], [2, 2, 2, 1], [2, 2, 2, 1]]
    path.write_text(json.dumps(content | {"post_processor": None}))
    with pytest.raises(TaskError, match="does not end a text"):
        Tokenizer(str(path), json=path.read_text()).end_id  # noqa: B018


@pytest.mark.parametrize(
    ("vocabulary", "content", "message"),
    [
        ("gone.json", None, "no tokenizer gone.json"),
        ("x", "{}", "no tokenizer.json"),
        ("x", "words", "no tokenizer.json"),
    ],
)
def test_bad_files(vocabulary: str, content: str | None, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        Tokenizer(vocabulary, json=content)(["a"])


def test_bad_training(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="vocab_size 100 is too small"):
        train_bpe(CAPTIONS, tmp_path / "w.json", vocab_size=100)
    with pytest.raises(TaskError, match="no captions"):
        train_bpe([], tmp_path / "w.json")
    with pytest.raises(TaskError, match="cannot write"):
        train_bpe(CAPTIONS, tmp_path / "nowhere" / "w.json", vocab_size=300)
