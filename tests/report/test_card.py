"""The card: its front matter by the library that model hubs use, its page by an HTML parser."""

from __future__ import annotations

import html.parser
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from robustq.export.timing import Latency
from robustq.report.card import sentence, write_card

COUNTED: dict[str, Any] = {
    "images": 1000,
    "epsilon": 8 / 255,
    "clean_accuracy": 0.65,
    "clean_interval": [0.62, 0.679],
    "robust_accuracy": 0.288,
    "interval": [0.261, 0.317],
    "attacks": {"fgsm": 0.414, "pgd20": 0.328},
    "verdict": "not judged",
    "flags": [],
}
RECORD: dict[str, Any] = {
    "format": "packed",
    "label": "resnet20-w4a4",
    "input": "uint8",
    "batch_norm": "fold",
    "consumer": None,
    "data": "/somewhere/cifar10",
    "suite": "recheck",
    "seed": 7,
    "preprocessing": {
        "channels": "RGB",
        "resize": "short-side",
        "shorter_side": 256,
        "interpolation": "bilinear, antialiased",
        "crop": "centre",
        "size": [224, 224],
        "range": "pixels 0 to 255",
        "mean": None,
        "std": None,
        "mean_and_std_applied_by": None,
    },
    "stay_in_float": ["gelu"],
    "integer_layers": ["a", "b"],
    "float_layers": [],
    "judged_file": "packed",
    "equal_in": ["onnxruntime 1.32.0"],
    "not_for": [],
    "shortfalls": [],
    "versions": {"robustq": "0.1.0"},
    "size_bytes": 163_896,
    "kit": "kit",
    "recheck": COUNTED,
}


def written(folder: Path, **entries: Any) -> tuple[str, str]:
    """Markdown and HTML of a card."""
    write_card(folder, {**RECORD, **entries}, folder / "net.onnx", Latency(0.342, 0.5, "some CPU"))
    return (folder / "card.md").read_text(), (folder / "card.html").read_text()


class Page(html.parser.HTMLParser):
    """Visible text and the tags of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.open = "", set[str](), list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self.open else ""


def test_both_pages_show_the_same_figures(tmp_path: Path) -> None:
    markdown, page = written(tmp_path)
    shown = Page(page)
    assert shown.open == []
    for text in (
        "resnet20-w4a4 (164 kB) answers 65.0% [62.0, 67.9] of 1,000 test images of cifar10 right, and at most 28.8% "
        "[26.1, 31.7] under attack within 8/255.",
        "41.4%",
        "0.342 ms",
        "256",
        "gelu",
        "2 of 2 in onnxruntime",
        "robustq export model.pt --format packed --input uint8 --images 1000 --seed 7",
        "python3 kit/check.py",
    ):
        assert text in markdown and text in shown.text
    assert "/somewhere" not in markdown + page


def test_a_hub_reads_the_accuracies(tmp_path: Path) -> None:
    written(tmp_path)
    found = ModelCard.load(tmp_path / "card.md").data.eval_results
    assert [(one.task_type, one.dataset_name, one.metric_value) for one in found] == [
        ("image-classification", "cifar10", 0.65),
        ("image-classification", "cifar10", 0.288),
    ]
    assert "within 8/255 (suite recheck, upper bound)" in found[1].metric_name


def test_names_are_text(tmp_path: Path) -> None:
    markdown, page = written(tmp_path, data="a|b <script>", float_layers=["x\x1b[31m"])
    text = markdown.split("---", 2)[2]
    assert "script" not in Page(page).tags and "<script>" not in text and "\x1b" not in text
    assert "a\\|b &lt;script>" in text


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"shortfalls": ["3 convolutions in float"]}, "failed a check and must not be used"),
        ({"recheck": None}, "Its accuracy was not counted at the export"),
        ({"recheck": {**COUNTED, "flags": [{"text": "noise breaks more"}]}}, "the second figure is too high"),
    ],
)
def test_limits_are_in_the_first_sentence(tmp_path: Path, entries: dict[str, Any], words: str) -> None:
    assert words in sentence({**RECORD, **entries})
    markdown, page = written(tmp_path, **entries)
    assert words in markdown and words in page
    assert all(text in markdown and text in page for text in entries.get("shortfalls", ()))
