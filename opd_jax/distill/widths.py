"""Micro-batches as wide as their rows need: rows sorted by length, a few static widths, one program.

Real responses are ragged, and a forward pass over T positions costs the same whatever is in them. So the rows
of each device are sorted by the positions that they need, cut into micro-batches of neighbours, and each
micro-batch is computed at the smallest width that holds it (`lax.switch`; the choice is made on the device).
Rows do not leave their device, and every device has long and short ones.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

MULTIPLE = 128  # widths are multiples of it: a TPU register's lanes, and a block of splash attention
OF_PROMPTS = 32  # the multiple for prompts, which are shorter


def of(config) -> tuple[int, ...]:
    """The widths of a config below rollout.max_tokens, ascending."""
    return rounded(tuple(config.train.widths), config.rollout.max_tokens)


def rounded(shares: Sequence[float], full: int, multiple: int = MULTIPLE) -> tuple[int, ...]:
    """Shares of `full` positions, rounded up to multiples; those below `full`, ascending."""
    found = {-(-int(share * full) // multiple) * multiple for share in shares}
    return tuple(sorted(width for width in found if 0 < width < full))


def last_position(mask_BT):
    """Positions of each row up to its last True, [B] int32."""
    t = mask_BT.shape[1]
    return jnp.where(mask_BT, jnp.arange(1, t + 1)[None], 0).max(axis=1).astype(jnp.int32)


def narrowest(widths: Sequence[int], need_B, at_width: Callable[[int], Callable[[Any], Any]], piece):
    """at_width(w)(piece) for the smallest width w that holds the needs of all rows.

    Args:
      widths: ascending; the last holds any row.
      at_width: returns a function for each width; all must return the same shapes and dtypes.

    Returns:
      (the result, the width as float32).
    """
    if len(widths) == 1:
        return at_width(widths[0])(piece), jnp.float32(widths[0])
    static = jnp.array(widths, jnp.int32)
    choice = (need_B.max() > static[:-1]).sum()
    result = jax.lax.switch(choice, [at_width(width) for width in widths], piece)
    return result, static[choice].astype(jnp.float32)
