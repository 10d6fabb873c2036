"""Training on the assistant's tokens alone: against a reference that knows nothing of masks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from data import Batch
from model import IGNORE_INDEX, SampleLayout, V4Model
from tests.model.tiny import gradient_scale, random_model, tiny_config
from trainer.engine import NativeEngine
from trainer.parallel.grid import Grid
from trainer.parallel.plan import build_local_model
from trainer.parallel.stage_plan import plan_stages

ROW = 48
MTP_WEIGHT = 0.3
# The lengths of samples, and for each the positions whose next token is the assistant's.
SAMPLES = {11: [4, 5, 6, 9], 21: [*range(8, 15), 17], 16: [14]}
# No balance loss, which is one of all tokens; it would need the model's own code in the reference.
CONFIG = tiny_config(vocab_size=96, balance_loss_weight=0.0)


def samples() -> list[tuple[Tensor, list[int]]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randint(3, CONFIG.vocab_size, (length,), generator=generator), places)
        for length, places in SAMPLES.items()
    ]


def batch_of(rows: list[list[tuple[Tensor, list[int]]]]) -> Batch:
    tokens = torch.full((len(rows), ROW), CONFIG.pad_token_id)
    targets = torch.full((len(rows), ROW), IGNORE_INDEX)
    for row, members in enumerate(rows):
        end = 0
        for ids, places in members:
            start, end = end, end + len(ids)
            tokens[row, start:end] = ids
            for place in places:
                targets[row, start + place] = ids[place + 1]
    return Batch(tokens, targets, [[len(ids) for ids, _ in members] for members in rows])


def gradients(model: V4Model) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def trained(batches: list[Batch]) -> tuple[float, float, dict[str, Tensor]]:
    """The losses of both heads and the gradient, as the engine makes them."""
    grid = Grid.single(torch.device("cpu"))
    local = build_local_model(CONFIG, torch.float32, grid, plan_stages(CONFIG, ROW, 1, "1f1b", 1))
    local.model.to_empty(device="cpu")
    local.model.load_state_dict(random_model(CONFIG).state_dict())
    engine = NativeEngine(local, grid)
    losses = engine.forward_backward(batches, MTP_WEIGHT)
    return float(losses.lm), float(losses.mtp), gradients(local.model)


def reference() -> tuple[float, float, dict[str, Tensor]]:
    """Whole logits, one sample at a time; the cross-entropy of the chosen tokens, written out."""
    model = random_model(CONFIG)
    lm, mtp = [], []
    for ids, places in samples():
        micro = model.microbatch(ids[None], SampleLayout.whole_rows(ids[None]), ids[None])
        streams, _ = model.run_blocks(model.embed_streams(micro), micro, model.layers)
        logits = model.head(model.norm(model.hc_head(streams)))
        for place in places:
            lm.append(functional.cross_entropy(logits[place], ids[place + 1]))
        block = model.mtp_block
        assert block is not None
        hidden, _ = block.predict_hidden(
            streams,
            model.embed(micro.query_next_T),
            micro.next_T,
            micro.positions,
            micro.exchange,
            micro.num_routed_tokens,
            None,
        )
        logits = model.head(hidden)
        for place in places:  # the same token, predicted one position earlier
            if place > 0:
                mtp.append(functional.cross_entropy(logits[place - 1], ids[place + 1]))
    lm_loss, mtp_loss = torch.stack(lm).mean(), torch.stack(mtp).mean()
    (lm_loss + MTP_WEIGHT * mtp_loss).backward()
    return lm_loss.item(), mtp_loss.item(), gradients(model)


def test_gradients_are_those_of_the_assistant_s_tokens_alone() -> None:
    """Packed in a row, and a sample in each; the worst of other orders of sums is 1.1e-5."""
    expected = reference()
    packed = batch_of([samples()])
    alone = [batch_of([[sample]]) for sample in samples()]
    for batches in ([packed], alone):
        lm, mtp, grads = trained(batches)
        torch.testing.assert_close((lm, mtp), expected[:2], rtol=2e-6, atol=0)
        assert grads.keys() >= expected[2].keys()
        for name, grad in grads.items():
            if name not in expected[2]:  # an indexer's, which this attention does not train
                assert ".indexer." in name and not grad.any()
                continue
            scale = gradient_scale(name, expected[2])
            assert float((grad - expected[2][name]).abs().max()) <= 3e-5 * scale, name


def test_a_step_without_a_target_changes_nothing() -> None:
    lm, mtp, grads = trained([batch_of([[(ids, []) for ids, _ in samples()]])])
    assert lm == mtp == 0.0
    assert all(not grad.any() for grad in grads.values())
