"""Supervised fine-tuning on written responses."""

import json

import jax
import numpy as np
import pytest

from opd_jax import data, sft
from opd_jax.errors import UserError
from opd_jax.models import tokenizers, transformer
from opd_jax.models.files import source
from opd_jax.parallel import distributed
from tests import tiny


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    """The session's models beside worked problems of differing lengths."""
    folder = tmp_path_factory.mktemp("sft")
    lines = []
    for n in range(30):
        reply = f"It is {n * n}." + " Yes." * (n % 3)
        user = {"role": "user", "content": f"What is {n} squared?"}
        lines.append(json.dumps({"messages": [user, {"role": "assistant", "content": reply}]}))
    (folder / "worked.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "student").symlink_to(models / "student")
    (folder / "teacher").symlink_to(models / "teacher")
    return folder


def config(folder, **overrides):
    values = {
        "teacher.path": "",
        "data.path": str(folder / "worked.jsonl"),
        "rollout.max_tokens": 24,
        "train.micro_batch": 8,
        "optimizer.learning_rate": 3e-3,
    }
    return tiny.config(folder, **(values | overrides))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_responses_are_the_reply_and_its_end_token_and_prompts_end_where_they_begin(folder):
    tokenizer = tiny.tokenizer()
    train, heldout, dropped = sft.read(config(folder), tokenizer, {tiny.END})
    assert (len(train), len(heldout), dropped) == (24, 6, 0)
    for exchange in train + heldout:
        number = int(exchange.prompt.text.split()[2])
        assert tokenizer.decode(exchange.prompt.ids).endswith("<|im_start|>a:")
        reply = tokenizer.decode(exchange.response)
        assert reply == f"It is {number * number}." + " Yes." * (number % 3) + "<|im_end|>"


def test_the_chat_template_gets_the_arguments_of_data_template(folder):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% if brief %}Briefly.{% endif %}" + tokenizer.chat_template
    train, _, _ = sft.read(config(folder, **{"data.template": '{"brief": true}'}), tokenizer, {tiny.END})
    assert all(tokenizer.decode(e.prompt.ids).startswith("Briefly.") for e in train)


def test_the_first_steps_loss_is_the_mean_negative_log_likelihood_of_the_batchs_responses(folder, tmp_path):
    c = config(folder, **{"train.steps": 1, "eval.every": 1})
    sft.train(c, tmp_path / "run")
    tokenizer = tokenizers.load(c.student.path)
    train, heldout, _ = sft.read(c, tokenizer, {tiny.END})
    first = next(data.TrainingBatches([e.prompt for e in train], data.Batching(8, 48, tiny.PAD), c.seed))
    model, params = source.load(c.student.path)

    @jax.jit
    def whole(params, ids):
        hidden = transformer.forward(model, params, ids, np.ones(ids.shape, bool))
        return transformer.logits(model, transformer.head(model, params), hidden)

    def mean_nll(exchanges, params):
        """By one forward pass over each conversation, unpadded, in float64 after the logits."""
        total, count = 0.0, 0
        for e in exchanges:
            ids = np.array(e.prompt.ids + e.response)[None]
            logits = np.asarray(whole(params, ids)[0], float)
            logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            logp -= logits.max(-1, keepdims=True)
            start = len(e.prompt.ids)
            total -= logp[np.arange(start - 1, ids.shape[1] - 1), ids[0, start:]].sum()
            count += len(e.response)
        return total / count

    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["kind"] for line in lines] == ["train", "eval"]
    expected = mean_nll([train[i] for i in first.index_B], params)
    np.testing.assert_allclose(lines[0]["loss"], expected, rtol=1e-5)
    assert lines[1]["prompts"] == 6
    assert lines[1]["tokens"] == sum(len(e.response) for e in heldout)
    assert lines[1]["loss"] < mean_nll(heldout, params)  # one step of Adam has helped


def test_a_run_that_is_gone_on_with_ends_bit_for_bit_as_one_that_never_stopped(folder, tmp_path):
    whole = sft.train(config(folder), tmp_path / "whole")
    sft.train(config(folder, **{"train.steps": 2}), tmp_path / "half")
    state = sft.train(config(folder), tmp_path / "half")
    assert int(state.step) == 4
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), whole.params, state.params)
    assert all(jax.tree.leaves(same))
    kinds = [(line["kind"], line["step"]) for line in read_lines(tmp_path / "half" / "metrics.jsonl")]
    assert kinds == [("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("train", 4), ("eval", 4)]


def test_an_evaluation_that_a_stop_left_out_is_made_up(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(distributed.Preempted):
        patched.setattr(distributed.Preemption, "reached", lambda self: True)
        sft.train(config(folder, **{"train.steps": 1}), tmp_path)
    assert [line["kind"] for line in read_lines(tmp_path / "metrics.jsonl")] == ["train"]
    sft.train(config(folder, **{"train.steps": 1}), tmp_path)
    made_up = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in made_up] == [("train", 1), ("eval", 1)]
    sft.train(config(folder, **{"train.steps": 1}), tmp_path)
    assert read_lines(tmp_path / "metrics.jsonl") == made_up


def test_a_template_that_never_ends_a_reply_is_refused(folder):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    with pytest.raises(UserError, match=r"ends no reply with an end token .*258.* rollout.end_ids"):
        sft.read(config(folder), tokenizer, {tiny.END})
    train, _, _ = sft.read(config(folder), tokenizer, {ord("\n")})
    assert all(exchange.response[-1] == ord("\n") for exchange in train)


@pytest.mark.parametrize(
    ("overrides", "line", "message"),
    [
        ({"data.path": "nowhere.jsonl"}, None, "data.path='nowhere.jsonl': no such file"),
        ({}, '{"prompt": "hi"}', "record 1 can't be used .* 'messages' that end in an assistant's reply"),
        ({}, '{"messages": [{"role": "user", "content": "hi"}]}', "assistant's reply"),
        ({"rollout.max_tokens": 12}, None, "rollout.max_tokens=12; set them to"),
        ({"rollout.max_tokens": 400}, None, "is more than the 256 positions of student.path"),
        ({"data.template": '{"brief": true}'}, None, "chat template never reads 'brief'"),
        ({"rollout.max_tokens": 12, "data.over_long": "drop", "data.heldout": 10}, None, "data.heldout=10"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused_in_one_line(folder, tmp_path, overrides, line, message):
    if line is not None:
        (tmp_path / "bad.jsonl").write_text(line + "\n")
        overrides = {"data.path": str(tmp_path / "bad.jsonl")}
    with pytest.raises(UserError, match=message) as caught:
        sft.train(config(folder, **overrides), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_random_weights_are_the_same_ones_each_time_and_need_no_weight_file(folder, models, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (models / "student" / name).exists():
            (bare / name).write_bytes((models / "student" / name).read_bytes())
    model, params = source.load(f"random:{bare}")
    assert model.layers == tiny.STUDENT.layers
    again = source.load(f"random:{bare}")[1]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, again)))
    spread = float(params["blocks"]["gate"].std()) * model.width**0.5
    assert 0.9 < spread < 1.1
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        source.load("random:nowhere")
