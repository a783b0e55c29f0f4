from hypothesis import given, settings
from hypothesis import strategies as st

from metier.text.windows import cut


@settings(max_examples=50)
@given(text=st.text(max_size=300), length=st.integers(1, 40))
def test_cuts_lose_and_double_nothing(text: str, length: int) -> None:
    pieces = list(cut(text, length))
    assert "".join(pieces) == text
    assert all(1 <= len(piece) <= length for piece in pieces)
