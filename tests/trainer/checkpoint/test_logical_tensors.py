"""How flat runs of elements become boxes of logical tensors."""

import itertools

import pytest
import torch

from model import V4Model
from model.parameters import always_fp32
from optim import StateSlice
from tests.model.tiny import tiny_config
from trainer.checkpoint.logical_tensors import boxes, boxes_of
from trainer.parallel.degrees import Degrees
from trainer.parallel.placement import placement_of


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 4), (1, 1, 5)])
def test_boxes_cover_a_run_once_and_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start, stop in itertools.combinations(range(whole.numel() + 1), 2):
        actual = []
        for offset, size in boxes(start, stop, shape):
            box = whole[tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))]
            assert box.shape == size
            actual.append(box.flatten())
        assert torch.equal(torch.cat(actual), torch.arange(start, stop))
        assert len(actual) <= 2 * max(len(shape), 1) - 1


def test_a_run_over_several_experts_stands_under_each_name() -> None:
    degrees = Degrees(2, expert=2)
    placement = placement_of("layers.0.ffn.experts.w2", (4, 3, 2), degrees, 1)
    piece = StateSlice("exp_avg", "layers.0.ffn.experts.w2", torch.arange(5.0), start=3)
    actual = [
        (name, part.offset, part.tensor.tolist(), part.shape)
        for name, part in boxes_of(piece, placement)
    ]
    assert actual == [
        ("layers.0.ffn.experts.2.w2.weight", (1, 1), [[0.0]], (3, 2)),
        ("layers.0.ffn.experts.2.w2.weight", (2, 0), [[1.0, 2.0]], (3, 2)),
        ("layers.0.ffn.experts.3.w2.weight", (0, 0), [[3.0, 4.0]], (3, 2)),
    ]


def test_which_parameters_stay_in_fp32() -> None:
    with torch.device("meta"):
        model = V4Model(tiny_config(num_nextn_predict_layers=1), torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert always_fp32(name) == (parameter.dtype == torch.float32), name
