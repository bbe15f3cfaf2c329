"""What the probes that compare images with texts say on the terminal."""

from typing import Any

from datamodules.console import table
from evaluation.ranks import one_decimal

WAYS = ("image_to_text", "text_to_image")


def text_summary(results: dict[str, Any]) -> str:
    """A few lines: zero-shot accuracy, and recalls beside those of chance."""
    lines = [""]
    if found := results.get("zeroshot"):
        protocol, half = found["protocol"], (found["interval"][1] - found["interval"][0]) / 2
        five = f", top-5 {one_decimal(found['top5'])}%" if "top5" in found else ""
        lines.append(
            f"zero-shot: top-1 {one_decimal(found['top1'])}%{five} (chance {one_decimal(100 / protocol['classes'])}%); "
            f"{protocol['test']['images']:,} test images, {protocol['classes']} classes, "
            f"{protocol['prompts']:,} prompts; 95% interval about +-{one_decimal(half)}"
        )
    if found := results.get("retrieval"):
        ks = list(found["image_to_text"])
        rows = []
        for way in WAYS:
            rows.append([way.replace("_", " "), *(one_decimal(found[way][k]) for k in ks)])
            rows.append(["  by chance", *(one_decimal(found["chance"][way][k]) for k in ks)])
        lines += [table(["retrieval, %", *ks], rows), "", retrieval_words(found)]
    return "\n".join(lines)


def retrieval_words(found: dict[str, Any]) -> str:
    """How many images and texts there were, and what counts as right where images share texts."""
    images, texts, captions = found["images"], found["texts"], found["captions"]
    if texts == captions:
        return f"{images:,} images, {texts:,} captions, all different"
    share = f"{images:,} images with {captions:,} captions, of which {texts:,} are different"
    return f"{share}: where images share one, each of them is right"
