"""The order of rows: passes through each source, shares of trained tokens, the same for everyone from anywhere."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.data.blend import Blend, Part
from megatron_klong.data.shard import ShardError
from tests.unit.data.sources import Lengths

ROW = 64
lengths = st.lists(st.integers(2, ROW), min_size=1, max_size=30)


def part(name: str, source: Lengths, weight: float | None = None) -> Part:
    return Part(name=name, source=source, windows=np.arange(len(source.lengths_tokens)), weight=weight)


def windows_of(blend: Blend, rounds: range) -> list[int]:
    return [window for number in rounds for row in blend.rows_of(number) for window in row]


@given(st.lists(lengths, min_size=1, max_size=4), st.integers(0, 5))
def test_without_weights_a_round_holds_every_window_once(sources: list[list[int]], number: int) -> None:
    parts = [part(str(n), Lengths(source)) for n, source in enumerate(sources)]
    blend = Blend(parts, row_tokens=ROW, seed=1)
    assert sorted(windows_of(blend, range(number, number + 1))) == list(range(len(blend)))
    for row in blend.rows_of(number):
        assert sum(blend.lengths_tokens[window] for window in row) <= ROW


@given(
    st.lists(st.tuples(lengths, st.floats(0.05, 1)), min_size=2, max_size=4), st.integers(1, 6), st.integers(0, 2**31)
)
def test_trained_tokens_are_shared_as_the_weights_say(
    sources: list[tuple[list[int], float]], rounds: int, seed: int
) -> None:
    parts = [part(str(n), Lengths(source), weight) for n, (source, weight) in enumerate(sources)]
    blend = Blend(parts, row_tokens=ROW, seed=seed)
    seen = Counter(windows_of(blend, range(rounds)))
    whole = sum(p.trained_tokens for p in parts) * rounds
    first = 0
    for source, weight in sources:
        times = [seen[number] for number in range(first, first + len(source))]
        trained = sum(count * length for count, length in zip(times, source, strict=True))
        share = weight / sum(w for _, w in sources)
        assert abs(trained - share * whole) <= max(source)
        assert max(times) - min(times) <= 1  # each pass holds each window once
        first += len(source)


def test_twice_its_own_share_is_two_passes_a_round_and_a_half_takes_two_rounds() -> None:
    parts = [part("small", Lengths([10] * 4), 0.5), part("large", Lengths([10] * 8), 0.5)]
    blend = Blend(parts, row_tokens=ROW, seed=0)
    # 120 trained tokens a round, 60 of each: one and a half passes through 40, three quarters of 80
    assert blend.epochs_a_round == (1.5, 0.75)
    assert Counter(w < 4 for w in windows_of(blend, range(1))) == {True: 6, False: 6}
    first = [w for w in windows_of(blend, range(2)) if w < 4]
    assert Counter(first) == dict.fromkeys(range(4), 3)


def test_rows_mix_sources_and_windows_know_their_group() -> None:
    parts = [part("a", Lengths([40] * 10, windows_each=2)), part("b", Lengths([20] * 10))]
    blend = Blend(parts, row_tokens=ROW, seed=0)
    rows = blend.rows_of(0)
    assert len(rows) == 10  # a window of each in every row
    assert all(sorted(window < 10 for window in row) == [False, True] for row in rows)
    assert [blend.window(n).group for n in (0, 1, 2, 10, 11)] == [0, 1, 0, 2, 2]
    assert blend.window(13).ids[0] == 3
    (batch,) = blend.batches(rows[:1], part=0, parts=1)
    assert sorted(set(batch.groups[0][batch.loss_mask[0]].tolist())) in ([0, 2], [1, 2])


@given(lengths, st.integers(0, 200), st.integers(0, 3))
def test_entered_anywhere_the_order_is_the_same(source: list[int], position: int, seed: int) -> None:
    def blend() -> Blend:
        parts = [part("a", Lengths(source), 0.3), part("b", Lengths([5, 9, 30]), 0.7)]
        return Blend(parts, row_tokens=ROW, seed=seed)

    walked = blend()
    order = [walked.row_at(n) for n in range(position + 1)]
    assert blend().row_at(position) == order[-1]
    assert walked.row_at(position // 2) == order[position // 2]


def test_seeds_and_rounds_differ_and_a_source_more_leaves_the_order_of_the_others() -> None:
    source = Lengths(list(range(2, 60)))
    one, other = (Blend([part("a", source)], row_tokens=ROW, seed=seed) for seed in (0, 1))
    assert one.rows_of(0) != other.rows_of(0)
    assert one.rows_of(0) != one.rows_of(1)
    assert sorted(one.rows_of(0)) == sorted(one.rows_of(1))
    half = Blend([part("a", source, 0.25), part("b", Lengths([10] * 80), 0.75)], row_tokens=ROW, seed=0)
    third = Blend([part("c", Lengths([7] * 11), 1e-9), *half.parts], row_tokens=ROW, seed=0)
    chosen = {w for w in windows_of(half, range(1)) if w < 58}
    moved = {w - 11 for w in windows_of(third, range(1)) if 11 <= w < 11 + 58}
    assert len(chosen ^ moved) <= 2  # the ends of the round move a little, as the third source adds tokens


def test_processes_share_the_rows_of_a_step() -> None:
    blend = Blend([part("a", Lengths([30] * 9))], row_tokens=ROW, seed=0)
    rows = [blend.row_at(position) for position in range(3, 7)]  # over the end of the round
    whole = blend.batches(rows, part=0, parts=1)
    halves = [batch for half in range(2) for batch in blend.batches(rows, part=half, parts=2)]
    assert [batch.ids.tolist() for batch in whole] == [batch.ids.tolist() for batch in halves]
    with pytest.raises(ValueError, match="4 rows cannot be shared by 3"):
        blend.batches(rows, part=0, parts=3)


def test_rounds_are_counted_in_rows() -> None:
    blend = Blend([part("a", Lengths([60] * 7))], row_tokens=ROW, seed=0)
    assert [blend.positions_of(rounds) for rounds in (0.5, 1, 2, 2.1)] == [4, 7, 14, 15]


def test_the_fingerprint_follows_everything_that_moves_a_row() -> None:
    def fingerprint(
        source: list[int], weight: float | None = None, row_tokens: int = ROW, seed: int = 0, multiple: int = 1
    ) -> str:
        parts = [part("a", Lengths(source), weight), part("b", Lengths([9]), weight and 1 - weight)]
        return Blend(parts, row_tokens=row_tokens, seed=seed, window_multiple=multiple).fingerprint

    base = [3, 4, 5]
    made = [
        fingerprint(base),
        fingerprint([3, 5, 4]),
        fingerprint(base, 0.5),
        fingerprint(base, 0.25),
        fingerprint(base, row_tokens=80),
        fingerprint(base, seed=1),
        fingerprint(base, multiple=4),
    ]
    assert len(set(made)) == len(made)
    assert fingerprint(base) == made[0]


def test_a_part_that_trains_nothing_is_named() -> None:
    with pytest.raises(ShardError, match="source b: nothing in it is to be trained"):
        Blend([part("a", Lengths([4])), part("b", Lengths([4], [0]))], row_tokens=ROW, seed=0)


@pytest.mark.parametrize(("share_of_short", "at_least"), [(0.15, 0.985), (0.5, 0.985), (1e-6, 0.9)])
def test_rows_of_128k_are_full_on_lengths_like_those_of_split_trajectories(
    share_of_short: float, at_least: float
) -> None:
    """Windows of long transcripts end up to one turn's room short of a row; short samples fill what they leave."""
    random = np.random.default_rng(0)
    row = 131072
    long = []
    for _ in range(150):
        cuts = random.integers(3, 8)
        long += [int(row * part) for part in (*random.uniform(0.875, 1.0, cuts), random.uniform(0.25, 1.0))]
    short = np.clip(random.lognormal(np.log(1500), 1.0, 20_000).astype(int), 64, 32768).tolist()
    parts = [
        part("trajectories", Lengths(long, [length // 3 for length in long]), 1 - share_of_short),
        part("comprehensive", Lengths(short, [length // 2 for length in short]), share_of_short),
    ]
    blend = Blend(parts, row_tokens=row, seed=0)
    rows = [filled for number in range(2) for filled in blend.rows_of(number)]
    tokens = sum(int(blend.lengths_tokens[list(filled)].sum()) for filled in rows)
    assert tokens / (len(rows) * row) >= at_least, tokens / (len(rows) * row)
