"""How often the weights rules are wrong, as tests/weights/test_calibration.py measures it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Rates:
    """What the rules say of healthy models, and how many faults planted in such they find."""

    models: int
    #: Models with a finding of high or critical severity, and with one of medium.
    high: int
    medium: int
    faults: int
    found: int
    #: Models by the rule that makes such a finding.
    by_rule: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        rules = ", ".join(f"{rule} {models}" for rule, models in self.by_rule.items())
        return (
            f"{self.high} have a high or critical finding and {self.medium} a medium one"
            + (f" ({rules})" if rules else "")
            + f"; {self.found:,} of {self.faults:,} planted faults are found on the right tensor "
            "with the right rule"
        )


@dataclass(frozen=True, slots=True)
class Calibration:
    """The rates of the models that limits were set on, and of those that none was set on."""

    tuning: Rates
    hold_out: Rates

    @property
    def sentence(self) -> str:
        """Both rates in words."""
        return (
            f"Calibration: of {self.tuning.models} healthy checkpoints that limits were set on, "
            f"{self.tuning}. Of {self.hold_out.models} others, that no limit was set on (the "
            f"hold-out), {self.hold_out}."
        )


#: Kept equal to the measurement by the test.
CALIBRATION = Calibration(
    tuning=Rates(models=28, high=0, medium=0, faults=829, found=826),
    hold_out=Rates(models=20, high=0, medium=3, faults=826, found=822, by_rule={"dead-units": 3}),
)
