"""What a user sees: lines in a log file, a bar on a terminal."""

import io

import pytest

from contrastive.training.progress import Progress, duration_text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(stream: io.StringIO) -> str:
    progress = Progress(stream=stream)
    progress.update(step=5, progress=0.25, seconds=30.0, rate=1234.5, wait=0.02, loss=3.21)
    progress.write("validation")
    progress.close()
    return stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_rate_time_left_data_wait_and_loss_are_shown(stream):
    text = show(stream())
    for part in ("25%", "1,234 pairs/s", "1:30 left", "data wait 2%", "loss 3.210", "validation"):
        assert part in text


def test_a_log_file_gets_lines_and_a_terminal_a_bar():
    assert "\r" not in show(io.StringIO()) and show(io.StringIO()).endswith("\n")
    assert "\r" in show(Terminal())


def test_a_log_file_is_not_flooded():
    stream = io.StringIO()
    progress = Progress(stream=stream)
    for step in range(50):
        progress.update(step, 0.5, 1.0, 1.0, 0.0, 1.0)
    assert len(stream.getvalue().splitlines()) == 1


def test_hours_are_written_as_hours():
    assert (duration_text(59), duration_text(3661)) == ("0:59", "1:01:01")
