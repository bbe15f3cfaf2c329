"""One row a measurement, one table for people, one JSON for machines."""

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """`ours` against `baseline`, both in `unit`, measured in turns within one run.

    `noise`: how far the ratio of one turn usually lies from that of the medians, as a share; None: one turn only.
    `note`: what else was found; name, setting, unit and `against` say which row it is.
    """

    name: str
    setting: str
    unit: str
    ours: float
    baseline: float
    against: str
    noise: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times better ours is: speed over speed, or time of the baseline over our time."""
        return self.ours / self.baseline if self.unit.endswith("/s") else self.baseline / self.ours


def compared(name: str, setting: str, unit: str, ours: Sequence[float], baseline: Sequence[float], against: str) -> Row:
    """A row of the medians over turns."""
    row = Row(name, setting, unit, statistics.median(ours), statistics.median(baseline), against)
    turns = [replace(row, ours=own, baseline=other).ratio for own, other in zip(ours, baseline, strict=True)]
    noise = statistics.median(abs(turn / row.ratio - 1) for turn in turns)
    return replace(row, noise=noise if len(turns) > 1 else None)


def show(rows: Sequence[Row]) -> str:
    """The table, in Markdown."""
    heads = "what", "setting", "unit", "trivit", "baseline", "ratio", "noise", "against"
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---:|---:|---:|---:|---|"]
    for r in rows:
        noise = "-" if r.noise is None else f"{r.noise:.1%}"
        sides = f"{r.ours:,.4g} | {r.baseline:,.4g}"
        setting = f"{r.setting}; {r.note}" if r.note else r.setting
        lines.append(f"| {r.name} | {setting} | {r.unit} | {sides} | {r.ratio:.3f} | {noise} | {r.against} |")
    return "\n".join(lines)


def write(rows: Sequence[Row], path: Path) -> None:
    """Rows with date, machine and versions, as JSON."""
    packages = ("torch", "torchvision", "lightning", "timm", "webdataset", "numpy")
    facts = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "versions": {name: version(name) for name in packages},
        "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
    }
    path.write_text(json.dumps(facts, indent=1) + "\n")
