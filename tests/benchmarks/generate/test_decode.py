"""The benchmark of decoding: what it times, and the bytes beside the formula."""

from __future__ import annotations

import time

import pytest

from benchmarks.generate.decode import TURN, bytes_per_token, measure, model_of, twin_of
from tests.model.tiny import random_model, tiny_config


def test_both_decode_as_many_tokens_and_bytes_follow_the_formula() -> None:
    model = random_model(tiny_config(index_head_dim=32)).eval()
    results = measure(model, twin_of(model), [128, 256], 2 * TURN, time.perf_counter)
    for ours, theirs in results.values():
        assert len(ours.times.tokens) == len(theirs.times.tokens) == 2 * TURN
        assert 0 < ours.times.indexer < ours.times.token
    short, long = (ours.num_bytes for ours, _ in results.values())
    assert (long - short) / 128 == pytest.approx(bytes_per_token(model.config), rel=0.02)


def test_the_demo_s_model_gets_positions_for_the_context() -> None:
    assert model_of(None, 40_000).config.max_position_embeddings == 40_000
