"""How often the weights rules are wrong, as tests/weights/test_calibration.py measures it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Calibration:
    """False alarms over healthy models, and planted faults found."""

    healthy_models: int
    false_alarms: int
    faults: int
    found: int

    @property
    def sentence(self) -> str:
        """Both rates in words."""
        return (
            f"Calibration: {self.false_alarms} of {self.healthy_models} healthy checkpoints "
            f"have a high or critical finding; {self.found} of {self.faults} planted faults are "
            "found on the right tensor with the right rule."
        )


#: Kept equal to the measurement by the test.
CALIBRATION = Calibration(healthy_models=28, false_alarms=0, faults=829, found=826)
