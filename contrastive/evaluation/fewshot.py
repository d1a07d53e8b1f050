from typing import Any


def few_shot(
    train_ND: Any, train_target_N: Any, test_MD: Any, test_target_M: Any, text_DK: Any, *, shots: Any, seeds: Any
) -> list[dict[str, Any]]:
    return []
