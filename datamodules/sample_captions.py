"""The caption of a sample: from its `.txt`, a field of its `.json`, or its class and templates.

Of several captions one is drawn each time; which one follows from the sample's key, as everything random does.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from datamodules.class_names import read_class_names, refuse_codes
from datamodules.errors import DataError
from datamodules.shard_reader import BadSampleError, ShardReader

_JSON_FIELDS = ("captions", "caption")


@dataclass(frozen=True)
class CaptionConfig:
    """Where captions come from.

    Args:
        field: of the sample's `.json`, a text or a list of them; None: its `.txt`, else `captions` or `caption` of
            its `.json`.
        templates: texts with {} for a class name, for data with labels instead of captions; used for all samples.
        class_names: a table of what the classes are called, synonyms separated by commas; None: as in the data set.
    """

    field: str | None = None
    templates: tuple[str, ...] = ()
    class_names: str | None = None

    def check(self) -> None:
        """DataError, one line, for what cannot work."""
        wrong = [template for template in self.templates if template.count("{}") != 1]
        if wrong:
            raise DataError(f"captions.templates: {wrong[0]!r} must have exactly one {{}} for the class name")
        if self.class_names and not self.templates:
            raise DataError("captions.class_names needs captions.templates: give some, such as 'a photo of {}'")
        if self.field and self.templates:
            raise DataError("captions.field and captions.templates: give one of them")


class SampleCaptions:
    """All captions of a sample, by shard and sample number.

    Args:
        reader: of the shards.
        config: where captions come from.
    """

    def __init__(self, reader: ShardReader, config: CaptionConfig) -> None:
        self.reader, self.config = reader, config
        members, name = reader.manifest.members, reader.manifest.name
        kinds = ("json",) if config.field else ("txt", "json")
        texts = [kind for kind in kinds if members.get(kind)]
        if config.templates and not reader.manifest.classes:
            instead = "; it has texts: read them with captions.templates [] (evaluate --captions txt)" if texts else ""
            raise DataError(f"captions.templates need classes, but {name} has no class names{instead}")
        if config.templates:
            refuse_codes(self._names)
        elif members and not texts:  # none are counted where no manifest was at hand
            raise DataError(
                f"{name} has no captions, no .{' and no .'.join(kinds)}: put them beside the images and pack these, or "
                "make captions of class names with captions.templates (evaluate --captions templates)"
            )

    def all(self, shard: int, sample: int) -> list[str]:
        """At least one caption. BadSampleError when there is none, or it is no UTF-8 text or no JSON."""
        if self.config.templates:
            label = self.reader.label(shard, sample)
            if label < 0:
                raise self._bad(shard, sample, "no label to make a caption from")
            return self._of_class[label]
        captions = self._from_json(shard, sample) if self.config.field else self._from_text(shard, sample)
        captions = [text for caption in captions if (text := " ".join(caption.split()))]
        if not captions:
            where = f"field {self.config.field!r} of its .json" if self.config.field else ".txt or .json"
            raise self._bad(shard, sample, f"no caption ({where})")
        return captions

    @cached_property
    def _names(self) -> list[list[str]]:
        classes, table = self.reader.manifest.classes, self.config.class_names
        return read_class_names(table, classes) if table else [[name.replace("_", " ")] for name in classes]

    @cached_property
    def _of_class(self) -> list[list[str]]:
        templates = self.config.templates
        return [[template.replace("{}", name) for template in templates for name in each] for each in self._names]

    def _from_text(self, shard: int, sample: int) -> list[str]:
        data = self.reader.member(shard, sample, "txt")
        if data is None:
            return self._from_json(shard, sample)
        return [self._decoded(shard, sample, data, "txt")]

    def _from_json(self, shard: int, sample: int) -> list[str]:
        data = self.reader.member(shard, sample, "json")
        if data is None:
            return []
        try:
            record = json.loads(self._decoded(shard, sample, data, "json"))
        except (ValueError, RecursionError) as error:
            raise self._bad(shard, sample, f"json: {error}") from error
        fields = (self.config.field,) if self.config.field else _JSON_FIELDS
        found: Any = []
        if isinstance(record, dict):
            found = next((record[field] for field in fields if field in record), [])
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list) or not all(isinstance(caption, str) for caption in found):
            raise self._bad(shard, sample, "json: captions must be a text or a list of texts")
        return found

    def _decoded(self, shard: int, sample: int, data: bytes | bytearray, extension: str) -> str:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self._bad(shard, sample, f"{extension}: not UTF-8 (byte {error.start})") from error

    def _bad(self, shard: int, sample: int, reason: str) -> BadSampleError:
        return BadSampleError(self.reader.name(shard), self.reader.key(shard, sample), reason)
