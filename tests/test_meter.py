"""What a training run says of itself between two log lines."""

from __future__ import annotations

import pytest
import torch

from model.meter import Meter


def test_a_value_is_averaged_over_the_steps_that_had_it() -> None:
    meter = Meter(torch.device("cpu"), flops=1.0, peak=1.0)
    for step, loss in enumerate((1.0, 2.0, 6.0, 7.0)):
        values = {"loss": torch.tensor(loss)}
        if step == 3:  # adversarial terms, say, begin there
            values["adversarial"] = torch.tensor(8.0)
        meter.add(step, [], values)
    means = meter.take(clips=2)
    assert (means["loss"], means["adversarial"]) == (4.0, 8.0)
    assert means["clips_per_s"] == pytest.approx(2 * means["steps_per_s"])
    # What is said once is not said again.
    meter.add(4, [], {"loss": torch.tensor(3.0)})
    means = meter.take(clips=2)
    assert means["loss"] == 3.0
    assert "adversarial" not in means
