"""Settings of a run's config that are known to make it ill, with their values: what to look at before any remedy."""

from evaluation.run_files import Run

USUAL_RATE = 5e-4
"""Of DINO, for a global batch of 256 (arXiv:2104.14294, section 3.2)."""
TIMES = 20
"""So many times the usual rate is suspicious (dino_demo has 16), and so is a hundredth of it."""
SLOW_CENTRE = 0.999
"""A centre that keeps this much has forgotten half of its start only after 700 steps."""


def suspects(run: Run) -> tuple[str, ...]:
    """The suspicious settings of a DINO run: key, value, and what is usual; () of other runs, or without any."""
    if "DINO" not in str(run.get("model.class_path", "")) and "train/teacher_entropy" not in run.metrics:
        return ()
    found = []
    momentum, student = _number(run, "center_momentum"), _number(run, "student_temp")
    if momentum is not None and momentum >= SLOW_CENTRE and run.get("model.targets") != "sinkhorn":
        found.append(f"model.center_momentum {momentum!r} (0.9 is usual: the centre hardly moves)")
    for name in ("teacher_temp", "warmup_teacher_temp"):
        teacher = _number(run, name)
        if teacher is not None and student is not None and teacher >= student:
            found.append(f"model.{name} {teacher:g} (should be well below model.student_temp, {student:g})")
    found += _rate(run)
    if _number(run, "clip_grad") == 0:
        found.append("model.clip_grad 0 (3 is usual: gradients are not clipped)")
    return tuple(found)


def _rate(run: Run) -> list[str]:
    base, peak, batch = _number(run, "base_lr"), _number(run, "lr"), run.get("data.global_batch_size")
    if run.get("model.optimizer") == "sgd":  # what is usual is AdamW's
        return []
    name, value, usual = "base_lr", base, USUAL_RATE
    if base is None:
        if not isinstance(batch, int):
            return []
        name, value, usual = "lr", peak, USUAL_RATE * batch / 256
    if value is None or usual / 100 < value <= TIMES * usual:
        return []
    return [f"model.{name} {value:g} ({usual:.2g} is usual{'' if base is not None else f' with a batch of {batch}'})"]


def _number(run: Run, name: str) -> float | None:
    value = run.get(f"model.{name}")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
