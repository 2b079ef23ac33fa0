"""Texts that come again are encoded once, with the same ids, in bounded memory."""

from collections import Counter
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.data import encoding
from megatron_klong.data.encoding import RepeatedTexts


class Counting:
    """An encoder that counts how often it is asked for a text."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def __call__(self, text: str) -> list[int]:
        self.asked[text] += 1
        return list(text.encode())


def test_from_the_second_time_on_the_ids_are_kept() -> None:
    encode = Counting()
    texts = RepeatedTexts(encode)
    assert [texts("ab") for _ in range(4)] == [[97, 98]] * 4
    assert encode.asked["ab"] == 2


def test_what_is_kept_cannot_be_spoilt_by_who_asked_for_it() -> None:
    texts = RepeatedTexts(Counting())
    for _ in range(3):
        texts("ab").append(0)
    assert texts("ab") == [97, 98]


def test_a_text_longer_than_a_quarter_of_the_room_is_never_kept() -> None:
    encode = Counting()
    with patch.object(encoding, "_KEPT_CHARACTERS", 16):
        texts = RepeatedTexts(encode)
        for text in ("12345", "1234"):
            for _ in range(4):
                texts(text)
    assert encode.asked == {"12345": 4, "1234": 2}


def test_where_room_is_short_what_was_not_asked_for_longest_goes() -> None:
    encode = Counting()
    with patch.object(encoding, "_KEPT_CHARACTERS", 8):
        texts = RepeatedTexts(encode)
        for text in ("aa", "aa", "bb", "bb", "cc", "cc", "dd", "dd"):  # 8 characters: all four are kept
            texts(text)
        texts("aa")  # asked for again, so bb is now the oldest
        for text in ("ee", "ee"):
            texts(text)
        for text in ("aa", "cc", "dd", "ee", "bb"):
            assert texts(text) == list(text.encode())
    assert encode.asked == {"aa": 2, "bb": 3, "cc": 2, "dd": 2, "ee": 2}


def test_a_text_is_forgotten_when_too_many_others_came_between() -> None:
    encode = Counting()
    with patch.object(encoding, "_SEEN_TEXTS", 2):
        texts = RepeatedTexts(encode)
        for text in ("a", "b", "c", "a", "a", "a"):  # the fourth is as good as the first time
            texts(text)
    assert encode.asked["a"] == 3


@given(asked=st.lists(st.text(max_size=3), max_size=40), room=st.integers(0, 12), seen=st.integers(0, 4))
def test_the_ids_are_those_of_the_encoder_whatever_is_kept(asked: list[str], room: int, seen: int) -> None:
    with patch.object(encoding, "_KEPT_CHARACTERS", room), patch.object(encoding, "_SEEN_TEXTS", seen):
        texts = RepeatedTexts(lambda text: list(text.encode()))
        assert [texts(text) for text in asked] == [list(text.encode()) for text in asked]
