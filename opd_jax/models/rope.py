"""Rotary frequencies, and the scalings by which checkpoints extend their context.

The fields of a scaling are those of `rope_parameters` in a Hugging Face config.json.
Sources: linear, Chen et al. 2023 (arXiv 2306.15595); yarn, Peng et al. 2023 (arXiv 2309.00071); llama3, the
Llama 3.1 release. Each matches transformers (modeling_rope_utils.py).
"""

import dataclasses
import math
from typing import Any, get_type_hints

import numpy as np


@dataclasses.dataclass(frozen=True)
class Linear:
    """Divides every position by `factor`."""

    factor: float

    def apply(self, frequency_C, theta: float):
        """(scaled frequency_C, the factor on cos and sin); frequency_C [head_size / 2], radians a token."""
        return frequency_C / self.factor, 1.0

    def reach(self) -> int | None:
        """Longest context that the scaling itself gives, None if it does not say."""
        return None


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Stretches wavelengths above original / low_freq_factor, not those below original / high_freq_factor."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def apply(self, frequency_C, theta: float):
        """As Linear.apply."""
        turns_C = self.original_max_position_embeddings * frequency_C / (2 * math.pi)
        band = self.high_freq_factor - self.low_freq_factor
        kept_C = np.clip((turns_C - self.low_freq_factor) / band, 0, 1)
        return frequency_C * (kept_C + (1 - kept_C) / self.factor), 1.0

    def reach(self) -> int | None:
        """As Linear.reach."""
        return None


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Keeps fast channels, stretches those that rarely turn over the original length, scales cos and sin."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def apply(self, frequency_C, theta: float):
        """As Linear.apply."""
        size = 2 * len(frequency_C)

        def channel(turns):
            length = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return size * math.log(length) / (2 * math.log(theta))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        ramp_C = (np.arange(size // 2) - low) / (high - low if high != low else 1e-3)
        stretched_C = np.clip(ramp_C, 0, 1)
        return frequency_C * (1 - stretched_C + stretched_C / self.factor), self.attention_factor

    def reach(self) -> int | None:
        """As Linear.reach."""
        return int(self.factor * self.original_max_position_embeddings)


KINDS = {"linear": Linear, "llama3": Llama3, "yarn": Yarn}
Scaling = Linear | Llama3 | Yarn


def frequencies(theta: float, head_size: int, scaling: Scaling | None):
    """(float32 [head_size / 2] radians a token, the factor on cos and sin)."""
    frequency_C = theta ** -(np.arange(0, head_size, 2) / head_size)
    amplitude = 1.0
    if scaling is not None:
        frequency_C, amplitude = scaling.apply(frequency_C, theta)
    return frequency_C.astype(np.float32), amplitude


def to_json(scaling: Scaling | None) -> dict[str, Any]:
    """The scaling's part of `rope_parameters`."""
    if scaling is None:
        return {"rope_type": "default"}
    name = next(name for name, kind in KINDS.items() if kind is type(scaling))
    return {"rope_type": name} | dataclasses.asdict(scaling)


def from_json(raw: dict[str, Any], max_positions: int) -> Scaling | None:
    """The scaling that `rope_parameters` (or `rope_scaling`) describes.

    Args:
      raw: its fields; `type` is the old spelling of `rope_type`.
      max_positions: used if original_max_position_embeddings is absent, as in transformers.

    Raises:
      ValueError: the kind or a field is not supported, missing or out of range; the message names it.
    """
    kind = raw.get("rope_type") or raw.get("type") or "default"
    fields = {name: value for name, value in raw.items() if value is not None}
    for name in ("rope_type", "type", "rope_theta", "partial_rotary_factor"):
        fields.pop(name, None)
    if kind == "default":
        return _unscaled(fields)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"rotary scaling {kind!r} (supported: {', '.join(KINDS)})")
    if kind == "linear":
        fields.pop("original_max_position_embeddings", None)  # not part of its formula
    else:
        fields.setdefault("original_max_position_embeddings", max_positions)
    if kind == "yarn":
        fields = _with_attention_factor(fields)
    declared = {field.name: field for field in dataclasses.fields(KINDS[kind])}
    types = get_type_hints(KINDS[kind])
    for name, value in fields.items():
        if name not in declared:
            raise ValueError(f"rotary scaling field {name!r} of {kind!r}")
        flag = types[name] is bool
        positive = isinstance(value, int | float) and 0 < value < math.inf
        if isinstance(value, bool) != flag or not (flag or positive):
            raise ValueError(f"rotary scaling {kind!r} with {name}={value!r}")
    for name, field in declared.items():
        if name not in fields and field.default is dataclasses.MISSING:
            raise ValueError(f"rotary scaling {kind!r} without {name!r}")
    numbers = {name: types[name](value) for name, value in fields.items()}
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise ValueError("rotary scaling 'llama3' whose low_freq_factor is not below high_freq_factor")
    return KINDS[kind](**numbers)


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """YaRN's factor on cos and sin, 0.1 mscale ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _unscaled(fields: dict[str, Any]) -> None:
    # A leftover original length has no effect; any other field would have one.
    fields.pop("original_max_position_embeddings", None)
    if fields:
        raise ValueError(f"rotary field {min(fields)!r} without a rope_type")


def _with_attention_factor(fields: dict[str, Any]) -> dict[str, Any]:
    """Adds attention_factor to `fields` if absent, from factor and DeepSeek's pair of mscale fields."""
    pair = [fields.pop(name, None) for name in ("mscale", "mscale_all_dim")]
    factor = fields.get("factor")
    if "attention_factor" not in fields and isinstance(factor, int | float):
        if all(pair):
            over, under = (yarn_attention_factor(factor, mscale) for mscale in pair)
            fields["attention_factor"] = over / under
        else:
            fields["attention_factor"] = yarn_attention_factor(factor)
    return fields
