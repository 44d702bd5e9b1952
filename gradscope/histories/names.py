"""How loggers name what they write: one table of patterns for every format that has names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeVar

from gradscope.histories.history import Kind

T = TypeVar("T")
#: What is logged of a run as a whole.
Role = Literal["total", "loss", "rate", "scale", "skipped"]

#: The note on a run that logged nothing of its layers.
ONLY_TOTAL = "only the total gradient norm was logged, so nothing is known of single layers"
#: The note on a run that logged no gradient at all.
ONLY_LOSS = "no gradient norm was logged, so only the loss is looked at"

#: Names of step columns, the likeliest first; those above it in a path do not count.
STEP = (
    "step", "global_step", "_step", "steps", "num_updates", "iteration", "iterations", "iter",
    "update", "updates", "n_updates", "batch", "episode", "episodes", "timestep", "timesteps",
    "total_timesteps",
)  # fmt: skip
#: What comes before a slash in the time of a step: ``ms/batch``.
_UNITS = frozenset(("ms", "s", "sec", "secs", "seconds", "min"))
_OTHER_STEP = re.compile(
    r"(?!(?:.*_)?(?:max|total|warmup|per|time|log|save|eval|val|decay)_)\w+_"
    r"(?:steps?|num_updates|iterations?|iter|updates?|episodes?)"
)

_NORM = r"(?:(?:grad|gradient)s?[_ -]?(?:l2[_ -])?norms?|gnorms?)"
#: How a parameter's gradient norm is named. What is not an L2 norm (``grad_inf_norm``) is not here.
_GRADIENTS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^(?:.+/)?grad_2(?:\.0)?_norm[/_](?P<name>.+)$",  # Lightning
        r"^(?:.+/)?l2_norm/grad/(?P<name>.+)$",  # Composer
        r"^(?:.+/)?grad/(?P<name>.+)\.norm$",  # OLMo
        r"^(?:.+/)?(?:grad|gradient)s?/(?P<name>.+)/(?:l2|l2_norm|norm)$",
        r"^(?P<name>.+)[/:._](?:grad|gradient)s?[/.](?:l2|l2_norm|norm)$",
        rf"^(?:.+/)?{_NORM}[/:.](?P<name>.+)$",
        r"^(?:[\w-]+/)?(?:grads?|gradients?)[/:.](?P<name>.+)$",  # W&B
        rf"^(?P<name>.+)[/:._](?:{_NORM}|grad_l2|l2_norm)$",
        r"^(?P<name>.+)[/:._](?:grads?|gradients?)$",
    )
)
#: Other statistics that stand beside the norm under the same prefix.
_NO_NORM = re.compile(
    r"(?:^|[./_])(?:min|max|avg|mean|std|var|median|hist|histogram)$", re.IGNORECASE
)
_WHERE = (
    r"(?:(?:train|training|trainer|optim|optimizer|metrics?|global|model|stats|norms?|monitor"
    r"|debug|log|logs|perf)[/_.: ])*"
)
_TOTAL = re.compile(
    _WHERE + rf"(?:(?:total_|global_)?{_NORM}(?:[/_.](?:total|global|all|step))?"
    r"|grad_2(?:\.0)?_norm_total|l2_norm/grad/global|(?:grad|gradient)s?[/.](?:(?:total|global)_)?norm"
    r"|total_norm|total_l2)",
    re.IGNORECASE,
)
_LOSS = re.compile(
    r"(?:(?:train|training|trainer|batch|metrics?|logs?|loss_metrics)[/_. ])*"
    r"(?:(?:batch|reduced_train|global_avg|avg|mean|total|running|lm|mlm|ce|step)[_ ])*"
    r"loss(?:_step|[/_ ]train|/total|/avg)?",
    re.IGNORECASE,
)
#: What Ultralytics' trainers, and YOLOv5's, write instead of their sum, which they minimise.
_PART = re.compile(
    r"train/(?:box|obj|cls|dfl|seg|sem|pose|kobj|rle|angle|giou|l1)_loss", re.IGNORECASE
)
_RATE = re.compile(
    r"(?:(?:train|training|optim|optimizer|metrics?)[/_])*"
    r"(?:lr|learning[_ ]rate)(?:[-/].+|_?group_?\d+|_?\d+)?",
    re.IGNORECASE,
)
_SCALE = re.compile(r"(?:.*[/_])?(?:loss|grad)[_ ]scale", re.IGNORECASE)
_SKIPPED = re.compile(r"(?:.*[/_])?(?:skipped|overflow|step_was_skipped)", re.IGNORECASE)
_ROLES: Mapping[Role, re.Pattern[str]] = {
    "total": _TOTAL,
    "loss": _LOSS,
    "rate": _RATE,
    "scale": _SCALE,
    "skipped": _SKIPPED,
}
#: The column of Weights & Biases' charts for one run: ``run-1 - train/loss`` and its extremes.
_EXPORTED = re.compile(r"(?P<run>.+) - (?P<metric>\S.*?)(?P<extreme>__(?:MIN|MAX))?")

#: Words of metrics that are no layers.
_METRIC = frozenset(
    word
    for words in (
        "acc accuracy val valid validation eval test loss losses lr time timestamp date",
        "datetime epoch  epochs runtime seconds sec s ms second minutes hours tokens",
        "samples memory mem gpu cpu ram  throughput tps wps ups wpb bsz mfu tflops",
        "flops ppl perplexity reward rewards return returns  kl entropy f1 auc auroc",
        "precision recall bleu rouge wer map iou dice score metric margin  margins",
        "logps clip clipped clipfrac fraction ratio momentum epsilon temperature speed",
        "rate  rates wall elapsed eta id run seed index count num number psnr ssim fid",
        "inception mse mae  rmse r2 error err top1 top5 learning rank worker device",
        "length len duration beta1 beta2  weights weight_norm param_norm parameters",
        "activation activations act update updates  value_loss policy_loss kld scale",
        "skipped step steps iteration best patience",
    )
    for word in words.split()
)
_PARAMETER = re.compile(
    r"(?:^|.*[./_])(?:weight|bias|kernel|weight_[gv]|in_proj_weight|in_proj_bias"
    r"|(?:weight|bias)_[ih]h_l\d+(?:_reverse)?)|.*[./](?:gamma|beta|embedding)",
    re.IGNORECASE,
)
_MODULE = re.compile(
    r"(?:^|[._/])(?:layers?|blocks?|conv|fc|linear|dense|encoder|decoder|embed\w*|wte|wpe|(?:batch"
    r"|layer|group|rms)?norm|bn|ln|attn|attention|mlp|ffn|head|lm_head|lstm|gru|rnn|proj|features"
    r"|classifier|backbone|stem|hidden|stage|downsample|experts?|router|gate|up|down|h)[_.]?"
    r"\d*(?=[._/]|$)",
    re.IGNORECASE,
)
#: What is not of gradients although it is of a layer.
_NOT_GRADIENT = re.compile(
    r"^(?:val|valid|validation|eval|test|time|perf|system|weights?|parameters|param_norm"
    r"|weight_norm|activations?|act|updates?|momentum|adam|exp_avg\w*|moments?)[/:]",
    re.IGNORECASE,
)


def gradient_of(name: str) -> str | None:
    """The parameter whose gradient norm a column or tag is; None when it is another thing."""
    if is_total(name):
        return None
    for pattern in _GRADIENTS:
        if found := pattern.match(name):
            return None if _NO_NORM.search(found["name"]) else found["name"]
    return None


def role_of(name: str) -> Role | None:
    """What a column or tag is of the run as a whole; None for one of a layer, or of no interest."""
    stripped = name.strip()
    return next((role for role, known in _ROLES.items() if known.fullmatch(stripped)), None)


def is_total(name: str) -> bool:
    """Whether it is the norm of all gradients together."""
    return role_of(name) == "total"


def is_loss(name: str) -> bool:
    """Whether it is the loss of training; that of validation is not."""
    return role_of(name) == "loss"


def is_loss_part(name: str) -> bool:
    """Whether it is one of several losses that add up to that of training."""
    return _PART.fullmatch(name.strip()) is not None


def is_rate(name: str) -> bool:
    """Whether it is a learning rate; there may be one for each parameter group."""
    return role_of(name) == "rate"


def is_known(name: str) -> bool:
    """Whether a name says what it holds."""
    return role_of(name) is not None or gradient_of(name) is not None


def step_column(names: Iterable[str]) -> str | None:
    """The column that counts optimizer steps, by the likeliest name; None without one."""
    ranked = [(rank, name) for name in names if (rank := _step_rank(name)) is not None]
    return min(ranked, key=lambda found: found[0])[1] if ranked else None


def _step_rank(name: str) -> tuple[int, int] | None:
    """Likelier names are lower; one that stands alone before one in a path."""
    path = name.lower().strip().replace(" ", "_").split("/")
    if path[0] in _UNITS:
        return None
    if path[-1] in STEP:
        return STEP.index(path[-1]), len(path)
    other = _OTHER_STEP.fullmatch(path[-1]) and not is_known(name)
    return (len(STEP), len(path)) if other else None


def likeliest(series: Iterable[tuple[str, T]]) -> T | None:
    """Of several series that may be one thing, that of the plainest name; None of none."""
    found = list(series)
    return min(found, key=lambda pair: len(pair[0]))[1] if found else None


def exported(columns: Sequence[str]) -> tuple[list[str | None], list[str]]:
    """The metrics of a chart exported from Weights & Biases, and the runs that they are of.

    ``run-1 - train/loss`` is the loss of a run; its extremes (``__MIN``, ``__MAX``) are None. Other
    columns are themselves.
    """
    named = [_EXPORTED.fullmatch(name) for name in columns]
    chart = any(f"{name}__MIN" in columns for name in columns) or named.count(None) <= 1
    read = [found if found and (chart or is_known(found["metric"])) else None for found in named]
    metrics = [
        name if found is None else None if found["extreme"] else found["metric"]
        for name, found in zip(columns, read, strict=True)
    ]
    return metrics, list(dict.fromkeys(found["run"] for found in read if found))


def plain_layers(columns: Sequence[str]) -> list[str]:
    """The columns of a table that are layers although no name says that they hold norms.

    Nothing where other columns are called norms. Beside metrics of other kinds or a total norm only
    what looks like a module or a parameter; otherwise everything that is not known.
    """
    if any(gradient_of(name) is not None for name in columns):
        return []
    rest = [name for name in columns if not is_known(name) and not _is_other(name)]
    layers = [name for name in rest if _looks_like_a_layer(name)]
    others = [name for name in rest if name not in layers and not _is_clock(name)]
    mixed = any(map(is_total, columns)) or any(map(_is_metric, others))
    return layers if mixed else [name for name in rest if name in {*layers, *others}]


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower())) | {name.lower()}


def _is_metric(name: str) -> bool:
    return bool(_words(name) & _METRIC)


def _is_clock(name: str) -> bool:
    """Columns that a table of anything may have."""
    return bool(_words(name) & {"epoch", "time", "timestamp", "runtime", "date", "datetime", ""})


def _is_other(name: str) -> bool:
    """Whether a name says that it is a step, or a statistic of something else."""
    other = _NOT_GRADIENT.match(name) or _NO_NORM.search(name)
    return other is not None or _step_rank(name) is not None


def _looks_like_a_layer(name: str) -> bool:
    if _PARAMETER.fullmatch(name):
        return True
    return _MODULE.search(name) is not None and not _is_metric(name)


_TOP = r"(?:(?:module|model|transformer|net|network)[._/])*"
#: Places of top-level modules where a name is all that is known.
_PLACES = (
    (re.compile(_TOP + r"(?:\w*embed\w*|wte|wpe|stem|tok\w*)(?:[._/].*)?", re.IGNORECASE), -1),
    (re.compile(_TOP + r"decoder\d*(?:[._/].*)?", re.IGNORECASE), 1),
    (
        re.compile(
            _TOP + r"(?:lm_head|head|classifier|fc|output|out|logits|ln_f|norm|norm_f|final_\w+)"
            r"(?:[._/].*)?",
            re.IGNORECASE,
        ),
        2,
    ),
)


def in_depth(names: Sequence[str]) -> list[str]:
    """Names in the likely order of the forward pass, where a writer sorted them by the alphabet.

    By their numbers (``layers.2`` before ``layers.10``), embeddings first and heads last. Names in
    any other order were put so by someone who knew it, and stay.
    """
    if len(names) < 2 or list(names) != sorted(names):
        return list(names)
    return sorted(names, key=_depth)


def _depth(name: str) -> tuple[int, list[tuple[int, str]]]:
    place = next((place for known, place in _PLACES if known.fullmatch(name)), 0)
    parts = re.split(r"(\d+)", name)
    return place, [(int(p[:18]), "") if p.isdecimal() else (-1, p) for p in parts]


def guessed_kind(name: str, shape: Sequence[int] | None = None) -> Kind:
    """What a parameter is, by its name and, where it is known, its shape."""
    lowered = name.lower()
    if lowered.endswith(("bias", ".beta")) or ".bias_" in lowered:
        return "bias"
    if re.search(r"(norm|\bbn|\.bn|ln_|_ln|layernorm)", lowered):
        return "norm"
    if re.search(r"(embed|wte|wpe)", lowered):
        return "embedding"
    if shape is None:
        return "other"
    if len(shape) == 1:
        return "norm" if lowered.endswith(("weight", "gamma", "scale")) else "bias"
    return "matrix" if len(shape) == 2 else "conv" if len(shape) > 2 else "other"


def clean(name: str) -> str:
    """A name that can be written as UTF-8: lone surrogates become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()
