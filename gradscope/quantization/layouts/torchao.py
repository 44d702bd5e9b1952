"""torchao's tensor subclasses, flattened: ``_weight_qdata``, ``_weight_scale``, …"""

from __future__ import annotations

from collections.abc import Mapping

from gradscope.containers.strict_json import MalformedError, parse
from gradscope.quantization.layouts.elements import is_codes, with_scale
from gradscope.quantization.layouts.nibbles import fp4
from gradscope.quantization.scales import Second
from gradscope.quantization.site import Site, companions, missing
from gradscope.quantization.weights import Kind, QuantizedWeight


def tensors(site: Site) -> QuantizedWeight | None:
    """Codes in ``_X_qdata``; what they are says the header's entry for the tensor X."""
    stem = site.leaf.removesuffix("_qdata")
    if stem == site.leaf or not stem.startswith("_"):
        return None
    name = site.module + stem[1:]
    said = _description(site.metadata.get(name))
    scale = site.beside(f"{stem}_scale", f"{stem}_scale_and_zero")
    zero = site.beside(f"{stem}_zero_point")
    over = site.beside(f"{stem}_per_tensor_scale")
    if scale is None:
        return QuantizedWeight(
            name, "torchao", site.ref.shape, site.ref, (), tuple(missing(site, f"{stem}_scale"))
        )
    if is_codes(site.ref):
        return with_scale(site, scale, zero, name=name)
    if site.ref.dtype == "U8" and scale.dtype in ("F8_E4M3", "F8_E8M0", "U8"):
        second = None if over is None else Second(over, inverse=False)
        plain = said.get("is_swizzled_scales") is False
        return fp4(site, scale, second, required=False, name=name, understood=plain)
    together = scale.name.endswith("_and_zero")
    return QuantizedWeight(
        name,
        "torchao int4",
        site.ref.shape,
        site.ref,
        (
            *companions(Kind.SIGNED if together else Kind.SCALE, scale),
            *companions(Kind.ANY, zero),
        ),
    )


def _description(entry: object) -> Mapping[str, object]:
    """The attributes that were saved with a tensor."""
    try:
        said = parse(entry.encode(), "header") if isinstance(entry, str) else {}
    except (MalformedError, UnicodeEncodeError):
        return {}
    attributes = said.get("_data") if isinstance(said, dict) else None
    return attributes if isinstance(attributes, dict) else {}
