"""The pictures of a report: reconstructions and nearest neighbours of a run, or the reason why there are none."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.errors import DataError
from datamodules.manifest import Manifest, load_manifest
from datamodules.open_shards import open_shards
from datamodules.remote import is_remote
from evaluation.errors import EvaluationError
from evaluation.report_tables import test_set
from evaluation.run_files import Run

OWN_IMAGES = 256


@dataclass(frozen=True)
class Section:
    """The pictures of one run; `note` says why there are none, or what they show."""

    run: str
    note: str
    pictures: Sequence[Any] = ()


def open_data(path: str) -> Manifest:
    """The manifest of a run's data; EvaluationError when it is not there any more."""
    if not is_remote(path) and "{" not in path and not Path(path).exists():
        raise EvaluationError(f"{path} is not there any more")
    return load_manifest(open_shards(path))


def reconstruction_section(run: Run, count: int, test_data: str | None) -> Section | None:
    """Reconstructions of images of `test_data` (None: of its train images); None for a run that is no MAE."""
    if "MAE" not in str(run.get("model.class_path", "")):
        return None
    from evaluation.pictures import sample_images
    from evaluation.reconstructions import draw_reconstructions, reconstruct
    from tasks.errors import TaskError
    from tasks.mae import load_mae

    path, which = (test_data, "test") if test_data else (run.get("data.train"), "train")
    try:
        mae = load_mae(run.path)
        images = sample_images(open_data(str(path)).root, mae.encoder.config, count)
        found = draw_reconstructions(reconstruct(mae, images))
    except (TaskError, DataError, EvaluationError) as error:
        return Section(run.name, f"No reconstructions: {error}.")
    note = f"{len(found)} {which} images, not chosen. {mae.mask_ratio:.0%} of the patches are hidden from the encoder."
    if mae.norm_pix_loss:
        note += (
            " This model predicts normalised patches: brightness and contrast of each hidden patch are taken from the "
            "true one (its own mean and standard deviation), so judge the structure, not the colours."
        )
    return Section(run.name, note, found)


def neighbour_section(run: Run, count: int, cache_dir: Path | None) -> Section | None:
    """Nearest neighbours from the features that evaluation left; without labels, among the run's own train images."""
    protocol = test_set(run)
    if protocol is None or "train" not in protocol:
        return own_neighbour_section(run, count)
    from evaluation.features import cached_features
    from evaluation.neighbours import draw_neighbours, neighbours
    from evaluation.pictures import load_pictures, spread
    from tasks.encoder_files import load_encoder
    from tasks.errors import TaskError

    try:
        encoder = load_encoder(run.source)
        sets = [open_data(protocol[which]["path"]) for which in ("train", "test")]
        train, test = (cached_features(encoder, m, cache_dir / "features" if cache_dir else None) for m in sets)
        if train is None or test is None:
            return Section(
                run.name, "No neighbours: the features of this checkpoint are not cached; evaluate it again."
            )
        queries = neighbours(train, test, spread(len(test), count))
        of_test = load_pictures(sets[1], [test.key[q.row] for q in queries], encoder.config)
        of_train = [load_pictures(sets[0], [train.key[n.row] for n in q.neighbours], encoder.config) for q in queries]
    except (TaskError, DataError, EvaluationError) as error:
        return Section(run.name, f"No neighbours: {error}.")
    right = sum(bool(n.right) for q in queries for n in q.neighbours)
    total = sum(len(q.neighbours) for q in queries)
    note = f"{len(queries)} test images drawn at random; {right} of their {total} neighbours are of the same class."
    return Section(run.name, note, draw_neighbours(queries, of_test, of_train))


def own_neighbour_section(run: Run, count: int) -> Section | None:
    """Nearest neighbours among some images that the run is trained on, for which nobody need have labels."""
    path = str(run.get("data.train", ""))
    if not run.checkpoint.exists() or is_remote(path):  # nothing is fetched for a picture
        return None
    from evaluation.neighbours import draw_neighbours, neighbours_among
    from evaluation.pictures import sample_images, spread
    from tasks.encoder_files import load_encoder
    from tasks.errors import TaskError

    try:
        encoder = load_encoder(run.source)
        images = sample_images(open_data(path).root, encoder.config, OWN_IMAGES)
        queries = neighbours_among(encoder, images, spread(len(images), count))
    except (TaskError, DataError, EvaluationError) as error:
        return Section(run.name, f"No neighbours: {error}.")
    note = (
        f"{len(queries)} images drawn at random and what is nearest to each among {len(images)} that are spread evenly "
        "over the run's own train images; classes are not looked at (trivit evaluate with labelled sets does)."
    )
    near = [images[[n.row for n in query.neighbours]] for query in queries]
    return Section(run.name, note, draw_neighbours(queries, images[[query.row for query in queries]], list(near)))


def retrieval_section(run: Run) -> Section:
    """The examples that `retrieval` left in the results of a run: `pictures` are those of images, those of texts."""
    from evaluation.pictures import load_pictures
    from evaluation.retrieval_examples import draw_retrieval, example_keys
    from tasks.encoder_files import load_encoder
    from tasks.errors import TaskError

    found = run.results["retrieval"]
    examples = found.get("examples")
    if not examples:
        return Section(run.name, "No examples: an earlier version scored this run; evaluate it again.")
    try:
        keys = example_keys(examples)
        images = load_pictures(open_data(found["protocol"]["test"]["path"]), keys, load_encoder(run.source).config)
    except (TaskError, DataError, EvaluationError) as error:
        return Section(run.name, f"No examples: {error}.")
    note = (
        "Images and texts drawn at random among all that were scored. A text is right for every image that has it; "
        "where no right one is shown, its place is told."
    )
    return Section(run.name, note, draw_retrieval(examples, dict(zip(keys, images, strict=True))))
