"""Routers: balance loss, hash tables, biases, and what each of them may not touch."""

from __future__ import annotations

import pytest
import torch

from model import IGNORE_INDEX, SampleLayout, TokenCounts
from model.router import Router, Routing, balance_loss, balanced_table, expert_loads
from tests.model.tiny import random_model, random_tokens, tiny_config

EXPERTS, ACTIVE = 8, 2


def routing_of(indices: torch.Tensor, scores: torch.Tensor | None = None) -> Routing:
    """Routing with the given choice [T, A]; scores are even where not given."""
    scores = torch.ones(len(indices), EXPERTS) if scores is None else scores
    return Routing(indices, torch.ones(indices.shape), scores)


def even_choice(tokens: int) -> torch.Tensor:
    """[T, 2]: each run of four tokens uses every one of eight experts once."""
    return (torch.arange(tokens)[:, None] * ACTIVE + torch.arange(ACTIVE)) % EXPERTS


def collapsed(tokens: int) -> Routing:
    """All tokens choose experts 0 and 1, which have all the score between them."""
    scores = torch.zeros(tokens, EXPERTS)
    scores[:, :ACTIVE] = 0.7
    return routing_of(torch.arange(ACTIVE).expand(tokens, -1), scores)


class TestBalanceLoss:
    def test_is_one_when_balanced(self):
        layout = SampleLayout.from_lengths([[4, 8, 20]])
        loss = balance_loss(routing_of(even_choice(32)), layout, 32)
        assert float(loss) == pytest.approx(1.0, abs=1e-6)

    def test_is_experts_over_active_when_collapsed(self):
        layout = SampleLayout.from_lengths([[1, 11, 20]])
        loss = balance_loss(collapsed(32), layout, 32)
        assert float(loss) == pytest.approx(EXPERTS / ACTIVE, abs=1e-6)

    def test_equals_the_formula_sample_by_sample(self):
        lengths = [3, 1, 12, 7]
        layout = SampleLayout.from_lengths([lengths])
        generator = torch.Generator().manual_seed(1)
        scores = torch.rand(23, EXPERTS, generator=generator)
        routing = routing_of(scores.topk(ACTIVE).indices, scores)
        expected, start = 0.0, 0
        for n in lengths:
            rows = slice(start, start + n)
            mean_share = (scores[rows] / scores[rows].sum(1, keepdim=True)).double().mean(0)
            for e in range(EXPERTS):
                chosen = int((routing.indices_TA[rows] == e).sum())
                share_of_choices = EXPERTS / (ACTIVE * n) * chosen
                expected += n / 40 * share_of_choices * float(mean_share[e])
            start += n
        assert float(balance_loss(routing, layout, 40)) == pytest.approx(expected, rel=1e-5)

    def test_samples_weigh_their_tokens_not_their_number(self):
        """24 balanced tokens in one sample and 8 collapsed ones in two."""
        even, flat = routing_of(even_choice(24)), collapsed(8)
        layout = SampleLayout.from_lengths([[24, 5, 3]])
        both = Routing(
            torch.cat([even.indices_TA, flat.indices_TA]),
            torch.ones(32, ACTIVE),
            torch.cat([even.scores_TE, flat.scores_TE]),
        )
        expected = (24 * 1 + 8 * EXPERTS / ACTIVE) / 32
        assert float(balance_loss(both, layout, 32)) == pytest.approx(expected, abs=1e-6)

    def test_padding_has_no_part_in_loss_or_load(self):
        choice = torch.cat([even_choice(12), torch.zeros(4, ACTIVE, dtype=torch.int64)])
        scores = torch.ones(16, EXPERTS)
        scores[12:, 0] = 50.0
        scores.requires_grad_()
        layout = SampleLayout.from_lengths([[12]], seq_len=16)
        loss = balance_loss(routing_of(choice, scores), layout, 12)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(1.0, abs=1e-6)
        assert scores.grad[12:].abs().max() == 0
        loads_LE = expert_loads([choice, choice], layout, EXPERTS)
        assert loads_LE.tolist() == [[12 * ACTIVE / EXPERTS] * EXPERTS] * 2

    def test_gradient_pushes_scores_of_crowded_experts_down(self):
        scores = torch.ones(6, EXPERTS, requires_grad=True)
        choice = torch.tensor([[0, 1]] * 6)
        layout = SampleLayout.from_lengths([[6]])
        balance_loss(routing_of(choice, scores), layout, 6).backward()
        assert (scores.grad[:, :2] > 0).all() and (scores.grad[:, 2:] < 0).all()


def make_gates_even(model) -> None:
    """Zero gate weights give even scores; A = E then makes the choice even too."""
    with torch.no_grad():
        for gate in model.routers().values():
            gate.weight.zero_()


def losses_of(model, tokens, layout=None):
    targets = tokens.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    return model(tokens, layout, targets)


def test_the_model_s_balance_loss_is_weight_times_learned_layers_when_balanced():
    config = tiny_config(
        n_routed_experts=4, num_experts_per_tok=4, num_hash_layers=1, balance_loss_weight=0.25
    )
    model = random_model(config)
    make_gates_even(model)
    output = losses_of(model, random_tokens(config, 2, 19))
    # Three learned layers and the MTP block; the hash layer has no balance loss.
    assert float(output.balance_loss) == pytest.approx(0.25 * 4, rel=1e-6)
    expected = output.lm_loss + 0.3 * output.mtp_loss + output.balance_loss
    assert output.loss.item() == pytest.approx(float(expected), rel=1e-6)


def test_the_model_s_balance_loss_is_weight_times_experts_over_active_when_collapsed():
    config = tiny_config(num_experts_per_tok=1, num_hash_layers=0, balance_loss_weight=1e-4)
    model = random_model(config)
    with torch.no_grad():
        for gate in model.routers().values():
            # Every token looks the same to the gate, and only expert 3 gets a score.
            gate.register_forward_pre_hook(lambda _, args: (torch.ones_like(args[0]), args[1]))
            gate.weight.fill_(-100.0)
            gate.weight[3] = 1.0
    output = losses_of(model, random_tokens(config, 1, 19))
    assert float(output.balance_loss) == pytest.approx(5 * 1e-4 * 8, rel=1e-5)
    assert output.expert_load.tolist() == [[0, 0, 0, 19, 0, 0, 0, 0]] * 5


def test_counts_are_the_global_denominator_of_the_balance_loss():
    config = tiny_config(num_hash_layers=0, balance_loss_weight=1.0)
    model = random_model(config)
    tokens = random_tokens(config, 1, 19)
    alone = losses_of(model, tokens).balance_loss
    targets = tokens.roll(-1, 1)
    counts = TokenCounts(lm=18, mtp=17, routed=19 * 4)
    shared = model(tokens, targets=targets, counts=counts).balance_loss
    assert float(shared) == pytest.approx(float(alone) / 4, rel=1e-6)


def loads_of(table: torch.Tensor, experts: int, counts: torch.Tensor) -> torch.Tensor:
    weights = counts.double()[:, None].expand_as(table)
    return torch.zeros(experts, dtype=torch.float64).index_add_(
        0, table.flatten(), weights.flatten()
    )


def assert_rows_distinct(table: torch.Tensor) -> None:
    ordered = table.sort(dim=1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all()


class TestHashTable:
    @pytest.mark.parametrize(
        ("vocab", "experts", "active"),
        [(8192, 256, 6), (5003, 16, 2), (97, 8, 8), (129280, 384, 6)],
    )
    def test_rows_distinct_and_uniform_loads_within_one_percent(self, vocab, experts, active):
        table = balanced_table(torch.Generator().manual_seed(0), vocab, experts, active)
        assert table.shape == (vocab, active) and table.dtype == torch.int64
        assert set(table.unique().tolist()) == set(range(experts))
        assert_rows_distinct(table)
        loads = loads_of(table, experts, torch.ones(vocab))
        assert float(loads.max() - loads.min()) <= 1
        mean = vocab * active / experts
        if mean >= 100:
            assert float((loads - mean).abs().max()) <= 0.01 * mean

    @pytest.mark.parametrize("power", [1.0, 1.2])
    def test_balanced_under_zipf_counts(self, power):
        """No expert has more than the mean plus one percent, unless one token alone has."""
        vocab, experts, active = 8192, 64, 6
        counts = (1e7 / torch.arange(1, vocab + 1, dtype=torch.float64) ** power).ceil()
        counts = counts[torch.randperm(vocab, generator=torch.Generator().manual_seed(1))]
        table = balanced_table(
            torch.Generator().manual_seed(0), vocab, experts, active, counts.tolist()
        )
        assert_rows_distinct(table)
        loads = loads_of(table, experts, counts)
        mean = float(loads.mean())
        assert float(loads.max()) <= max(float(counts.max()), 1.01 * mean)
        # A table that ignores the counts is far from that.
        blind = balanced_table(torch.Generator().manual_seed(0), vocab, experts, active)
        assert float(loads_of(blind, experts, counts).max()) > 1.2 * max(counts.max(), mean)

    def test_unseen_tokens_still_get_distinct_experts(self):
        table = balanced_table(torch.Generator().manual_seed(0), 500, 16, 4, [0.0] * 499 + [3.0])
        assert_rows_distinct(table)
        assert len(table.unique()) == 16

    def test_neighbouring_ids_do_not_share_their_rows(self):
        """Rows are in random order: ids close to each other must not go to the same experts."""
        table = balanced_table(torch.Generator().manual_seed(0), 4096, 32, 4)
        common = (table[1:, :, None] == table[:-1, None, :]).any(-1).sum(1).double()
        assert abs(float(common.mean()) - 4 * 4 / 32) < 0.05

    def test_ids_that_do_not_occur_are_spread_over_all_experts(self):
        counts = torch.zeros(4000)
        counts[:400] = torch.arange(400, 0, -1).double() ** 2
        table = balanced_table(torch.Generator().manual_seed(0), 4000, 8, 2, counts.tolist())
        unused = table[400:].flatten().bincount(minlength=8)
        assert int(unused.min()) > 0.8 * 3600 * 2 / 8
        loads = loads_of(table, 8, counts)
        assert float(loads.max() / loads.mean()) < 1.01

    def test_counts_of_another_vocabulary_are_refused(self):
        with pytest.raises(ValueError, match="token_counts has 3 entries, the vocabulary 4"):
            balanced_table(torch.Generator(), 4, 2, 1, [1.0, 2.0, 3.0])

    def test_layers_and_seeds_have_tables_of_their_own_and_none_is_zero(self):
        model = random_model(tiny_config(num_hash_layers=3), seed=0)
        other = random_model(tiny_config(num_hash_layers=3), seed=1)
        tables = [m.layers[i].ffn.gate.tid2eid for m in (model, other) for i in range(3)]
        for number, table in enumerate(tables):
            assert_rows_distinct(table)
            assert int(table.max()) == 7 and len(table.unique()) == 8
            for before in tables[:number]:
                assert not torch.equal(table, before)

    def test_the_model_s_tables_are_balanced_by_the_counts_it_is_given(self):
        config = tiny_config(num_hash_layers=1)
        model = random_model(config)
        counts = torch.arange(97, 0, -1).double() ** 2
        model.init_weights(0, counts.tolist())
        loads = loads_of(model.layers[0].ffn.gate.tid2eid, 8, counts)
        assert float(loads.max() / loads.mean()) < 1.01


class TestRouter:
    def hidden(self, config, tokens: int = 50) -> torch.Tensor:
        return torch.randn(tokens, config.hidden_size, generator=torch.Generator().manual_seed(2))

    def test_scores_choice_and_weights_by_hand(self):
        config = tiny_config()
        router: Router = random_model(config).layers[1].ffn.gate
        x = self.hidden(config)
        routing = router(x, torch.zeros(50, dtype=torch.int64))
        for t in range(50):
            score = torch.log1p(torch.exp(router.weight.double() @ x[t].double())).sqrt()
            chosen = (score + router.bias).argsort(descending=True)[: config.num_experts_per_tok]
            assert routing.indices_TA[t].tolist() == chosen.tolist()
            weights = score[chosen] / score[chosen].sum() * config.routed_scaling_factor
            torch.testing.assert_close(routing.weights_TA[t].double(), weights, rtol=1e-5, atol=0)

    def test_bias_only_selects(self):
        """A bias that leaves the choice as it is leaves every weight as it is, to the bit."""
        config = tiny_config()
        router: Router = random_model(config).layers[1].ffn.gate
        x, tokens = self.hidden(config), torch.zeros(50, dtype=torch.int64)
        router.bias.zero_()
        before = router(x, tokens)
        router.bias.fill_(5.0)
        after = router(x, tokens)
        assert torch.equal(before.indices_TA, after.indices_TA)
        assert torch.equal(before.weights_TA, after.weights_TA)
        assert torch.equal(before.scores_TE, after.scores_TE)
        router.bias[4] = 100.0
        forced = router(x, tokens)
        assert (forced.indices_TA == 4).any(1).all()
        assert torch.equal(before.scores_TE, forced.scores_TE)
        assert not router.bias.requires_grad

    def test_hash_layers_follow_the_token_and_weigh_by_the_gate(self):
        config = tiny_config()
        router: Router = random_model(config).layers[0].ffn.gate
        tokens = torch.arange(50)
        x = self.hidden(config)
        first, second = router(x, tokens), router(x * 0.5, tokens)
        assert torch.equal(first.indices_TA, router.tid2eid[:50])
        assert torch.equal(first.indices_TA, second.indices_TA)
        assert not torch.equal(first.weights_TA, second.weights_TA)
        total = first.weights_TA.sum(1)
        torch.testing.assert_close(total, torch.full((50,), config.routed_scaling_factor))

    def test_scores_are_fp32_in_a_bf16_model(self):
        config = tiny_config()
        model = random_model(config, dtype=torch.bfloat16)
        router: Router = model.layers[1].ffn.gate
        x = self.hidden(config).bfloat16()
        routing = router(x, torch.zeros(50, dtype=torch.int64))
        assert routing.scores_TE.dtype == routing.weights_TA.dtype == torch.float32
        exact = (x.double() @ router.weight.double().T).exp().log1p().sqrt()
        torch.testing.assert_close(routing.scores_TE.double(), exact, rtol=1e-5, atol=1e-6)

    def test_very_negative_logits_have_finite_gradients(self):
        config = tiny_config()
        router: Router = random_model(config).layers[1].ffn.gate
        with torch.no_grad():
            router.weight.fill_(-100.0)
        routing = router(torch.ones(3, config.hidden_size), torch.zeros(3, dtype=torch.int64))
        routing.weights_TA.sum().backward()
        assert routing.weights_TA.isfinite().all() and router.weight.grad.isfinite().all()


class TestBiasUpdate:
    def test_moves_against_the_load_and_leaves_hash_layers(self):
        config = tiny_config(num_hash_layers=1)
        model = random_model(config)
        before = {n: b.clone() for n, b in model.named_buffers()}
        parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
        load = torch.tensor([[10.0, 30, 20, 20, 20, 20, 20, 20]] * 5)
        load[2] = load[2].flip(0)
        model.update_router_bias(load, speed=0.01)
        step = torch.tensor([0.01, -0.01, 0, 0, 0, 0, 0, 0])
        for number, gate in model.routers().items():
            if gate.hashed:
                assert torch.equal(gate.tid2eid, before["layers.0.ffn.gate.tid2eid"])
                continue
            name = f"layers.{number}" if number < 4 else "mtp.0"
            moved = gate.bias - before[f"{name}.ffn.gate.bias"]
            torch.testing.assert_close(
                moved, step.flip(0) if number == 2 else step, atol=1e-7, rtol=0
            )
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, parameters[name])

    def test_default_speed_is_the_report_s(self):
        model = random_model(tiny_config(num_hash_layers=0))
        before = model.layers[0].ffn.gate.bias.clone()
        model.update_router_bias(torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8]] * 5))
        moved = model.layers[0].ffn.gate.bias - before
        torch.testing.assert_close(moved, torch.tensor([1e-3] * 4 + [-1e-3] * 4), atol=1e-7, rtol=0)

    def test_repeated_updates_even_the_load_out(self):
        config = tiny_config(num_hash_layers=0, num_nextn_predict_layers=0)
        model = random_model(config)
        tokens = random_tokens(config, 4, 64)

        def spread() -> torch.Tensor:
            with torch.no_grad():
                load = losses_of(model, tokens).expert_load
            assert load.sum(1).tolist() == [4 * 64 * 3] * 4
            model.update_router_bias(load, speed=0.01)
            return load[0].max() - load[0].min()

        first = spread()
        for _ in range(60):
            last = spread()
        assert float(first) > 60 and float(last) < 0.4 * float(first)

    def test_load_of_another_number_of_layers_is_refused(self):
        model = random_model(tiny_config())
        with pytest.raises(ValueError):
            model.update_router_bias(torch.ones(4, 8))
