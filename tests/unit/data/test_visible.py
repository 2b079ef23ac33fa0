"""Characters one cannot see: each replaced by a mark, everything else untouched, nothing left that acts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.data.visible import one_line, visible


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", [("plain", False)]),
        ("", []),
        ("a\nb", [("a\nb", False)]),
        ("a  \nb ", [("a", False), ("··", True), ("\nb", False), ("·", True)]),
        ("\tx", [("⇥   ", True), ("x", False)]),
        ("\x1b[0m", [("⟨ESC⟩", True), ("[0m", False)]),
        ("\x01\x7f\r", [("⟨U+0001⟩", True), ("⟨DEL⟩", True), ("⟨CR⟩", True)]),
        ("a\u00a0b", [("a", False), ("⟨NBSP⟩", True), ("b", False)]),
        ("\u200b\u202e\ufeff", [("⟨U+200B⟩", True), ("⟨U+202E⟩", True), ("⟨BOM⟩", True)]),
        ("\u2800\u3164", [("⟨U+2800⟩", True), ("⟨U+3164⟩", True)]),
        ("\ud800", [("⟨U+D800⟩", True)]),
        ("\U000e0041", [("⟨U+E0041⟩", True)]),
        ("\ufffd", [("\ufffd", True)]),
        ("日本 é 😀", [("日本 é 😀", False)]),
    ],
)
def test_what_is_shown(text: str, expected: list[tuple[str, bool]]) -> None:
    assert list(visible(text)) == expected


@given(text=st.text())
def test_what_is_shown_is_printable_and_loses_nothing(text: str) -> None:
    runs = list(visible(text))
    assert all(character.isprintable() or character == "\n" for run, _ in runs for character in run)
    kept = "".join(run for run, marked in runs if not marked)
    remaining = iter(text)
    assert all(character in remaining for character in kept), "in order"
    assert one_line(text).isprintable()
