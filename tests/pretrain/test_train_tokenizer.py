"""A vocabulary of one's own: learned by the command, trained with, and gone on with when its file is gone."""

import json
from pathlib import Path

import pytest

from datamodules.shard_writer import ShardWriter
from pretrain.cli import main
from tasks import tokenizer
from tasks.clip_files import load_clip
from tasks.tokenizer import Tokenizer
from tests.datamodules.pictures import jpeg
from tests.pretrain.conftest import pretrain
from tests.pretrain.test_clip_run import SMALL


def learn(source: Path, out: Path, *options: str) -> int:
    return main(["tokenizer", "train", str(source), str(out), *options])


def test_learned_trained_with_and_resumed_without_the_file(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tmp_path / "words.json"
    assert learn(drawn, words, "--size", "300") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{words}: 300 ids, learned from 96 captions"
    options = told[1].partition("train with ")[2].split()
    assert options[:3] == ["--model.text.tokenizer", str(words), "--model.text.context_length"]
    command = [*SMALL, "--data.train", drawn, "--output", tmp_path / "run", "--allow_changes", "[trainer.max_steps]"]
    monkeypatch.chdir(tmp_path)
    options[1] = "words.json"  # a path that means nothing elsewhere
    assert pretrain(*command, *options, "--trainer.max_steps", 3) == 0
    content = words.read_text()
    words.unlink()
    tokenizer._read.cache_clear()  # as in a new process
    assert pretrain(*command, *options, "--trainer.max_steps", 4) == 0
    assert load_clip(tmp_path / "run").text.tokenizer.json == content
    last = tmp_path / "run/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    tokenizer._read.cache_clear()
    assert pretrain(*command, *options, "--trainer.max_steps", 4) == 0, "previous.ckpt has it, too"
    assert load_clip(tmp_path / "run").text.tokenizer.json == content

    begun = [*SMALL, "--data.train", drawn, "--output", tmp_path / "next", "--model.init_checkpoint", tmp_path / "run"]
    assert pretrain(*begun, *options) == 0
    assert load_clip(tmp_path / "next").text.tokenizer.json == content

    (tmp_path / "moved.json").write_text(content)
    options[1] = str(tmp_path / "moved.json")
    assert pretrain(*command, *options, "--trainer.max_steps", 5) == 0
    assert learn(drawn, words, "--size", "290") == 0
    capsys.readouterr()
    options[1] = str(words)
    assert pretrain(*command, *options, "--trainer.max_steps", 6) == 2
    options[1] = "clip"
    assert pretrain(*command, *options, "--trainer.max_steps", 6) == 2
    said = capsys.readouterr().err
    assert f"the tokenizer {words} is no longer what this run began with" in said and "Traceback" not in said
    assert main(["pretrain", *map(str, command), "--model.text.tokenizer", "gone.json", "--output", "new"]) == 2
    assert "no tokenizer gone.json" in capsys.readouterr().err


def test_captions_are_chosen_counted_and_cleaned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ShardWriter(tmp_path / "set", samples_per_shard=4) as writer:
        for i in range(6):
            texts = {"json": json.dumps({"title": f"Große Katze {i}", "captions": ["a cat", "one cat"]}).encode()}
            writer.write(f"{i}", {"jpg": jpeg(i), **(texts if i != 2 else {"txt": b"caf\xe9"})})
    assert learn(tmp_path / "set", tmp_path / "a.json", "--size", "270") == 0
    said = capsys.readouterr()
    assert "266 ids, learned from 10 captions" in said.out
    assert "1 of 6 samples have no caption that can be read (first: " in said.err and "not UTF-8 (byte 3)" in said.err
    own = ["--size", "280", "--captions", "json:title", "--clean", "whitespace"]
    assert learn(tmp_path / "set", tmp_path / "b.json", *own) == 0
    assert "--model.text.clean whitespace" in capsys.readouterr().out
    lower, as_is = (
        Tokenizer(str(tmp_path / "b.json"), clean=clean)(["Katze"])[0].tolist() for clean in ("lower", "whitespace")
    )
    assert lower != as_is and "Katze" in (tmp_path / "b.json").read_text()


@pytest.mark.parametrize(
    ("out", "options", "words"),
    [
        ("words.txt", [], "ends in .json"),
        ("no/words.json", [], "does not exist"),
        ("there.json", [], "is there already"),
        ("words.json", ["--size", "20"], "vocab_size 20 is too small"),
        ("words.json", ["--captions", "json:nothing"], "has no caption that can be read (first: "),
        ("words.json", ["--captions", "all"], "use txt, json:FIELD or templates"),
    ],
)
def test_mistakes_are_one_line(
    out: str, options: list[str], words: str, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.json").write_text("{}")
    assert learn(drawn, tmp_path / out, *options) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert words in said[-1] and "Traceback" not in "".join(said)
    assert (tmp_path / "there.json").read_text() == "{}" and not (tmp_path / "words.json").exists()
