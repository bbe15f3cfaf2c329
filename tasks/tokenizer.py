"""Captions to token ids: CLIP's vocabulary through open_clip, or any vocabulary of the `tokenizers` package.

Axes: b = captions, t = context length.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tasks.errors import TaskError

Clean = Literal["lower", "canonicalize", "whitespace"]
PAD, START, END = "<pad>", "<start_of_text>", "<end_of_text>"
Encode = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Tokenizer:
    """Texts -> ids. It is called in loader workers: what is pickled is plain, the vocabulary is read where it is used.

    Args:
        vocabulary: `clip`; the path of a tokenizer.json (of `train_bpe`, or any other of the `tokenizers` package that
            ends a text with a token of its own); or `hf-hub:USER/NAME`, which is fetched.
        context_length: ids of a text, with those that begin and end it.
        clean: how texts are cleaned before: repaired and unescaped, white space collapsed; `lower`: then in small
            letters; `canonicalize`: also without punctuation.
        pad_id: fills up what is short.
        json: content of the tokenizer.json, where the file may be gone; None: read `vocabulary`.
    """

    vocabulary: str = "clip"
    context_length: int = 77
    clean: Clean = "lower"
    pad_id: int = 0
    json: str | None = field(default=None, repr=False)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """int64 [b t]; what is too long is cut and ended, so that the last id is that of the end.

        The words <start_of_text> and <end_of_text> in a text of CLIP's vocabulary become those ids themselves.
        """
        result = torch.full((len(texts), self.context_length), self.pad_id)
        for row, ids in zip(result, self._heavy.encode(list(texts)), strict=True):
            if len(ids) > self.context_length:
                ids = [*ids[: self.context_length - 1], ids[-1]]
            row[: len(ids)] = torch.tensor(ids)
        return result

    @property
    def vocab_size(self) -> int:
        """Number of ids; TaskError where the vocabulary cannot be had."""
        return self._heavy.size

    @property
    def end_id(self) -> int:
        """The id that ends every text."""
        return self._heavy.end_id

    def word(self, token: int) -> str:
        """What an id of a tokenizer.json stands for."""
        return self._heavy.word(token)

    def content(self) -> str | None:
        """What a checkpoint must keep to have the same ids without the file; None for CLIP's vocabulary."""
        return None if self.vocabulary == "clip" else self.json or _read(self.vocabulary)

    @property
    def _heavy(self) -> "_Vocabulary":
        return _clip(self.clean) if self.vocabulary == "clip" else _tokenizers(self.content() or "", self.clean)


class _Vocabulary(NamedTuple):
    encode: Encode  # with start and end, of any length
    size: int
    end_id: int
    word: Callable[[int], str]


@cache
def _clip(clean: Clean) -> _Vocabulary:
    from open_clip.tokenizer import SimpleTokenizer

    words = SimpleTokenizer(clean=clean)
    start, end = words.sot_token_id, words.eot_token_id

    def encode(texts: list[str]) -> list[list[int]]:
        return [[start, *words.encode(text), end] for text in texts]

    return _Vocabulary(encode, words.vocab_size, end, words.decoder.__getitem__)


@cache
def _tokenizers(content: str, clean: Clean) -> _Vocabulary:
    from open_clip.tokenizer import get_clean_fn
    from tokenizers import Tokenizer as HFTokenizer

    try:
        words: Any = HFTokenizer.from_str(content)
    except Exception as error:  # the package raises nothing more special
        raise TaskError(f"this is no tokenizer.json of the tokenizers package: {error}") from error
    words.no_padding()
    words.no_truncation()
    cleaned = get_clean_fn(clean)
    empty = words.encode("").ids
    if not empty:
        raise TaskError("this tokenizer.json does not end a text with a token of its own: the text tower needs one")

    def encode(texts: list[str]) -> list[list[int]]:
        return [words.encode(cleaned(text)).ids for text in texts]  # a batch would start threads in every loader worker

    return _Vocabulary(encode, words.get_vocab_size(), empty[-1], words.id_to_token)


@cache
def _read(vocabulary: str) -> str:
    path = vocabulary
    if vocabulary.startswith("hf-hub:"):
        try:
            from huggingface_hub import hf_hub_download

            path = hf_hub_download(vocabulary.removeprefix("hf-hub:"), "tokenizer.json")
        except Exception as error:  # the hub, the network and the file system each have their own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TaskError(f"cannot fetch the tokenizer {vocabulary}: {reason}") from error
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"no tokenizer {vocabulary} (`clip`, a tokenizer.json, or hf-hub:NAME): {error}") from error


_spare: dict[str, str] = {}


@contextlib.contextmanager
def spare_vocabulary(vocabulary: str, content: str | None) -> Iterator[None]:
    """Within it, towers with that vocabulary are built from `content`: its file may be gone, a checkpoint has it."""
    if content is not None:
        _spare[vocabulary] = content
    try:
        yield
    finally:
        _spare.pop(vocabulary, None)


def spare_content(vocabulary: str) -> str | None:
    """What a vocabulary is read from instead of its file; None outside of `spare_vocabulary`."""
    return _spare.get(vocabulary)


def train_bpe(captions: Iterable[str], path: str | Path, vocab_size: int = 49408, clean: Clean = "lower") -> None:
    """Learns a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909) from captions and writes its tokenizer.json.

    Ids are ordered as CLIP's: padding is 0, the start of a text has the last but one and its end the largest, which is
    how the text tower finds it. There is nothing that it could not write: unknown letters fall apart into bytes.

    Args:
        captions: any number.
        path: where to write, ending in .json.
        vocab_size: at most so many ids; at least the 256 bytes, padding, start and end.
        clean: how captions are cleaned; give the text tower the same.

    Raises:
        TaskError: too small a vocabulary, no captions, or a file that cannot be written.
    """
    from open_clip.tokenizer import get_clean_fn
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import models, pre_tokenizers, processors, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < (least := len(alphabet) + 3):
        raise TaskError(f"vocab_size {vocab_size} is too small: bytes, padding, start and end of a text are {least}")
    words: Any = HFTokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, special_tokens=[PAD], initial_alphabet=alphabet, show_progress=False
    )
    seen = 0

    def cleaned() -> Iterable[str]:
        nonlocal seen
        clean_fn = get_clean_fn(clean)
        for caption in captions:
            seen += 1
            yield clean_fn(caption)

    words.train_from_iterator(cleaned(), trainer)
    if not seen:
        raise TaskError("there are no captions to learn a vocabulary from")
    words.add_special_tokens([START, END])
    ends = [(word, words.token_to_id(word)) for word in (START, END)]
    words.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
    try:
        words.save(str(path))
    except Exception as error:  # the package raises nothing more special
        raise TaskError(f"cannot write {path}: {error}") from error
    _read.cache_clear()  # it may have had other words
