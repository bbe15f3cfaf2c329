"""URLs, and single files behind them, with everything that can go wrong on the way."""

import builtins
import errno
import shutil
import time
from types import SimpleNamespace

import pytest
from jsonargparse import Namespace

from datamodules import remote
from datamodules.errors import DataError
from datamodules.recipes import MAERecipe
from datamodules.remote import check_url, download, read, redact
from datamodules.shard_datamodule import ShardDataModule
from datamodules.sources import list_source
from pretrain.checks import check
from tests.datamodules.servers import web_server


@pytest.mark.parametrize("url", ["http://h/a b", "https://h:8443/x/", "s3://bucket", "s3://b/x@y", "gs://bucket/x"])
def test_urls_that_are_taken(url):
    assert check_url(url) == url.rstrip("/")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://h/x", "ftp:// is not read here"),
        ("pipe://cat x", "pipe:// is not read here"),
        ("file:///x", "file:// is not read here"),
        ("http:///x", "names no host"),
        ("s3:///x", "names no bucket"),
        ("http://h:99999/x", "not valid"),
        ("http://[::1/x", "not valid"),
        ("http://anna:SECRET@h/x", "user name or password"),
        ("https://SECRET@h/x", "user name or password"),
        ("s3://AKIA:SECRET@bucket/x", "user name or password"),
        ("https://h/x?X-Amz-Signature=SECRET", "signatures and tokens"),
        ("https://h/x#SECRET", "signatures and tokens"),
        ("s3://b/x?versionId=SECRET", "signatures and tokens"),
    ],
)
def test_urls_that_are_refused_in_one_line_without_their_secret(url, message):
    with pytest.raises(DataError, match=message) as caught:
        check_url(url)
    assert "SECRET" not in str(caught.value) and "\n" not in str(caught.value)


SECRET_URL = "http://anna:SECRET@h.invalid/train"


@pytest.mark.parametrize(
    "quoting",
    [
        lambda: check(Namespace(output="", data=Namespace(train=SECRET_URL))),
        lambda: ShardDataModule(SECRET_URL, MAERecipe(crop_size=32), 8, channels=4),
        lambda: list_source(SECRET_URL),
    ],
    ids=["check", "datamodule", "pack"],
)
def test_a_secret_is_refused_before_any_message_quotes_the_url(quoting):
    with pytest.raises(DataError, match="holds a user name or password") as caught:
        quoting()
    assert "SECRET" not in str(caught.value)


def test_urls_are_not_packed():
    with pytest.raises(DataError, match="https://h/x is a URL, and only files can be packed"):
        list_source("https://h/x/")


def test_redacted_text():
    text = "404, url='https://cdn.example/a.tar?X-Amz-Signature=SECRET&x=1'\nfrom s3://k:SECRET@b/c and http://h/plain"
    assert redact(text) == "404, url='https://cdn.example/a.tar?***' from s3://***@b/c and http://h/plain"


FAULTS = pytest.mark.parametrize(
    ("fault", "message", "requests"),
    [
        ("500", "the server answers 500, 3 times", 3),
        ("503", "the server answers 503, 3 times", 3),
        ("429", "the server answers 429, 3 times", 3),
        ("410", "the server answers 410$", 1),
        ("401", r"may not be read \(401\): check the credentials", 1),
        ("403", r"may not be read \(403\): check the credentials", 1),
        ("404", r"does not exist \(404\)", 1),
        ("cut", "the connection was cut, 3 times", 3),
        ("short", "bytes came instead of .*, 3 times", 3),
        ("stall", "no answer within 0.3 s, 3 times", 3),
    ],
)


@FAULTS
def test_a_file_that_cannot_be_had(web, picture_set, tmp_path, monkeypatch, fault, message, requests):
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.3)
    web.faults["/shard-000000.tar"] = (fault, None)
    size = (picture_set / "shard-000000.tar").stat().st_size
    with pytest.raises(DataError, match=message) as caught:
        download(f"{web.url}/shard-000000.tar", tmp_path / "x", size, remote.PATIENT)
    assert isinstance(caught.value, remote.NotThereError) == (fault == "404")
    assert web.requests["/shard-000000.tar"] == requests
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{web.url}/shard-000000.tar")


@pytest.mark.parametrize("between", [0.0, 60.0])
@pytest.mark.parametrize(
    ("fault", "why"),
    [("500", "the server answers 500"), ("cut", "the connection was cut"), ("stall", "no answer within 0.3 s"),
     ("403", ""), ("404", "")],
)  # fmt: skip
def test_what_is_waited_for_is_told(web, tmp_path, monkeypatch, capsys, fault, why, between):
    """With every try, but not more often than every few seconds about one file."""
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(remote, "_SECONDS_BETWEEN_LINES", between)
    web.faults["/shard-000000.tar"] = (fault, None)
    url = f"{web.url}/shard-000000.tar"
    with pytest.raises(DataError):
        download(url, tmp_path / "x", None, remote.PATIENT)
    lines = [f"{url}: {why} (try 1 of 3, next in 0.05 s)", f"{url}: {why} (try 2 of 3, next in 0.1 s)"]
    assert capsys.readouterr().err.splitlines() == (lines[: 1 if between else 2] if why else [])


def test_no_secret_is_told_while_waiting(cache, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("from https://h/x?X-Amz-Signature=SECRET and\nhttp://anna:SECRET@h/y")

    monkeypatch.setattr(remote, "_files", lambda _: SimpleNamespace(cat_file=fail))
    with pytest.raises(DataError):
        read("https://h/x", remote.IMPATIENT)
    (line,) = capsys.readouterr().err.splitlines()
    assert "https://h/x?***" in line and "try 1 of 2" in line and "SECRET" not in line


@FAULTS
def test_the_same_over_s3(picture_set, cache, tmp_path, monkeypatch, fault, message, requests):
    """A web server is an S3 server to someone who only gets."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.3)
    shutil.copytree(picture_set, tmp_path / "root" / "bucket" / "train")
    with web_server(tmp_path / "root") as server:
        for name, value in {
            "AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "AKIDSECRET", "AWS_SECRET_ACCESS_KEY": "SECRET",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        path = "/bucket/train/shard-000000.tar"
        server.faults[path] = (fault, None)
        size = (picture_set / "shard-000000.tar").stat().st_size
        with pytest.raises(DataError, match=message) as caught:
            download(f"s3:/{path}", tmp_path / "x", size, remote.PATIENT)
        assert server.requests[path] == requests
        assert "SECRET" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", ["500", "cut", "refuse", "stall", "short"])
def test_what_passes_is_tried_again(web, picture_set, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.3)
    web.faults["/shard-000000.tar"] = (fault, 1)
    whole = (picture_set / "shard-000000.tar").read_bytes()
    download(f"{web.url}/shard-000000.tar", tmp_path / "x", len(whole), remote.PATIENT)
    assert (tmp_path / "x").read_bytes() == whole


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1/x", "the server cannot be reached, 2 times"),
        ("http://no-such-host.invalid/x", "no such host, or no network, 2 times"),
    ],
)
def test_no_server(cache, url, message):
    with pytest.raises(DataError, match=message):
        read(url, remote.IMPATIENT)


def test_a_full_disk_is_not_the_server(web, tmp_path, monkeypatch):
    class Full:
        def get_file(self, *_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(remote, "_files", lambda _: Full())
    with pytest.raises(OSError, match="No space left"):
        download(f"{web.url}/shard-000000.tar", tmp_path / "x", None, remote.PATIENT)


@pytest.mark.parametrize("read_whole", [False, True])
def test_a_trickle_is_given_up(web, tmp_path, monkeypatch, read_whole):
    monkeypatch.setattr(remote, "GRACE_SECONDS", 0.1)
    web.faults["/shard-000000.tar"] = ("trickle", None)
    url, began = f"{web.url}/shard-000000.tar", time.monotonic()
    with pytest.raises(
        DataError, match="not whole within 0.5 s, 2 times" if read_whole else "too slow: .* bytes came in .*, 2 times"
    ):
        read(url, (0.01,)) if read_whole else download(url, tmp_path / "x", None, (0.01,))
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("why", ["no folder", "no permission"])
def test_what_is_wrong_here_is_not_told_as_the_servers(web, tmp_path, monkeypatch, why):
    path = tmp_path / "gone" / "x"
    if why == "no permission":

        def refuse(*_, **__):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(remote, "_files", lambda _: SimpleNamespace(get_file=refuse, cat_file=refuse))
        with pytest.raises(DataError, match=rf"manifest.json: {path} here: Permission denied$"):
            read(f"{web.url}/manifest.json", remote.PATIENT)
    with pytest.raises(OSError, match=str(path)):
        download(f"{web.url}/shard-000000.tar", path, None, remote.PATIENT)


@pytest.mark.parametrize(
    ("url", "package"), [("http://h/x", "aiohttp"), ("s3://b/x", "s3fs"), ("gs://b/x", "gcsfs.core")]
)
def test_missing_packages_are_named(monkeypatch, url, package):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == package:
            raise ImportError(name)
        return real(name, *arguments, **options)

    import fsspec

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: without(package))
    with pytest.raises(DataError, match=r'pip install "trivit\[remote\]"'):
        read(url, ())


def test_s3_without_credentials(cache, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(DataError, match=r"no credentials in the environment.*FSSPEC_S3_ANON=1"):
        read("s3://bucket/x", remote.IMPATIENT)


def test_passwords_for_http_come_from_netrc(web, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login anna password SECRET\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert read(f"{web.url}/manifest.json", ()).startswith(b"{")
    assert web.authorizations == {"Basic YW5uYTpTRUNSRVQ="}
