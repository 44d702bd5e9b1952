"""How far a map can be trusted: what was measured of it, typed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradscope.report.model import Number, Record


class Control(Record):
    """Mean areas and standard deviations of the same curves for the map at random positions."""

    insertion_auc: Number
    deletion_auc: Number
    insertion_spread: Number
    deletion_spread: Number
    #: Standard deviation of insertion less deletion, which move together.
    difference_spread: Number | None = None
    rankings: int
    #: Means of the curves, as those of the map.
    insertion_curve: tuple[Number, ...] | None = None
    deletion_curve: tuple[Number, ...] | None = None


class Randomised(Record):
    """How similar the map stays with parameters randomised from the output down to a layer."""

    layer: str
    #: Spearman's rank correlation with the original's raw values, of values and of magnitudes. 0
    #: where one of them is constant.
    correlation: Number
    magnitude_correlation: Number
    #: The map has one value everywhere.
    constant: bool = False


class Localisation(Record):
    """How much of a map lies on the annotated object; by chance each is ``area``."""

    #: The share of the model's input that the object covers.
    area: Number
    pointing_game: Number
    relevance_mass: Number
    relevance_rank: Number


class Diagnostics(Record):
    """How far a map can be trusted. None means not measured, or not defined; never "good"."""

    #: Sum of the attribution less S(x) - S(reference); and that over |S(x) - S(reference)|. Of
    #: relevance, the sum with what constants hold, less S(x): the conservation residual.
    completeness_delta: Number | None = None
    relative_delta: Number | None = None
    #: Areas under the target's probability over the fraction of pixels shown or removed.
    insertion_auc: Number | None = None
    deletion_auc: Number | None = None
    #: The probability with none to all of the pixels shown or removed, at even steps.
    insertion_curve: tuple[Number, ...] | None = None
    deletion_curve: tuple[Number, ...] | None = None
    #: Standard deviation over random orders of pixels of equal value.
    insertion_spread: Number | None = None
    deletion_spread: Number | None = None
    random_control: Control | None = None
    #: The cascade, from the output towards the input; the mean correlation of its maps that are not
    #: constant; how much the entropy of the map's histogram rises, relatively, at its end.
    randomisation: tuple[Randomised, ...] | None = None
    similarity: Number | None = None
    complexity_rise: Number | None = None
    #: Greatest relative L2 change of the raw values when every pixel changes by at most 0.02 of the
    #: range 0..1; and the mean rank correlation with the maps of those pictures, and with one of
    #: noise.
    sensitivity: Number | None = None
    repeatability: Number | None = None
    noise_similarity: Number | None = None
    #: Correlation of what the map gives to random parts with what the score loses without them; the
    #: squared error of the same, of the square of the losses; and both for the map elsewhere.
    faithfulness_correlation: Number | None = None
    infidelity: Number | None = None
    control_faithfulness_correlation: Number | None = None
    control_infidelity: Number | None = None
    #: Mean difference of the target's probability without the weakest and the strongest pixels,
    #: which are imputed; 0 is chance.
    road: Number | None = None
    #: Gini index of |map|.
    sparseness: Number | None = None
    ground_truth: Localisation | None = None
    #: Spearman's rank correlation with the other methods' maps of the same image and target.
    agreement: Mapping[str, Number] | None = None
    #: The method's own diagnostics: steps, forward passes, rectifiers seen, …
    method: Mapping[str, Any] = {}
