"""Which adapters leave a tier that is full."""

from __future__ import annotations

from lorafleet.engine.eviction import Candidate, choose_evictions, decayed, score


def test_uses_count_half_after_a_half_life() -> None:
    assert decayed(8.0, elapsed_s=0.0, half_life_s=60.0) == 8.0
    assert decayed(8.0, elapsed_s=60.0, half_life_s=60.0) == 4.0
    assert decayed(8.0, elapsed_s=180.0, half_life_s=60.0) == 1.0


def test_score_grows_with_use_and_waiting_requests_and_falls_with_size() -> None:
    assert score(Candidate("x", 10, 2.0, 3)) == 0.5
    assert score(Candidate("x", 10, 2.0, 4)) > score(Candidate("x", 10, 2.0, 3)) > score(Candidate("x", 20, 2.0, 3))


def test_lowest_scores_leave_until_there_is_room_and_no_more_than_needed() -> None:
    cold, warm, hot = Candidate("cold", 4, 0.0, 0), Candidate("warm", 4, 1.0, 0), Candidate("hot", 4, 1.0, 5)
    assert choose_evictions([hot, warm, cold], needed_bytes=4) == ["cold"]
    assert choose_evictions([hot, warm, cold], needed_bytes=5) == ["cold", "warm"]
    assert choose_evictions([hot, warm, cold], needed_bytes=0) == []
    assert choose_evictions([hot, warm, cold], needed_bytes=13) is None
    # Once the large one has to go, the small one before it need not.
    assert choose_evictions([Candidate("small", 1, 0.0, 0), Candidate("large", 8, 1.0, 0)], needed_bytes=6) == ["large"]
