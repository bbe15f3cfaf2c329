"""Sets behind URLs: found, opened, replaced, lost; over http, S3 and Google storage."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from datamodules import remote, remote_set, shard_cache
from datamodules.errors import DataError, DataFailure
from datamodules.inspect_shards import inspect_command
from datamodules.manifest import load_manifest
from datamodules.open_shards import open_shards
from datamodules.remote_set import expand, fetch, short_names
from datamodules.shard_reader import BadSampleError, ShardReader
from datamodules.verify import verify
from tests.datamodules.pictures import write_pictures
from tests.datamodules.servers import google_server, s3_server, web_server
from tests.datamodules.tar_builders import picture, write_tar


def read_all(root: Path) -> list[str]:
    manifest = load_manifest(root)
    reader = ShardReader(manifest)
    return [reader.image(shard, i)[0] for shard, count in enumerate(manifest.counts) for i in range(count)]


KEYS = [f"{i:05d}" for i in range(100)]


def test_a_folder_with_its_manifest(web, picture_set):
    root = open_shards(f"{web.url}/")
    manifest, here = load_manifest(root), load_manifest(picture_set)
    assert (manifest.hash, manifest.classes, manifest.name) == (here.hash, here.classes, web.url)
    assert set(web.requests) == {"/manifest.json"}  # no tar before it is needed
    assert read_all(root) == KEYS
    assert all(web.requests[f"/shard-00000{i}.tar"] == web.requests[f"/shard-00000{i}.tar.idx"] == 1 for i in range(7))
    assert read_all(open_shards(web.url)) == KEYS
    assert web.requests["/shard-000000.tar"] == 1 and web.requests["/manifest.json"] == 2


def test_the_index_that_lies_beside_the_tar_is_taken(web, picture_set):
    manifest = load_manifest(open_shards(web.url))
    ShardReader(manifest).image(0, 0)
    assert (manifest.root / "shard-000000.tar.idx").read_bytes() == (picture_set / "shard-000000.tar.idx").read_bytes()


@pytest.mark.parametrize("beside", [None, b"rubbish", "of another tar"])
def test_without_a_good_index_the_tar_is_scanned(own_web, own_pictures, beside):
    index = own_pictures / "shard-000000.tar.idx"
    if beside is None:
        index.unlink()
    else:
        index.write_bytes((own_pictures / "shard-000001.tar.idx").read_bytes() if beside != b"rubbish" else beside)
    assert read_all(open_shards(own_web.url)) == KEYS[:40]


def test_names_with_spaces_and_unicode(tmp_path, own_web, own_pictures):
    (own_pictures / "manifest.json").unlink()
    for suffix in ("", ".idx"):
        (own_pictures / f"shard-000000.tar{suffix}").rename(own_pictures / f"größe 1 #%20.tar{suffix}")
    load_manifest(own_pictures)
    assert sorted(read_all(open_shards(own_web.url))) == KEYS[:40]


def test_http_without_a_manifest_says_what_to_do(own_web, own_pictures):
    (own_pictures / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"has no manifest.json, and http cannot list files.*NAME-\{000000\.\.000015\}"):
        open_shards(own_web.url)


@pytest.mark.parametrize("content", [b"", b"<html>login</html>", b'{"format": 1}', b"[]"])
def test_a_damaged_manifest(own_web, own_pictures, content):
    (own_pictures / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest.json is damaged .*upload it again"):
        open_shards(own_web.url)


@pytest.mark.parametrize("name", ["../../x.tar", "/etc/x.tar", ".x.tar", "x", f"{'x' * 300}.tar"])
def test_names_from_elsewhere_do_not_leave_the_cache(own_web, own_pictures, name):
    manifest = load_manifest(own_pictures)
    shards = (replace(manifest.shards[0], name=name), *manifest.shards[1:])
    (own_pictures / "manifest.json").write_bytes(replace(manifest, shards=shards).to_bytes())
    with pytest.raises(DataError, match=r"is no plain name of a .tar"):
        open_shards(own_web.url)


def test_a_compressed_tar_is_named_by_its_url(own_web, own_pictures):
    tar = own_pictures / "shard-000001.tar"
    tar.write_bytes(b"\x1f\x8b" + bytes(1000))
    with pytest.raises(DataError, match=rf"^{own_web.url}/shard-000001.tar is compressed"):
        fetch(open_shards(f"{own_web.url}/shard-000001.tar") / "shard-000001.tar")


@pytest.mark.parametrize("indexed", [True, False])
def test_tars_in_braces(own_web, own_pictures, indexed):
    here = load_manifest(own_pictures)
    if not indexed:
        for index in own_pictures.glob("*.idx"):
            index.unlink()
    pattern = f"{own_web.url}/shard-{{000000..000003}}.tar"
    root = open_shards(pattern)
    assert [own_web.requests[f"/shard-00000{i}.tar"] for i in range(4)] == [0 if indexed else 1] * 4
    manifest = load_manifest(root)
    assert (manifest.hash, manifest.classes, manifest.name) == (here.hash, here.classes, pattern)
    assert read_all(root) == KEYS[:40]
    assert read_all(open_shards(f"{own_web.url}/shard-{{000001,000003}}.tar")) == KEYS[10:20] + KEYS[30:40]
    assert read_all(open_shards(f"{own_web.url}/shard-000002.tar")) == KEYS[20:30]
    with pytest.raises(DataError, match=r"shard-000004.tar does not exist \(404\)"):
        open_shards(f"{own_web.url}/shard-{{000000..000004}}.tar")


def named_set(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    for tar, names in (("a", (b"owl", b"cat")), ("b", (b"owl", b"ant"))):
        members = [(f"{tar}{i}.{end}", data) for i, name in enumerate(names)
                   for end, data in (("jpg", picture(i)), ("cls", name))]  # fmt: skip
        write_tar(folder / f"{tar}.tar", members)


@pytest.mark.parametrize("there", ["fetched", "in the cache", "evicted"])
def test_names_in_labels_are_collected_from_tars_that_are_fetched(own_web, own_pictures, there):
    named_set(own_pictures)
    pattern = f"{own_web.url}/{{a,b}}.tar"
    root = open_shards(pattern)
    if there != "fetched":
        (root / "manifest.json").unlink()
        if there == "evicted":
            (root / "b.tar").unlink()
        open_shards(pattern)
    manifest, here = load_manifest(root), load_manifest(own_pictures)
    assert (manifest.hash, manifest.classes) == (here.hash, ("ant", "cat", "owl"))
    assert [ShardReader(manifest).label(shard, 1) for shard in range(2)] == [1, 0]


@pytest.mark.parametrize("beside", [("a", "b"), ("b",)])
def test_names_in_labels_of_tars_that_were_not_fetched_are_told(own_web, own_pictures, beside):
    """Those of the others alone would be another numbering."""
    named_set(own_pictures)
    here = load_manifest(own_pictures)
    about = (own_pictures / "manifest.json").read_bytes()
    (own_pictures / "manifest.json").unlink()
    for name in {"a", "b"} - set(beside):
        (own_pictures / f"{name}.tar.idx").unlink()
    root = open_shards(f"{own_web.url}/{{a,b}}.tar")
    assert load_manifest(root).classes == () and load_manifest(root).hash == here.unnamed_hash
    with pytest.raises(BadSampleError, match=rf"b'owl' is no index of a class .*; upload it, and delete {root}"):
        ShardReader(load_manifest(root)).label(0, 0)
    (own_pictures / "manifest.json").write_bytes(about)
    shutil.rmtree(root)
    assert load_manifest(open_shards(f"{own_web.url}/{{a,b}}.tar")).hash == here.hash


def test_optional_files_that_are_forbidden_are_absent(own_web, own_pictures):
    for name in ("manifest.json", "classes.txt"):
        own_web.faults[f"/{name}"] = ("403", None)
    root = open_shards(f"{own_web.url}/shard-{{000000..000003}}.tar")
    assert load_manifest(root).classes == () and read_all(root) == KEYS[:40]
    with pytest.raises(DataError, match=r"manifest.json: may not be read \(403\)"):
        open_shards(own_web.url)


def test_tars_evicted_while_they_are_indexed(own_web, own_pictures, monkeypatch):
    for index in own_pictures.glob("*.idx"):
        index.unlink()
    real = shard_cache.cached

    def evicted_at_once(path, *arguments, **options):
        there = real(path, *arguments, **options)
        path.unlink()
        path.with_name(f"{path.name}.idx").unlink(missing_ok=True)
        return there

    monkeypatch.setattr(shard_cache, "cached", evicted_at_once)
    root = open_shards(f"{own_web.url}/shard-{{000000..000003}}.tar")
    monkeypatch.undo()
    assert load_manifest(root).num_samples == 40


def test_brace_notation():
    assert expand("x-{08..11}.tar") == ["x-08.tar", "x-09.tar", "x-10.tar", "x-11.tar"]
    assert expand("{a,b}/{0..4..2}.tar") == [f"{f}/{i}.tar" for f in "ab" for i in (0, 2, 4)]
    assert short_names(["http://h/a/0.tar", "http://h/a/1%20b.tar"]) == ["0.tar", "1 b.tar"]
    assert short_names(["http://h/a/0.tar", "http://h/b/0.tar"]) == ["a__0.tar", "b__0.tar"]
    clashing = ["/d/a__b/c.tar", "/d/a/b__c.tar", "/d/x/c.tar", "/d/y/c.tar", "/d/z/b__c.tar"]
    assert len(set(short_names(clashing))) == 5 and all(name.endswith(".tar") for name in short_names(clashing))
    for pattern, message in (("x-{0..3.tar", "a brace is not closed"), ("x-{0..3}", "x-0 is no .tar")):
        with pytest.raises(DataError, match=message):
            expand(pattern)


def test_shards_of_one_name_do_not_collide(tmp_path, own_web, own_pictures):
    for i, name in enumerate(("a", "b")):
        (own_pictures / name).mkdir()
        shutil.copy(own_pictures / f"shard-00000{i}.tar", own_pictures / name / "x.tar")
    assert read_all(open_shards(f"{own_web.url}/{{a,b}}/x.tar")) == KEYS[:20]


def test_a_replaced_set_is_another_set(own_web, own_pictures):
    old = open_shards(own_web.url)
    assert read_all(old) == KEYS[:40]
    shutil.rmtree(own_pictures)
    write_pictures(own_pictures, 50, 10)
    new = open_shards(own_web.url)
    assert new != old and read_all(new) == KEYS[:50]


def test_a_shard_that_is_not_the_manifests_is_lost(own_web, own_pictures):
    manifest = load_manifest(open_shards(own_web.url))
    tar = own_pictures / "shard-000001.tar"
    data = tar.read_bytes()
    first, second = load_members(tar)
    tar.write_bytes(data.replace(first.encode(), second.encode(), 1))
    with pytest.raises(BadSampleError, match=r"not the shard that manifest.json lists: one of the two was replaced"):
        ShardReader(manifest).image(1, 0)


def load_members(tar: Path) -> tuple[str, str]:
    """A member's name, and another one of the same length and checksum of its header."""
    import tarfile

    with tarfile.open(tar) as file:
        name = file.getnames()[0]
    stem, _, suffix = name.partition(".")
    return name, f"{stem}.{suffix[1:]}{suffix[0]}"


def test_without_a_manifest_a_replaced_tar_is_lost_until_the_next_start(own_web, own_pictures):
    pattern = f"{own_web.url}/shard-{{000000..000003}}.tar"
    manifest = load_manifest(open_shards(pattern))
    os.utime(own_pictures / "shard-000001.tar", ns=(1, 1))  # another ETag
    with pytest.raises(BadSampleError, match=r"was replaced on the server .*: start again"):
        ShardReader(manifest).image(1, 0)
    assert open_shards(pattern) != manifest.root
    assert read_all(open_shards(pattern)) == KEYS[:40]


def test_a_lost_shard_is_not_asked_for_again_by_everyone(web):
    manifest = load_manifest(open_shards(web.url))
    web.faults["/shard-000002.tar"] = ("500", None)
    for _ in range(4):  # as many readers, each without a memory of the others
        with pytest.raises(BadSampleError, match="the server answers 500, 3 times"):
            ShardReader(manifest).image(2, 0)
    assert web.requests["/shard-000002.tar"] == 3
    web.faults.clear()
    open_shards(web.url)  # the next run does not believe it
    assert ShardReader(manifest).image(2, 0)[0] == "00032"


def test_a_lost_shard_is_tried_again_later(web, monkeypatch):
    monkeypatch.setattr(remote_set, "_TRY_A_LOST_SHARD_AGAIN_AFTER", (0.2, 0.2))
    manifest = load_manifest(open_shards(web.url))
    web.faults["/shard-000002.tar"] = ("404", None)
    with pytest.raises(BadSampleError, match=r"does not exist \(404\)"):
        ShardReader(manifest).image(2, 0)
    web.faults.clear()
    time.sleep(0.3)
    assert ShardReader(manifest).image(2, 0)[0] == "00032"


def test_evicted_between_two_reads(web):
    manifest = load_manifest(open_shards(web.url))
    reader = ShardReader(manifest)
    assert reader.image(2, 0)[0] == "00032"
    for path in manifest.root.glob("shard-000002.*"):
        path.unlink()
    assert reader.image(2, 1)[0] == "00033"
    assert web.requests["/shard-000002.tar"] == 2
    (manifest.root / "shard-000002.tar").unlink()
    web.faults["/shard-000002.tar"] = ("404", None)
    with pytest.raises(BadSampleError, match="404") as caught:
        reader.image(2, 2)
    assert caught.value.key == "00034"


def test_a_full_disk_stops_instead_of_making_bad_samples(web, monkeypatch):
    manifest = load_manifest(open_shards(web.url))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote, "download", full)
    with pytest.raises(DataFailure, match="is full: free some space"):
        ShardReader(manifest).image(2, 0)


def test_a_wrong_size_of_the_cache_is_told_at_the_start(web, monkeypatch):
    monkeypatch.setenv("TRIVIT_CACHE_SIZE", "plenty")
    with pytest.raises(DataError, match="is no size"):
        open_shards(web.url)


def test_a_cache_that_cannot_be_written(web, cache):
    cache.touch()
    with pytest.raises(DataFailure, match="cannot write"):
        open_shards(web.url)


def test_a_damaged_folder_in_the_cache(web):
    root = open_shards(web.url)
    (root / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"in the cache is damaged .*delete it"):
        load_manifest(open_shards(web.url))


def test_tars_of_local_folders_are_not_fetched(own_pictures):
    assert fetch(own_pictures / "shard-000000.tar") is False


def test_verify_and_inspect(own_web, own_pictures, tmp_path, capsys):
    assert verify(own_web.url) == []
    own_web.faults["/shard-000002.tar"] = ("404", None)
    shutil.rmtree(tmp_path / "cache")
    findings = verify(own_web.url)
    assert [(f.shard, f.kind) for f in findings] == [("shard-000002.tar", "unreadable")]
    assert inspect_command(own_web.url, tmp_path / "sheet.png") == 0
    out = capsys.readouterr().out
    assert f"{own_web.url}: 40 samples in 4 shards" in out and (tmp_path / "sheet.png").is_file()


def test_inspect_fetches_few_of_many_shards(tmp_path, cache, capsys):
    with web_server(write_pictures(tmp_path / "many", 40, 2)) as server:
        assert inspect_command(server.url, tmp_path / "sheet.png") == 0
        assert sum(name.endswith(".tar") for name in server.requests) == 8
    out = capsys.readouterr().out
    assert "40 samples in 20 shards" in out and "looked at: 8 of the 20 shards" in out


@pytest.mark.parametrize("protocol", ["s3", "gs"])
def test_buckets(picture_set, cache, monkeypatch, protocol):
    """The same over S3 (moto) and Google storage (gcp-storage-emulator), both real servers."""
    monkeypatch.setattr(remote, "STALL_SECONDS", 5.0)
    with (s3_server if protocol == "s3" else google_server)() as endpoint:
        upload = (s3_uploader if protocol == "s3" else google_uploader)(endpoint, monkeypatch)
        for path in picture_set.iterdir():
            upload(f"in k/train/{path.name}", path.read_bytes())
            if path.name != "manifest.json":
                upload(f"bare/{path.name}", path.read_bytes())
        url = f"{protocol}://pictures"
        root = open_shards(f"{url}/in k/train")
        assert load_manifest(root).hash == load_manifest(picture_set).hash
        assert read_all(root) == KEYS
        assert read_all(open_shards(f"{url}/bare")) == KEYS
        assert read_all(open_shards(f"{url}/bare/shard-{{000000..000001}}.tar")) == KEYS[:32]
        upload("bare/shard-000006.tar", (picture_set / "shard-000000.tar").read_bytes())
        assert len(read_all(open_shards(f"{url}/bare"))) == 112  # another version, so another set
        for wrong in ("none", "bare/{0..1}.tar"):
            with pytest.raises(DataError, match=r"does not exist|holds no .tar files"):
                open_shards(f"{url}/{wrong}")
        with pytest.raises(DataError, match=r"nothing.* does not exist \(404\)"):
            open_shards(f"{protocol}://nothing/train")


def s3_uploader(endpoint, monkeypatch):
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "AKIASECRET", "AWS_SECRET_ACCESS_KEY": "SECRET",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="pictures")
    return lambda name, data: client.put_object(Bucket="pictures", Key=name, Body=data)


def google_uploader(endpoint, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec
    from gcsfs.core import GCSFileSystem

    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})  # as FSSPEC_GS_TOKEN=anon does it
    files = GCSFileSystem(token="anon")
    return lambda name, data: files.pipe_file(f"pictures/{name}", data)


def test_what_the_folder_says(web):
    """trivit_remote.json says all that a process needs to fetch."""
    root = open_shards(web.url)
    about = json.loads((root / "trivit_remote.json").read_text())
    assert about["url"] == web.url and len(about["shards"]) == 7
    assert about["shards"]["shard-000000.tar"]["url"] == f"{web.url}/shard-000000.tar"
