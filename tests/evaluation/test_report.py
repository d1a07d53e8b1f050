import re
from html.parser import HTMLParser

import pytest

from contrastive.evaluation import evaluate_labelled, evaluate_pairs, format_results_table, write_report
from contrastive.evaluation.figures import points, training_curves

METRICS = [
    {"step": 10, "train/loss": 3.0, "train/lr_factor": 0.5, "train/data_wait": 0.1},
    {"step": 20, "train/loss": None, "train/lr_factor": 1.0, "train/pairs_per_second": 100.0},
    {"step": 20, "validation/zeroshot/top1": 0.2, "validation/image_to_text/recall@1": 0.1},
    {"step": 30, "train/loss": 2.0, "train/lr_factor": 0.1},
]


@pytest.fixture
def run(model, pairs, labelled):
    (pairs / "0.txt").write_text("blue <b>square</b>")
    found = [
        evaluate_pairs(model, pairs, examples=4),
        evaluate_labelled(model, "colours", labelled, labelled, invert=True, examples=2),
    ]
    results = {
        "run": "a & b",
        "sets": {one.results["name"]: one.results for one in found},
        "seconds": {"training": 130.0, "validation": 3.0},
    }
    return results, {one.results["name"]: one.examples for one in found}


class Page(HTMLParser):
    """Tags that are open, addresses, and text."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href", "action")]

    def handle_startendtag(self, tag, attributes):
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_whole_page_that_asks_nothing_of_the_network(run, tmp_path):
    results, examples = run
    path = write_report(
        tmp_path / "new" / "report.html",
        results=results,
        metrics=METRICS,
        examples=examples,
        config="lr: 1",
        environment={"python": "3"},
    )
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert not re.search(r"@import|url\((?!#)", text)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_the_report_shows_results_examples_curves_and_settings(run, tmp_path):
    results, examples = run
    path = write_report(tmp_path / "r.html", results=results, metrics=METRICS, examples=examples, config="lr: 1")
    page = Page(path.read_text())
    for expected in (
        "a & b",
        "blue <b>square</b>",
        "linear probe, top-1",
        "the same on the pixels",
        "Training loss",
        "Validation zero-shot",
        "lr: 1",
        "2.2 min",
    ):
        assert expected in page.text
    tiles = [a for a in page.addresses if a.startswith("data:image/png")]
    shown = examples.values()
    cases = sum(len(hits.images) for e in shown for hits in e.hits) + sum(len(e.right + e.wrong) for e in shown)
    assert len(tiles) == cases > 0


def test_a_report_of_bare_results_has_no_empty_sections(run, tmp_path):
    text = write_report(tmp_path / "r.html", results={"sets": run[0]["sets"]}).read_text()
    assert "Training" not in text and "Recipe" not in text and "Results" in text


def test_the_table_holds_every_measurement_in_percent(run):
    results, _ = run
    results["sets"]["validation"]["zeroshot"]["top1"] = {
        "value": 0.2547, "low": 0.2354, "high": 0.2739, "chance": 0.00053,
    }  # fmt: skip
    table = format_results_table(results)
    assert re.search(r"zero-shot, top-1 +25\.5% +23\.5 … +27\.4 +0\.05\n", table)
    assert "validation: 8 pairs, 5 captions" in table and "colours: 48 images, 4 classes, inverted" in table
    assert table.endswith("seconds: training 130, validation 3")
    assert len(re.findall(r"\d%", table)) == 6 + 2 + 2 + 2 + 2 + 4  # no random tower; top-5 of 4 says nothing


def test_points_leave_out_rows_without_the_quantity():
    assert points(METRICS, "train/loss") == ([10, 30], [3.0, 2.0])


def test_only_quantities_that_were_logged_are_drawn():
    assert list(training_curves(METRICS[:1])) == [
        "Training loss",
        "Learning rate, share of the peak",
        "Share of time waiting for data",
    ]
    assert training_curves([]) == {}
