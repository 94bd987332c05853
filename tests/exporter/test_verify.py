"""What an export must reach."""

from __future__ import annotations

import numpy as np
import pytest

from fpabee.exporter.verify import required_of
from fpabee.runtime.agreement import EXPORT_REQUIREMENTS


@pytest.mark.parametrize(("largest", "times"), [(0.0, 1), (10.0, 1), (45.0, 4.5)])
def test_large_logits_may_differ_more(largest: float, times: float) -> None:
    logits = np.linspace(-largest, 0, 12, dtype=np.float32).reshape(2, 3, 2)
    required = required_of(logits)
    assert required.logits == pytest.approx(times * EXPORT_REQUIREMENTS.logits)
    assert required.tie == pytest.approx(times * EXPORT_REQUIREMENTS.tie)
    assert (required.labels, required.exits) == (1.0, 1.0)
