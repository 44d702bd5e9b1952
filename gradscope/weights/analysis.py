"""``analyze_weights``: checkpoint -> statistics -> rules -> report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gradscope.checkpoints.open import open_checkpoint
from gradscope.checkpoints.tensors import Checkpoint
from gradscope.errors import UsageError
from gradscope.report.config import ConfigLike
from gradscope.report.request import Failures, requested
from gradscope.statistics import engine_for
from gradscope.weights.casting import Wanted, wanted_casts, with_casts
from gradscope.weights.ending import judged, report
from gradscope.weights.examining import Look, among, examine, headers
from gradscope.weights.patterns import filtered, narrowed
from gradscope.weights.result import Examined, WeightsReport
from gradscope.weights.shares import owned, share

Progress = Callable[[int, int], None]


def analyze_weights(
    *checkpoints: str | Path,
    key: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    headers_only: bool = False,
    shard: str | None = None,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    fail_on: str | None = None,
    allow_empty: bool = False,
    config: ConfigLike = None,
    baseline: str | Path | None = None,
    keep_going: bool = False,
    cast: Sequence[str] = (),
    snr: str | float | None = None,
    spectral: bool = False,
    norms_only: bool = False,
    bootstrap: int = 0,
    budget: str | float | None = None,
    device: str = "cpu",
    engine: str = "local",
    jobs: int | None = None,
    progress: Progress = lambda _done, _total: None,
) -> WeightsReport:
    """Diagnose one or more checkpoints.

    ``include`` and ``exclude`` are shell patterns of tensor names, ``key`` the dotted path of the
    nested dict that is the state dict, ``select`` and ``ignore`` rule codes, prefixes or names,
    ``config`` a configuration or its file, ``baseline`` the file of accepted findings.
    ``progress`` is called with bytes done and bytes in all. An input that cannot be read is an
    entry of ``errors``, never an exception; with ``keep_going`` the other shards of a checkpoint
    one of whose files fails while it is read are still analysed. ``cast`` are types that casting
    is measured to, ``snr`` the decibels that the best of them must keep. ``spectral`` computes the
    singular values of every matrix, within ``budget`` seconds if any, with ``norms_only`` the
    greatest alone; ``bootstrap`` many drawn sets test each fitted exponent.

    ``shard`` (``0/4`` to ``3/4``) measures only a share of the tensors, for a partial report that
    ``merge`` joins with the others. ``engine`` is ``local``, the threads of this process, or
    ``ray``, the cluster that Ray is connected to.

    Raises UsageError for an unknown rule, key, device, engine, severity or type, and for a shard
    that there is not.
    """
    request = requested(
        Examined,
        select=select,
        ignore=ignore,
        fail_on=fail_on,
        allow_empty=allow_empty,
        config=config,
        baseline=baseline,
        narrowed=narrowed(include, exclude),
    )
    if engine != "local":
        _refuse_near(engine, device, budget)
    casts = wanted_casts(cast, snr)
    looks = list(_looks(casts, spectral, device, norms_only, bootstrap, budget))
    if headers_only:
        _refuse_data(casts, spectral, shard)
    part = None if shard is None else share(shard)
    run = engine_for(engine, jobs)
    opened: list[Checkpoint] = []
    failures = Failures()
    for path in checkpoints:
        with failures.caught():
            opened.append(filtered(open_checkpoint(str(path), key), include, exclude))
    if headers_only:
        return report(request, [judged(headers(c), request) for c in opened], failures, casts)
    from gradscope.statistics import scan_for

    own = [None] * len(opened) if part is None else owned(opened, part, spectral)
    nbytes = sum(r.nbytes for c, o in zip(opened, own, strict=True) for r in among(c.tensors, o))
    meter = _Meter(progress, (1 + len(looks)) * nbytes)
    scan = scan_for(device)
    examinations = [
        judged(examine(c, scan, run, meter, keep_going, looks, o), request)
        for c, o in zip(opened, own, strict=True)
    ]
    if part is None:
        return report(request, examinations, failures, casts)
    from gradscope.weights.parts import partial_report

    options = {
        "checkpoints": [str(path) for path in checkpoints],
        "key": key,
        "include": list(include),
        "exclude": list(exclude),
        "keep_going": keep_going,
        "cast": list(cast),
        "snr": snr,
        "spectral": spectral,
        "norms_only": norms_only,
        "bootstrap": bootstrap,
        "budget": budget,
        "device": device,
    }
    return partial_report(request, part, options, examinations, failures)


def _refuse_data(casts: Wanted, spectral: bool, shard: str | None) -> None:
    """Raises UsageError for what there is nothing of where only headers are read."""
    asked = {"--cast": casts.targets, "--spectral": spectral, "--shard": shard is not None}
    for option in (name for name, is_asked in asked.items() if is_asked):
        what = "shares out" if option == "--shard" else "reads"
        raise UsageError(
            f"{option} {what} the data, which --headers-only does not read: give one of them"
        )


def _refuse_near(engine: str, device: str, budget: str | float | None) -> None:
    """Raises UsageError for what only this machine has."""
    if device != "cpu":
        raise UsageError(f"--engine {engine} computes on CPUs: give it or --device, not both")
    if budget is not None:
        raise UsageError(
            f"--budget is by the clock of one machine, and --engine {engine} computes on several: "
            "give one of them"
        )


def _looks(
    casts: Wanted,
    spectral: bool,
    device: str,
    norms_only: bool,
    bootstrap: int,
    budget: str | float | None,
) -> Iterator[Look]:
    """What is asked for beside the statistics. Raises UsageError."""
    if casts.targets:
        yield partial(with_casts, wanted=casts)
    if spectral:
        from gradscope.weights.spectral import wanted_spectra, with_spectra

        wanted = wanted_spectra(device, norms_only, bootstrap, budget)
        yield partial(with_spectra, wanted=wanted)
        return
    given = {"--norms-only": norms_only, "--bootstrap": bootstrap, "--budget": budget is not None}
    for option in (name for name, is_given in given.items() if is_given):
        raise UsageError(f"{option} is about spectra: give --spectral as well")


@dataclass
class _Meter:
    """Bytes done of the whole run, told to whoever draws the progress bar."""

    progress: Progress
    total: int
    done: int = 0

    def __call__(self, amount: int) -> None:
        self.done += amount
        self.progress(self.done, self.total)
