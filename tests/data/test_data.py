"""Prompts: sources, rendering, the held-out split, and batches that resume and shard exactly."""

import dataclasses
import json
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from opd_jax import data
from opd_jax.config import default
from opd_jax.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if plain %}<plain>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, two special tokens, the ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    # Writes a first token by itself, as Llama's does: rendered text must not get it twice.
    start = ("<|im_start|>", inner.token_to_id("<|im_start|>"))
    inner.post_processor = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[start])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )


@pytest.fixture(scope="module")
def demo_cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def config(**changes):
    section = default().data
    section.update({"source": "jsonl", "prompt_tokens": 2048, "heldout": 0} | changes)
    return section


def write_jsonl(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def numbered(count: int) -> list[data.Prompt]:
    """Prompt i has i % 5 + 1 tokens, all equal to 100 + i."""
    return [data.Prompt((100 + i,) * (i % 5 + 1), f"prompt {i}", None) for i in range(count)]


def take(iterator, steps: int) -> np.ndarray:
    return np.stack([next(iterator).index_B for _ in range(steps)])


def test_demo_train_and_heldout_share_no_text_and_a_quarter_are_requests(tokenizer, demo_cache):
    prompts = data.load(config(source="demo", cache=demo_cache, heldout=80), tokenizer)
    train, heldout = ([p.text for p in part] for part in (prompts.train, prompts.heldout))
    assert (len(train), len(heldout), prompts.dropped) == (240, 80, 0)
    assert len(set(train + heldout)) == 320
    for part in (prompts.train, prompts.heldout):
        assert sum(p.answer is None for p in part) == len(part) / 4
        assert all(p.answer is None or float(p.answer) == float(p.answer) for p in part)
    # Any count of held-out prompts keeps the mixture.
    assert sum(p.answer is None for p in prompts.heldout[:8]) == 2


def test_demo_is_built_once_and_then_read_without_the_generator(tokenizer, demo_cache, monkeypatch):
    first = data.load(config(source="demo", cache=demo_cache), tokenizer)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert data.load(config(source="demo", cache=demo_cache), tokenizer) == first
    assert [p.name[0] for p in Path(demo_cache).iterdir()] == ["o"]  # no scratch folder stays


def test_what_a_killed_build_left_is_removed_and_a_living_ones_folder_is_not(demo_cache):
    from opd_jax.data.prompts import demo

    cache = Path(demo_cache)
    other = cache / f"{demo.BUILDING}other"
    other.mkdir()
    (other / demo.LOCK).write_text("another host")
    older = cache / f"{demo.BUILDING}older"  # without a lock
    older.mkdir()
    program = (
        "import sys, time; from pathlib import Path; from opd_jax.data.prompts import demo\n"
        "with demo._scratch(Path(sys.argv[1])) as folder: print(folder, flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", program, demo_cache], stdout=subprocess.PIPE, text=True)
    try:
        folder = Path(child.stdout.readline().strip())
        assert folder.parent == cache
        demo.prepare(cache)
        assert folder.exists() and other.exists() and not older.exists()
        child.kill()
        child.wait()
        assert folder.exists()
        demo.prepare(cache)
        assert not folder.exists() and other.exists()
    finally:
        child.kill()
        child.communicate()
        shutil.rmtree(other)


def test_edited_demo_requests_never_meet_an_old_cache_and_building_tells_of_no_download(
    demo_cache, monkeypatch, tmp_path, capfd
):
    from opd_jax.data.prompts import demo

    requests = json.loads(demo.EVERYDAY_FILE.read_text(encoding="utf-8"))
    before = demo.prepare(Path(demo_cache))
    edited = tmp_path / "everyday.json"
    edited.write_text(json.dumps([*requests[:-4], *(f"New request {i}." for i in range(4))]))
    monkeypatch.setattr(demo, "EVERYDAY_FILE", edited)
    capfd.readouterr()
    assert demo.prepare(Path(demo_cache)) != before
    assert "Downloading" not in "".join(capfd.readouterr())


def _prepare(cache, barrier):
    from opd_jax.data.prompts import demo

    barrier.wait()
    demo.prepare(Path(cache))


def test_two_processes_that_build_the_demo_at_once_both_succeed(tokenizer, tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    workers = [context.Process(target=_prepare, args=(tmp_path, barrier)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1
    assert len(data.load(config(source="demo", cache=str(tmp_path)), tokenizer).train) == 240


def test_loading_prompts_never_imports_tensorflow(demo_cache):
    program = (
        "import sys; from opd_jax import data; from opd_jax.data.prompts import sources;"
        "assert 'tensorflow_datasets' not in sys.modules, 'slow import at the top';"
        f"sources.read_demo({demo_cache!r}); assert 'tensorflow' not in sys.modules"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_prompt_is_the_template_with_system_prompt_and_generation_header(tokenizer, tmp_path):
    path = write_jsonl(
        tmp_path / "p.jsonl",
        [
            {"prompt": "What is 2+2? £é", "answer": 4},
            {
                "messages": [
                    {"role": "system", "content": "Own."},
                    {"role": "user", "content": "Hi"},
                ]
            },
        ],
    )
    prompts = data.load(config(path=path, system_prompt="Be brief."), tokenizer).train
    assert tokenizer.decode(prompts[0].ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 2+2? £é<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompts[0].ids[0] == tokenizer.bos_token_id  # one token, not its spelling
    assert (prompts[0].text, prompts[0].answer) == ("What is 2+2? £é", "4")
    # A conversation's own system message wins.
    assert "Be brief." not in tokenizer.decode(prompts[1].ids)
    assert (prompts[1].text, prompts[1].answer) == ("Own.\nHi", None)


def test_template_options_reach_the_template(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}])
    prompts = data.load(config(path=path, template='{"plain": true}'), tokenizer).train
    assert tokenizer.decode(prompts[0].ids).endswith("assistant\n<plain>")


def test_over_long_prompts_are_refused_or_dropped_and_counted(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "x" * n} for n in (5, 200, 300, 9)])
    longest = max(len(p.ids) for p in data.load(config(path=path), tokenizer).train)
    with pytest.raises(UserError, match=f"data.prompt_tokens=100: 2 of 4 .* {longest} tokens"):
        data.load(config(path=path, prompt_tokens=100), tokenizer)
    prompts = data.load(config(path=path, prompt_tokens=100, over_long="drop"), tokenizer)
    assert ([p.text for p in prompts.train], prompts.dropped) == (["x" * 5, "x" * 9], 2)
    with pytest.raises(UserError, match="no training prompt is left"):
        data.load(config(path=path, prompt_tokens=3, over_long="drop"), tokenizer)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "line 2"),
        ('["prompt"]', "line 2"),
        ('{"text": "a"}', "record 2 .*messages or prompt or question or problem"),
        ('{"prompt": 3}', "not a string"),
        ('{"messages": []}', "nothing to answer"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "nothing to answer"),
    ],
)
def test_bad_line_of_a_file_is_named_in_one_line(tokenizer, tmp_path, line, reason):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=reason) as caught:
        data.load(config(path=str(path)), tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"source": "csv"}, "data.source"),
        ({"source": "rg:no_such_task"}, "no task 'no_such_task'"),
        ({"source": "rg:chain_sm"}, "did you mean chain_sum"),
        ({"source": "mixture"}, "data.mixture is empty"),
        ({"source": "mixture", "mixture": ("rg:chain_sum",)}, "'rg:chain_sum' is not 'WEIGHT"),
        ({"source": "mixture", "mixture": ("-1 rg:chain_sum",)}, "a weight above 0"),
        ({"source": "mixture", "mixture": ("1 csv:a.csv",)}, "a kind of jsonl"),
        ({"source": "rg:chain_sum", "template": "{"}, "data.template="),
        ({"source": "rg:chain_sum", "few_shot": "/nowhere.jsonl"}, "data.few_shot"),
        ({"path": "/nowhere.jsonl"}, "data.path"),
        ({"over_long": "cut"}, "data.over_long"),
        ({"source": "tfds", "path": "no_such_dataset"}, "data.path"),
        ({"source": "tfds", "path": ""}, "data.path"),
        ({"source": "demo", "heldout": 81}, "data.heldout"),
        ({"source": "demo", "cache": "/proc/no"}, "data.cache"),
    ],
)
def test_mistake_in_the_config_is_one_line_that_names_the_key(tokenizer, demo_cache, changes, key):
    with pytest.raises(UserError, match=key) as caught:
        data.load(config(**{"generated": 4, "cache": demo_cache} | changes), tokenizer)
    assert "\n" not in str(caught.value)


def test_tokenizer_without_chat_template_is_refused(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no chat template"):
        data.load(config(), bare)


def test_tfds_folder_with_a_question_column_is_read(tokenizer, tmp_path):
    import tensorflow_datasets as tfds

    class Sums(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            columns = {"question": tfds.features.Text(), "answer": tfds.features.Text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(columns))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(6):
                yield i, {"question": f"{i} + {i}?", "answer": str(2 * i)}

    builder = Sums(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    path = str(builder.data_path)
    prompts = data.load(config(source="tfds", path=path, heldout=2), tokenizer)
    everything = {p.text: p.answer for p in prompts.train + prompts.heldout}
    assert everything == {f"{i} + {i}?": str(2 * i) for i in range(6)}
    assert len(prompts.heldout) == 2


def test_held_out_texts_depend_on_the_texts_alone_and_leave_the_training_set():
    # Ten texts twice, with another answer.
    prompts = numbered(30) + [dataclasses.replace(p, answer="x") for p in numbered(10)]
    train, heldout = data.hold_out(prompts, 8)
    again = data.hold_out(prompts[::-1], 8)[1]
    assert [p.text for p in again] == [p.text for p in heldout]
    assert len({p.text for p in heldout}) == 8
    assert not {p.text for p in train} & {p.text for p in heldout}
    assert {p.text for p in train} | {p.text for p in heldout} == {p.text for p in prompts}
    with pytest.raises(UserError, match="data.heldout=30"):
        data.hold_out(prompts, 30)


def test_batches_are_left_padded_and_the_mask_is_the_prompt():
    prompts = numbered(7)
    batch = next(data.TrainingBatches(prompts, data.Batching(7, 6, 104), seed=1))
    assert (batch.tokens_BP.dtype, batch.index_B.dtype) == (np.int32, np.int32)
    assert batch.mask_BP.dtype == bool
    assert batch.valid_B.all()
    for tokens_P, mask_P, index in zip(batch.tokens_BP, batch.mask_BP, batch.index_B, strict=True):
        ids = prompts[index].ids
        np.testing.assert_array_equal(tokens_P, [104] * (6 - len(ids)) + list(ids))
        # Prompt 4 is made of the padding token: its mask must not be found by comparison.
        np.testing.assert_array_equal(mask_P, [False] * (6 - len(ids)) + [True] * len(ids))


def test_every_epoch_holds_every_prompt_once_in_a_new_order():
    index = take(data.TrainingBatches(numbered(10), data.Batching(5, 6, 0), seed=3), 8).reshape(4, 10)
    assert (np.sort(index, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in index}) == 4
    other_seed = take(data.TrainingBatches(numbered(10), data.Batching(5, 6, 0), seed=4), 2).reshape(10)
    assert tuple(other_seed) != tuple(index[0])


def test_batch_larger_than_the_set_of_prompts_wraps_around():
    index_B = next(data.TrainingBatches(numbered(3), data.Batching(8, 6, 0), seed=0)).index_B
    assert np.bincount(index_B, minlength=3).min() >= 2


def test_resumed_iterator_goes_on_exactly_where_the_state_was_taken():
    whole = take(data.TrainingBatches(numbered(10), data.Batching(4, 6, 0), seed=5), 9)
    first = data.TrainingBatches(numbered(10), data.Batching(4, 6, 0), seed=5)
    head = take(first, 4)
    state = json.loads(json.dumps(first.state()))
    tail = take(data.TrainingBatches(numbered(10), data.Batching(4, 6, 0), seed=5, start=state), 5)
    np.testing.assert_array_equal(np.concatenate([head, tail]), whole)


@pytest.mark.parametrize(
    ("count", "batch", "seed", "name"),
    [(9, 4, 5, "prompts"), (10, 2, 5, "batch"), (10, 4, 6, "seed")],
)
def test_state_of_other_data_is_refused(count, batch, seed, name):
    state = data.TrainingBatches(numbered(10), data.Batching(4, 6, 0), seed=5).state()
    with pytest.raises(UserError, match=name):
        data.TrainingBatches(numbered(count), data.Batching(batch, 6, 0), seed=seed, start=state)


def test_processes_together_read_the_batch_of_a_single_process():
    alone = data.TrainingBatches(numbered(10), data.Batching(6, 6, 0), seed=2)
    rows = np.array([0, 1, 4]), np.array([2, 3, 5])
    shares = [data.TrainingBatches(numbered(10), data.Batching(6, 6, 0, own), seed=2) for own in rows]
    for _ in range(5):
        expected = next(alone)
        parts = [next(share) for share in shares]
        for field, whole in zip(expected._fields, expected, strict=True):
            for own, part in zip(rows, parts, strict=True):
                np.testing.assert_array_equal(getattr(part, field), whole[own])


def test_a_batch_takes_the_least_bucket_that_holds_its_longest_prompt():
    prompts = numbered(10)
    plain = data.TrainingBatches(prompts, data.Batching(2, 6, 0), seed=2)
    seen = set()
    for _, batch in zip(
        range(40), data.TrainingBatches(prompts, data.Batching(2, 6, 0, buckets=(4, 2)), seed=2)
    ):
        want = next(plain)
        longest = max(len(prompts[i].ids) for i in want.index_B)
        width = 2 if longest <= 2 else 4 if longest <= 4 else 6
        seen.add(width)
        assert batch.tokens_BP.shape == batch.mask_BP.shape == (2, width)
        np.testing.assert_array_equal(batch.index_B, want.index_B)
        np.testing.assert_array_equal(batch.tokens_BP, want.tokens_BP[:, 6 - width :])
        np.testing.assert_array_equal(batch.mask_BP, want.mask_BP[:, 6 - width :])
    assert seen == {2, 4, 6}


def test_a_resumed_iterator_takes_the_buckets_of_an_uninterrupted_one():
    batching = data.Batching(2, 6, 0, buckets=(2, 4))
    first = data.TrainingBatches(numbered(10), batching, seed=2)
    take(first, 3)
    again = data.TrainingBatches(numbered(10), batching, seed=2, start=first.state())
    for _ in range(9):
        for want, got in zip(next(first), next(again), strict=True):
            np.testing.assert_array_equal(got, want)


def test_processes_with_shares_of_a_batch_take_the_same_bucket():
    batchings = [data.Batching(2, 6, 0, np.array([row]), (1, 2, 3, 4)) for row in (0, 1)]
    shares = [data.TrainingBatches(numbered(10), batching, seed=2) for batching in batchings]
    widths = [[next(share).tokens_BP.shape[1] for _ in range(40)] for share in shares]
    assert widths[0] == widths[1]
    assert len(set(widths[0])) > 2


@pytest.mark.parametrize("rows", [[None], [np.array([0, 1]), np.array([2, 3])]])
def test_held_out_batches_cover_every_prompt_once_and_mark_the_filling(rows):
    parts = [list(data.heldout_batches(numbered(10), data.Batching(4, 6, 0, own))) for own in rows]
    valid, index = (
        np.concatenate([np.concatenate([getattr(b, f) for b in row]) for row in zip(*parts)])
        for f in ("valid_B", "index_B")
    )
    np.testing.assert_array_equal(index[valid], np.arange(10))
    assert (len(valid), valid.sum()) == (12, 10)
    # Filling rows are real prompts, so no softmax over an empty row arises.
    assert all(batch.mask_BP.any(axis=1).all() for row in parts for batch in row)
