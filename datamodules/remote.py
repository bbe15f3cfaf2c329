"""Files behind http(s)://, s3:// and gs:// URLs, read through fsspec.

Nothing waits for ever: connecting and every stalled read have a limit. What may pass (5xx, a cut connection, a stall)
is tried again, and a line says so; what will not (403, 404) is not. Credentials come from the environment (AWS's and
Google's variables, .netrc, fsspec's FSSPEC_*); a URL that holds one is refused, because URLs are written to
config.yaml, logs and errors.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from datamodules.console import one_line, tell
from datamodules.errors import DataError
from datamodules.sidecars import DISK_FULL

PROTOCOLS = ("http", "https", "s3", "gs")
CONNECT_SECONDS = 15.0
STALL_SECONDS = 30.0
GRACE_SECONDS = 60.0
LEAST_RATE = 100e3
"""Bytes per second on average that a download must reach after the grace: a trickle is as good as a stall."""
PATIENT = (1.0, 4.0, 15.0, 40.0)
"""Seconds between tries while training: a server may be restarted, a switch replaced."""
IMPATIENT = (0.5, 2.0)
"""Seconds between tries at the start, when somebody is waiting and a wrong address is likelier."""
_SECONDS_BETWEEN_LINES = 3.0
_CUT = (
    "PayloadError", "DisconnectedError", "StreamingError", "ContentLengthError", "TransferEncodingError",
    "IncompleteRead", "ConnectionClosedError",
)  # fmt: skip
Value = TypeVar("Value")


class NotThereError(DataError):
    """The server has no such file."""


class ForbiddenError(DataError):
    """The server does not give this file to anyone like us (403)."""


class About(NamedTuple):
    """Bytes of a remote file, None when the server does not say, and what changes when it is replaced."""

    bytes: int | None
    version: str


def is_remote(path: object) -> bool:
    """Whether this is a URL and no path."""
    return "://" in str(path)


def check_url(url: str) -> str:
    """The URL without a slash at its end; DataError when it cannot be read here or holds a secret (never repeated)."""
    protocol = url.partition("://")[0].lower()
    if protocol not in PROTOCOLS:
        raise DataError(f"{protocol}:// is not read here: give a path, or a URL of http, https, s3 or gs")
    try:
        parts = urlsplit(url)
        place, _, signed = parts.hostname, parts.port, bool(parts.query or parts.fragment or url.endswith(("?", "#")))
    except ValueError:
        raise DataError(f"this {protocol} URL of the data is not valid: check host and port") from None
    if "@" in parts.netloc:
        raise DataError(
            f"the {protocol} URL of the data holds a user name or password, which would end up in config.yaml: take it "
            "out, and give credentials in the environment (.netrc for http; AWS_ACCESS_KEY_ID and so on for s3)"
        )
    if signed:
        raise DataError(
            f"the {protocol} URL of the data goes on after ? or #, where signatures and tokens stand, which would end "
            "up in config.yaml: give the bare URL, and credentials in the environment"
        )
    if not place:
        raise DataError(f"{url} names no {'bucket' if protocol in ('s3', 'gs') else 'host'}")
    return url.rstrip("/")


def redact(text: str) -> str:
    """The text with what may be secret taken out of every URL in it; on one line."""
    text = re.sub(r"(\w+://)[^\s/@'\"]*@", r"\1***@", text)
    return " ".join(re.sub(r"(\w+://[^\s?#'\"<>]*)[?#][^\s'\"<>]*", r"\1?***", text).split())


def read(url: str, pauses: Sequence[float]) -> bytes:
    """The content of a small file. NotThereError, or DataError after as many tries as there are pauses, and one."""
    soon = 5 * GRACE_SECONDS  # for the whole, which may otherwise trickle in for ever
    return _try(url, pauses, lambda files: bytes(files.cat_file(url, timeout=soon)))


def download(url: str, path: Path, size: int | None, pauses: Sequence[float]) -> None:
    """Write a remote file to `path`; `size` is how many bytes must come, if that is known.

    Raises:
        NotThereError, DataError: as `read`.
        OSError: the disk is full, or `path` cannot be written.
    """
    sequential: dict[str, Any] = {"s3": {"max_concurrency": 1}, "gs": {"concurrency": 1}}  # or memory holds big parts

    def get(files: Any) -> None:
        files.get_file(url, str(path), callback=_least_rate(), **sequential.get(_protocol(url), {}))
        came = path.stat().st_size
        if size is not None and came != size:
            raise _WrongLengthError(f"{came} bytes came instead of {size}")

    _try(url, pauses, get, writes=path)


def about(url: str, pauses: Sequence[float]) -> About:
    """Size and version of a remote file. NotThereError, DataError as `read`."""
    return _about(_try(url, pauses, lambda files: files.info(url, **_fresh(url))))


def list_tars(url: str, pauses: Sequence[float]) -> dict[str, About]:
    """File name -> size and version of the tars in a folder of s3 or gs. NotThereError, DataError as `read`."""
    entries = _try(url, pauses, lambda files: files.ls(url, detail=True, **_fresh(url)))
    names = {entry["name"].rpartition("/")[2]: entry for entry in entries if entry["type"] == "file"}
    return {name: _about(names[name]) for name in sorted(names) if name.endswith(".tar") and not name.startswith(".")}


class _WrongLengthError(Exception):
    pass


class _TooSlowError(Exception):
    pass


def _least_rate() -> Any:
    """What fsspec calls with every piece that came; ends a download that is too slow."""
    from fsspec import Callback

    class LeastRate(Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.began, self.came = time.monotonic(), 0

        def relative_update(self, inc: int = 1) -> None:
            self.came += inc
            seconds = time.monotonic() - self.began
            if seconds > GRACE_SECONDS + self.came / LEAST_RATE:
                raise _TooSlowError(f"too slow: {self.came} bytes came in {seconds:.0f} s")

    return LeastRate()


def _protocol(url: str) -> str:
    return url.partition("://")[0].lower()


def _fresh(url: str) -> dict[str, Any]:
    return {"refresh": True} if _protocol(url) == "s3" else {}


def _about(info: dict[str, Any]) -> About:
    names = ("ETag", "etag", "generation", "LastModified", "Last-Modified", "updated", "mtime")
    return About(info.get("size"), " ".join(str(info[name]) for name in names if info.get(name)))


def _files(url: str) -> Any:
    """The fsspec file system of a URL; fsspec keeps one for each process and protocol."""
    protocol = _protocol(url)
    try:
        import fsspec
        from aiohttp import ClientTimeout

        waiting = ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=STALL_SECONDS)
        if protocol == "s3":
            config = {
                "connect_timeout": CONNECT_SECONDS, "read_timeout": STALL_SECONDS, "retries": {"total_max_attempts": 1},
            }  # fmt: skip
            files = fsspec.filesystem("s3", config_kwargs=config, use_listings_cache=False)
            files.retries = 1  # trying again is done here, for all protocols alike
        elif protocol == "gs":
            # The newer class in gcsfs asks for the kind of bucket by gRPC, which does not survive a fork.
            os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
            from gcsfs.core import GCSFileSystem

            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints tracebacks for what it then raises
            files = GCSFileSystem(requests_timeout=waiting, use_listings_cache=False)
        else:
            files = fsspec.filesystem("http", client_kwargs={"timeout": waiting, "trust_env": True})
    except ImportError:
        raise DataError(f'{protocol}:// URLs need packages that are not here: pip install "trivit[remote]"') from None
    return files


def _try(
    url: str, pauses: Sequence[float], action: Callable[[Any], Value], writes: Path | None = None
) -> Value:  # fmt: skip
    """What `action` returns; of its errors, those of the file that it `writes` are passed on as they are."""
    if _protocol(url) == "gs":
        pauses = pauses[len(IMPATIENT) :]  # gcsfs itself tries six times within half a minute
    tries = 0
    while True:
        try:
            return action(_files(url))
        except DataError:
            raise
        except Exception as error:  # each protocol has its own dozens of exceptions, without a common class
            if isinstance(error, OSError) and (
                error.errno in DISK_FULL or (writes is not None and str(error.filename) == str(writes))
            ):
                raise
            status = _status(error)
            if status == 404:
                raise NotThereError(f"{url} does not exist (404)") from None
            why, passes = _explain(error, status)
            if status == 403:
                raise ForbiddenError(f"{url}: {why}") from None
            if not passes or tries == len(pauses):
                often = f", {tries + 1} times" if tries else ""
                raise DataError(f"{url}: {why}{often}") from None
        _tell_of_waiting(url, f"{why} (try {tries + 1} of {len(pauses) + 1}, next in {pauses[tries]:g} s)")
        time.sleep(pauses[tries])
        tries += 1


_told: dict[str, float] = {}


def _tell_of_waiting(url: str, why: str) -> None:
    """One line that says what is waited for, unless there was one about the same file just now."""
    now = time.monotonic()
    if now - _told.get(url, -_SECONDS_BETWEEN_LINES) >= _SECONDS_BETWEEN_LINES:
        _told[url] = now
        tell(one_line(redact(f"{url}: {why}")))


def _chain(error: BaseException) -> list[BaseException]:
    """An exception and what it came from; fsspec's http calls any failure FileNotFoundError, with its cause."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__
    return chain


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an exception of any of the libraries."""
    chain = _chain(error)
    if _is_local(chain[-1]):
        return None
    for cause in reversed(chain):
        response = getattr(cause, "response", None)  # botocore
        if isinstance(response, dict) and "ResponseMetadata" in response:
            return int(response["ResponseMetadata"].get("HTTPStatusCode", 500))
        status = getattr(cause, "status", None)  # aiohttp
        if type(cause).__name__ == "HttpError":  # gcsfs
            status = getattr(cause, "code", None)
        if isinstance(status, int | str) and str(status).isdigit():
            return int(status)
    if len(chain) == 1 and isinstance(error, FileNotFoundError):
        return 404
    if isinstance(chain[-1], PermissionError) or str(chain[-1]).startswith("Forbidden"):
        return 403
    return None


def _is_local(error: BaseException) -> bool:
    """Whether it is about a file on this machine; what comes from a server names none."""
    return isinstance(error, OSError) and error.filename is not None and Path(str(error.filename)).is_absolute()


def _explain(error: BaseException, status: int | None) -> tuple[str, bool]:
    """What went wrong, and whether trying again may help."""
    cause = _chain(error)[-1]
    kind = type(cause).__name__
    if isinstance(cause, OSError) and _is_local(cause):
        return f"{cause.filename} here: {cause.strerror}", False
    if status in (401, 403):
        return f"may not be read ({status}): check the credentials in the environment", False
    if status is not None:
        return f"the server answers {status}", status >= 500 or status in (408, 425, 429)
    if "Credential" in kind:
        return (
            "no credentials in the environment (for s3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
            "for gs GOOGLE_APPLICATION_CREDENTIALS); for a public bucket set FSSPEC_S3_ANON=1 or FSSPEC_GS_TOKEN=anon"
        ), False
    if isinstance(cause, _WrongLengthError | _TooSlowError):
        return f"{cause}", True
    if isinstance(cause, ValueError) and not isinstance(cause, OSError) and "InvalidURL" in kind:
        return "is not a valid URL", False
    if "DNS" in kind or "gaierror" in kind:
        return "no such host, or no network", True
    if kind == "CancelledError":  # by the limit for the whole of a small file
        return f"not whole within {5 * GRACE_SECONDS:g} s", True
    if isinstance(cause, TimeoutError) or "Timeout" in kind:
        return f"no answer within {STALL_SECONDS:g} s", True
    if "Connector" in kind or "EndpointConnection" in kind or isinstance(cause, ConnectionRefusedError):
        return "the server cannot be reached", True
    if isinstance(cause, ConnectionError) or kind.endswith(_CUT):
        return "the connection was cut", True
    return redact(f"{kind}: {cause}")[:300], True
