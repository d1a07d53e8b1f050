"""Labels and class names from the command line and from files: read where the meaning is plain, else refused."""

import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.cli.label_files import read_class_names, read_labels
from contrastive.errors import UserError

LABEL = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8)


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("cat, dog ,cow", ["cat", "dog", "cow"]),
        ('cat,"red, shiny apple",dog', ["cat", "red, shiny apple", "dog"]),
        ('cat, "red, shiny apple"', ["cat", "red, shiny apple"]),
        ('"a ""big"" cat",dog', ['a "big" cat', "dog"]),
        ("cat,,dog", ["cat", "", "dog"]),
    ],
)
def test_a_list_on_the_command_line_is_a_line_of_csv(text, labels):
    assert read_labels(text, None) == labels


@settings(deadline=None, max_examples=40)
@given(st.lists(st.one_of(LABEL, st.builds("{}, {}".format, LABEL, LABEL)), min_size=2, max_size=6))
def test_any_list_that_csv_writes_is_read_back(labels):
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerow(labels)
    assert read_labels(text.getvalue().strip(), None) == [label.strip() for label in labels]


@pytest.mark.parametrize("text", ['cat,"dog', 'cat,"dog" x'])
def test_an_unclosed_quote_is_refused(text):
    with pytest.raises(UserError, match="--labels: .*double quotes"):
        read_labels(text, None)


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("a.txt", "cat\n\n dog \ncow\n", ["cat", "dog", "cow"]),
        ("a", "cat\ndog", ["cat", "dog"]),
        ("a.txt", "\ufeffcat\r\ndog\r\n", ["cat", "dog"]),
        ("a.txt", "cat, dog, cow\n", ["cat", "dog", "cow"]),
        (
            "a.txt",
            "tench, Tinca tinca\ngoldfish, Carassius auratus\n",
            ["tench, Tinca tinca", "goldfish, Carassius auratus"],
        ),
        ("a.txt", '"cat"\n"dog"\n', ["cat", "dog"]),
        ("a.txt", "0\n1\n2\n", ["0", "1", "2"]),
        ("a.txt", "1 euro\n2 euro\n5 euro\n", ["1 euro", "2 euro", "5 euro"]),
        ("a.json", '["cat", "dog "]', ["cat", "dog"]),
        ("a.txt", '["cat", "dog"]', ["cat", "dog"]),
        ("a.json", '{"0": "cat", "10": "cow", "2": "dog"}', ["cat", "dog", "cow"]),
        ("a.json", '{"dog": 1, "cat": 0}', ["cat", "dog"]),
        ("a.json", '{"labels": ["cat", "dog"]}', ["cat", "dog"]),
        ("config.json", '{"model_type": "vit", "id2label": {"1": "dog", "0": "cat"}}', ["cat", "dog"]),
        ("a.csv", "label\ncat\ndog\n", ["cat", "dog"]),
        ("a.csv", 'id,Name\n0,cat\n1,"red, shiny apple"\n', ["cat", "red, shiny apple"]),
        ("a.tsv", "id\tlabel\n0\tcat\n1\tdog\n", ["cat", "dog"]),
        ("a.csv", "cat,dog,cow\n", ["cat", "dog", "cow"]),
        ("a.csv", "id;label\n0;cat, red\n1;dog\n", ["cat, red", "dog"]),
        ("a.csv", "id;label\n0;cat\n1;dog, big, old\n", ["cat", "dog, big, old"]),
        ("a.csv", "class|n\ncat; red|0\ndog|1\n", ["cat; red", "dog"]),
        ("a.csv", "id\tname\n0\tcat\n", ["cat"]),
        ("a.tsv", "id,name\n0,cat\n", ["cat"]),
    ],
)
def test_a_file_whose_meaning_is_plain_is_read(tmp_path, name, text, labels):
    assert read_labels(None, write(tmp_path, name, text)) == labels


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "holds no label"),
        ("a.json", "[]", "holds no label"),
        ("a.json", '["cat", 1]', "entry 2 is 1, no text"),
        ("a.json", '["cat", null]', "entry 2 is null"),
        ("a.json", '{"cat": ["a cat"], "dog": ["a dog"]}', "--templates"),
        ("a.json", '{"n01": "cat", "n02": "dog"}', "the labels, or their values"),
        ("a.json", '{"cat": 0, "dog": 0}', "holds no list of names"),
        ("a.json", '{"0": "cat", "0": "dog"}', "the key '0' is given twice"),
        ("a.json", '"cat"', "holds no list of names"),
        ("a.json", "cat\ndog", "not JSON"),
        ("a.txt", "['cat', 'dog']", "not JSON"),
        ("a.csv", "id,value\n0,cat\n", "none of its columns"),
        ("a.csv", "animal\ncat\ndog\n", "none of its columns"),
        ("a.csv", "label,name\n0,cat\n", "several of its columns"),
        ("a.csv", "label\ncat\nred, apple\n", "row 3 has 2 columns"),
        ("a.csv", 'label\n"cat\ndog\n', "quotes"),
        (
            "a.csv",
            "id;label\n0;cat;red\n",
            "row 2 has 3 columns, the first has 2; put labels with a semicolon in quotes",
        ),
        ("a.csv", "label,x\ncat,1\n,2\n", "row 3 has no label"),
        ("a.txt", "0: cat\n1: dog\n", "the lines are numbered"),
        ("a.txt", "1 cat\n2 dog\n", "the lines are numbered"),
        ("a.txt", "0,cat\n1,dog\n", "the lines are numbered"),
        ("a.txt", "id,label\n0,cat\n", "header of a table"),
        ("a.txt", "0\tcat\n1\tdog\n", "line 1 has a tab"),
        ("a.yaml", "names:\n  0: cat\n", ".yaml is not read"),
        ("a.parquet", "PAR1", ".parquet is not read"),
    ],
)
def test_a_file_that_could_mean_two_things_is_refused_in_one_line(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message) as raised:
        read_labels(None, write(tmp_path, name, text))
    assert "\n" not in str(raised.value) and name in str(raised.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("größe".encode("cp1252"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_labels(None, str(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_bytes(b"cat\0dog")
    with pytest.raises(UserError, match="not text"):
        read_labels(None, str(tmp_path / "a.txt"))
    with pytest.raises(UserError, match="is a folder"):
        read_labels(None, str(tmp_path))


def test_a_file_given_as_a_list_is_named(tmp_path):
    with pytest.raises(UserError, match="use --labels-file"):
        read_labels(write(tmp_path, "a.txt", "cat\n"), None)


@settings(deadline=None, max_examples=30)
@given(labels=st.lists(LABEL.filter(lambda text: text[0] not in '[{"' and "," not in text), min_size=2, unique=True))
def test_json_and_lines_of_the_same_labels_are_read_alike(tmp_path_factory, labels):
    folder = tmp_path_factory.mktemp("labels")
    read = read_labels(None, write(folder, "a.json", json.dumps(labels)))
    assert read == labels
    numbered = {str(number): label for number, label in enumerate(labels)}
    assert read_labels(None, write(folder, "b.json", json.dumps(dict(reversed(numbered.items()))))) == labels
    try:
        assert read_labels(None, write(folder, "a.txt", "\n".join(labels))) == labels
    except UserError as error:
        assert "numbered" in str(error)


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("n.json", '{"1": "cat", "10": "dog"}', {"1": "cat", "10": "dog"}),
        ("n.json", '["cat", "dog"]', ["cat", "dog"]),
        ("n.csv", "1,cat\n10,dog\n", {"1": "cat", "10": "dog"}),
        ("n.csv", "folder,name\n1,cat\n10,dog\n", {"1": "cat", "10": "dog"}),
        ("n.csv", "name,folder\ncat,1\n", {"1": "cat"}),
        ("n.tsv", "n01\ttench, Tinca tinca\n", {"n01": "tench, Tinca tinca"}),
        ("n.txt", "cat\ndog\n", ["cat", "dog"]),
    ],
)
def test_class_names_are_read(tmp_path, name, text, names):
    assert read_class_names(write(tmp_path, name, text)) == names


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("n.json", '{"0": ["n01440764", "tench"]}', "one name a class"),
        ("n.csv", "1,cat,x\n", "3 columns; give two"),
        ("n.csv", "1,cat\n1,dog\n", "'1' is given twice"),
        ("n.txt", "0 cat\n1 dog\n", "numbered"),
    ],
)
def test_class_names_that_could_mean_two_things_are_refused(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        read_class_names(write(tmp_path, name, text))


def test_class_names_are_read_with_each_separator(tmp_path):
    for mark in ",;|\t":
        file = write(tmp_path, "names.csv", f"folder{mark}name\n1{mark}cat\n2{mark}dog\n")
        assert read_class_names(file) == {"1": "cat", "2": "dog"}
