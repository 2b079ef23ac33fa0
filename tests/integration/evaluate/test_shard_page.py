"""The page of a shard: its numbers, its text marked and harmless, alone, and shown by a browser in light and dark."""

import re
from pathlib import Path

import pytest

from megatron_klong.data.inspect import Inspection
from megatron_klong.data.preprocess import preprocess
from megatron_klong.data.shard import ShardWriter
from megatron_klong.evaluate.canvas import DARK, LIGHT, Theme
from megatron_klong.evaluate.shard_page import write_shard_page
from megatron_klong.trajectory.context import ContextPolicy
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.schema import Transcript
from megatron_klong.trajectory.tokenizer import load_tokenizer
from megatron_klong.trajectory.tokenizer_training import train_tokenizer
from megatron_klong.trajectory.windows import split
from tests.integration.evaluate.builders import Page, read
from tests.integration.evaluate.test_report import chromium
from tests.unit.trajectory.builders import assistant, bash, policy, system, tool, transcript, user

EVIL = '<script>alert("1")</script></pre><img src=x onerror=alert(1)> \x1b[31m \u202e & $\\frac{'
RULE = policy(1200, reserve=200, keep=300)


def work(turns: int) -> list[Transcript]:
    commands = ["cat model.py", "python train.py", "sed -i s/x/y/ model.py", "python train.py", "cat > README.md <<E"]
    results = ["x = 1", "NameError: x", "", "exit code 0", ""]
    made = []
    for length in (turns, 2):
        messages = [system("You work."), user("task " + EVIL)]
        for number in range(length):
            messages.append(assistant("I go on. " * 6, reasoning=f"step {number}", calls=[bash(commands[number % 5])]))
            messages.append(tool(results[number % 5] + "\nmore" * 30))
        made.append(transcript(*messages))
    return made


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["cat python train model reads and writes"] * 3, vocabulary_size=300, folder=folder)
    return folder / "tokenizer.json"


def write(folder: Path, made: list[Transcript], tokenizer_file: Path, rule: ContextPolicy = RULE) -> Path:
    tokenizer = load_tokenizer(tokenizer_file)
    renderer = GlmRenderer(tokenizer)
    with ShardWriter(folder / "sft", tokenizer, rule, renderer=renderer.name, overwrite=True) as shard:
        for item in made:
            rendered = renderer.transcript(item)
            shard.add(item, rendered, split(rendered, rule))
    return folder / "sft"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("page")
    prefix = write(folder, work(15), tokenizer_file)
    return write_shard_page(Inspection(prefix, tokenizer_file), folder / "report.html")


def test_the_numbers_are_those_of_the_summary(page_file: Path, tokenizer_file: Path) -> None:
    page = read(page_file)
    summary = Inspection(page_file.parent / "sft", tokenizer_file).summary()
    assert page.rows_of("all", f"{summary.tokens:,}")[0][3] == f"{summary.window_tokens:,}"
    assert page.rows_of("once") == [["once", f"{summary.trained_tokens:,}", "100 %"]]
    for row in summary.phases:
        assert page.rows_of(row.phase, str(row.windows))[0][2:4] == [str(row.turns), f"{row.trainable_tokens:,}"]
    assert page.rows_of("0", "ttest")[0][2] == "15"  # turns of the document t, from test
    assert "Nothing stands out." in page.text


def test_a_window_for_each_frequent_phase_is_shown(page_file: Path, tokenizer_file: Path) -> None:
    page = read(page_file)
    summary = Inspection(page_file.parent / "sft", tokenizer_file).summary()
    shown = [row.example for row in summary.phases if row.example is not None]
    assert shown
    for number in shown:
        assert f"Window {number}: " in page.text
    content = page_file.read_text("utf-8")
    assert '<li class="segment trained">' in content
    assert "<b>&lt;|assistant|&gt;</b>" in content
    assert "<i>⏎</i>" in content


def test_text_of_transcripts_cannot_act(page_file: Path) -> None:
    content = page_file.read_text("utf-8")
    page = Page(content)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.images)
    assert 'alert("1")' in page.text
    assert "⟨ESC⟩[31m" in page.text
    assert "\u202e" not in content
    assert "\x1b" not in content


def test_the_page_stands_alone(page_file: Path) -> None:
    content = page_file.read_text("utf-8")
    assert content.startswith("<!doctype html>")
    without_data = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", content)
    assert not re.search(r"https?:|url\(|@import", without_data)
    page = Page(content)
    assert len(page.images) == 6
    assert all(image["alt"] for image in page.images)


def test_the_same_shard_gives_the_same_page(page_file: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    inspection = Inspection(page_file.parent / "sft", tokenizer_file)
    assert write_shard_page(inspection, tmp_path / "x.html").read_bytes() == page_file.read_bytes()


def test_without_a_tokenizer_ids_are_shown_and_it_is_said(page_file: Path, tmp_path: Path) -> None:
    inspection = Inspection(page_file.parent / "sft", None)
    inspection.tokenizer, inspection.no_text = None, "it is not here; pass --tokenizer"
    page = read(write_shard_page(inspection, tmp_path / "x.html"))
    assert "Ids instead of text, and no phases of work: it is not here; pass --tokenizer." in page.text
    assert "Window 0: phase not known" in page.text
    assert len(page.images) == 5


def test_what_is_left_out_is_said(tmp_path: Path, tokenizer_file: Path) -> None:
    long = transcript(user("task"), assistant("y" * 9000), user("x" * 5000), assistant("short"), user("z"))
    many = transcript(user("task"), *[message for _ in range(40) for message in (assistant("a"), user("b"))])
    never = transcript(user("w" * 30000), assistant("a"))
    prefix = write(tmp_path, [long, many, never], tokenizer_file, policy(20000, reserve=200, keep=300))
    page = read(write_shard_page(Inspection(prefix, tokenizer_file), tmp_path / "x.html"))
    assert "1 transcript in no window." in page.text
    assert "trainable tokens" in page.text
    assert "… 3,001 more characters" in page.text  # of a line end and 9,000, 6,000 are shown
    assert "… 4,101 more characters" in page.text  # of a line end and 5,000 behind the role's token, 900
    assert page.rows_of("never")


def test_an_empty_shard_has_a_page(tmp_path: Path, tokenizer_file: Path) -> None:
    prefix = write(tmp_path, [], tokenizer_file)
    page = read(write_shard_page(Inspection(prefix, tokenizer_file), tmp_path / "x.html"))
    assert page.text.count("The shard holds no window.") == 2
    assert "The shard holds no transcript." in page.text
    assert page.images == []


def test_real_transcripts_have_a_page(shared_data: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "gpt-neox-olmo-dolma-v1_5", add_special_tokens=True)
    source = shared_data / "trajectories" / "openai_messages"
    preprocess([source], tmp_path / "sft", tokenizer, policy(8192, reserve=1024, keep=1024))
    page = read(write_shard_page(Inspection(tmp_path / "sft", Path(tokenizer.path)), tmp_path / "x.html"))
    assert page.rows_of("debugging")[0][2] == "29"  # turns, as test_phases reads them


# -- in a browser


def test_a_browser_opens_it_without_complaint(page_file: Path, tmp_path: Path) -> None:
    done = chromium(tmp_path, "--virtual-time-budget=2000", "--dump-dom", page_file.as_uri())
    assert len(Page(done.stdout.replace("<!DOCTYPE html>", "")).images) == 6
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line or "Failed to load" in line] == []


@pytest.mark.parametrize(
    ("scheme", "theme", "width"), [(1, LIGHT, 1200), (0, DARK, 500)], ids=["light, desk", "dark, phone"]
)
def test_a_browser_shows_plots_and_trained_text(
    page_file: Path, tmp_path: Path, scheme: int, theme: Theme, width: int
) -> None:
    from matplotlib.image import imread

    shot = tmp_path / "shot.png"
    blink = f"--blink-settings=preferredColorScheme={scheme}"
    chromium(tmp_path / "profile", blink, f"--screenshot={shot}", f"--window-size={width},9000", page_file.as_uri())
    pixels = (imread(shot)[:, :, :3] * 255).round().astype(int)

    def share(color: str) -> float:
        wanted = [int(color[start : start + 2], 16) for start in (1, 3, 5)]
        return float((abs(pixels - wanted).max(axis=2) <= 2).mean())

    trained = "#eceefb" if theme is LIGHT else "#23284a"
    assert share(theme.paper) > 0.3
    for color in (theme.new, theme.overlap, trained):
        assert share(color) > 1e-3, f"{color} is missing, so plots or trained text are"
