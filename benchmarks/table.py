"""One row a measurement, one table for people, one JSON for machines."""

import json
import platform
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """`ours` against `baseline`, both in `unit`, measured in turns within one run."""

    name: str
    setting: str
    unit: str
    ours: float
    baseline: float
    against: str

    @property
    def ratio(self) -> float:
        """How many times better ours is: speed over speed, or time of the baseline over our time."""
        return self.ours / self.baseline if self.unit.endswith("/s") else self.baseline / self.ours


def show(rows: list[Row]) -> str:
    """The table, in Markdown."""
    lines = ["| what | setting | unit | trivit | baseline | ratio | against |", "|---|---|---|---:|---:|---:|---|"]
    lines += [
        f"| {r.name} | {r.setting} | {r.unit} | {r.ours:.1f} | {r.baseline:.1f} | {r.ratio:.3f} | {r.against} |"
        for r in rows
    ]
    return "\n".join(lines)


def write(rows: list[Row], path: Path) -> None:
    """Rows with date, machine and versions, as JSON."""
    packages = ("torch", "torchvision", "lightning", "timm", "webdataset", "numpy")
    facts = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "versions": {name: version(name) for name in packages},
        "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
    }
    path.write_text(json.dumps(facts, indent=1) + "\n")
