"""Where an answer stands in the text of a dialogue."""

from hypothesis import given
from hypothesis import strategies as st

from dpo_wrapper.data.tokens.dialogue_text import DialogueText, common_prefix


@given(st.text("ab", max_size=9), st.text("ab", max_size=9), st.text("abc", max_size=9))
def test_common_prefix(start: str, one: str, other: str) -> None:
    texts = [start + one, start + other]
    lengths = [k for k in range(len(min(texts, key=len)) + 1) if texts[0][:k] == texts[1][:k]]
    expected = texts[0][: lengths[-1]]
    assert common_prefix(*texts) == expected
    assert common_prefix(*map(list, texts)) == list(expected)


def test_segments_are_cut_where_answers_begin_and_end() -> None:
    text = DialogueText("Q1 A1 Q2 A2.", [(3, 6), (9, 12)], 9, True)
    assert text.end == 12
    assert text.segments(0, 9) == [(0, 3, False), (3, 6, True), (6, 9, False)]
    assert text.segments(9, 12) == [(9, 12, True)]
    assert text.segments(4, 12) == [(4, 6, True), (6, 9, False), (9, 12, True)]
