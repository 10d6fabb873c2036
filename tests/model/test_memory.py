"""Memory grows linearly with the row length: what is kept for backward, and the peak."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from model import IGNORE_INDEX, SampleLayout, V4Model
from tests.model.tiny import random_model, random_tokens, tiny_config

# Small top-k and real ratios, so that most entries are not selected; short enough to be quick.
CONFIG = {"sliding_window": 32, "hca_compress_ratio": 32, "index_topk": 8, "index_n_heads": 4}
LENGTHS = (512, 1024, 2048)


def peak_memory(run: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator held at once during ``run``, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def saved_bytes(run: Callable[[], object]) -> int:
    """Bytes kept for backward, every storage once."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    del output
    return sum(sizes.values())


def assert_linear(sizes: list[int]) -> None:
    """The second doubling adds twice what the first one adds; quadratic growth would add 4."""
    first, second = sizes[1] - sizes[0], sizes[2] - sizes[1]
    assert first > 0
    assert second / first < 2.05, sizes
    assert sizes[2] < 4.5 * sizes[0], sizes


def training_step(model: V4Model, length: int, samples: list[int] | None = None):
    """A function of no arguments: forward and backward of one row."""
    tokens = random_tokens(model.config, 1, length)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    layout = SampleLayout.from_lengths([samples or [length]])
    return lambda backward=True: _step(model, tokens, layout, targets, backward)


def _step(model: V4Model, tokens, layout, targets, backward: bool):
    loss = model(tokens, layout, targets).loss
    if backward:
        loss.backward()
        model.zero_grad()
    return loss


def test_the_measure_sees_what_is_quadratic():
    """The negative control: the same measures on a function that forms an [S, S] matrix."""
    peaks, saved = [], []
    for length in LENGTHS:
        x = torch.randn(length, 64, requires_grad=True)

        def attend(x: Tensor = x) -> Tensor:
            return ((x @ x.t()).softmax(-1) @ x).sum()

        peaks.append(peak_memory(lambda attend=attend: attend().backward()))
        saved.append(saved_bytes(attend))
    matrix = 4 * LENGTHS[0] ** 2
    assert saved[0] >= matrix and peaks[0] >= matrix
    for sizes in (peaks, saved):
        with pytest.raises(AssertionError):
            assert_linear(sizes)


@pytest.mark.parametrize("kind", ["window", "csa", "hca"])
def test_peak_of_a_training_step_is_linear(kind):
    config = tiny_config(**CONFIG, num_hidden_layers=1, layer_types=(kind,))
    model = random_model(config)
    assert_linear([peak_memory(training_step(model, length)) for length in LENGTHS])


@pytest.mark.parametrize("kind", ["window", "csa", "hca"])
def test_what_is_kept_for_backward_is_linear(kind):
    config = tiny_config(**CONFIG, num_hidden_layers=1, layer_types=(kind,))
    model = random_model(config)
    steps = [training_step(model, length) for length in LENGTHS]
    assert_linear([saved_bytes(lambda step=step: step(backward=False)) for step in steps])


@pytest.mark.parametrize("kind", ["window", "csa", "hca"])
def test_peak_of_evaluation_is_linear(kind):
    """Nothing is kept here, so that a large mask or score matrix of a moment is the peak."""
    config = tiny_config(**CONFIG, num_hidden_layers=1, layer_types=(kind,))
    model = random_model(config)
    steps = [training_step(model, length) for length in LENGTHS]
    with torch.no_grad():
        assert_linear([peak_memory(lambda step=step: step(backward=False)) for step in steps])


def test_many_short_samples_take_no_more_than_one_long_one():
    model = random_model(tiny_config(**CONFIG))
    packed = peak_memory(training_step(model, 1024, [31] * 33 + [1]))
    assert packed < 1.1 * peak_memory(training_step(model, 1024))


def test_whole_logits_are_never_held():
    """The logits of all tokens would be most of the memory at a vocabulary of 20 000."""
    config = tiny_config(vocab_size=20_000, num_hidden_layers=1, layer_types=("window",))
    model = random_model(config)
    # Weights' gradients (embedding and head, the head's also in fp32 while it is summed).
    gradients = 4 * 3 * 2 * 20_000 * 32
    whole_logits = 4 * 2048 * 20_000
    assert peak_memory(training_step(model, 2048)) < 0.4 * whole_logits + gradients
