import re
from collections import Counter
from dataclasses import asdict
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from evaluation import evaluate
from evaluation.errors import EvaluationError
from evaluation.neighbours import neighbours_among
from evaluation.report import file_name, report, unique_names
from evaluation.report_tables import data_words, outdated
from evaluation.run_files import Run, read_run
from tasks.encoder_config import EncoderConfig
from tasks.encoder_files import save_encoder
from tasks.encoders import Encoder
from tests.evaluation.conftest import CONFIG, make_run, write_images

VOID = {"meta", "img", "br", "path", "use", "link", "input", "hr", "wbr"}


class Page(HTMLParser):
    """What a test wants to know of a page; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.loads: list[str] = []
        self.words = ""
        self.images_without_text = 0
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        values = dict(attributes)
        self.loads += [values[name] or "" for name in ("src", "href", "srcset", "data") if name in values]
        self.images_without_text += tag == "img" and not values.get("alt")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open and self._open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] not in ("style", "script"):
            self.words += f" {data}"


def test_everything_is_on_one_page_that_loads_nothing(scored_run: Path) -> None:
    (scored_run / "bad_samples.jsonl").write_text(
        '{"shard": "a.tar", "key": "<b>k", "reason": "cut off", "epoch": 0}\n'
    )
    path = report([scored_run])
    assert path == scored_run / "report.html"
    text = path.read_text()
    page = Page(text)
    assert len(text) < 3_000_000
    assert all(load.startswith(("data:image/", "#")) for load in page.loads)
    assert not re.search(r"url\((?!#)", text)
    assert "http://" not in text
    assert "https://" not in text
    assert page.tags["script"] == page.tags["link"] == page.tags["b"] - text.count("<b>") == 0
    # photographs and two heads, those of the only layer again; photographs and rollout; five of components
    inside = 6 * (1 + 2) + 2 + 6 * 2 + 6 * 5
    assert page.tags["img"] == 9 * 3 + 8 * 6 + inside
    assert page.images_without_text == 0
    assert page.tags["svg"] >= 6  # the verdict's sign and the curves
    for words in (
        "of the test images get the right class", "Raw pixels", "Untrained encoder", "Training loss", "Learning rate",
        "Images per second",
        "75% of the patches are hidden", "mean and standard deviation", "neighbours are of the same class", "✓",
        "in the last layer (of 1)", "head 2", "by-product", "first three principal components",
        "Short in the first layers and long in the last", "of 2 heads, 0 look at fewer than 2 tokens and 2 at",
        "the mean of the patches comes, followed back through all layers", "Attention distance, pixels",
        "cut off", "<b>k", "temperature", "0.07", "strength", "global_batch_size", "<cat>",
    ):  # fmt: skip
        assert words in page.words, words
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_several_runs_side_by_side(
    scored_run: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.report_inside.LEVEL", 99)
    monkeypatch.setattr("evaluation.report_inside.WORK", 0)  # as if the encoder were huge
    other = make_run(tmp_path / "other" / "mae", train=world / "train", rows=30, seed=1, norm_pix_loss=False)
    path = report([scored_run, other, scored_run], output=tmp_path / "both.html")
    page = Page(path.read_text())
    assert path == tmp_path / "both.html"
    for words in ("runs/mae", "other/mae", "Where the settings differ", "seed", "nothing has been scored yet",
                  "times an even share: nothing stands out", "mean over 1 image."):  # fmt: skip
        assert words in page.words, words
    assert page.tags["img"] == 2 * 3 * 3 + 2 * 4 * 6 + 2 * (3 * (1 + 2) + 2 + 2 + 3 * 5)
    assert [run.name for run in unique_names([read_run(scored_run), read_run(other)])] == ["runs/mae", "other/mae"]


def test_scores_of_another_encoder_stand_beside_a_run(
    scored_run: Path, world: Path, encoder_file: Path, tmp_path: Path
) -> None:
    """What `evaluate --output` wrote of an export: in the tables, with pictures of its inside, without a training."""
    results = evaluate(
        encoder_file, train=world / "train", test=world / "test", output=tmp_path / "theirs", device="cpu", workers=0,
        progress=False, probes=("knn",), floors=False,
    )  # fmt: skip
    path = report([scored_run, tmp_path / "theirs"])
    assert path == scored_run / "report_with_theirs.html"
    page = Page(path.read_text())
    for words in (
        f"Scores of {encoder_file}: there is no run", "kNN: ", "about the same as", "Where the class token looks",
        f"Scored on 60 images in {world / 'test'} of 6 classes, after learning from 240 images in {world / 'train'}.",
    ):  # fmt: skip
        assert words in page.words, words
    assert f"{results['knn']['top1']:.1f}" in page.words
    assert page.words.count("Scored on 60 images") == 2
    assert "No pictures of the inside" not in page.words and "too few rows" not in page.words
    assert "theirs: config.yaml" not in page.words and "0 steps so far" not in page.words
    alone = Page(report([tmp_path / "theirs"]).read_text())
    assert "There are scores, but no floors" in alone.words and " Training " not in alone.words
    own = tmp_path / "own.safetensors"
    own.write_bytes(encoder_file.read_bytes())
    written = tmp_path / "theirs" / "results.json"
    written.write_text(written.read_text().replace(str(encoder_file), str(own)))
    assert outdated(read_run(tmp_path / "theirs")) == []
    save_encoder(Encoder(CONFIG), own)
    assert "earlier checkpoint of what was scored" in outdated(read_run(tmp_path / "theirs"))[0]
    written.unlink()
    with pytest.raises(EvaluationError, match=r"is no trivit run: .* \(nor a results\.json of `trivit evaluate"):
        report([scored_run, tmp_path / "theirs"])


def test_data_of_each_probe_is_named_where_probes_have_others(tmp_path: Path) -> None:
    test = {"path": "/val", "images": 1000}
    run = Run(tmp_path, "a", "", {}, {}, {
        "knn": {"protocol": {"classes": 7, "train": {"path": "/train", "images": 50}, "test": test}},
        "zeroshot": {"protocol": {"classes": 9, "test": test}},
        "segmentation": {"protocol": {"test": {"path": "/masks", "hash": "x"}}},
        "floors": {}, "suite:mine": {"protocol": {"suite": "mine"}},
    }, [])  # fmt: skip
    assert data_words(run) == [
        "kNN: scored on 1,000 images in /val of 7 classes, after learning from 50 images in /train.",
        "Zero-shot: scored on 1,000 images in /val of 9 classes.", "segmentation: scored on the images in /masks.",
    ]  # fmt: skip


def test_a_run_that_has_only_begun_has_a_page(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\nmodel: {class_path: tasks.mae_task.MAETask}\n")
    page = Page(report([tmp_path]).read_text())
    assert "Too early" in page.words
    assert "Nothing has been scored yet" in page.words
    assert "No reconstructions:" in page.words
    assert "No pictures of the inside of the encoder: " in page.words and "What the patches say" not in page.words


def test_a_run_of_one_row_is_told_to_have_no_line(world: Path, cache: Path, tmp_path: Path) -> None:
    longer, short = (make_run(tmp_path / f"run{rows}", train=world / "train", rows=rows) for rows in (20, 1))
    (longer / "report.html").write_text("its own")
    both = report([longer, short])
    assert both == longer / "report_with_run1.html" and (longer / "report.html").read_text() == "its own"
    text = both.read_text()
    assert "run1 (too few rows for a line)" in text and "run20 (too few" not in text
    assert "metrics.csv has one row: curves begin with the second." in report([short]).read_text()


def test_a_report_on_many_runs_has_a_name_that_a_disk_takes() -> None:
    first, second = "b" * 120, "c" * 120
    names = [file_name(others) for others in ([first, second], [second, first], [first])]
    assert names[0] != names[1] and names[0].startswith("report_with_2_others_")
    assert all(len(name) < 200 for name in names) and names[2] == f"report_with_{first}.html"
    assert file_name(["x/run", "y/run"]) == "report_with_x_run_y_run.html"


def test_a_run_without_labels_has_neighbours_too(cache: Path, tmp_path: Path) -> None:
    """Among its own train images; an image is not its own neighbour, and nothing is said of classes."""
    photos = write_images(tmp_path / "photos", 20, labelled=False)
    page = Page(report([make_run(tmp_path / "run", train=photos)]).read_text())
    assert "nearest to each among 20 that are spread evenly over the run's own train images" in page.words
    assert "✗" not in page.words and page.images_without_text == 0
    encoder = Encoder(CONFIG)
    images = torch.rand(9, 3, 16, 16) * 255
    (query,) = neighbours_among(encoder, torch.cat([images, images[4:5] + 0.5]), [4], k=3)
    assert query.neighbours[0].row == 9 and len(query.neighbours) == 3 and 4 not in [n.row for n in query.neighbours]


def test_encoders_of_other_kinds_show_their_patches_and_say_why_not_more(
    world: Path, cache: Path, tmp_path: Path
) -> None:
    config = EncoderConfig(arch="timm:test_convnext", image_size=64)
    about = {"format": 1, "objective": "dino", "encoder": asdict(config), "encoder_prefix": "encoder."}
    (tmp_path / "checkpoints").mkdir()
    state = {f"encoder.{name}": value for name, value in Encoder(config).state_dict().items()}
    torch.save({"trivit": about, "state_dict": state}, tmp_path / "checkpoints" / "last.ckpt")
    (tmp_path / "config.yaml").write_text(
        f"model: {{class_path: tasks.dino_task.DINOTask}}\ndata: {{train: {world / 'train'}}}\n"
    )
    page = Page(report([tmp_path]).read_text())
    assert "No attention of a class token: timm:test_convnext has no class token." in page.words
    assert page.tags["img"] == 6 * 5 + 8 * 6 and "What the patches say" in page.words
    assert "64 pixels are 2 x 2 patches: too few to show shapes" in page.words
    assert "The encoder shown is the teacher's" in page.words
    assert "How far and how widely" not in page.words and "Where the features come from" not in page.words


def test_pictures_that_are_gone_leave_a_reason(scored_run: Path, world: Path, cache: Path) -> None:
    for entry in (cache / "features").iterdir():
        (entry / "about.json").unlink()
    assert (
        "No neighbours: the features of this checkpoint are not cached" in Page(report([scored_run]).read_text()).words
    )
    text = (scored_run / "results.json").read_text()
    (scored_run / "results.json").write_text(text.replace(str(world), str(world / "moved")))
    words = Page(report([scored_run]).read_text()).words
    assert "is not there any more" in words


def test_scores_of_an_earlier_checkpoint_are_told(scored_run: Path) -> None:
    assert "earlier checkpoint" not in report([scored_run]).read_text()
    last = scored_run / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    state["state_dict"]["model.mask_token"] += 1
    torch.save(state, last)
    assert "earlier checkpoint" in report([scored_run]).read_text()


def test_the_style_hints_at_what_scrolls_and_keeps_words_and_headings_with_their_own() -> None:
    """What a browser makes of it is in test_report_browser.py, but for these, which it does not tell."""
    css = (files("evaluation") / "report.css").read_text()
    screen, paper = css.split("@media print", 1)
    (edge,) = re.findall(r"\.wide, pre \{ (overflow-x: auto.*?)\}", screen, re.DOTALL)
    assert edge.count("local,") == 2 and edge.count("1rem 100% no-repeat scroll") == 2  # covers scroll, shadows stay
    assert "\ntbody th { font-weight: 600; }" in screen  # "background" is not broken where a table can scroll
    assert re.search(r"\.wide, pre \{[^}]*background: none", paper)
    together = [rule for rule in re.findall(r"([^{}]+)\{ break-after: avoid; \}", paper) if "h2" in rule]
    for name in ("h2,", "h3,", ".legend", "h2 + p", "h3 + p", ".note:has(+ div)", "p:has(+ .shares)"):
        assert name in together[0], name


def test_bad_input_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no such run"):
        report([tmp_path / "nothing"])
    with pytest.raises(EvaluationError, match="no trivit run"):
        report([tmp_path])
    with pytest.raises(EvaluationError, match="at least one run"):
        report([])
