"""The report in a real browser without a network: on a phone, on a screen, in the dark and on paper."""

import base64
import io
import shutil
from pathlib import Path

import pytest
from PIL import Image

from evaluation import evaluate
from evaluation.report import report
from pretrain.cli import main
from tests.evaluation.browser import DARK, DESK, PAPER, PHONE, Visit, needed, visit
from tests.evaluation.conftest import clip_run, make_run

pytestmark = pytest.mark.slow
LONG = "a_run_whose_name_is_much_longer_than_any_phone_is_wide_" * 2


@pytest.fixture(autouse=True)
def browser() -> str:
    return needed()


def looked_at(page: Path) -> Visit:
    """What holds of every report, in every size."""
    assert page.stat().st_size < 10_000_000
    found = visit(page, [PHONE, DESK, DARK, PAPER])
    assert found.requests == found.complaints == []
    assert found.pdf.startswith(b"%PDF") and found.pdf.count(b"/Type /Page\n") > 1
    for size, seen in found.pages.items():
        assert seen.width <= size.width, size
        assert seen.wide == seen.broken == seen.faint == seen.small == [], size
        assert seen.images > 0 and seen.headings == found.pages[DESK].headings
    assert found.pages[PAPER].scrolling == []  # paper does not scroll
    assert "max_steps: 600" not in found.pages[PAPER].text, "what is folded is not printed"
    assert "that were folded on the screen are not printed" in found.pages[PAPER].text
    assert "are not printed" not in found.pages[DESK].text
    return found


def in_order(text: str, *words: str) -> bool:
    places = [text.find(word) for word in words]
    return -1 not in places and places == sorted(places)


def test_one_run(scored_run: Path) -> None:
    (scored_run / "bad_samples.jsonl").write_text('{"shard": "a.tar", "key": "k", "reason": "cut off", "epoch": 0}\n')
    path = report([scored_run])
    seen = looked_at(path).pages[DESK]
    assert seen.headings[0] == "mae" and "features are" in seen.headings[1]
    assert seen.headings[2:] == [
        "Scores", "Training", "Where the time went", "Reconstructions", "Where the class token looks",
        "How far and how widely the heads look", "Where the features come from", "What the patches say",
        "Nearest neighbours", "Bad samples", "How the numbers were made",
    ]  # fmt: skip
    assert in_order(seen.text, "Raw pixels", "Training loss", "Computing takes", "head 2", "✗", "cut off", "seed:")
    opened = path.with_name("opened.html")
    opened.write_text(path.read_text().replace("<details>", "<details open>"))
    printed = visit(opened, [PAPER]).pages[PAPER]
    assert printed.scrolling == printed.wide == []
    for words in ("temperature", "max_steps: 600"):  # protocol and config
        assert words in printed.text, "what was opened is printed"


def test_two_runs_of_different_kinds_by_the_command(
    scored_run: Path, clip_checkpoint: Path, colours: Path, tmp_path: Path
) -> None:
    clip = clip_run(clip_checkpoint, tmp_path)
    probes = ("knn", "attributes", "label_free", "zeroshot", "retrieval")
    evaluate(clip, train=colours, test=colours, probes=probes, progress=False, workers=0, device="cpu")
    long = tmp_path / LONG
    clip.rename(long)
    assert main(["report", str(scored_run), str(long), "--output", str(tmp_path / "both.html")]) == 0
    found = looked_at(tmp_path / "both.html")
    assert found.pdf.count(b"/Type /Page\n") <= 12
    headings = found.pages[PHONE].headings
    for heading in (
        "Scores", "Further probes", "What the features know of the images", "Zero-shot: what is taken for what",
        "Retrieval", "Where the settings differ",
    ):  # fmt: skip
        assert heading in headings, heading
    assert "kNN: not scored alike, so these are not to be compared" in found.pages[PHONE].text
    assert LONG in headings and "mae" in headings
    assert any("Setting" in table for table in found.pages[PHONE].scrolling)
    assert found.pages[DESK].images > 100


def test_a_run_without_scores_or_pictures(world: Path, cache: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", train=world / "train", rows=3)
    shutil.rmtree(run / "checkpoints")
    found = visit(report([run]), [PHONE, PAPER])
    assert found.requests == found.complaints == []
    for size, seen in found.pages.items():
        assert seen.width <= size.width and seen.wide == seen.faint == []
        assert "Nothing has been scored yet" in seen.text and "No pictures of the inside of the encoder" in seen.text


def test_what_is_wrong_with_a_page_is_seen(tmp_path: Path) -> None:
    """Or the tests above could not fail."""
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "png")
    whole = base64.b64encode(file.getvalue()).decode()
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><meta name=viewport content='width=device-width'><main><h2>Head</h2>"
        "<img src='https://example.org/a.png' alt=absent>"
        f"<img src='data:image/png;base64,{whole}' alt=whole><img src='data:image/png;base64,AAAA' alt=torn>"
        "<p style='width: 700px'>long</p><p style='color: #aaa'>faint</p><p style='font-size: 6px'>small</p>"
        "<div style='overflow-x: auto'><p style='width: 3000px'>scrolls</p></div>"
        "<details><summary>more</summary>folded</details><script>throw Error('ill')</script></main>"
    )
    found = visit(page, [PHONE, PAPER])
    assert found.requests == ["https://example.org/a.png"]
    assert any("ERR_" in each for each in found.complaints) and any("Uncaught" in each for each in found.complaints)
    seen, printed = found.pages[PHONE], found.pages[PAPER]
    assert seen.broken == ["absent", "torn"] and seen.images == 3 and seen.headings == ["Head"]
    assert seen.wide == ["P.: long"] and printed.wide == [] and seen.width > 390
    assert seen.faint == ["P.: faint"] and seen.small == ["P.: small"]
    assert [each.partition(".")[0] for each in printed.scrolling] == ["DIV"]
    assert "folded" in seen.text and "folded" not in printed.text
    assert set(found.pages) == {PHONE, PAPER}
