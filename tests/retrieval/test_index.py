from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.errors import DataError
from metier.retrieval.index import reciprocal_rank_fusion, require_texts


def test_fusion_adds_one_over_sixty_plus_rank() -> None:
    hits = reciprocal_rank_fusion([[7, 3], [3, 9]], k=3)
    assert [hit.position for hit in hits] == [3, 7, 9]
    expected = [Fraction(1, 62) + Fraction(1, 61), Fraction(1, 61), Fraction(1, 62)]
    assert [hit.score for hit in hits] == pytest.approx([float(value) for value in expected])


def test_fusion_breaks_ties_by_position() -> None:
    assert [hit.position for hit in reciprocal_rank_fusion([[5], [2]], k=2)] == [2, 5]


@given(st.lists(st.permutations(range(6)), min_size=1, max_size=4), st.integers(1, 8))
def test_fusion_is_a_ranking_that_respects_agreement(rankings: list[list[int]], k: int) -> None:
    found = [hit.position for hit in reciprocal_rank_fusion(rankings, k)]
    assert len(found) == len(set(found)) == min(k, 6)
    for better in range(6):
        for worse in range(6):
            ahead = all(r.index(better) < r.index(worse) for r in rankings)
            if ahead and worse in found:
                assert found.index(better) < found.index(worse)


def test_nothing_to_search_is_refused() -> None:
    with pytest.raises(DataError, match="no text to search"):
        require_texts([])
