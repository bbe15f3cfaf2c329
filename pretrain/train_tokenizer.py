"""`trivit tokenizer train`: a vocabulary from the captions of a set."""

import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from datamodules.console import one_line, tell
from datamodules.manifest import load_manifest
from datamodules.open_shards import open_shards
from datamodules.sample_captions import CaptionConfig, SampleCaptions
from datamodules.shard_reader import BadSampleError, ShardReader
from evaluation.text_probes import chosen_captions
from pretrain.errors import RunError
from tasks.errors import TaskError
from tasks.tokenizer import Clean, Tokenizer, train_bpe

_LOOKED_AT, _LONGEST = 10_000, 512  # captions whose lengths are told, up to so many ids


def tokenizer_command(source: str, output: str, size: int, captions: str | None, clean: Clean) -> None:
    """Learns a vocabulary from all captions of a set, writes it, and says how to train with it.

    Args:
        source: shards, or images with texts beside them, as `data.train` takes them.
        output: the file to write, NAME.json.
        size: at most so many ids.
        captions: which ones, as `evaluation.text_probes.chosen_captions` takes them; None: `txt`.
        clean: how captions are cleaned.

    Raises:
        RunError, DataError, EvaluationError, TaskError: one line, for what the user can repair.
    """
    place = Path(output)
    if place.suffix != ".json":
        raise RunError(f"{output}: the name of a vocabulary ends in .json")
    if place.exists():
        raise RunError(f"{output} is there already, and runs may need it as it is: name another file, or remove it")
    if not place.parent.is_dir():
        raise RunError(f"{output}: the folder {place.parent} does not exist")
    found = _Captions(open_shards(source), chosen_captions(CaptionConfig(), captions or "txt", None, None))
    try:
        train_bpe(found, place, size, clean)
    except TaskError as error:
        if found.count or not found.without:
            raise
        raise RunError(f"{source} has no caption that can be read (first: {found.first})") from error
    words = Tokenizer(str(place), clean=clean, context_length=_LONGEST)
    if found.without:
        tell(f"{found.without:,} of {found.samples:,} samples have no caption that can be read (first: {found.first})")
    lengths = found.lengths(words)
    context = min(77, max(8, -(-lengths[-1] // 8) * 8))
    most = f"{lengths[-1]} at most" if lengths[-1] < _LONGEST else f"{_LONGEST} or more at most"
    print(f"{output}: {words.vocab_size:,} ids, learned from {found.count:,} captions")
    print(
        f"with start and end a caption has {lengths[len(lengths) // 2]} ids (median), {most}: train with "
        f"--model.text.tokenizer {output} --model.text.context_length {context}"
        + ("" if clean == "lower" else f" --model.text.clean {clean}")
    )


class _Captions:
    """All captions of a set, in order, under a progress bar; those that were seen are counted."""

    def __init__(self, root: Path, config: CaptionConfig) -> None:
        self.reader = ShardReader(load_manifest(root))
        self.captions = SampleCaptions(self.reader, config)
        self.samples = self.reader.manifest.num_samples
        self.count = self.without = 0
        self.first = ""
        self.kept: list[str] = []

    def __iter__(self) -> Iterator[str]:
        with tqdm(total=self.samples, desc="captions", unit="img", disable=None, file=sys.stderr) as bar:
            for shard, part in enumerate(self.reader.manifest.shards):
                for sample in range(part.samples):
                    bar.update()
                    try:
                        texts = self.captions.all(shard, sample)
                    except BadSampleError as error:
                        self.first = self.first or one_line(f"{error.shard}/{error.key}: {error.reason}")
                        self.without += 1
                        continue
                    self.count += len(texts)
                    if len(self.kept) < _LOOKED_AT:
                        self.kept += texts
                    yield from texts

    def lengths(self, words: Tokenizer) -> list[int]:
        """Ids of the first captions, in rising order."""
        ids = words(self.kept[:_LOOKED_AT])
        return sorted(((ids == words.end_id).int().argmax(dim=1) + 1).tolist())
