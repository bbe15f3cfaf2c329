"""Adding to a set: old shards, keys and labels stay, and no interruption loses any of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import datamodules.pack as pack_module
import datamodules.pack_extend as extend_module
from datamodules.errors import DataError
from datamodules.manifest import MANIFEST, UNFINISHED, build_manifest, load_manifest
from datamodules.pack import SKIPPED, pack
from datamodules.pack_shard import pack_shard
from datamodules.shard_writer import ShardWriter
from datamodules.sidecars import locked
from datamodules.synth import synth
from pretrain.cli import main
from tests.datamodules.set_files import files, read
from tests.datamodules.tar_builders import image_folders, picture


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A set of 40 cats and owls in five shards."""
    image_folders(tmp_path / "first", ["cat", "owl"], 20)
    pack(tmp_path / "first", tmp_path / "set", samples_per_shard=8, workers=1)
    return tmp_path / "set"


@pytest.fixture
def more(tmp_path: Path) -> Path:
    """Other images, 12 of a new class and 12 cats, some of whom are called as the first ones."""
    image_folders(tmp_path / "more", ["bee", "cat"], 12)
    for i, path in enumerate(sorted((tmp_path / "more").rglob("*.JPEG"))):
        path.write_bytes(picture(5000 + i))
    return tmp_path / "more"


def labels(root: Path) -> dict[str, str]:
    """Key -> name of the class."""
    names = load_manifest(root).classes
    return {key: names[int(members["cls"])] for key, members in read(root).items()}


def test_old_shards_stay_and_new_ones_come_behind(old: Path, more: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, samples, described = files(old), read(old), load_manifest(old)
    assert main(["shards", "pack", str(more), str(old), "--extend", "--samples-per-shard", "8"]) == 0
    said = capsys.readouterr().err
    assert "1 new classes (bee)" in said
    assert "12 keys are in the set already (first: cat/cat_0)" in said
    after = load_manifest(old)
    assert after.classes == ("cat", "owl", "bee")
    assert [s.name for s in after.shards] == [f"shard-{i:06d}.tar" for i in range(8)]
    assert after.num_samples == 64 and after.members == {"cls": 64, "jpeg": 64}
    assert after.made_by == f"{described.made_by}; {after.made_by.rpartition('; ')[2]}"
    now = files(old)
    assert all(now[name] == data for name, data in before.items() if name != MANIFEST)
    assert {key: members for key, members in read(old).items() if key in samples} == samples
    found = labels(old)
    assert len(found) == 64 and sorted(found.values()) == ["bee"] * 12 + ["cat"] * 32 + ["owl"] * 20
    assert all(name == key.partition("/")[0] for key, name in found.items())
    assert not list(old.glob(".*"))
    rebuilt = build_manifest(old, [shard.name for shard in after.shards], after.classes)
    assert rebuilt.hash == after.hash and rebuilt.members == after.members
    assert main(["shards", "verify", str(old)]) == 0


def test_the_same_source_twice(old: Path, more: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(more, old, extend=True, workers=1)
    before = files(old)
    assert main(["shards", "pack", str(more), str(old), "--extend"]) == 0
    assert "holds these 24 samples already, nothing to do" in capsys.readouterr().err
    pack(more.parent / "first", old, extend=True, samples_per_shard=8, workers=1)
    pack(more.parent / "first", old, samples_per_shard=8, workers=1)  # as in a script that begins from the beginning
    assert main(["shards", "pack", str(more), str(old), "--extend", "--resize", "10"]) == 2
    said = capsys.readouterr().err
    assert "holds these images already, packed with other settings (--resize None -> 10): choose the same ones" in said
    assert files(old) == before


def test_the_same_source_in_shards_of_another_size(more: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = more.parent / "small"
    pack(more, root, resize=16, samples_per_shard=10, workers=1)
    before = files(root)
    for options in ([], ["--samples-per-shard", "3"]):
        assert main(["shards", "pack", str(more), str(root), "--extend", "--resize", "16", *options]) == 0
        assert "holds these 24 samples already, nothing to do" in capsys.readouterr().err
    for options, difference in (
        ([], "--resize 16 -> None"),
        (["--resize", "20"], "--resize 16 -> 20"),
        (["--resize", "16", "--quality", "80"], "--quality 90 -> 80"),
    ):
        assert main(["shards", "pack", str(more), str(root), "--extend", *options]) == 2
        assert f"packed with other settings ({difference}): " in capsys.readouterr().err
    assert files(root) == before
    copy = more.rename(more.with_name("same photos, elsewhere"))
    assert pack(copy, root, resize=16, extend=True, workers=1).num_samples == 24
    (more.parent / "c.csv").write_text("file,caption\nbee_0.JPEG,a bee\n")
    texts = pack(copy, root, resize=16, captions=more.parent / "c.csv", extend=True, workers=1)
    assert texts.num_samples == 48, "other texts are other samples"


def test_twice_in_a_row_and_same_names(old: Path, more: Path) -> None:
    third = image_folders(more.parent / "third", ["cat", "ape"], 3)
    for i, path in enumerate(sorted(third.rglob("*.JPEG"))):
        path.write_bytes(picture(9000 + i))
    pack(more, old, extend=True, workers=1)
    pack(third, old, extend=True, workers=1)
    manifest = load_manifest(old)
    assert manifest.classes == ("cat", "owl", "bee", "ape") and manifest.num_samples == 70
    assert len(read(old)) == 70
    assert len([key for key in labels(old) if key.startswith("cat/cat_0")]) == 3


def test_sets_are_not_mixed_without_being_told(old: Path, more: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(old)
    assert main(["shards", "pack", str(more), str(old)]) == 2
    assert "already holds shards: choose an empty folder, --extend of pack adds to a set" in capsys.readouterr().err
    assert main(["shards", "pack", str(more), str(more.parent / "new"), "--extend"]) == 2
    assert "holds no set that could be extended: leave --extend out" in capsys.readouterr().err
    assert files(old) == before and not (more.parent / "new").exists()


def test_what_cannot_be_read_is_added_to_the_list(old: Path, more: Path) -> None:
    (more / "bee" / "bee_0.JPEG").write_bytes(b"no")
    pack(more, old, extend=True, workers=1)
    (more / "bee" / "bee_1.JPEG").write_bytes(b"no image")
    shutil.copytree(more / "bee", more.parent / "bees")
    pack(more.parent / "bees", old, extend=True, workers=1)
    names = [line.split("\t")[0] for line in (old / SKIPPED).read_text().splitlines()]
    assert names[0] == "bee/bee_0.JPEG" and sorted(names[1:]) == ["bee_0.JPEG", "bee_1.JPEG"]


def test_unlabelled_and_foreign_sets(more: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "flat", prefix="mine") as writer:
        writer.write("a", {"jpg": picture()})
    manifest = pack(more, tmp_path / "flat", extend=True, workers=1)
    assert manifest.classes == ("bee", "cat") and manifest.members == {"cls": 24, "jpeg": 24, "jpg": 1}
    assert [shard.name for shard in manifest.shards] == ["mine-000000.tar", "shard-000000.tar"]

    synth(tmp_path / "drawn", samples=20, size=16, workers=1)
    flat = tmp_path / "few"
    flat.mkdir()
    (flat / "x.jpg").write_bytes(picture(3))
    manifest = pack(flat, tmp_path / "drawn", extend=True, workers=1)
    assert manifest.members["cls"] == 20 and manifest.num_samples == 21 and "circle" in manifest.classes


def test_labels_that_cannot_be_matched(old: Path, more: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "numbered") as writer:
        writer.write("a", {"jpg": picture(), "cls": b"4"})
    with pytest.raises(DataError, match=r"numbered only numbers its classes.*write their names into .*classes\.txt"):
        pack(more, tmp_path / "numbered", extend=True)
    (tmp_path / "t.csv").write_text("path,label\nmore/cat/cat_1.JPEG,1\n")
    with pytest.raises(DataError, match=r"has numbers for labels, but .*set names its classes: give their names"):
        pack(tmp_path / "t.csv", old, extend=True)
    assert pack(tmp_path / "t.csv", tmp_path / "numbered", extend=True, workers=1).classes == ()
    assert sorted(members["cls"] for members in read(tmp_path / "numbered").values()) == [b"1", b"4"]


def test_a_list_of_classes_beside_the_tars_grows_too(old: Path, more: Path) -> None:
    (old / MANIFEST).unlink()
    (old / "classes.txt").write_text("cat\nowl\n")
    assert load_manifest(old).classes == ("cat", "owl")
    pack(more, old, extend=True, workers=1)
    (old / MANIFEST).unlink()
    assert load_manifest(old).classes == ("cat", "owl", "bee")


def test_one_at_a_time(old: Path, more: Path) -> None:
    code = (
        "from pathlib import Path\nfrom datamodules.sidecars import locked\nimport time\n"
        f"with locked(Path({str(old / '.lock')!r}), wait=False):\n"
        "    print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(DataError, match="another process is writing"):
            pack(more, old, extend=True)
        holder.kill()
    assert pack(more, old, extend=True, workers=1).num_samples == 64
    with locked(old / ".lock", wait=False):
        pass


def test_interrupted_while_packing(old: Path, more: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shutil.copytree(old, old.with_name("whole"))
    pack(more, whole, extend=True, samples_per_shard=4, workers=1)
    before, count = files(old), [0]

    def counting(job: object, tick: object) -> object:
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return pack_shard(job, tick)  # type: ignore[arg-type]

    monkeypatch.setattr(pack_module, "pack_shard", counting)
    with pytest.raises(KeyboardInterrupt):
        pack(more, old, extend=True, samples_per_shard=4, workers=1)
    now = {name: (old / name).read_bytes() for name in before}
    assert now == before and load_manifest(old).num_samples == 40, "readers see the old set all the while"
    with pytest.raises(DataError, match=r"\.extend was begun by another command"):
        pack(more, old, extend=True, samples_per_shard=5, workers=1)
    pack(more, old, extend=True, samples_per_shard=4, workers=1)
    assert count[0] == 7, "three of six shards were there already"
    assert files(old) == files(whole)


@pytest.mark.parametrize("moves", [0, 1, 5, 12])
def test_interrupted_while_moving(old: Path, more: Path, monkeypatch: pytest.MonkeyPatch, moves: int) -> None:
    """The instant in which the set is of both kinds: it says so, and the same command, or any other one, ends it."""
    whole = shutil.copytree(old, old.with_name("whole"))
    pack(more, whole, extend=True, samples_per_shard=4, workers=1)
    before = files(old)
    replace, count = Path.replace, [0]

    def failing(self: Path, target: Path) -> Path:
        if self.parent.name == ".extend" and not self.name.endswith(".partial"):
            count[0] += 1
            if count[0] > moves:
                raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing)
        if moves < 12:
            with pytest.raises(KeyboardInterrupt):
                pack(more, old, extend=True, samples_per_shard=4, workers=1)
    if moves < 12:
        assert (old / UNFINISHED).exists()
        with pytest.raises(DataError, match=r"is unfinished: run the command that began it again .*--extend"):
            load_manifest(old)
        assert all((old / name).read_bytes() == data for name, data in before.items())
    pack(more, old, extend=True, samples_per_shard=4, workers=1)
    assert files(old) == files(whole)


@pytest.mark.parametrize("name", ["unlink", "rmdir"])
def test_interrupted_while_tidying_up(old: Path, more: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    whole = shutil.copytree(old, old.with_name("whole"))
    pack(more, whole, extend=True, workers=1)
    original = getattr(Path, name)
    for nth in range(1, 5):
        again = shutil.copytree(old, old.with_name(f"set{nth}"))
        count = [0]

        def failing(self: Path, missing_ok: bool = False, nth: int = nth, count: list[int] = count) -> None:
            count[0] += self.name != ".lock" and "partial" not in self.name
            if count[0] == nth:
                raise KeyboardInterrupt
            original(self, missing_ok) if name == "unlink" else original(self)

        with monkeypatch.context() as patch:
            patch.setattr(Path, name, failing)
            try:
                pack(more, again, extend=True, workers=1)
            except KeyboardInterrupt:
                assert count[0] == nth
        pack(more, again, extend=True, workers=1)
        assert files_of(again) == files_of(whole)


def files_of(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}


@pytest.mark.slow
def test_killed_and_continued(old: Path, more: Path) -> None:
    whole = shutil.copytree(old, old.with_name("whole"))
    pack(more, whole, extend=True, samples_per_shard=2, workers=1)
    before = files(old)
    code = (
        "import time\nimport datamodules.pack_shard as p\nread = p.SourceReader.read\n"
        "def slow(self, image):\n    time.sleep(0.05)\n    return read(self, image)\n"
        "p.SourceReader.read = slow\nfrom datamodules.pack import pack\n"
        f"pack({str(more)!r}, {str(old)!r}, samples_per_shard=2, workers=2, extend=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, start_new_session=True) as process:
        while len(list((old / ".extend").glob("*.tar"))) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert all((old / name).read_bytes() == data for name, data in before.items())
    assert load_manifest(old).num_samples == 40
    pack(more, old, samples_per_shard=2, workers=2, extend=True)
    assert files(old) == files(whole)


def test_a_full_disk_is_one_line(old: Path, more: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(extend_module, "write_aside", full)
        with pytest.raises(DataError, match=r"the disk of .* is full: free some space and run the same command again"):
            pack(more, old, extend=True, workers=1)
    assert json.loads((old / MANIFEST).read_text())["samples"] == 40
    assert pack(more, old, extend=True, workers=1).num_samples == 64
