"""Labels that are names of classes instead of numbers."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from datamodules.class_labels import class_number, label_name, labels_of
from datamodules.manifest import MANIFEST, load_manifest
from datamodules.shard_reader import BadSampleError, ShardReader
from datamodules.shard_writer import ShardWriter
from datamodules.tar_index import ShardIndex, scan_tar
from tests.datamodules.tar_builders import picture, write_tar


def labelled(folder: Path, name: str, *labels: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    members = [(f"{name}{i}.{end}", data) for i, label in enumerate(labels)
               for end, data in (("jpg", picture(i)), ("cls", label))]  # fmt: skip
    write_tar(folder / f"{name}.tar", members)
    return folder


def labels(folder: Path) -> list[int]:
    manifest = load_manifest(folder)
    reader = ShardReader(manifest)
    return [reader.label(shard, i) for shard, count in enumerate(manifest.counts) for i in range(count)]


def test_names_become_the_classes_of_a_set(tmp_path: Path) -> None:
    folder = labelled(tmp_path / "set", "a", b"sea lion\n", "größe".encode(), b"sea lion")
    labelled(folder, "b", b"", b"ant")
    assert load_manifest(folder).classes == ("ant", "größe", "sea lion")
    reader = ShardReader(load_manifest(folder))
    assert [reader.label(0, i) for i in range(3)] == [2, 1, 2] and reader.label(1, 1) == 0
    labelled(folder, "c", b"bee", b"sea lion")  # more tars later
    assert load_manifest(folder).classes == ("ant", "bee", "größe", "sea lion")
    reader = ShardReader(load_manifest(folder))
    assert [reader.label(2, i) for i in range(2)] == [1, 3] and reader.label(1, 1) == 0


def test_a_list_of_classes_goes_before_the_names_found(tmp_path: Path) -> None:
    folder = labelled(tmp_path / "set", "a", b"dog", b"cat", b"0", b"cow")
    (folder / "classes.txt").write_text("dog\ncat\n")
    reader = ShardReader(load_manifest(folder))
    assert [reader.label(0, i) for i in range(3)] == [0, 1, 0]
    with pytest.raises(BadSampleError, match=r"cls: b'cow' is no index of a class .*classes\.txt"):
        reader.label(0, 3)


@pytest.mark.parametrize("first", [(b"cat", b"7"), (b"7", b"7")])
def test_numbers_and_names_in_one_set_are_not_mixed(
    first: tuple[bytes, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise 7 would be whatever class happens to come seventh in the alphabet."""
    folder = labelled(labelled(tmp_path / "set", "a", *first), "b", b"dog", b"cat")
    with caplog.at_level(logging.WARNING, "trivit"):
        assert load_manifest(folder).classes == ()
    assert "some .cls hold numbers (7), others names (cat)" in caplog.text


def test_numbers_stay_numbers_and_only_the_first_of_a_shard_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = labelled(tmp_path / "set", "a", b"3", b"1")
    read: list[int] = []
    monkeypatch.setattr("datamodules.class_labels.label_name", lambda content: read.append(1))
    assert (load_manifest(folder).classes, len(read)) == ((), 1)
    assert labels(folder) == [3, 1]


def test_a_manifest_from_before_names_is_made_anew_once_deleted(tmp_path: Path) -> None:
    folder = labelled(tmp_path / "set", "a", b"owl", b"cat")
    old = replace(load_manifest(folder), classes=())
    (folder / MANIFEST).write_bytes(old.to_bytes())
    with pytest.raises(BadSampleError, match=r"b'owl' is no index of a class .*; an old manifest\.json .* is deleted"):
        labels(folder)
    (folder / MANIFEST).unlink()
    assert labels(folder) == [1, 0] and load_manifest(folder).unnamed_hash == old.hash


def test_our_writer_collects_names_too(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", samples_per_shard=1) as writer:
        for name in ("owl", "cat"):
            writer.write(name, {"jpg": picture(), "cls": name.encode()})
    assert (tmp_path / "set" / MANIFEST).is_file() and labels(tmp_path / "set") == [1, 0]


def test_digits_with_an_underscore_are_a_name_in_both_directions(tmp_path: Path) -> None:
    """Python's int reads 1_0 as ten and 2019_01 as 201901."""
    folder = labelled(tmp_path / "set", "a", b"2019_01", b"1_0", b"cat")
    assert (load_manifest(folder).classes, labels(folder)) == (("1_0", "2019_01", "cat"), [1, 0, 2])
    assert class_number(b"1_0", {}) is None


@pytest.mark.parametrize("odd", ["größe".encode("latin-1"), b"a\nb", b"3.5", b"-1"])
@pytest.mark.parametrize("first", [True, False])
def test_one_odd_label_is_one_bad_sample(
    odd: bytes, first: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = labelled(tmp_path / "set", "a", *((odd, b"owl", b"cat") if first else (b"owl", b"cat", odd)))
    with caplog.at_level(logging.WARNING, "trivit"):
        reader = ShardReader(load_manifest(folder))
    assert reader.manifest.classes == ("cat", "owl") and not caplog.text
    assert [reader.label(0, i + first) for i in range(2)] == [1, 0]
    with pytest.raises(BadSampleError, match="is no index of a class"):
        reader.label(0, 0 if first else 2)


def test_a_tar_without_labels_is_not_opened_to_look_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.jpg", picture()), ("0.txt", b"a cat"), ("1.txt", b"an owl")])
    index = scan_tar(path)
    path.unlink()
    monkeypatch.setattr(ShardIndex, "members", None)
    assert labels_of(index) == ("", frozenset())


def test_what_is_a_name() -> None:
    assert [label_name(text) for text in (b" cat \n", b"12", b"-1", b"3.5", b"", b"a\nb", b"\xff", b"x" * 201)] == [
        "cat", *[None] * 7
    ]  # fmt: skip
    numbers = {"a": 0, "b": 1}
    assert [class_number(text, numbers) for text in (b"b", b"1", b"2", b"-1", b"c")] == [1, 1, None, None, None]
    assert [class_number(text, {}) for text in (b"2", b"b")] == [2, None]
