"""One line about everything in a source that did not become a sample; every command that reads a source prints it."""

from collections.abc import Mapping

LONE_TEXT = ".txt without an image"


def left_out_line(rejected: Mapping[str, int]) -> str:
    """Counts by reason, the commonest first: "left out: 5 × .heic (install contrastive[heif]), 1 × .psd"; "" for none.

    rejected: see `Source.rejected`.
    """
    counted = sorted(
        ((count, reason) for reason, count in rejected.items() if count), key=lambda one: (-one[0], one[1])
    )
    return f"left out: {', '.join(f'{count:,} × {reason}' for count, reason in counted)}" if counted else ""


def of_captions_alone(reason: str) -> bool:
    """Whether what was left out for this reason is no loss to a command that reads images only."""
    return reason == LONE_TEXT
