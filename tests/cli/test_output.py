"""Outputs that cannot be written are found before any work is done."""

import pytest

from contrastive.cli.output import check_output, check_output_folder
from contrastive.errors import UserError


@pytest.mark.parametrize("place", ["/proc/x/y", "file/y", "link/y", "n" * 300 + "/y"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for check in (lambda: check_output_folder("--output", place), lambda: check_output("O", place, makes_folders=True)):
        with pytest.raises(UserError, match="^(--output|O) .*(name|remove|shorter)") as raised:
            check()
        assert "\n" not in str(raised.value)


def test_what_can_be_written_passes_and_nothing_is_left_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_output_folder("--output", "a/b")
    check_output("--save", "a/b/c.safetensors", makes_folders=True)
    check_output("--output", "c.csv")
    check_output("--output", "/dev/null")
    assert list(tmp_path.iterdir()) == []
