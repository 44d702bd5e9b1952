"""What measured facts mean: how severe, why, and what to do about it.

The only place that decides. Functions here know no default: every limit is a keyword-only
parameter of the rule that reports the matter, so that ``limits(rule)`` gives the limits that the
result is judged by, and a rule called with others judges the same facts anew.
"""

from gradscope.flow.judgement.dead import dead_zones, intervention, recovery
from gradscope.flow.judgement.diverged import Course, divergence
from gradscope.flow.judgement.exploded import (
    LayerVerdict,
    exploding,
    exploding_layers,
    exploding_level,
    lasting,
)
from gradscope.flow.judgement.levels import limits, worst
from gradscope.flow.judgement.steps import adds_up, captured_unfinished, learning_rate
from gradscope.flow.judgement.vanished import WEIGHTLESS, vanishing, vanishing_level

__all__ = [
    "WEIGHTLESS",
    "Course",
    "LayerVerdict",
    "adds_up",
    "captured_unfinished",
    "dead_zones",
    "divergence",
    "exploding",
    "exploding_layers",
    "exploding_level",
    "intervention",
    "lasting",
    "learning_rate",
    "limits",
    "recovery",
    "vanishing",
    "vanishing_level",
    "worst",
]
