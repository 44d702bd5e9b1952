"""Rules about attention heads: `--spectral` measures them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gradscope.report.rules import Observation, rule
from gradscope.report.severity import Severity
from gradscope.text import runs
from gradscope.weights.result import AttentionResult, Examined, Need, TensorResult
from gradscope.weights.rules.spectra import one_element


@rule("W124", "attention-range", Severity.LOW, reads=Examined, needs=Need.SPECTRA)
def attention_range(examined: Examined, *, clip: float = 100.0) -> Iterator[Observation]:
    """Logits of attention heads can leave the range in which a softmax works.

    Two signs, of attentions whose heads and norm are known. The deviation of the logits of
    independent inputs is above 100, the level at which QK-clip intervenes (Kimi K2, 2025): the
    softmax is one-hot before anything was compared, and its gradient is gone. Or, in float16, the
    bound of the logits is beyond 65,504: an input exists whose logits are infinite. The bound holds
    for every input of the norm, with bias and offset, rotated or not; real inputs stay far below.
    """
    for seen in examined.attention:
        if seen.logit_rms is None or seen.logit_bounds is None:
            continue
        hot = [h for h, rms in enumerate(seen.logit_rms) if rms > clip]
        wide = [h for h, bound in enumerate(seen.logit_bounds) if bound > _FLOAT16]
        if hot or (wide and seen.dtype == "F16"):
            yield _out_of_range(seen, hot, wide, clip)


_FLOAT16 = 65504.0


def _out_of_range(
    seen: AttentionResult, hot: Sequence[int], wide: Sequence[int], clip: float
) -> Observation:
    rms, bound = max(seen.logit_rms or (0.0,)), max(seen.logit_bounds or (0.0,))
    which = hot or wide
    told = f"deviate by up to {rms:.3g}" if hot else f"can reach {bound:.3g}, float16 {_FLOAT16:,g}"
    return Observation(
        seen.tensor,
        f"the logits of head {runs(which, len(which))} of {seen.heads} {told}",
        "lower the learning rate of queries and keys, clip them (QK-clip), or normalise them "
        "(QK-norm)"
        if hot
        else "compute the logits in bfloat16 or float32, or scale the queries before the product",
        {"logit_rms": rms, "logit_bound": bound, "affected_fraction": len(which) / seen.heads},
        threshold=clip if hot else _FLOAT16,
    )


@rule("W125", "head-collapse", Severity.LOW, reads=Examined, needs=Need.SPECTRA)
def head_collapse(
    examined: Examined, *, share: float = 0.25, least: int = 16, heads: int = 4
) -> Iterator[Observation]:
    """An attention head uses next to none of its dimensions, unlike the others of its layer.

    The effective rank of its queries, keys or values, or of the product W_qᵀ W_k by which it
    compares, is below a quarter of the median of the heads beside it and of what a random matrix
    of that shape has. Of 130 heads of four released transformers (an ALBERT, two GPT-2 and a
    MiniLM; of 32 and 64 dimensions) the least is 91 % of the median, of the product 70 %. Such
    a head attends by one or two features whatever the input, or hands on next to nothing: it
    was not trained, was pruned, or a conversion mixed its rows up. Heads of fewer than 16
    dimensions and layers of fewer than 4 heads are not judged. Where all heads are like that,
    the matrix is `rank-collapse`; rows that are dead or copies are the business of `dead-units`
    and `duplicate-units`. Read where the heads are known: by `config.json`, or a norm of the
    queries.
    """
    for seen in examined.attention:
        alike: dict[tuple[int, tuple[int, ...]], list[_Side]] = {}
        if seen.head_size >= least:
            for side, found in _low(examined, seen, share, heads):
                alike.setdefault((len(side.ranks), found), []).append(side)
        for (_, found), sides in alike.items():
            yield _collapsed(seen, sides, found, share)


def _low(
    examined: Examined, seen: AttentionResult, share: float, heads: int
) -> Iterator[tuple[_Side, tuple[int, ...]]]:
    """The heads of each side that use next to none of their dimensions.

    Those whose queries or keys are such compare so as well, which is not told again.
    """
    told: set[int] = set()
    for side in _sides(seen):
        tensor = examined.by_name[side.tensor]
        if len(side.ranks) < heads or _explained(tensor, seen.head_size):
            continue
        most = share * min(_median(side.ranks), seen.random_rank)
        low = (h for h, rank in enumerate(side.ranks) if rank < most)
        found = tuple(h for h in low if not (side.compares and h in told))
        told.update(_queries(found, seen, side))
        if found:
            yield side, found


@dataclass(frozen=True, slots=True)
class _Side:
    """One matrix of each head: what it is called, where it is, and its effective ranks."""

    name: str
    tensor: str
    ranks: Sequence[float]
    #: Whether it is the product of two others, whose collapse is its own.
    compares: bool = False


def _sides(seen: AttentionResult) -> Iterator[_Side]:
    yield _Side("queries", seen.tensor, seen.query_ranks)
    yield _Side("keys", seen.key_tensor, seen.key_ranks)
    if seen.value_tensor is not None and seen.value_ranks is not None:
        yield _Side("values", seen.value_tensor, seen.value_ranks)
    yield _Side("comparison", seen.tensor, seen.effective_ranks, compares=True)


def _queries(found: Sequence[int], seen: AttentionResult, side: _Side) -> Iterator[int]:
    """The query heads that some heads of a side serve; values have no part in the comparison."""
    if side.name != "values":
        shared = seen.heads // len(side.ranks)
        yield from (h * shared + i for h in found for i in range(shared))


def _median(ranks: Sequence[float]) -> float:
    return sorted(ranks)[len(ranks) // 2]


def _explained(tensor: TensorResult, size: int) -> bool:
    """Whether dead or copied rows, or one element, could make a head what it is."""
    units = tensor.units
    lost = 0 if units is None else (units.dead_rows or 0) + (units.duplicate_rows or 0)
    return 2 * lost >= size or (
        tensor.spectrum is not None and one_element(tensor, tensor.spectrum)
    )


def _collapsed(
    seen: AttentionResult, sides: Sequence[_Side], found: Sequence[int], share: float
) -> Observation:
    """Of the same heads in one matrix or in several."""
    worst = min(sides, key=lambda side: min(side.ranks[h] for h in found))
    low, median = min(worst.ranks[h] for h in found), _median(worst.ranks)
    head = f"head {found[0]}" if len(found) == 1 else f"heads {runs(found, len(found))}"
    uses = "uses" if worst.compares else "use"
    *names, last = (side.name for side in sides)
    which = f"{', '.join(names)} and {last}" if names else last
    return Observation(
        sides[0].tensor,
        f"the {which} of {head} of {len(worst.ranks)} {uses} {low:.1f} of {seen.head_size} "
        f"dimensions, those of its neighbours {median:.1f}",
        "compare the head with an earlier checkpoint, and with the model before it was converted; "
        "if it was always so, the head can be pruned",
        {
            "effective_rank": low,
            "median_rank": median,
            "random_rank": seen.random_rank,
            "heads": len(found),
            "affected_fraction": len(found) / len(worst.ranks),
        },
        threshold=share * min(median, seen.random_rank),
    )
