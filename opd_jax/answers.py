"""Is the final answer of a response right? Text alone, one pair at a time.

This may take any time and memory on a hostile expression: `grading` runs it in processes that it can end.
"""

import math
import re

BRACE = re.compile(r"\\[{}]|(\\(?:boxed|fbox)\s*)?\{|\}")
BARE_BOX = re.compile(r"\\boxed\s+([^\s{$.,]+)")
MARKED = re.compile(r"\banswer(?:\s+is|\s*:)\s*:?\s*", re.IGNORECASE)
MARKUP = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf|operatorname|mbox)\s*\{([^{}]*)\}")
SPACING = re.compile(r"(?<!\\)\\[,!;: ]|~|\\q?quad(?![a-z])|\\(?:left|right|displaystyle)(?![a-z])")
SENTENCE_END = re.compile(r"[.!](?=\s|$)|,?\s+(?:because|since|so that|as)\s|;\s")
UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?:[eE][+-]?\d+)?"
NUMBER = re.compile(rf"(?<![\w.])-?{UNSIGNED}(?![\w^])")
QUANTITY = re.compile(rf"([-+]?{UNSIGNED})(\s*)([^\d\s].*)?")
CHOICE = re.compile(r"\(?([A-J])\)?[.:]?")
CHOSEN = re.compile(r"(?:option|choice|answer)?\s*(?:\(([A-J])\)|([A-J])(?=$|[).:,]|\s+(?![a-z])))", re.I)
WORDS = re.compile(r"[^\W\d_]{2,}(?:[\s'-]+[^\W\d_]+)*")
POWER_OF_TEN = re.compile(r"(?:([-+]?[\d.]+)\s*(?:\\times|\\cdot|×|\*)\s*)?10\s*\^\s*\{?\s*(-?\d+)\s*\}?")
BOUND = re.compile(r"[a-zA-Z]\s*(<|≤|>|≥)([^<>=≤≥]+)")
CHAIN = re.compile(r"([^<>=≤≥]+?)(<|≤)\s*[a-zA-Z]\s*(<|≤)([^<>=≤≥]+)")
LONGEST = 1000  # characters of a final answer that is read as an expression; no reference is that long
TOLERANCE = 1e-6  # relative, between two plain numbers

SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
# Letters straight after a number are a unit only if they are one of these: 5cm, but not 5x.
ATTACHED = re.compile(
    r"[mcdk]?m|in|ft|yd|mi|[mk]?g|lbs?|oz|m?[lL]|m?s|min|hr?s?|[kM]?Hz|k?[JWN]|kWh|k?Pa|k?V|mol|[KCF]"
    r"|[mk]ph|rad|deg|km/h|m/s"
)
# Words after a number that are mathematics.
NO_UNIT = re.compile(r"pi|sqrt|sin|cos|tan|log|ln|exp|and|or|mod|to|[xyzn]|times|plus|minus|over")


def grade(response: str, answer: str) -> bool:
    """Whether the final answer of `response` equals the reference `answer`.

    The final answer is what the last \\boxed{} holds, else what stands in <answer> tags, after #### or
    after "answer is"; without any of these, the last number for a numeric reference and the last line for
    any other. A reference of one letter from A to J is a choice. Numbers are compared as numbers, without
    units, currency and thousands separators; a per cent sign on one side alone may or may not count.
    Words are compared without case and closing punctuation, and the rest as expressions, by math-verify.
    """
    answer = reference(answer)
    said = final_answers(response)
    if CHOICE.fullmatch(_clean(answer)):
        return _chosen(said[-1] if said else None, response) == CHOICE.fullmatch(_clean(answer))[1]
    if not said:
        if _quantity(answer)[0] is not None:
            return _same_quantity((_last_number(response), False), _quantity(answer))
        said = [(response.strip().splitlines() or [""])[-1]]
    return same(said[-1], answer) or (len(said) > 1 and same(", ".join(said), answer))


def reference(answer: str) -> str:
    """The reference itself, where the data has a worked solution that boxes it or ends in #### (GSM8K)."""
    if "####" in answer or "\\boxed" in answer:
        return (final_answers(answer) or [answer])[-1].strip()
    return answer


def same(said: str, answer: str) -> bool:
    """Whether two final answers, without the text around them, are equal."""
    said, answer = _clean(said), _clean(answer)
    if not said:
        return not answer
    if said == answer or _plain(said) == _plain(answer):
        return True
    quantities = _quantity(said), _quantity(answer)
    if None not in (quantities[0][0], quantities[1][0]):
        return _same_quantity(*quantities)
    if WORDS.fullmatch(_plain(answer)):
        # "Yes, it is": the first word answers a question of yes or no.
        first = re.split(r"[\s,.;:]", _plain(said), maxsplit=1)[0]
        return _plain(answer) in ("yes", "no", "true", "false") and first == _plain(answer)
    if WORDS.fullmatch(_plain(said)) and not any(map(NO_UNIT.fullmatch, _plain(said).split())):
        return False
    return _same_expression(said, answer)


def final_answers(response: str) -> list[str]:
    """What the response marks as its answer, [] where nothing is marked.

    Several only where the line of the last box has more than one box. Linear in the response's length.
    """
    boxes = _boxes(response)
    if boxes:
        line_start = response.rfind("\n", 0, boxes[-1][0]) + 1
        return [text for start, text in boxes if start >= line_start]
    text = response.replace("**", "").replace("__", "")
    end = text.rfind("</answer>")  # reasoning-gym
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return [text[start + len("<answer>") : end]]
    start = text.rfind("####")  # GSM8K
    if start >= 0 and text[start:].strip("# \n"):
        return [text[start:].strip("# \n").partition("\n")[0]]
    for match in reversed(list(MARKED.finditer(text))):
        if match.end() < len(text):
            return [_first_sentence(text[match.end() :].partition("\n")[0])]
    return []


def _boxes(response: str) -> list[tuple[int, str]]:
    """(start, content) of every closed box, in order of their starts."""
    boxes, opened = [], []
    for match in BRACE.finditer(response):
        brace = match.group()
        if brace == "}" and opened:
            start, inside = opened.pop()
            if start is not None:
                boxes.append((start, response[inside : match.start()]))
        elif brace.endswith("{") and brace != "\\{":
            opened.append((match.start() if match[1] else None, match.end()))
    boxes += [(match.start(), match[1]) for match in BARE_BOX.finditer(response)]
    return sorted(boxes)


def _first_sentence(text: str) -> str:
    """The text up to the end of its first sentence; "3.5" and "(1, 2)" have none inside."""
    return SENTENCE_END.split(text, maxsplit=1)[0]


def _clean(text: str) -> str:
    """The text without delimiters of mathematics, spacing commands and markup of words."""
    text = text.strip().replace("\\$", "").replace("{,}", ",").replace("−", "-").replace(",\\!", ",")
    text = text.replace("\\varnothing", "\\emptyset").replace("\\dfrac", "\\frac")
    text = re.sub(r"(\d)\\,(?=\d{3}(?!\d))", r"\1,", text)
    text = re.sub(r"\\[()\[\]]", " ", text) if re.match(r"\\[(\[]", text) else text
    text = SPACING.sub(" ", text)
    text = MARKUP.sub(r" \1 ", text).replace("$", "").replace("\\%", "%")
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"(?:[.,;]|(?<=[a-z])!)$", "", text).rstrip()


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().strip("\"'`*").rstrip(".!").strip().casefold()


def _chosen(said: str | None, response: str) -> str | None:
    """The letter of the choice that was made, or None."""
    if said is not None:
        match = CHOSEN.match(_clean(said))
        return (match[1] or match[2]).upper() if match else None
    lines = response.replace("**", "").strip().splitlines() or [""]
    alone = CHOICE.fullmatch(_clean(lines[-1])) or re.match(r"\(?([A-J])\)\s", lines[-1])
    found = [alone[1]] if alone else re.findall(r"\(([A-J])\)|\b(?:option|choice) ([A-J])\b", lines[-1])
    return "".join(found[-1]) if found else None


def _quantity(text: str) -> tuple[float | None, bool]:
    """(value, whether in per cent) of one number with or without a unit; (None, False) for all else."""
    text = re.sub(r"[$€£]", "", _clean(text)).strip()
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|°|\\degree", " degrees", text)
    text = re.split(r"(?<![<>!=])=(?!=)", text)[-1].strip()
    power = POWER_OF_TEN.match(text)
    if power:
        text = f"{power[1] or 1}e{power[2]}{text[power.end() :]}"
    match = QUANTITY.fullmatch(text)
    if not match or not any(c.isdigit() for c in match[1]):
        return None, False
    value, unit = float(match[1].replace(",", "")), (match[3] or "").strip()
    if unit.startswith("%") or re.match(r"per\s?cent", unit):
        return (value, True) if unit in ("%", "percent", "per cent") else (None, False)
    if math.isinf(value):
        return None, False
    scale, _, rest = unit.partition(" ")
    if scale.lower() in SCALES:
        value, unit = value * SCALES[scale.lower()], rest
    return (value, False) if not unit or _is_unit(unit, attached=not match[2]) else (None, False)


def _is_unit(unit: str, attached: bool) -> bool:
    words = re.findall(r"[^\W\d_]+", unit)
    if not re.fullmatch(r"[^\W\d_][\w^{}²³/·' .-]*", unit) or any(map(NO_UNIT.fullmatch, words)):
        return False
    if re.search(r"\d", re.sub(r"\^\{?-?\d\}?", "", unit)):  # more than an exponent
        return False
    bare = re.sub(r"\^\{?-?\d\}?|[²³]", "", unit).strip()
    return bool(ATTACHED.fullmatch(bare)) or (not attached and len(words[0]) > 1)


def _same_quantity(said: tuple[float | None, bool], answer: tuple[float | None, bool]) -> bool:
    """Whether two results of `_quantity` are the same number; 50% is 50 and 0.5, but 0.5% is not 50%."""
    (said_value, said_percent), (value, percent) = said, answer
    if said_value is None or value is None:
        return False
    if math.isclose(value, said_value, rel_tol=TOLERANCE):
        return True
    if said_percent == percent:
        return False
    said_value = said_value / 100 if said_percent else said_value * 100
    return math.isclose(value, said_value, rel_tol=TOLERANCE)


def _last_number(text: str) -> float | None:
    """The last number that is no part of a word or a difference, or None."""
    text = re.sub(r"\\?[$%€£]|\*\*", "", text)
    found = [match.group() for match in NUMBER.finditer(text) if any(c.isdigit() for c in match.group())]
    return float(found[-1].replace(",", "")) if found else None


def _same_expression(said: str, answer: str) -> bool:
    """Whether two expressions are equal, by math-verify; may take any time."""
    import math_verify  # with sympy, a second to import

    def parse(text):
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) if "(" not in text and "{" not in text else text
        return math_verify.parse("\\boxed{" + _interval(text) + "}", parsing_timeout=None)

    # "22/7 ≈ 3.14" says the first of the two.
    said = re.split(r"\\approx|≈", said)[0]
    if len(said) > LONGEST:
        return False
    return bool(math_verify.verify(parse(answer), parse(said), timeout_seconds=None))


def _interval(text: str) -> str:
    """The interval that x > 2 or 2 <= x < 5 describes; any other text as it is."""
    plain = re.sub(r"\\leq?(?![a-z])|\\leqslant|<=", "≤", text)
    plain = re.sub(r"\\geq?(?![a-z])|\\geqslant|>=", "≥", plain)
    plain = plain.replace("\\lt", "<").replace("\\gt", ">")
    if chain := CHAIN.fullmatch(plain):
        low, left, right, high = chain.groups()
    elif bound := BOUND.fullmatch(plain):
        sign, value = bound.groups()
        low, left, right, high = (
            ("-\\infty", "<", sign, value) if sign in "<≤" else (value, sign, "<", "\\infty")
        )
    else:
        return text
    return f"{'[' if left in '≤≥' else '('}{low.strip()},{high.strip()}{']' if right == '≤' else ')'}"
