"""Task rewards: is the final answer of a response right? Host side, with the device waiting."""

import math
import re
from collections.abc import Sequence

import jax
import numpy as np

from opd_jax import sharding

# Where a response says its answer, the last occurrence of the first form that it has.
ANSWER_FORMS = (
    re.compile(r"<answer>(.*?)</answer>", re.DOTALL),  # reasoning-gym
    re.compile(r"####\s*(.+)"),  # GSM8K
    re.compile(r"\banswer(?:\s+is|\s*:)\s*:?\s*(.+)", re.IGNORECASE),
)
NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?!\w)")
EXPRESSION = re.compile(r"[\\/^*+]|\d[a-zA-Z]")
RELATIVE_TOLERANCE = 1e-6


def grade(response: str, answer: str) -> float:
    """1.0 if the final answer of `response` equals the reference `answer`, else 0.0.

    The final answer is what the last \\boxed{} holds, else what stands in <answer> tags, after #### or
    after "answer is"; without any of these, the last number for a numeric reference and the last line for
    any other. Numbers are compared as numbers (1,200 is 1200.0, a currency or per cent sign means nothing),
    words without case and closing punctuation, and the rest as expressions, by math-verify.
    """
    said = _said(response)
    wanted = _number(answer)
    if said is None and wanted is not None:
        return float(_is_close(wanted, _last_number(response)))
    final = said if said is not None else (response.strip().splitlines() or [""])[-1]
    if wanted is not None and _is_close(wanted, _number(final)):
        return 1.0
    return float(_plain(final) == _plain(answer) or _same_expression(final, answer))


def reward_batch(mesh, tokenizer, answers: Sequence[str | None], rollouts) -> jax.Array:
    """Decodes and grades a batch of responses: reward_B on the mesh, NaN where there is no answer.

    One host round trip: it waits for the sampler, and each process grades its own rows.

    Args:
      answers: the reference answers of this process's rows.
      rollouts: Rollouts on the mesh.
    """
    tokens_BL, mask_BT = sharding.local_values((rollouts.tokens_BL, rollouts.mask_BT))
    response_BT = tokens_BL[:, -mask_BT.shape[1] :]
    reward_B = np.full(len(answers), np.nan, np.float32)
    for b, answer in enumerate(answers):
        if answer is not None:
            text = tokenizer.decode(response_BT[b][mask_BT[b]], skip_special_tokens=True)
            reward_B[b] = grade(text, answer)
    return sharding.put_batch(mesh, reward_B)


def _said(response: str) -> str | None:
    """What the response marks as its answer, or None."""
    start = response.rfind("\\boxed{")
    if start >= 0:
        start += len("\\boxed{")
        depth = 1
        for end in range(start, len(response)):
            depth += {"{": 1, "}": -1}.get(response[end], 0)
            if depth == 0:
                return response[start:end]
    for form in ANSWER_FORMS:
        found = form.findall(response)
        if found:
            return found[-1]
    return None


def _is_close(wanted: float, got: float | None) -> bool:
    return got is not None and math.isclose(wanted, got, rel_tol=RELATIVE_TOLERANCE)


def _number(text: str) -> float | None:
    """The value of a short text that ends in a plain number, units allowed; None for an expression."""
    text = _without_signs(text).split("=")[-1]
    return None if EXPRESSION.search(text) else _last_number(text)


def _without_signs(text: str) -> str:
    """The text without currency and per cent signs, and LaTeX's markup of words."""
    return re.sub(r"\\text\{([^{}]*)\}", r"\1", re.sub(r"\\?[$%]", "", text))


def _last_number(text: str) -> float | None:
    """The last number that is no part of a word, or None."""
    text = _without_signs(text)
    found = [match.group() for match in NUMBER.finditer(text) if any(c.isdigit() for c in match.group())]
    return float(found[-1].replace(",", "")) if found else None


def _plain(text: str) -> str:
    return text.strip().strip("$").rstrip(".!").strip().casefold()


def _same_expression(said: str, answer: str) -> bool:
    import math_verify  # with sympy, a second to import

    def parse(text):
        return math_verify.parse("\\boxed{" + text.replace("\\$", "").strip().strip("$.") + "}")

    return bool(math_verify.verify(parse(answer), parse(said)))
