"""Rules about singular values: `--spectral` measures them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.text import listed
from gradscope.weights.names import common_pattern
from gradscope.weights.result import Examined, Need, SpectrumResult, TensorResult
from gradscope.weights.roles import ADAPTERS, TABLES, Role
from gradscope.weights.rules.tensors import LOST, SHAPED, mostly_dead


@rule("W122", "rank-collapse", Severity.MEDIUM, reads=Examined, needs=Need.SPECTRA)
def rank_collapse(
    examined: Examined, *, share: float = 0.05, least: int = 32
) -> Iterator[Observation]:
    """A matrix uses next to none of its dimensions.

    The effective rank, exp of the entropy of the singular values' shares (Roy and Vetterli 2007),
    is below 5 % of what the shape allows. The least of 400 healthy matrices of 32 and more rows and
    columns is 17 %, of the last layer of a small voice detector. A product of thin factors that was
    merged into one matrix, a layer that only passes a mean on, and collapsed training look so.
    Units that are dead or copies of others are the business of `dead-units` and `duplicate-units`,
    experts that are dead that of `dead-expert`, one element that outweighs all others that of
    `extreme-value`; factors of adapters are thin by design.
    """
    for tensor, name, seen, short in _matrices(examined):
        rank = seen.effective_rank
        if short < least or rank is None or rank >= share * short:
            continue
        if _lost_units(tensor) or one_element(tensor, seen):
            continue
        yield Observation(
            tensor.name,
            f"{name}uses {rank:.1f} of {short} dimensions: the greatest singular value is "
            f"{seen.spectral_norm:.3g}, the stable rank {seen.stable_rank or 0:.2f}",
            "compare it with an earlier checkpoint; if it was always so, a layer of that rank does "
            "the same for less",
            {
                "effective_rank": rank,
                "stable_rank": seen.stable_rank or 0.0,
                "dimensions": short,
                "affected_fraction": 1 - rank / short,
            },
            threshold=share * short,
        )


def _matrices(examined: Examined) -> Iterator[tuple[TensorResult, str, SpectrumResult, int]]:
    """Each matrix with its tensor, what to call it, and its shorter side."""
    for tensor in examined.tensors:
        if tensor.spectrum is None or tensor.role not in SHAPED - {Role.DEPTHWISE}:
            continue
        rows = tensor.units.rows if tensor.units is not None else tensor.shape[0]
        experts = tensor.spectrum.experts
        for number, seen in enumerate(experts):
            if not examined.experts.covers(tensor.name, number):
                short = min(rows // len(experts), tensor.numel // rows)
                yield tensor, f"expert {number} ", seen, short
        if not experts and not examined.experts.covers(tensor.name):
            yield tensor, "", tensor.spectrum, min(rows, tensor.numel // rows)


def _lost_units(tensor: TensorResult) -> bool:
    """Whether another rule tells why units say nothing of their own."""
    units = tensor.units
    copies = units is not None and units.duplicate_rows > LOST * units.rows
    return copies or mostly_dead(tensor)


def one_element(tensor: TensorResult, seen: SpectrumResult) -> bool:
    """Whether the greatest singular value is about one element."""
    top = tensor.outliers.top if tensor.outliers is not None else ()
    return bool(top) and abs(top[0].value) > 0.9 * seen.spectral_norm


@rule("W123", "random-spectrum", Severity.LOW, reads=Examined, needs=Need.SPECTRA)
def random_spectrum(
    examined: Examined,
    *,
    share: float = 0.5,
    errors: float = 3.0,
    bits: float = 0.015,
    least: int = 4096,
) -> Iterator[Observation]:
    """A matrix is as it was initialised: noise throughout.

    Three signs together. No singular value lies beyond the edge of noise, and all of them are
    distributed as those of noise (Marchenko and Pastur 1967): training of any length leaves spikes.
    The elements are Gaussian or uniform to 0.015 bits of negentropy (2 / √n of few). And their
    standard deviation is that of an initialisation in use (torch's default, LeCun's, Xavier's,
    Kaiming's, 0.01, 0.02) within three standard errors, of matrices large enough for that to mean
    something. In released models such layers exist where the loss does not reach them: the pooler
    of a BERT, the last angle update of a CHGNet. Tables, which training moves row by row, and
    factors of adapters are not judged. Medium where half of all matrices are like that: then
    nothing was trained, or nothing was loaded.
    """
    judged = [
        t
        for t in examined.tensors
        if t.spectrum and t.role not in ADAPTERS | TABLES and t.numel >= least
    ]
    found = [(t, name) for t in judged if (name := _untouched(t, errors, bits)) is not None]
    if len(found) > 3 and len(found) >= share * len(judged):
        tensors = [t for t, _ in found]
        yield Observation(
            common_pattern(tensors),
            f"{len(found)} of {len(judged)} matrices are as they were initialised: "
            f"{listed([t.name for t in tensors], len(tensors))}",
            "load the trained checkpoint, or train; after training, check that the optimizer has "
            "these parameters and that the loss reaches them",
            {"untouched": len(found), "matrices": len(judged), "affected_fraction": 1.0},
            threshold=share,
            severity=Severity.MEDIUM,
        )
        return
    for tensor, name in found:
        yield Observation(
            tensor.name,
            f"no singular value is beyond those of noise, and its elements are those of {name}: it "
            "was never trained",
            "leave the layer out if the model does not use it; otherwise check that the optimizer "
            "has it and that the loss reaches it",
            {"mp_distance": _noise(tensor), "affected_fraction": 1.0},
        )


def _noise(tensor: TensorResult) -> float:
    seen = tensor.spectrum
    return math.inf if seen is None or seen.mp_distance is None else seen.mp_distance


def _untouched(tensor: TensorResult, errors: float, bits: float) -> str | None:
    """The initialisation that a matrix still has; None of one that was trained."""
    seen, s, units = tensor.spectrum, tensor.statistics, tensor.units
    if seen is None or s is None or units is None or s.std is None or seen.spikes != 0:
        return None
    into = tensor.numel // units.rows
    short = min(units.rows, into)
    if short < 16 or s.negentropy_bits is None or _noise(tensor) > 4 / short:
        return None
    for shape, negentropy, error, name, variance in _initialisations(tensor, units.rows, into):
        std = math.sqrt(variance)
        near = abs(s.std / std - 1) <= errors * error / math.sqrt(tensor.numel)
        off = abs(s.negentropy_bits - negentropy)
        if near and off <= max(bits, 2 / math.sqrt(tensor.numel)):
            return f"{name} ({shape}, standard deviation {std:.3g})"
    return None


def _initialisations(
    tensor: TensorResult, rows: int, into: int
) -> Iterator[tuple[str, float, float, str, float]]:
    """Those in use: shape, its negentropy as it is measured, the standard error of the deviation of
    one element, what to call it, and its variance.
    """
    out = rows * math.prod(tensor.shape[2:])
    scaled = [
        ("LeCun's initialisation", 1 / into),
        ("Kaiming's initialisation", 2 / into),
        ("Kaiming's initialisation by fan-out", 2 / out),
        ("Xavier's initialisation", 2 / (into + out)),
    ]
    fans = [rows / gates for gates in (4, 3, 1)] if tensor.role is Role.RECURRENT else [into]
    default = [("torch's default initialisation", 1 / (3 * fan)) for fan in fans]
    fixed = [("the usual initialisation", v) for v in (0.02**2, 0.01**2)]
    for name, variance in default + scaled:
        yield "uniform", 0.245, math.sqrt(0.2), name, variance
    for name, variance in scaled + fixed:
        yield "Gaussian", 0.0, math.sqrt(0.5), name, variance
