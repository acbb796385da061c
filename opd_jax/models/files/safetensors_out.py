"""Writes a safetensors file tensor by tensor, with one tensor on the host at a time.

Format (github.com/huggingface/safetensors): 8 bytes with the header's length, little-endian; the header,
which is JSON padded with spaces to a multiple of 8; the tensors' bytes in the header's order, without gaps.
"""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np

_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write(path, shapes: dict[str, tuple[int, ...]], dtype: np.dtype, values: Iterable[np.ndarray]) -> int:
    """Writes one file.

    Args:
      path: the file, replaced if it exists.
      shapes: name -> shape of each tensor, in the order of `values`.
      dtype: of all of them: float32, float16 or bfloat16.
      values: the tensors; each is released before the next is taken.

    Returns:
      Number of bytes of tensors written.
    """
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype.name], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), value in zip(shapes.items(), values, strict=True):
            if value.shape != shape or value.dtype != dtype:
                raise ValueError(f"{name} is {value.dtype}{value.shape}, declared {dtype}{shape}")
            file.write(np.ascontiguousarray(value).view(np.uint8).reshape(-1).data)
    return end
