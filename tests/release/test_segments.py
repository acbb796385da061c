"""Segments on device against NLTK's own tokenizers on the decoded text, over real vocabularies."""

import functools
import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from nltk.tokenize import LineTokenizer
from nltk.tokenize.punkt import PunktLanguageVars, PunktSentenceTokenizer, load_punkt_params

from benchmarks import held_out_texts, segment_texts
from benchmarks.segments import Comparison, Qwen3, SmolLM2, pad, segment
from opd_jax.errors import UserError
from opd_jax.models import tokenizers
from opd_jax.release.segments import nltk_segments, punkt, segments, sentences
from opd_jax.release.segments import words as word_table
from opd_jax.release.segments.tokens import WIDE_SPACES
from tests.golden import make_qwen3

ROWS, POSITIONS = 64, 128


@functools.cache
def load(name):
    return Comparison({"smollm2": SmolLM2, "qwen3": Qwen3}[name]())


@pytest.fixture(params=["smollm2", "qwen3"])
def comparison(request):
    return load(request.param)


def compare(comparison, texts):
    """Agreement over the texts, cut into responses of the shape that all tests here share."""
    return comparison.texts(texts, ROWS, POSITIONS)


def numbers(table, rows):
    """Segment numbers of each response, without the padding."""
    out_BT = np.asarray(segment(table, *pad(rows, ROWS, POSITIONS)))
    return [out_T[: len(ids)].tolist() for ids, out_T in zip(rows, out_BT, strict=False)]


def host_numbers(token_bytes, rows, span_tokenize):
    """The same by one of NLTK's tokenizers; special tokens are white space."""
    return [nltk_segments.token_numbers([token_bytes[i] or b" " for i in ids], span_tokenize) for ids in rows]


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
    'An option, eg. "--file" or the like. (It is defined.)\n    """\n\n    # Next.',
    "e.g. Foo., then more. Mr. Smith Jr., of U.S. Inc., said: see no. yes.-- no. '..--.. .--. -.",
    "Oui\u00a0! Non\u00a0? Bien.\u00a0Et alors. ![badge](a.b) ![x](y?) ok. !(no) ?) so",
    "",
    "...",
    ".",
    "no end at all",
]


def test_hand_made_texts_are_cut_as_nltk_cuts_them(comparison):
    found = compare(comparison, HAND)
    assert found.both > 70 and not found.different


SLICE = [
    ("reasoning-gym gsm_symbolic", 0.5),
    ("reasoning-gym codeio", 0.1),
    ("reasoning-gym jugs", 0.2),
    ("champ solutions (LaTeX)", 0.25),
    ("champ model answers", 0.05),
    ("fiction", 1.0),
    ("Python's manual", 0.2),
    ("docstrings", 0.1),
    ("code", 0.1),
    ("scrambled punctuation", 1.0),
    ("docstrings of mpmath (LaTeX)", 0.2),
    ("champ concepts and hints (LaTeX)", 0.2),
]


@pytest.mark.parametrize("kind, share", SLICE)
def test_texts_are_cut_as_nltk_cuts_them(comparison, kind, share):
    source = held_out_texts if kind in held_out_texts.SOURCES else segment_texts
    found = compare(comparison, source.documents(kind, share))
    assert found.both > 20
    assert found.precision >= 0.995 and found.recall >= 0.995, found.different[:5]


def test_qwen3s_tokenizer_json_has_the_bytes_and_sentences_of_the_golden_file(tmp_path):
    golden = json.loads((Path(__file__).parents[1] / "golden" / "qwen3.json").read_text("utf-8"))
    load("qwen3").vocabulary.tokenizer.save_pretrained(tmp_path)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    token_bytes = tokenizers.token_bytes(read)
    assert len(token_bytes) == 151_669 and make_qwen3.digest(token_bytes) == golden["bytes_sha256"]
    ids = [read.encode(text, add_special_tokens=False) for text in golden["texts"]]
    assert ids == golden["ids"] == [load("qwen3").vocabulary.encode(text) for text in golden["texts"]]
    table = segments.SegmentTable.from_tokenizer(read)
    assert numbers(table, ids) == golden["sentences"] == [load("qwen3").nltk.numbers(row) for row in ids]


def test_random_tokens_get_valid_numbers_and_those_of_nltk(comparison):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, POSITIONS + 1, ROWS)
    rows = [rng.integers(0, len(comparison.vocabulary.token_bytes), n).tolist() for n in lengths]
    for out in numbers(comparison.table, rows):
        assert sorted(set(out)) == list(range(len(set(out))))
    assert comparison.responses(rows, ROWS, POSITIONS).equal >= ROWS - 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-5, 200_000), max_size=POSITIONS), st.integers(0, 2**POSITIONS - 1))
def test_any_ids_under_any_mask_give_non_decreasing_numbers_from_zero(ids, holes):
    tokens_BT, mask_BT = pad([ids], ROWS, POSITIONS)
    mask_BT[0] &= [bool(holes >> i & 1) for i in range(POSITIONS)]
    out_BT = np.asarray(segment(load("smollm2").table, tokens_BT, mask_BT))
    assert (out_BT[~mask_BT] == -1).all()
    kept_T = out_BT[0][mask_BT[0]]
    assert (kept_T >= 0).all() and (np.diff(kept_T) >= 0).all()
    assert kept_T.size == 0 or kept_T.max() < POSITIONS


def test_the_end_token_belongs_to_the_last_sentence():
    smollm2 = load("smollm2")
    end = smollm2.vocabulary.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = [*smollm2.vocabulary.encode("One. Two."), end]
    assert numbers(smollm2.table, [ids]) == [[0, 0, 1, 1, 1]]
    assert smollm2.nltk.numbers(ids) == [0, 0, 1, 1, 1]


MAPPED = [
    # Tokens of one response, and the sentence of each.
    (["Yes", ".", " No", "."], [0, 0, 1, 1]),
    (["Yes", ".\n\n", "No", "."], [0, 0, 1, 1]),
    (["Yes", ".", "\n\n", "No", "."], [0, 0, 0, 1, 1]),
    (["\n", "Yes", ". ", " No"], [0, 0, 0, 1]),
    (["So", ' "No.', '"', " Yes"], [0, 0, 0, 1]),
    (["Yes", ".**", " ", "No"], [0, 0, 1, 1]),
    (["Yes", ".*", "*", " No", "."], [0, 0, 1, 1, 1]),
]


@pytest.mark.parametrize("pieces, expected", MAPPED)
def test_a_token_belongs_to_the_sentence_of_its_first_written_character(pieces, expected):
    vocabulary = sorted({piece.encode() for tokens, _ in MAPPED for piece in tokens})
    ids = [vocabulary.index(piece.encode()) for piece in pieces]
    assert numbers(segments.SegmentTable.from_token_bytes(vocabulary), [ids]) == [expected]
    assert nltk_segments.SentenceSplitter(vocabulary, punkt.load_parameters()).numbers(ids) == expected


def test_words_cut_into_any_tokens_give_the_same_sentences():
    """The same texts, one byte a token: every word, abbreviation and number spans tokens."""
    token_bytes = [bytes([i]) for i in range(256)]
    table = segments.SegmentTable.from_token_bytes(token_bytes)
    # A run of dashes behind a mark or quote is seen only where two of them share a token.
    texts = [text for text in HAND if text.isascii() and '"--' not in text and ".--" not in text]
    rows = [list(text.encode())[:POSITIONS] for text in texts]
    nltk = nltk_segments.SentenceSplitter(token_bytes, punkt.load_parameters())
    assert numbers(table, rows) == [nltk.numbers(ids) for ids in rows]


def test_untrained_punkt_is_nltks_punkt_without_data(comparison):
    vocabulary = comparison.vocabulary
    table = segments.SegmentTable.from_token_bytes(vocabulary.token_bytes, "punkt_untrained")
    texts = HAND + segment_texts.documents("Python's manual", 0.05)
    rows = [vocabulary.encode(text)[:POSITIONS] for text in texts][:ROWS]
    untrained = numbers(table, rows)
    assert untrained == host_numbers(vocabulary.token_bytes, rows, PunktSentenceTokenizer().span_tokenize)
    assert untrained[1] != numbers(comparison.table, rows)[1], "it knows of abbreviations"


def test_lines_are_those_of_nltks_line_tokenizer_without_blank_ones(comparison):
    vocabulary = comparison.vocabulary
    table = segments.SegmentTable.from_token_bytes(vocabulary.token_bytes, "newline")
    blank = ["\n\n a\n \n b \n\n", "a\n\tb", "x\r\ny"]
    texts = [*HAND, *blank, *segment_texts.documents("code", 0.2)]
    rows = [vocabulary.encode(text)[:POSITIONS] for text in texts][:ROWS]
    rng = np.random.default_rng(1)
    rows += rng.integers(0, len(vocabulary.token_bytes), (ROWS - len(rows), POSITIONS)).tolist()

    def written_spans(text):  # without the indentation, which belongs to the line before
        for start, end in LineTokenizer().span_tokenize(text):
            yield end - len(text[start:end].lstrip()), end

    assert numbers(table, rows) == host_numbers(vocabulary.token_bytes, rows, written_spans)


@pytest.mark.parametrize("kind, expected", [("fixed:3", [0, 0, 0, 1, 1, 1, 2]), ("token", list(range(7)))])
def test_fixed_segments_count_response_tokens_and_read_no_text(kind, expected):
    table = segments.SegmentTable.from_tokenizer(None, kind)
    assert numbers(table, [[5] * 7, [], [-3]]) == [expected, [], [0]]
    tokens_BT, mask_BT = pad([[5] * 9], ROWS, POSITIONS)
    mask_BT[0, 1:3] = False
    assert np.asarray(segment(table, tokens_BT, mask_BT))[0, [0, *range(3, 9)]].tolist() == expected


@pytest.mark.parametrize(
    "kind, folder, said",
    [
        ("lines", "", r"segments\.kind='lines' is unknown \(did you mean newline\?\): use one of"),
        ("fixed", "", "fixed:N"),
        ("fixed:N", "", "1 or more"),
        ("fixed:0", "", "1 or more"),
        ("fixed:x", "", "1 or more"),
        ("fixed:-4", "", "1 or more"),
        ("newline", "english", r"segments\.punkt=english is not read by segments\.kind=newline"),
        ("punkt", "/nowhere", r"segments\.punkt=/nowhere is no folder of Punkt parameters"),
    ],
)
def test_a_wrong_kind_or_folder_is_refused_in_one_line(kind, folder, said):
    with pytest.raises(UserError, match=said):
        segments.SegmentTable.from_tokenizer(load("smollm2").vocabulary.tokenizer, kind, folder)


@pytest.fixture
def punkt_folder(tmp_path):
    """Parameters in which "foo" is an abbreviation and "mr" is none, written as NLTK writes them."""
    from nltk.tabdata import TabEncoder

    encode = TabEncoder()
    (tmp_path / "abbrev_types.txt").write_text(encode.set2txt({"foo", "e.g"}))
    (tmp_path / "collocations.tab").write_text(encode.tups2tab([("bar", "baz"), ("##number##", "qux")]))
    (tmp_path / "sent_starters.txt").write_text(encode.set2txt({"then"}))
    (tmp_path / "ortho_context.tab").write_text(encode.ivdict2tab({"then": 46, "smith": 12, "under": 96}))
    return tmp_path


def test_a_folder_of_punkt_parameters_is_read_as_nltk_reads_it(punkt_folder, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(punkt_folder)])  # NLTK opens no file elsewhere
    theirs = load_punkt_params(nltk.data.FileSystemPathPointer(str(punkt_folder)))
    ours = punkt.load_parameters(str(punkt_folder))
    for name in ("abbrev_types", "collocations", "sent_starters", "ortho_context"):
        assert getattr(ours, name) == getattr(theirs, name)

    text = "A foo. Then foo. smith Mr. Smith bar. Baz bar. Then 5. Qux and foo. Under e.g. it"
    vocabulary = load("smollm2").vocabulary
    table = segments.SegmentTable.from_tokenizer(vocabulary.tokenizer, "punkt", str(punkt_folder))
    rows = [vocabulary.encode(text)]
    spans = PunktSentenceTokenizer(theirs).span_tokenize
    assert numbers(table, rows) == host_numbers(vocabulary.token_bytes, rows, spans)
    assert numbers(table, rows) != numbers(load("smollm2").table, rows)


def test_parameters_without_room_on_device_are_refused_with_the_way_out(punkt_folder):
    (punkt_folder / "abbrev_types.txt").write_text("j.-l")
    with pytest.raises(UserError, match=r"'j\.-l' does not fit .* segments\.kind=nltk"):
        segments.SegmentTable.from_token_bytes([b"a"], "punkt", str(punkt_folder))


def test_eight_devices_give_the_same_result_as_one_without_communication():
    smollm2 = load("smollm2")
    rows = [smollm2.vocabulary.encode(text)[:POSITIONS] for text in HAND]
    tokens_BT, mask_BT = pad(rows, ROWS, POSITIONS)
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    cut, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    arguments = (
        jax.device_put(smollm2.table, whole),
        jax.device_put(tokens_BT, cut),
        jax.device_put(mask_BT, cut),
    )
    compiled = segment.lower(*arguments).compile()
    assert not any(name in compiled.as_text() for name in ("all-reduce", "all-gather", "permute("))
    np.testing.assert_array_equal(compiled(*arguments), segment(smollm2.table, tokens_BT, mask_BT))


def test_nltk_cuts_a_sharded_batch_on_the_host_with_explicit_transfers_only():
    smollm2 = load("smollm2")
    rows = [smollm2.vocabulary.encode(text)[: POSITIONS - 8] for text in HAND]
    tokens_BT, mask_BT = pad(rows, ROWS, POSITIONS)
    tokens_BL = np.concatenate([np.full((ROWS, 5), 11, np.int32), tokens_BT], axis=1)
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "tensor"))
    cut = NamedSharding(mesh, P("data"))
    tokens, mask = jax.device_put(tokens_BL, cut), jax.device_put(mask_BT, cut)
    with jax.transfer_guard("disallow"):
        table = smollm2.nltk.cut(tokens, mask)
        out = segment(table, tokens, mask)
    assert table.lookup.sharding.is_equivalent_to(cut, 2)
    np.testing.assert_array_equal(out, segment(smollm2.table, tokens_BT, mask_BT))


def test_no_two_word_types_share_a_hash():
    types, _ = word_table.word_types(punkt.load_parameters())
    base = word_table.hash_base(types)
    hashes = {word_table.word_hash(word, base) for word in types}
    assert len(hashes) == len(types) > 10_000 and 0 not in hashes


def test_words_that_share_a_hash_get_another_base():
    draw = random.Random(0)
    first, seen = word_table.hash_base(()), {}
    words = ("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(400_000))
    for word in words:
        pair = [seen.setdefault(word_table.word_hash(word, first), word), word]
        if pair[0] != word:
            break
    assert pair[0] != pair[1]
    base = word_table.hash_base(pair)
    assert base % 2 and word_table.word_hash(pair[0], base) != word_table.word_hash(pair[1], base)


def test_every_word_type_is_found_on_device_with_what_is_known_of_it():
    types, number_first = word_table.word_types(punkt.load_parameters())
    base = word_table.hash_base(types)
    table = sentences.SentenceTable(
        jnp.zeros((1, 8), jnp.uint32), jnp.asarray(word_table.bucket_table(types, base)), number_first
    )
    words = [*types, "zyzzyva-not-a-word"]
    hashes_1N = jnp.asarray([[word_table.word_hash(word, base) for word in words]], jnp.uint32)
    found_1N = np.asarray(sentences._look_up(table, hashes_1N))
    assert found_1N[0].tolist() == [*types.values(), int(word_table.UNKNOWN_WORD)]


def test_words_are_split_as_nltk_splits_them():
    draw = random.Random(1)
    words = PunktLanguageVars().word_tokenize
    for _ in range(2000):
        pieces = draw.choices(segment_texts.PIECES + segment_texts.MARKS, k=draw.randint(1, 8))
        assert punkt.split_words("".join(pieces)) == words("".join(pieces))


def test_white_space_is_that_of_nltks_regular_expressions():
    from nltk import redos

    space = redos.compile(r"\s")
    assert all(punkt.is_space(chr(i)) == bool(space.match(chr(i))) for i in range(0x10000))


def test_a_white_space_spelt_by_several_tokens_is_white_space():
    """Every wide space before and after a full stop, cut in every way, alone and beside ASCII space."""
    token_bytes = [bytes([i]) for i in range(256)]
    ids = {}

    def spell(piece):
        if len(piece) == 1:
            return piece[0]
        if piece not in ids:
            ids[piece] = len(token_bytes)
            token_bytes.append(piece)
        return ids[piece]

    rows = []
    for space in WIDE_SPACES:
        cuts = [[space[:1], space[1:]]] if len(space) == 2 else []
        if len(space) == 3:
            cuts = [[space[:1], space[1:]], [space[:2], space[2:]], [space[i : i + 1] for i in range(3)]]
        for first, *middle, last in cuts:
            for outer_before, outer_after in ((b"", b""), (b" ", b""), (b"", b"\n")):
                wide = [spell(outer_before + first), *map(spell, middle), spell(last + outer_after)]
                rows += [[*b"Yes.", *wide, *b"No."], [*b"a", *wide, *b".He left.", *wide, *b"Gone."]]
    broken = [[*b"Yes.\xe2", *b"\x80No."], [*b"Yes.\xf0\xc2\xa0No."], [*b"Yes.\xc2", *b"b\xa0No."]]
    rows += broken
    table = segments.SegmentTable.from_token_bytes(token_bytes)
    nltk = nltk_segments.SentenceSplitter(token_bytes, punkt.load_parameters())
    found = [got for at in range(0, len(rows), ROWS) for got in numbers(table, rows[at : at + ROWS])]
    assert found == [nltk.numbers(row) for row in rows]
    assert max(map(max, found)) > 0
