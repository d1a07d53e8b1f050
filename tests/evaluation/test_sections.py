import re

import pytest

from contrastive.evaluation.sections import MOST_CLASSES, set_sections
from contrastive.evaluation.table import format_results_table


def m(value):
    return {"value": value, "low": value - 0.02, "high": value + 0.02}


SHOTS = [
    {"method": method, "shots": shots, "top1": m(base + shots / 100)}
    for method, base in (("probe", 0.3), ("prototypes <b>", 0.5))
    for shots in (1, 4, 16)
]
KNN = {
    "k": 20,
    "temperature": 0.07,
    "top1": m(0.612),
    "grid": [{"k": k, "temperature": t, "accuracy": 0.6 - t} for k in (5, 20) for t in (0.07, 0.2)],
}


def text_of(found):
    return "\n".join(set_sections("set", found))


def test_few_shots_are_a_table_of_methods_by_shots_with_intervals_and_a_figure():
    text = text_of({"fewshot": SHOTS, "zeroshot": {"top1": m(0.25)}})
    table = text[: text.index("</table>")]
    assert re.findall(r"<th>(.*?)</th>", table) == ["", "1 shot", "4 shots", "16 shots"]
    rows = re.findall(r"<tr><td>(.*?)</td>(.*?)</tr>", table)
    assert [method for method, _ in rows] == ["probe", "prototypes &lt;b&gt;"]
    cells = re.findall(r"<td>([\d.]+)<small>([\d.]+) – ([\d.]+)</small></td>", rows[0][1])
    assert cells == [("31.0", "29.0", "33.0"), ("34.0", "32.0", "36.0"), ("46.0", "44.0", "48.0")]
    assert text.count("<svg") == 1 and ">zero-shot</text>" in text and "prototypes &lt;b&gt;</text>" in text


def test_a_method_without_some_number_of_shots_has_a_dash_there():
    assert text_of({"fewshot": SHOTS[:-1]}).count("<td>–</td>") == 1


def test_neighbours_show_what_was_chosen_and_all_that_was_tried():
    text = text_of({"knn": KNN})
    assert "<td>20</td><td>0.07</td><td>61.2  (59.2 – 63.2)</td>" in text
    assert ">temperature 0.07</text>" in text and ">temperature 0.2</text>" in text
    assert "<svg" not in text_of({"knn": {**KNN, "grid": []}})


def test_the_table_holds_the_ends_of_few_shots_and_the_neighbours():
    found = {"name": "set", "kind": "labelled", "samples": 9, "classes": 3, "invert": False}
    table = format_results_table({"sets": {"set": found | {"fewshot": SHOTS, "knn": KNN}}})
    assert "1 shot, probe, top-1" in table and "16 shots, prototypes <b>, top-1" in table
    assert "4 shots" not in table
    assert re.search(r"20 nearest neighbours, top-1 +61\.2%", table)


@pytest.mark.parametrize("classes", [3, MOST_CLASSES + 1])
def test_confusion_is_a_matrix_of_few_classes_and_a_list_of_many(classes):
    counts = [[0] * classes for _ in range(classes)]
    for index in range(classes):
        counts[index][index] = 8
    counts[0][1] = 2
    judged = {
        "calibration": {"before": m(0.1)},
        "reliability": [{"confidence": 0.5, "accuracy": 0.5, "samples": 3}],
        "confusion": counts,
        "per_class": [],
        "names": [f"class {index}" for index in range(classes)],
    }
    text = text_of({"zeroshot": judged})
    if classes == 3:
        assert 'title="class 0 taken for class 1: 2">20</td>' in text
    else:
        assert "<td>class 0</td><td>class 1</td><td>2</td><td>20</td>" in text and 'class="confusion"' not in text
