"""A report says what the records say: numbers computed by hand, text escaped, empty input survived, a browser content.

Nothing is faked: records are files' content, the shard is preprocessed from them, the browser is Chromium.
"""

import html
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_klong.data.preprocess import PreprocessReport
from megatron_klong.data.shard import Shard, ShardWriter
from megatron_klong.evaluate.canvas import DARK, LIGHT, Theme
from megatron_klong.evaluate.findings import MISSING
from megatron_klong.evaluate.report import write_report
from megatron_klong.evaluate.summary import mean_and_standard_error
from megatron_klong.trajectory.episode import EpisodeRecord, PolicyRecord
from megatron_klong.trajectory.replay import ReplayResult
from tests.conftest import REPOSITORY
from tests.integration.evaluate.builders import POLICY, Page, agreeing, read, record, write
from tests.unit.trajectory.builders import byte_tokenizer, policy

PLOTS = {"score_by_turns", "endings", "prompt_tokens", "window_composition", "windows_per_episode"}

RUN = [
    record("heldout-1", score=0.2, turns=5),
    record("heldout-2", score=0.4, turns=11),
    record("heldout-3", score=0.9, turns=17, ending="timed_out"),
    record("heldout-4", score=None, turns=2, ending="sandbox_failed", error="bwrap: no such file"),
    record("train-1", score=0.5),
    record("heldout-1", "other", score=1.0, turns=4),
]


@pytest.fixture(scope="module")
def run_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("run"), RUN)


def test_mean_and_standard_error() -> None:
    # mean (0.2 + 0.4 + 0.9) / 3 = 0.5; squares 0.09 + 0.01 + 0.16 = 0.26; / 2 = 0.13; sqrt = 0.36056; / sqrt 3
    assert mean_and_standard_error([0.2, 0.4, 0.9]) == pytest.approx((0.5, 0.208167), abs=1e-6)
    assert mean_and_standard_error([0.7]) == (0.7, None)
    assert mean_and_standard_error([]) == (None, None)


def test_scores_are_those_of_the_records(run_report: Path) -> None:
    page = read(run_report)
    #            policy split       mean     error      n   bar  turns   windows  without score
    # turns (5 + 11 + 17 + 2) / 4 = 8.75 -> 8.8; windows (2 + 3 + 5 + 1) / 4 = 2.75 -> 2.8
    assert page.rows_of("m", "held-out") == [["m", "held-out", "0.500", "± 0.208", "3", "", "8.8", "2.8", "1"]]
    assert page.rows_of("m", "train") == [["m", "train", "0.500", MISSING, "1", "", "3.0", "1.0", "0"]]
    assert page.rows_of("other", "held-out") == [["other", "held-out", "1.000", MISSING, "1", "", "4.0", "1.0", "0"]]


def test_each_episode_has_its_row(run_report: Path) -> None:
    page = read(run_report)
    assert page.rows_of("heldout-3", "m") == [
        ["heldout-3", "m", "held-out", "17", "5", "170.0", "timed out", "0.900", "✓ equal 17 prompts"]
    ]
    failed = page.rows_of("heldout-4", "m")[0]
    assert failed[6:8] == ["sandbox failederrorbwrap: no such file", MISSING]
    assert "1 episode ended as sandbox failed." in page.text
    assert "1 episode without a score." in page.text


def test_seconds_are_split_by_what_they_went_to(run_report: Path) -> None:
    # policy "other": 4 turns in 40 s, 2 s of model and 0.5 s given back a turn: 8 = 20 %, 2 = 5 %, the rest 75 %
    expected = ["other", "1", "40.0", "20.0 %", "5.0 %", "75.0 %", "2.000"]
    assert read(run_report).rows_of("other", "1", "40.0") == [expected]


def test_a_context_that_differs_is_named_with_its_turns(tmp_path: Path) -> None:
    replays = agreeing(RUN)
    # numbered from 0 there, from 1 on the page
    replays[RUN[2].id] = ReplayResult(turns=17, windows=5, mismatches=(0, 4, 5, 8))
    del replays[RUN[4].id]
    page = read(write(tmp_path, RUN, replays=replays))
    assert page.rows_of("heldout-3", "m")[0][-1] == "✗ differs at turn 1, 5, 6 and 1 more"
    assert page.rows_of("train-1", "m")[0][-1] == "not replayed"
    assert "Defect: heldout-3/m/1" in page.text
    assert "4 of 5" in page.text


def test_every_trainable_token_is_accounted_for(tmp_path: Path, run_report: Path) -> None:
    shard = Shard(run_report.parent.parent / "sft")
    trained = int(shard.column("trained_tokens").sum())
    whole = read(run_report)
    assert whole.rows_of("trained, each in one window") == [["trained, each in one window", f"{trained:,}", "100 %"]]
    assert "Nothing dropped." in whole.text
    assert "Nothing refused of 6 files." in whole.text
    # prefix + overlap + new = all tokens of the windows
    parts = [whole.rows_of(part)[0][1] for part in ("prefix", "overlap", "new", "all")]
    prefix, overlap, new, total = (int(tokens.replace(",", "")) for tokens in parts)
    assert prefix + overlap + new == total == sum(len(shard.window(n).ids) for n in range(len(shard)))

    refusals = [{"source": f"in.jsonl:{n}", "reason": "not_json", "detail": "line 1 is <b>"} for n in (7, 9)]
    changes = {"dropped_tokens": {"turn_exceeds_window": 30}, "refusals": refusals}
    cut = read(write(tmp_path, RUN, preprocessing={"trainable_tokens": trained + 30, **changes}))
    assert cut.rows_of("dropped: turn exceeds window")[0][1] == "30"
    assert cut.rows_of("not json") == [["not json", "2", "in.jsonl:7line 1 is <b>"]]
    assert "Nothing" not in cut.text
    assert "Defect" not in cut.text

    lost = read(write(tmp_path, RUN, preprocessing={"trainable_tokens": trained + 31, **changes}))
    assert lost.rows_of("unaccounted for")[0][1] == "1"
    assert "Defect" in lost.text


def test_a_shard_of_another_run_is_a_defect(tmp_path: Path) -> None:
    page = read(write(tmp_path, RUN, preprocessing={"trained_tokens": 1, "trainable_tokens": 1}))
    assert "they are not of one run" in page.text


def test_a_mapping_that_is_no_preprocessing_report_is_refused(tmp_path: Path, run_report: Path) -> None:
    shard = Shard(run_report.parent.parent / "sft")
    with pytest.raises(ValueError, match=r"sft has no 'files'; pass the content of the \.report\.json"):
        write_report(tmp_path, title="", records=[], shard=shard, preprocessing={}, replays={}, splits={}, facts={})


def test_text_from_outside_is_text(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script><img src=x onerror=alert(1)> $\\frac{'
    bad = [record(f"train-{evil.replace('/', '')}", evil.replace("/", ""), score=0.5, ending="_x<b>", error=evil)]
    path = write(tmp_path, bad, title=evil, facts={evil: evil}, splits={bad[0].task: evil})
    page = read(path)
    assert "script" not in page.tags
    assert len(page.images) == len(PLOTS)
    assert page.text.count(evil) >= 4
    assert html.escape(evil, quote=False).split()[0] in path.read_text("utf-8").replace("&#34;", '"')


def test_the_page_stands_alone(run_report: Path) -> None:
    content = run_report.read_text("utf-8")
    page = Page(content)
    assert content.startswith("<!doctype html>")
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    without_data = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", content)
    assert not re.search(r"https?:|url\(|@import", without_data)
    assert len(page.images) == len(PLOTS)
    assert all(str(image["src"]).startswith("data:image/png;base64,") and image["alt"] for image in page.images)
    files = {path.stem: path.read_bytes() for path in (run_report.parent / "plots").iterdir()}
    assert files.keys() == PLOTS
    assert all(png.startswith(b"\x89PNG") for png in files.values())


def test_the_same_run_gives_the_same_page(run_report: Path, tmp_path: Path) -> None:
    assert write(tmp_path, RUN).read_bytes() == run_report.read_bytes()


def test_the_longest_episode_shows_its_prefix_only_where_the_shard_knows_it(tmp_path: Path) -> None:
    assert "pinned prefix is not drawn" not in read(write(tmp_path / "same", RUN)).text
    other = PolicyRecord.of(policy(500, reserve=60, keep=100))
    moved = [record("heldout-3", score=0.9, turns=17, context=other), *RUN[:2]]
    assert "pinned prefix is not drawn" in read(write(tmp_path / "other", moved)).text


@pytest.mark.parametrize(
    ("records", "plots"),
    [
        pytest.param([], set(), id="nothing"),
        pytest.param(
            [record("heldout-1", score=None, turns=0, windows=0, ending="sandbox_failed", context=None)],
            {"endings", "windows_per_episode"},
            id="one that never began",
        ),
        pytest.param([record("heldout-1", score=0.0, turns=1)], PLOTS - {"window_composition"}, id="one turn"),
    ],
)
def test_a_run_with_hardly_anything(tmp_path: Path, records: list[EpisodeRecord], plots: set[str]) -> None:
    with ShardWriter(tmp_path / "sft", byte_tokenizer(), POLICY, renderer="glm-4.5", overwrite=False):
        pass
    stale = tmp_path / "report" / "plots" / "window_composition.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier report")
    page = read(
        write_report(
            tmp_path / "report",
            title="Hardly anything",
            records=records,
            shard=Shard(tmp_path / "sft"),
            preprocessing=PreprocessReport().as_json(),
            replays={one.id: ReplayResult(turns=0, windows=0, mismatches=()) for one in records},
            splits={},
            facts={},
        )
    )
    assert {path.stem for path in stale.parent.iterdir()} == plots
    assert len(page.images) == len(plots)
    assert "The shard holds no window." in page.text
    assert ("No episode was recorded." in page.text) == (not records)


def test_a_long_table_is_folded(tmp_path: Path) -> None:
    records = [record(f"train-{number:02d}", score=0.5, turns=1) for number in range(62)]
    page = read(write(tmp_path, records))
    assert page.tags.count("details") == 1
    assert "2 more episodes" in page.text
    assert len([row for row in page.rows if row[0].startswith("train-")]) == 62


def test_importing_the_report_loads_neither_torch_nor_matplotlib() -> None:
    code = "import sys, megatron_klong.evaluate.report; print({'torch', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# -- in a browser


def chromium(profile: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH: the page was not opened in a browser")
    offline = ["background-networking", "component-update", "sync", "quic", "gpu"]
    flags = ["--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars", "--enable-logging=stderr"]
    flags += [f"--disable-{service}" for service in offline]
    command = [program, *flags, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_a_browser_opens_it_without_complaint(run_report: Path, tmp_path: Path) -> None:
    done = chromium(tmp_path, "--virtual-time-budget=2000", "--dump-dom", run_report.as_uri())
    assert len(Page(done.stdout.replace("<!DOCTYPE html>", "")).images) == len(PLOTS)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line or "Failed to load" in line]
    assert complaints == []


@pytest.mark.parametrize(
    ("scheme", "theme", "width"), [(1, LIGHT, 1200), (0, DARK, 500)], ids=["light, desk", "dark, phone"]
)
def test_a_browser_shows_the_plots(run_report: Path, tmp_path: Path, scheme: int, theme: Theme, width: int) -> None:
    from matplotlib.image import imread

    shot = tmp_path / "shot.png"
    blink = f"--blink-settings=preferredColorScheme={scheme}"
    chromium(tmp_path / "profile", blink, f"--screenshot={shot}", f"--window-size={width},6000", run_report.as_uri())
    pixels = (imread(shot)[:, :, :3] * 255).round().astype(int)

    def share(color: str) -> float:
        wanted = [int(color[start : start + 2], 16) for start in (1, 3, 5)]
        return float((abs(pixels - wanted).max(axis=2) <= 2).mean())

    assert share(theme.paper) > 0.5
    # these are drawn in plots only: policies, endings, parts of windows
    for color in (*theme.cycle[:3], theme.overlap):
        assert share(color) > 1e-4, f"{color} is missing, so a plot is"
