"""Is the final answer of a response right? Compares text, one pair at a time.

A hostile expression may take any amount of time and memory, so `grading` runs this in processes that it can
kill.
"""

import fractions
import re
import unicodedata

from opd_jax.evaluation import quantities

BRACE = re.compile(r"\\[{}]|(\\(?:boxed|fbox)\s*)?\{|\}")
BARE_BOX = re.compile(r"\\boxed\s+([^\s{$.,]+)")
ADVERB = r"(?:\s+(?:therefore|thus|hence)\b,?)?"
MARKED = re.compile(rf"\banswer(?:\s+is|\s*:){ADVERB}\s*(?::|\.\.\.|…)?\s*", re.IGNORECASE)
STATED = re.compile(rf"\b(?:is|are|equals?|get|obtain){ADVERB}\s*:?\s+")
MARKUP = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf|operatorname|mbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
SPACING = re.compile(r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-z])|\\(?:left|right|displaystyle)(?![a-z])")
SENTENCE_END = re.compile(r"[.!](?=\s|$)|,?\s+(?:because|since|so that|as)\s|;\s")
SENTENCE_BREAK = re.compile(r"(?<=[.!?])\s+|\n")
TYPED_PI = re.compile(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])")
UNIT_FRACTION = re.compile(r"\\frac\s*" + r"\s*\{\s*\\(?:text|mathrm)\s*\{([^{}]*)\}\s*\}" * 2)
ORDINAL = re.compile(r"(\d+)\s*(?:\^\s*\{\s*(?:st|nd|rd|th)\s*\}|\^?\s*(?:st|nd|rd|th))")
SUPERSCRIPT = re.compile(r"[⁰¹²³⁴-⁹⁻]+")
ROOT = re.compile(r"(?:√|(?<![\\a-zA-Z])sqrt)\s*(?:\(([^()]*)\)|(\d+))")
HALF_DAY = re.compile(r"(?<=\d)\s*([ap])\.?m\b\.?")
NUMBER = re.compile(rf"(?<![\w.^/{{])-?{quantities.UNSIGNED}(?![\w^])")  # not in an exponent or argument
CHOICE = re.compile(r"\(?([A-J])\)?[.:]?")
LEAD = re.compile(r"(?:(?:the|my|our)\s+)?(?:final\s+)?answer(?:\s+is|\s*:)\s*:?\s*", re.IGNORECASE)
CHOSEN = re.compile(r"(?:option|choice|answer)?\s*(?:\(([A-J])\)|([A-J])(?=$|[).:,]|\s+(?![a-z])))", re.I)
OPTION = re.compile(r"\(?([A-J])[).:]\s")
CHOSEN_BY = re.compile(
    rf"\b(?i:option|choice|answer)\s+(?:is|must be){ADVERB}\s*:?\s+\(?([A-J])\b(?!\)? or )"
)
CHOSEN_LAST = re.compile(r"\b(?:is|be)\s+\(?([A-J])\)?[\s.,]*$")
WORDS = re.compile(r"[^\W\d_]{2,}(?:[\s'-]+[^\W\d_]+)*")
PER_CENT = re.compile(r"\s*(?:%|\bper\s?cent)$")
BOUND = re.compile(r"[a-zA-Z]\s*(<|≤|>|≥)([^<>=≤≥]+)")
BOUNDED = re.compile(r"([^<>=≤≥]+)(<|≤|>|≥)\s*([a-zA-Z])")
TURNED = str.maketrans("<>≤≥", "><≥≤")
CHAIN = re.compile(r"([^<>=≤≥]+?)(<|≤)\s*[a-zA-Z]\s*(<|≤)([^<>=≤≥]+)")
OR = re.compile(r"\s+or\s+|\\lor(?![a-z])|\\cup(?![a-z])")
REPEATING = re.compile(r"(?<!\d)(-?)(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
BASED = re.compile(r"([0-9A-Z]+)_\{?(\d+)\}?")
CONGRUENT = re.compile(r"(?:[a-z]\s*)?(?:\\equiv\s*)?(-?\d+)\s*\\p?mod\s*\{?\s*(\d+)\s*\}?")
EQUATION = re.compile(r"([^=<>≤≥]+)=([^=<>≤≥]+)")
CHOICES = re.compile(r"\(?[A-J]\)?(?:(?:,|,? and| or|\s)\s*\(?[A-J]\)?)+")
BOLD_END = re.compile(r"\*\*([^*]+)\*\*[.!]?\s*$")
NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NUMBER_WORDS += tuple(f"{ten}-{one}".removesuffix("-zero") for ten in TENS for one in NUMBER_WORDS[:10])
THOUGHT_END = re.compile(r"</(?:think|thinking|thought|reasoning)>")
THOUGHT = re.compile(r"<(?:think|thinking|thought|reasoning)>")
ABOUT = re.compile(r"^(?:approximately|about|around|roughly|nearly|exactly|just|only|simply)\s+", re.I)
AMOUNT = "half|third|quarter|fifth|tenth|dozen|hundred|thousand|million"
NUMBERS = "|".join(NUMBER_WORDS)
VALUE = rf"(?:an?(?=\s(?:{AMOUNT}))|half|quarters?|thirds?|plus|minus|times|{NUMBERS})\b|[-−+±√\\(\d$%]"
ASIDE = re.compile(  # what no longer says the number, if no value follows
    rf",\s+(?!or\b|and\b|{VALUE})|\s+and\s+(?!or\b|{VALUE})"
    r"|,?\s+or\s+(?=[\w -]+\s(?:dozens?|scores?|pairs?)\b)"
    r"|\s+\((?!mod|or|base)(?=[a-z])|\s+(?:which|so|altogether|in total)\b",
    re.IGNORECASE,
)
NO_ANSWER = re.compile(
    r"\b(?:do not|don't|cannot|can't|could not|couldn't) (?:know|solve|tell|determine|find)\b"
)
DOLLARS = re.compile(r"\s*(?:\\\$|\$(?!.*\$))\s*[-\d.]")  # not a formula between dollar signs
ELLIPSIS = re.compile(r"\\[lc]?dots[cbmio]?(?![a-z])|…|\.\.\.")
OTHERWISE = re.compile(r",?\s+or\s+")
FORMULA = re.compile(r"\$([^$]+)\$")
LISTED = re.compile(rf",\s*(?:{ELLIPSIS.pattern})\s*,")
TINY = 1e-3  # math-verify compares six decimals, which say little of numbers below this
TOLERANCE = 2e-3  # relative, of tiny numbers
NAME = re.compile(r"[a-zA-Z](?:\([a-zA-Z]\))?")
LONGEST = 1000  # most characters of a final answer; no reference is longer


def grade(response: str, answer: str) -> bool:
    """Whether the final answer of `response` equals the reference `answer`.

    A thought between <think> tags is no part of the response. A thought that never ends has no answer. The
    final answer is the content of the last \\boxed{}, or else the text in <answer> tags, after #### or after
    "answer is". If the response marks no answer, it depends on the reference:

    - a number: the last number of the response;
    - several numbers with spaces between them: the numbers of the last sentence;
    - anything else: the last line, or what follows its last "is".

    A reference of one letter from A to J is a choice. Numbers are compared as numbers, without currency signs
    and thousands separators, and with `quantities.same` if they have units. A per cent sign on only one side
    is allowed. Words are compared without case and closing punctuation. math-verify compares everything else
    as expressions.
    """
    answer, reply = reference(answer), spoken(response)
    if reply is None:
        return False
    said = final_answers(reply)
    if choice := CHOICE.fullmatch(_clean(answer)):
        return _chosen(said[-1] if said else None, reply) == choice[1]
    if not said:
        if quantity := quantities.read(_clean(answer)):
            last = (reply.strip().splitlines() or [""])[-1]
            if LISTED.search(last):
                return False  # its last number ends a list
            if NO_ANSWER.search(SENTENCE_BREAK.split(last)[-1]):
                return False
            number = _last_number(reply)
            if number is None:
                return False
            return quantities.same(quantities.Quantity(number, exact=number.is_integer()), quantity)
        if len(answer.split()) > 1 and all(map(NUMBER.fullmatch, answer.split())):
            return _numbers(SENTENCE_BREAK.split(reply.strip())[-1]) == _numbers(answer)
        line = (reply.strip().splitlines() or [""])[-1]
        bold = BOLD_END.search(line)
        line = bold[1] if bold else line
        stated = _first_sentence(STATED.split(line)[-1])
        formulas = FORMULA.findall(stated)
        return (
            same(line, answer) or same(stated, answer) or (len(formulas) == 1 and same(formulas[0], answer))
        )
    if len(said) > 1 and same(", ".join(said), answer):
        return True
    if "\\boxed" in reply or quantities.read(_clean(answer)) is None:
        return same(said[-1], answer)
    # "The answer is 36, altogether, so the shop keeps that many."
    text = ABOUT.sub("", said[-1].strip())
    head = ASIDE.split(text, maxsplit=1)[0]
    first, *rest = OTHERWISE.split(_first_sentence(text), maxsplit=1)  # "2.5 hours, or 150 minutes"
    one, other = quantities.read(_clean(first)), quantities.read(_clean(rest[0])) if rest else None
    if one and other and quantities.same(one, other):
        head = first
    return same(head, answer)


def spoken(response: str) -> str | None:
    """The response without its thoughts; None if a thought never ends."""
    *_, response = THOUGHT_END.split(response)
    return None if THOUGHT.search(response) else response


def reference(answer: str) -> str:
    """The reference itself, if the data has a worked solution that boxes it or ends in #### (GSM8K)."""
    if "####" in answer or "\\boxed" in answer:
        return (final_answers(answer) or [answer])[-1].strip()
    return answer


def same(said: str, answer: str) -> bool:
    """Whether two final answers, without the text around them, are equal."""
    if len(said) > LONGEST:
        return False
    said = LEAD.sub("", said, count=1)
    dollars = bool(DOLLARS.match(said)), bool(DOLLARS.match(answer))
    said, answer = _clean(said), _clean(answer)
    if not said:
        return not answer
    if said == answer or _plain(said) == _plain(answer):
        return True
    for pattern, agree in ((BASED, _same_in_base), (CONGRUENT, _congruent)):
        left, right = pattern.fullmatch(said), pattern.fullmatch(answer)
        if left and right:
            return agree(left, right)
    said, answer = _in_digits(said), _in_digits(answer)
    left, right = EQUATION.fullmatch(said), EQUATION.fullmatch(answer)
    if left and right and _plain(left[1]) != _plain(right[1]):
        return _same_equation(left, right)
    left, right = HALF_DAY.search(_plain(said)), HALF_DAY.search(_plain(answer))
    if left and right and left[1] != right[1]:
        return False
    said_quantity, quantity = (
        value and value._replace(unit=value.unit or "dollars" * dollar)
        for value, dollar in zip(map(quantities.read, (said, answer)), dollars, strict=True)
    )
    if said_quantity and quantity:
        return quantities.same(said_quantity, quantity)
    if WORDS.fullmatch(_plain(answer)):
        # "Yes, it is": the first word answers a question of yes or no.
        first = re.split(r"[\s,.;:]", _plain(said), maxsplit=1)[0]
        return _plain(answer) in ("yes", "no", "true", "false") and first == _plain(answer)
    if WORDS.fullmatch(_plain(said)) and not any(map(quantities.NO_UNIT.fullmatch, _plain(said).split())):
        return False
    return _same_expression(said, answer)


def final_answers(response: str) -> list[str]:
    """The answers that the response marks, [] if it marks none.

    There are several only if the line of the last box has several boxes. If no box is closed, the response
    was cut off inside one, and the part that is there is the answer. Takes time linear in the response's
    length.
    """
    boxes, cut = _boxes(response)
    if cut is not None and not boxes:
        return [response[cut:].partition("\n")[0]]
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


def _boxes(response: str) -> tuple[list[tuple[int, str]], int | None]:
    """Returns ((start, content) of each closed box, in order; start of the content of the last open box)."""
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
    return sorted(boxes), next((inside for start, inside in reversed(opened) if start is not None), None)


def _first_sentence(text: str) -> str:
    """The text up to the end of its first sentence; "3.5" and "(1, 2)" contain no end."""
    return SENTENCE_END.split(text, maxsplit=1)[0]


def _clean(text: str) -> str:
    """The text without math delimiters, spacing commands and text markup."""
    text = text.strip().replace("\\$", "").replace("{,}", ",").replace("\\!", "")
    text = text.replace("\\varnothing", "\\emptyset").replace("\\dfrac", "\\frac")
    text = SUPERSCRIPT.sub(lambda match: f"^{{{unicodedata.normalize('NFKC', match[0])}}}", text)
    text = ROOT.sub(lambda match: f"\\sqrt{{{match[1] or match[2]}}}", text.replace("−", "-"))
    text = TYPED_PI.sub(r"\\pi", UNIT_FRACTION.sub(r" \1/\2 ", text))
    text = re.sub(r"(\\sqrt(?:\[\d+\])?)\s*(\d+)", r"\1{\2}", text)  # \sqrt 51 means the root of 51, not of 5
    text = re.sub(r"(\d)\\,(?=\d{3}(?!\d))", r"\1,", text)
    text = re.sub(r"\\[()\[\]]", " ", text) if re.match(r"\\[(\[]", text) else text
    text = REPEATING.sub(_repeating, SPACING.sub(" ", text))
    text = MARKUP.sub(r" \1 ", text).replace("$", "").replace("\\%", "%")
    text = re.sub(r"\s+", " ", text).strip()
    if ordinal := ORDINAL.fullmatch(text):
        return ordinal[1]
    return re.sub(r"(?:[.,;]|(?<=[a-z])!)$", "", text).rstrip()


def _plain(text: str) -> str:
    """The text without case, quotes, a word's closing punctuation (7! stays) and a leading article."""
    text = re.sub(r"\s+", " ", text).strip().strip("\"'`*").casefold()
    text = HALF_DAY.sub(r" \1m", text)
    text = re.sub(r"(?<=[^\W\d_])[.!]+$|\.+$", "", text).strip()
    return re.sub(r"^(?:an?|the) (?=[^\W\d_]{2})", "", text)


def _in_digits(text: str) -> str:
    """Converts a number below 100 in words to digits; returns other text unchanged."""
    word = _plain(text).replace(" ", "-")
    return str(NUMBER_WORDS.index(word)) if word in NUMBER_WORDS else text


def _chosen(said: str | None, response: str) -> str | None:
    """The letter of the chosen option, or None."""
    if said is not None:
        if CHOICES.fullmatch(_clean(said)):
            return None  # more than one
        match = CHOSEN.match(_clean(said))
        if not match and (last := CHOSEN_LAST.search(_clean(said))):
            return last[1]
        return (match[1] or match[2]).upper() if match else None
    lines = response.replace("**", "").strip().splitlines() or [""]
    listed = sum(bool(OPTION.match(line)) for line in lines) > 1  # a list of options chooses none
    alone = CHOICE.fullmatch(_clean(lines[-1])) or (None if listed else OPTION.match(lines[-1]))
    if alone:
        return alone[1]
    if chosen := CHOSEN_BY.findall(lines[-1]):
        return chosen[-1]
    found = list(re.finditer(r"\(([A-J])\)|\b(?:[oO]ption|[cC]hoice) ([A-J])\b", lines[-1]))
    # A line that breaks off after naming a choice had not yet decided.
    if not found or not re.match(r".*[.!)\]]\s*$|\s*$", lines[-1][found[-1].end() :]):
        return None
    return found[-1][1] or found[-1][2]


def _last_number(text: str) -> float | None:
    """The last number that is not part of a word or a difference, or None."""
    return (_numbers(text) or [None])[-1]


def _numbers(text: str) -> list[float]:
    """All such numbers, in order."""
    text = quantities.decimal(re.sub(r"[%€£]|\*\*|__", "", _clean(text)))
    found = [match.group() for match in NUMBER.finditer(text) if any(c.isdigit() for c in match.group())]
    return [float(number.replace(",", "")) for number in found]


def _parse(text: str) -> list:
    """The expressions that math-verify reads, [] if none."""
    import math_verify

    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) if "(" not in text and "{" not in text else text
    boxed = "\\boxed{" + _interval(text) + "}"
    # None is documented and means no limit.
    return math_verify.parse(boxed, parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _same_equation(said: re.Match, answer: re.Match) -> bool:
    """Whether two equations with different left sides are equivalent; may take any amount of time."""
    import sympy

    if all(NAME.fullmatch(side[1].strip()) for side in (said, answer)):
        # f(x) = 2x is y = 2x, but x = 4 is not y = 4.
        return not quantities.read(answer[2]) and same(said[2], answer[2])
    sides = [[_parse(side) for side in equation.groups()] for equation in (said, answer)]
    if not all(side and isinstance(side[0], sympy.Expr) for pair in sides for side in pair):
        return same(said[2], answer[2])
    one, other = (left[0] - right[0] for left, right in sides)
    if one.free_symbols != other.free_symbols or other == 0:
        return False
    ratio = sympy.simplify(one / other)
    return bool(ratio.is_number and ratio.is_finite and ratio != 0)


def _same_expression(said: str, answer: str) -> bool:
    """Whether math-verify finds two expressions equal; may take any amount of time."""
    import math_verify  # the import takes a second
    import sympy

    exact = "." not in said + answer

    def equal(one, other):
        same = bool(math_verify.verify(one, other, timeout_seconds=None))
        return same and not _far_apart(one, other, exact)

    # "22/7 ≈ 3.14" means the first of the two.
    said = re.split(r"\\approx|≈", re.sub(r"^(?:\\approx|≈)", "", said))[0].strip()
    if ELLIPSIS.search(said) or ELLIPSIS.search(answer):  # math-verify would read the last item alone
        return _listed(said) == _listed(answer)
    # math-verify would divide only the fraction of a mixed number by 100, so per cent signs are removed
    # first.
    said_bare, bare = PER_CENT.sub("", said), PER_CENT.sub("", answer)
    said_values, values = _parse(said_bare), _parse(bare)
    if equal(values, said_values):
        return True
    if (said_bare == said) == (bare == answer):
        return False
    percents = values if bare != answer else said_values
    divided = [value / 100 for value in percents if isinstance(value, sympy.Expr)]
    return equal(divided, said_values) if bare != answer else equal(values, divided)


def _listed(text: str) -> str:
    """A list with an ellipsis, without spaces."""
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", ELLIPSIS.sub("…", text))
    return re.sub(r"\s", "", text)


def _far_apart(one: list, other: list, exact: bool) -> bool:
    """Whether two lists of one number each differ, though math-verify takes them for the same.

    Args:
      exact: neither is a decimal, so that any difference counts; else that of tiny numbers does.
    """
    import sympy

    values = [values[0] for values in (one, other) if values]
    reals = [value for value in values if isinstance(value, sympy.Expr) and value.is_number and value.is_real]
    if len(reals) < 2:
        return False
    left, right = (value.evalf(60) for value in reals)
    apart, size = abs(left - right), max(abs(left), abs(right))
    if exact:
        return bool(apart > size * 1e-40)
    return bool(size < TINY and apart > TOLERANCE * size)


def _same_in_base(said: re.Match, answer: re.Match) -> bool:
    """Whether two numbers with bases are equal, such as 1011_2 and 13_8."""
    try:
        value, other = (int(digits, int(base)) for digits, base in (said.groups(), answer.groups()))
    except ValueError:  # no such digit or base
        return False
    return value == other


def _congruent(said: re.Match, answer: re.Match) -> bool:
    """Whether two residues are equal, such as 5 mod 12 and 17 mod 12."""
    (value, modulus), (other, other_modulus) = (map(int, match.groups()) for match in (said, answer))
    return modulus == other_modulus and modulus > 0 and (value - other) % modulus == 0


def _repeating(match: re.Match) -> str:
    """A repeating decimal as a fraction."""
    sign, whole, fixed, period = match.groups()
    scale = 10 ** len(fixed)
    value = fractions.Fraction(int(whole + fixed or 0), scale)
    value += fractions.Fraction(int(period), scale * (10 ** len(period) - 1))
    return f"{sign}\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _interval(text: str) -> str:
    """Writes x > 2 or 2 <= x < 5 as an interval, or several as a union; returns other text unchanged."""
    parts = OR.split(text)
    if len(parts) > 1 and all(_one_interval(part.strip()) != part.strip() for part in parts):
        return "\\cup".join(_one_interval(part.strip()) for part in parts)
    return _one_interval(text)


def _one_interval(text: str) -> str:
    plain = re.sub(r"\\leq?(?![a-z])|\\leqslant|<=", "≤", text)
    plain = re.sub(r"\\geq?(?![a-z])|\\geqslant|>=", "≥", plain)
    plain = plain.replace("\\lt", "<").replace("\\gt", ">")
    turned = BOUNDED.fullmatch(plain)
    if turned and not BOUND.fullmatch(plain):
        plain = "".join(reversed(turned.groups())).translate(TURNED)
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
