"""Numbers that JSON can hold."""

import math
from collections.abc import Mapping
from typing import Any, cast


def finite(content: Any) -> Any:
    """The content with None for NaN and infinities."""
    if isinstance(content, Mapping):
        items = cast(Mapping[Any, Any], content).items()
        return {key: finite(value) for key, value in items}
    if isinstance(content, list | tuple):
        return [finite(value) for value in cast(list[Any], content)]
    return None if isinstance(content, float) and not math.isfinite(content) else content
