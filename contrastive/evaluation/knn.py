from typing import Any


def knn_sweep(train_ND: Any, train_target_N: Any, test_MD: Any, test_target_M: Any) -> dict[str, Any]:
    return {}
