"""Rollouts as text: nothing of a response is lost, and each sentence carries its own numbers."""

import numpy as np
import pytest

from opd_jax.distill.types import Scores, Supervision
from opd_jax.release.release import Release
from opd_jax.run import transcripts
from tests import tiny

SENTENCES = ("First it is so. ", "Then it is not. ", "End.")


@pytest.fixture(scope="module")
def records():
    """Two rollouts: one of three sentences, the last not kept, and one cut off within its first."""
    texts = "".join(SENTENCES).encode(), b"No end"
    rows = [[*texts[0], tiny.END], [*texts[1]]]
    width = 40
    numbers = np.repeat([0, 1, 2], [len(SENTENCES[0]), len(SENTENCES[1]), len(SENTENCES[2]) + 1])
    segment_BT = np.full((2, width), -1)
    segment_BT[0, : len(numbers)], segment_BT[1, : len(rows[1])] = numbers, 0
    mask_BT = segment_BT >= 0
    kept_BT = mask_BT & (segment_BT < 2)
    prompts = [[*b"Hello?"], [tiny.PAD, tiny.PAD, tiny.PAD, *b"Hi?"]]
    tokens = [p + r + [tiny.PAD] * (width - len(r)) for p, r in zip(prompts, rows)]
    zero_BT = np.zeros(mask_BT.shape, np.float32)
    zero_BTK = np.zeros((*mask_BT.shape, 4), np.float32)
    rollouts = tiny.Rollouts(
        tokens_BL=np.array(tokens, np.int32),
        prompt_mask_BP=np.array([[True] * 6, [False] * 3 + [True] * 3]),
        mask_BT=mask_BT,
        logp_BT=zero_BT,
        behaviour_logp_BT=zero_BT,
        topk_BTK=np.zeros((2, width, 4), np.int32),
        topk_logp_BTK=zero_BTK,
        stop_BT=zero_BT,
        finished_B=np.array([True, False]),
    )
    scores = Scores(
        advantage_BT=np.where(mask_BT, -0.5 * (segment_BT + 1), 0).astype(np.float32),
        contrast_BT=np.where(mask_BT, 3 - segment_BT, 0).astype(np.float32),
        teacher_logp_BT=zero_BT,
        student_logp_BT=zero_BT,
        teacher_topk_logp_BTK=zero_BTK,
        student_topk_logp_BTK=zero_BTK,
        overlap_BT=zero_BT,
        teacher_stop_BT=zero_BT,
    )
    release = Release(
        weight_BT=kept_BT.astype(np.float32),
        mask_BT=kept_BT,
        segment_BT=segment_BT,
        kept_B=kept_BT.sum(axis=1),
        cut_B=np.array([2, 1]),
        segments_B=np.array([3, 1]),
        accepted_B=np.array([True, False]),
        gain_B=np.array([4.5, 0.0], np.float32),
    )
    supervision = Supervision(scores=scores, release=release)
    return transcripts.records(tiny.tokenizer(), 7, rollouts, supervision, right=[True, None])


def test_the_sentences_join_to_the_response(records):
    joined = ["".join(s["text"] for s in record["sentences"]) for record in records]
    assert joined == ["".join(SENTENCES) + "<|im_end|>", "No end"]
    assert [s["text"] for s in records[0]["sentences"]][:2] == list(SENTENCES[:2])


def test_the_prompt_is_shown_without_its_padding(records):
    assert [record["prompt"] for record in records] == ["Hello?", "Hi?"]


def test_a_sentence_is_kept_where_the_mask_keeps_it(records):
    kept = [[s["kept"] for s in record["sentences"]] for record in records]
    assert kept == [[True, True, False], [True]]
    assert [[s["kept_tokens"] for s in record["sentences"]] for record in records] == [[16, 16, 0], [6]]


def test_each_sentence_has_the_means_of_its_own_tokens(records):
    sentences = records[0]["sentences"]
    assert [s["contrast"] for s in sentences] == [3, 2, 1]
    assert [s["advantage"] for s in sentences] == [-0.5, -1.0, -1.5]
    assert [s["advantage_std"] for s in sentences] == [0, 0, 0]
    assert [s["tokens"] for s in sentences] == [16, 16, 5]


def test_a_record_says_how_its_rollout_ended_and_what_was_released(records):
    assert [record["right"] for record in records] == [True, None]
    keys = ("step", "finished", "accepted", "gain", "kept_tokens", "tokens")
    told = [tuple(record[key] for key in keys) for record in records]
    assert told == [(7, True, True, 4.5, 32, 37), (7, False, False, 0.0, 6, 6)]
