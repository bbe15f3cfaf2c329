"""The commands on remote shards: the same run as from the folder, one line for a mistake, and no secret anywhere."""

import base64
import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from lightning.pytorch import Callback, Trainer

from datamodules import remote
from pretrain.cli import main
from pretrain.config import parse
from pretrain.run import train
from tests.datamodules.servers import s3_server, web_server
from tests.pretrain.conftest import SMALL, pretrain

ROOT = Path(__file__).resolve().parents[2]
SECRETS = ("s3cr3t-key", "AKIDs3cr3t", "s3cr3t-token", "netrc-s3cr3t")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TRIVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PATIENT", (0.05,))
    monkeypatch.setattr(remote, "IMPATIENT", (0.05,))
    return tmp_path / "cache"


@pytest.fixture
def web(drawn):
    with web_server(drawn) as server:
        yield server


def losses(run: Path) -> list[str]:
    with (run / "metrics.csv").open() as file:
        return [row["train/loss"] for row in csv.DictReader(file)]


@pytest.mark.slow
def test_killed_and_gone_on_with_the_same_losses_as_from_the_folder(web, drawn, tmp_path, cache):
    class Killed(Exception):
        pass

    class Killer(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            if trainer.global_step == 4:
                raise Killed

    here, there = tmp_path / "here", tmp_path / "there"
    more = [*SMALL, "--checkpoint_every", "3", "--data.workers", "1"]
    assert pretrain(*more, "--data.train", drawn, "--output", here) == 0
    with pytest.raises(Killed):
        train(*parse([*more, "--data.train", web.url, "--output", str(there)]), [Killer()])
    assert f"train: {web.url}\n" in (there / "config.yaml").read_text()
    shutil.rmtree(cache)  # it goes on at another node
    assert pretrain(*more, "--data.train", web.url, "--output", there) == 0
    assert losses(there) == losses(here) and len(losses(here)) == 8
    # The folder and the URL are the same data, so a run may move between them.
    assert pretrain(*more, "--data.train", drawn, "--output", there) == 0


def test_evaluate_and_report(web, drawn, tmp_path, monkeypatch):
    run, name = tmp_path / "run", sorted(drawn.glob("*.tar"))[0].name.replace("000000.tar", "{000000..000001}.tar")
    assert pretrain(*SMALL, "--data.train", web.url, "--output", run) == 0
    command = ["evaluate", str(run), "--train", web.url, "--test", f"{web.url}/{name}"]
    assert main([*command, "--probes", "knn"]) == 0
    protocol = json.loads((run / "results.json").read_text())["knn"]["protocol"]
    assert protocol["train"]["path"] == web.url and protocol["train"]["images"] == 96
    assert protocol["test"]["images"] < 96
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run)]) == 0
    assert web.url in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1/train", "the server cannot be reached"),
        ("http://no-such-host.invalid/train", "no such host, or no network"),
        ("http://anna:s3cr3t-key@127.0.0.1:1/train", "user name or password"),
        ("https://h/train?X-Amz-Signature=s3cr3t-key", "signatures and tokens"),
        ("hdfs://h/train", "hdfs:// is not read here"),
        ("{web}/nothing", "has no manifest.json, and http cannot list files"),
        ("{web}/shard-{000000..000099}.tar", "does not exist"),
    ],
)
def test_mistakes_end_in_one_line(web, tmp_path, capsys, url, message):
    url = url.replace("{web}", web.url)
    assert pretrain(*SMALL, "--data.train", url, "--output", tmp_path / "run") == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("trivit: ")]
    assert len(lines) == 1 and message in lines[0] and "s3cr3t" not in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()
    for command in ("verify", "inspect"):
        assert main(["shards", command, url]) == 2
        error = capsys.readouterr().err
        assert message in error and "s3cr3t" not in error


def test_a_lost_shard_is_named_in_bad_samples(web, drawn, tmp_path):
    name = sorted(drawn.glob("*.tar"))[1].name
    web.faults[f"/{name}"] = ("403", None)
    run = tmp_path / "run"
    assert pretrain(*SMALL, "--data.train", web.url, "--output", run, "--data.bad_sample_budget", 0.5) == 0
    bad = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert bad and {entry["shard"] for entry in bad} == {name}
    assert all("may not be read (403): check the credentials" in entry["reason"] for entry in bad)


@pytest.mark.slow
def test_no_secret_is_in_any_file_or_line(drawn, tmp_path, monkeypatch, capfd):
    """S3 with keys, http with a password, and a redirect to a signed URL; what goes well, and what does not."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login anna password netrc-s3cr3t\n")
    with s3_server() as endpoint, web_server(drawn) as signed, web_server(drawn) as web:
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "AKIDs3cr3t", "AWS_SECRET_ACCESS_KEY": "s3cr3t-key",
            "AWS_SESSION_TOKEN": "s3cr3t-token", "AWS_DEFAULT_REGION": "us-east-1", "NETRC": f"{tmp_path / 'netrc'}",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        _upload(drawn)
        web.redirect = f"{signed.url}{{path}}?X-Amz-Signature=s3cr3t-key"  # as data hubs do it
        for name, url in {"s3": "s3://pictures/train", "web": web.url}.items():
            run = str(tmp_path / "runs" / name)
            assert pretrain(*SMALL, "--data.train", url, "--output", run, "--trainer.max_steps", 3) == 0
            assert main(["evaluate", run, "--train", url, "--test", url, "--probes", "knn"]) == 0
            assert main(["report", run]) == 0
        assert f"Basic {base64.b64encode(b'anna:netrc-s3cr3t').decode()}" in web.authorizations
        assert any("s3cr3t-key" in path for path in signed.requests)

        monkeypatch.setenv("TRIVIT_CACHE", str(tmp_path / "another"))
        half = ["--output", tmp_path / "runs" / "half", "--data.bad_sample_budget", 0.9]
        tar = next(drawn.glob("*.tar")).name
        signed.faults = {f"/{tar}?X-Amz-Signature=s3cr3t-key": ("cut", None)}
        assert pretrain(*SMALL, "--data.train", web.url, *half) == 0
        assert tar in (tmp_path / "runs" / "half" / "bad_samples.jsonl").read_text()
        signed.faults = {"/manifest.json?X-Amz-Signature=s3cr3t-key": ("400", None)}
        for url in (
            "s3://nothing/train",
            web.url,
            "https://u:s3cr3t-key@h/train",
            "https://h/t?X-Amz-Signature=s3cr3t-key",
        ):
            assert pretrain(*SMALL, "--data.train", url, "--output", tmp_path / "runs" / "wrong") == 2

    for text in capfd.readouterr():
        assert "Traceback" not in text and not [secret for secret in SECRETS if secret in text], text
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "netrc"]
    names = {"config.yaml", "last.ckpt", "results.json", "report.html", "trivit_remote.json"}
    assert names <= {path.name for path in files}
    for path in files:
        data = path.read_bytes()
        assert not [secret for secret in SECRETS if secret.encode() in data], path


def _upload(folder: Path) -> None:
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket="pictures")
    for path in folder.iterdir():
        client.put_object(Bucket="pictures", Key=f"train/{path.name}", Body=path.read_bytes())


@pytest.mark.slow
def test_the_commands_of_readme(web, tmp_path, monkeypatch):
    """As printed, but with the tiny model, and every URL that of the server here."""
    section = (ROOT / "README.md").read_text().partition("## Remote shards")[2]
    commands = section.partition("```text\n")[2].partition("```")[0].splitlines()
    assert len(commands) >= 4
    monkeypatch.chdir(tmp_path)
    for command in commands:
        command = command.replace("mae_vitb16_in1k", "mae_demo")
        command = re.sub(r"\w+://[\w./-]*(?=[\s\"]|$)", web.url, command)
        command = re.sub(r"https://[^\"]*", f"{web.url}/synth-{{000000..000002}}.tar", command)
        arguments = shlex.split(command)[1:]
        more = [*SMALL, "--trainer.max_steps", "4"] if arguments[0] == "pretrain" else []
        assert main([*arguments, *more]) == 0, command
