"""The paragraph about a run without progress: who waits where for whom."""

from dataclasses import replace

from trainer.parallel.waits import Collective
from trainer.process.hang import RankReport, describe_hang

REDUCE = Collective("all_reduce", "world", (0, 1, 2, 3), 57)
PLACE = "trainer/engine.py, line 80, in _agree"


def reports(*collectives: Collective | None) -> dict[int, RankReport]:
    """Of ranks on two hosts, two on each."""
    return {
        rank: RankReport(
            rank, f"node{rank // 2}", 100 + rank, "update", 12, 61.0, 60.0, collective, PLACE
        )
        for rank, collective in enumerate(collectives)
    }


def test_the_rank_that_is_missing_is_named_with_what_it_does() -> None:
    of_ranks = reports(REDUCE, None, REDUCE, REDUCE)
    of_ranks[1] = replace(of_ranks[1], task="reading data", place="data/rows/loader.py, line 9")
    assert describe_hang(of_ranks, {}) == (
        "rank 0 on node0 and ranks 2, 3 on node1 wait in all_reduce number 57 over the axis world "
        f"(step 12, update, {PLACE}) for rank 1; rank 1 on node0 is in no collective but in step "
        "12, reading data: data/rows/loader.py, line 9"
    )


def test_ranks_in_different_collectives_are_set_against_each_other() -> None:
    other = Collective("all_gather", "world", (0, 1, 2, 3), 3)
    text = describe_hang(reports(REDUCE, other, REDUCE, REDUCE), {})
    assert "number 57 over the axis world (" in text and ") for rank 1; rank 1 on node0" in text
    assert "waits in all_gather number 3 over the axis world (" in text
    assert ") for ranks 0, 2, 3; these ranks call different collectives" in text


def test_ranks_that_wait_for_ranks_that_wait_are_counted() -> None:
    """Pairs of ranks wait for rank 7, directly or through others."""
    pairs = [Collective("reduce_scatter", "data", (2 * n, 2 * n + 1), 4) for n in range(4)]
    chain = [Collective("send and receive", "pipeline", (2 * n + 1, 7), 4) for n in range(3)]
    places = [pair for n in range(3) for pair in (pairs[n], chain[n])]
    text = describe_hang(reports(*places, pairs[3], None), {})
    assert text.count(" for rank 7") == 3, "of the four that wait for it"
    assert "4 more ranks wait in 4 other collectives" in text
    assert "rank 7 on node3 is in no collective" in text


def test_a_rank_without_an_answer_has_its_last_sign() -> None:
    of_ranks = reports(REDUCE, REDUCE, REDUCE, None)
    last = replace(of_ranks.pop(3), task="saving")
    text = describe_hang(of_ranks, {3: last})
    assert ") for rank 3; rank 3 on node1 (pid 103) does not answer" in text
    assert text.endswith("its last sign was in step 12, saving")
    assert describe_hang(of_ranks, {3: None}).endswith("; rank 3 has given no sign of life")


def test_a_report_travels_as_json() -> None:
    for report in reports(REDUCE, None).values():
        assert RankReport.from_json(report.to_json()) == report
