"""Layer-wise relevance propagation. Values [N, C, H, W], which sum to the score as far as is told.

The score is handed back from the logits to the pixels over the recorded pass, operator by operator.
A batch norm behind a convolution or dense layer is folded into it first (canonisation, as in
zennit): relevance explodes where its shift cancels what it scales. Any other one passes it on.
"""

from __future__ import annotations

from dataclasses import replace

from gradscope.attribution.formulas.gradients import Result
from gradscope.attribution.formulas.operators import Kind
from gradscope.attribution.formulas.propagation import Composite, propagated
from gradscope.attribution.formulas.references import pixel_range
from gradscope.attribution.formulas.relevance import (
    Rule,
    alpha_beta_rule,
    box_rule,
    epsilon_rule,
    flat_rule,
    gamma_rule,
)
from gradscope.attribution.formulas.sharing import Shares
from gradscope.attribution.subject import Subject
from gradscope.errors import NotApplicableError, UsageError

#: The stabiliser of every rule but the epsilon rule.
SMALL = 1e-6


def lrp(subject: Subject, *, composite: str, epsilon: float, gamma: float, biases: bool) -> Result:
    """x_j sum_k w_jk R_k / (z_k ± e) in dense layers, and the composite's rule in convolutions.

    Sums, pooling and other linear operators share by contribution; activations pass relevance on,
    the maximum takes it all, and the factors of a product get half each.
    """
    if epsilon < 0 or gamma < 0:
        raise UsageError("epsilon and gamma have to be at least 0")
    made = _composite(subject, composite, epsilon, gamma)
    return propagated(subject, replace(made, biases=biases))


def _composite(subject: Subject, name: str, epsilon: float, gamma: float) -> Composite:
    """The rules of a composite: zennit's under their names, and each rule everywhere."""
    flat, dense = flat_rule(SMALL), epsilon_rule(epsilon)
    convolution = {
        "epsilon": dense,
        "gamma": gamma_rule(gamma, SMALL),
        "epsilon-plus": alpha_beta_rule(1, SMALL),
        "epsilon-gamma": gamma_rule(gamma, SMALL),
        "epsilon-alpha2-beta1": alpha_beta_rule(2, SMALL),
    }
    base = name.removesuffix("-flat").removesuffix("-box")
    return Composite(
        convolution=convolution[base],
        dense=convolution[base] if name == "gamma" else dense,
        first=flat if name.endswith("-flat") else None,
        first_of_pixels=_box(subject) if name.endswith("-box") else None,
        others={Kind.SOFTMAX: _no_attention},
    )


def _box(subject: Subject) -> Rule:
    return box_rule(*pixel_range(subject), SMALL)


def _no_attention(*_: object) -> Shares:
    raise NotApplicableError(
        "the model has attention, for whose softmax lrp has no rule; use attention-lrp or relevance"
    )
