"""The blacklist: what its lines mean, and that no spelling of a forbidden URL is allowed while all others are."""

import string
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from megatron_klong.sandbox.egress.rules import Blacklist, BlacklistError
from megatron_klong.sandbox.egress.urls import is_ip_literal, normal_host

OWNER, REPOSITORY = "ROIM1998", "APT"
FORBIDDEN = "https://github.com/ROIM1998/APT"


def forbids(blacklist: Blacklist, url: str) -> bool:
    host, _, rest = url.partition("/")
    path, _, query = rest.partition("?")
    return not blacklist.verdict(host, f"/{path}", query).allowed


@pytest.mark.parametrize(
    "entry",
    [
        "https://github.com/ROIM1998/APT",
        "http://www.GitHub.com/roim1998/apt/",
        "github.com:443/ROIM1998/APT.git",
        "ROIM1998/APT",
        "ROIM1998/APT/tree/main/src",
        "git@github.com:ROIM1998/APT.git",
        "ssh://git@github.com/ROIM1998/APT",
        "git+https://github.com/ROIM1998/APT",
        "<https://github.com/ROIM1998/APT/*>",
        "https://github.com/ROIM1998/APT#readme",
        "https://raw.githubusercontent.com/ROIM1998/APT/main/a.py",
        "https://api.github.com/repos/ROIM1998/APT",
        "https://github.com/%52OIM1998/APT  # theirs",
    ],
)
def test_one_repository_can_be_written_in_many_ways(entry: str) -> None:
    blacklist = Blacklist.parse(entry)
    assert forbids(blacklist, "github.com/ROIM1998/APT/blob/main/README.md")
    assert forbids(blacklist, "raw.githubusercontent.com/ROIM1998/APT/main/a.py")
    assert not forbids(blacklist, "github.com/ROIM1998/APT2")
    assert not forbids(blacklist, "github.com/ROIM1998")


@pytest.mark.parametrize("text", ["none", "", "# nothing\n\nNone\n", "\ufeffnone\r\n"])
def test_none_forbids_nothing(text: str, tmp_path: Path) -> None:
    file = tmp_path / "blacklist.txt"
    file.write_text(text, "utf-8")
    blacklist = Blacklist.read(file)
    assert not blacklist
    assert not forbids(blacklist, "github.com/any/thing")
    assert not blacklist.opens("github.com")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("whatever", "neither a URL, a host nor owner/repo"),
        ("ftp://example.org/x", "only http, https, git and ssh"),
        ("http://10.0.0.7/x", "always refused"),
        ("*.example.org/x", "takes no path"),
        ("example.org/*/x", "wildcards"),
        ("example.org/a/../x", "a prefix"),
        ("https://", "neither a URL"),
    ],
)
def test_an_entry_that_cannot_be_meant_names_file_and_line(line: str, reason: str) -> None:
    with pytest.raises(BlacklistError, match=f"tasks/a/blacklist.txt:2: .*{reason}"):
        Blacklist.parse(f"# first\n{line}\n", source="tasks/a/blacklist.txt")


def test_an_unreadable_blacklist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BlacklistError, match="cannot be read"):
        Blacklist.read(tmp_path / "blacklist.txt")


def test_hosts_and_domains() -> None:
    blacklist = Blacklist.parse("example.org\n.example.net\n*.example.com")
    forbidden = [
        "example.org",
        "www.example.org/a",
        "EXAMPLE.org./",
        "example.net",
        "a.b.example.net/x",
        "c.example.com",
    ]
    allowed = ["a.example.org", "myexample.net/", "example.net.example.edu", "example.com.example.edu"]
    assert [url for url in forbidden if not forbids(blacklist, url)] == []
    assert [url for url in allowed if forbids(blacklist, url)] == []


def test_an_entry_with_a_query_needs_those_pairs() -> None:
    blacklist = Blacklist.parse("https://openreview.net/forum?id=Ab1")
    assert forbids(blacklist, "openreview.net/forum?noteId=2&id=ab1")
    assert forbids(blacklist, "openreview.net/forum?i%64=Ab1")
    assert not forbids(blacklist, "openreview.net/forum?id=Ab2")
    assert not forbids(blacklist, "openreview.net/pdf?id=Ab1")


@pytest.mark.parametrize(
    "url",
    [
        "api.github.com/repos/roim1998/apt/contents/src",
        "api.github.com/graphql",
        "codeload.github.com/ROIM1998/APT/zip/refs/heads/main",
        "raw.github.com/ROIM1998/APT/main/a.py",
        "media.githubusercontent.com/media/ROIM1998/APT/main/weights.bin",
        "github.com/ROIM1998/APT.wiki.git/info/refs",
        "roim1998.github.io/APT/",
        "cdn.jsdelivr.net/gh/ROIM1998/APT@v1/a.py",
        "data.jsdelivr.com/v1/packages/gh/ROIM1998/APT",
        "cdn.statically.io/gh/ROIM1998/APT/main/a.py",
        "rawcdn.githack.com/ROIM1998/APT/0a1b/a.html",
        "colab.research.google.com/github/ROIM1998/APT/blob/main/a.ipynb",
        "web.archive.org/web/2024/https://github.com/ROIM1998/APT",
        "web.archive.org/web/*/github.com/ROIM1998/APT*",
        "archive.org/wayback/available?url=github.com%2FROIM1998%2FAPT",
        "archive.softwareheritage.org/browse/origin/directory/?origin_url=https://github.com/ROIM1998/APT",
        "ghproxy.com/https://raw.githubusercontent.com/ROIM1998/APT/main/a.py",
        "gitclone.com/github.com/ROIM1998/APT.git/info/refs",
        "r.jina.ai/https://github.com/ROIM1998/APT",
        "modules.example.org/github.com/!r!o!i!m1998/!a!p!t/@v/list",
        "github-com.translate.goog/ROIM1998/APT?_x_tr_sl=en",
        "unknown.example.org/fetch/https:/github.com/ROIM1998/APT",
    ],
)
def test_the_other_names_of_a_repository(url: str) -> None:
    assert forbids(Blacklist.parse(FORBIDDEN), url)
    assert not forbids(Blacklist.parse("https://github.com/ROIM1998/other"), url) or url == "api.github.com/graphql"


@pytest.mark.parametrize(
    ("entry", "url"),
    [
        (
            "https://gitlab.com/group/sub/project/-/tree/main",
            "gitlab.com/api/v4/projects/group%2Fsub%2Fproject/repository",
        ),
        ("https://gitlab.com/group/project", "group.gitlab.io/project/"),
        ("https://gitlab.example.org/group/project.git", "gitlab.example.org/api/v4/projects/group%2fproject"),
        ("https://bitbucket.org/team/code", "api.bitbucket.org/2.0/repositories/team/code/src"),
        ("https://codeberg.org/team/code", "codeberg.org/api/v1/repos/team/code"),
        ("https://huggingface.co/owner/model", "hf-mirror.com/owner/model/resolve/main/model.safetensors"),
        ("https://huggingface.co/owner/model/tree/main", "huggingface.co/api/models/owner/model/revision/main"),
        ("https://hf.co/datasets/owner/set", "huggingface.co/datasets/owner/set"),
        ("https://huggingface.co/datasets/owner/set", "datasets-server.huggingface.co/rows?dataset=owner%2Fset"),
        ("https://huggingface.co/spaces/Owner/My_app", "owner-my-app.hf.space/"),
        ("https://github.com/owner", "gist.github.com/owner/123"),
        ("https://github.com/owner", "owner.github.io/"),
        ("https://gist.github.com/owner/abc", "api.github.com/gists/abc"),
    ],
)
def test_names_on_other_hosts(entry: str, url: str) -> None:
    assert forbids(Blacklist.parse(entry), url)


@pytest.mark.parametrize(
    "url",
    [
        "r.jina.ai/https://%EF%BD%87ithub.com/owner/repo",
        "r.jina.ai/https://git%C2%ADhub.com/owner/repo",
        "r.jina.ai/https://git%25E2%2580%258Bhub.com/owner/repo",
        "r.jina.ai/https://github.com:443\\owner/repo",
        "r.jina.ai/https://openreview.net/forum?id=x1",
        "api.allorigins.win/get?url=https%3A%2F%2Fgit%09hub.com%2Fowner%2Frepo",
        "api.allorigins.win/get?url=https://github%E3%80%82com/owner/repo",
        "api.allorigins.win/get?before=github.com/x&url=https://github.com/owner/repo",
        "api.allorigins.win/get?text=see%20github.com/owner/repo",
        f"r.jina.ai/https://github.com/{'./' * 301}owner/repo",
        f"r.jina.ai/https://github.com/{'%2e/' * 301}owner/repo",
        f"web.archive.org/web/2020id_/https://github.com{'/' * 601}owner/repo",
        f"web.archive.org/web/2020id_/https://github.com/{'a-long-name/../' * 60}owner/repo",
        f"r.jina.ai/https://github.com/{chr(0xFDFA) * 2000}/../owner/repo",
        "modules.example.org/github.com/%21owner/re%21po/@v/list",
        "sourcegraph.com/search?q=repo:^github%5C.com/owner/repo$",
        "sourcegraph.com/search?q=repo:^github\\.com/owner/repo$",
        "sourcegraph.com/.api/search/stream?q=repo:github.*er/rep",
        "proxy.golang.org/github.com/owner/repo/@v/list",
    ],
)
def test_a_url_inside_another_is_found_however_it_is_disguised(url: str) -> None:
    blacklist = Blacklist(["owner/repo", "openreview.net/forum?id=x1"])
    assert forbids(blacklist, url)
    of_others = url.replace("owner", "other").replace("x1", "x2")
    assert not forbids(blacklist, of_others) or ".api" in url


def test_a_url_that_is_all_names_is_refused_in_bounded_time() -> None:
    verdict = Blacklist(["owner/repo"]).verdict("r.jina.ai", "/" + "github.com/" * 2900 + "%" + "25" * 14 + "41")
    assert "more often than any honest URL" in verdict.reason
    assert Blacklist(["owner/repo"]).verdict("r.jina.ai", "/" + "github.com/x/" * 50).allowed


def test_what_fetches_urls_is_told_them_where_they_can_be_read() -> None:
    blacklist = Blacklist(["owner/repo"], fetchers=["mirror.example.com"])
    for host in ("r.jina.ai", "mirror.example.com", "www.archive.org"):
        refused = blacklist.verdict(host, "/", body=True)
        assert not refused.allowed
        assert (refused.rule, "a body" in refused.reason) == (None, True)
        assert blacklist.verdict(host, "/").allowed
        assert Blacklist(fetchers=["mirror.example.com"]).verdict(host, "/", body=True).allowed
    assert blacklist.verdict("github.com", "/owner/other.git/git-upload-pack", body=True).allowed


def test_what_only_resembles_a_name_is_allowed() -> None:
    blacklist = Blacklist.parse("https://huggingface.co/datasets/owner/set\nhttps://github.com/owner/repo")
    allowed = [
        "huggingface.co/owner/set",
        "huggingface.co/datasets/owner/set2",
        "xgithub.com/owner/repo",
        "github.com.example.org/owner/repo",
        "github.com/owner/repository",
        "github.com/owner/repo-2",
        "github.com/other/owner/repo",
        "web.archive.org/web/2024/https://github.com/owner/repo2",
        "example.org/owner/repo",
        "owner.github.io/other",
    ]
    assert [url for url in allowed if forbids(blacklist, url)] == []


def test_tls_is_opened_only_where_the_host_does_not_decide() -> None:
    blacklist = Blacklist.parse(f"{FORBIDDEN}\nexample.org", fetchers=["mirror.example.com"])
    opened = ["github.com", "www.github.com", "api.github.com", "codeload.github.com", "ghproxy.com"]
    opened += ["proxy.golang.org", "goproxy.io", "goproxy.cn", "sourcegraph.com"]
    assert all(map(blacklist.opens, [*opened, "mirror.example.com", "github-com.translate.goog"]))
    assert not any(map(blacklist.opens, ["index.example.net", "example.org", "gitlab.com", "huggingface.co"]))


@pytest.mark.parametrize(
    "text",
    [
        "git clone git@github.com:ROIM1998/APT.git",
        "ssh://git@github.com:22/roim1998/apt",
        "git://github.com/ROIM1998/APT",
        "(see https://www.github.com/ROIM1998/APT).",
        "**github.com/ROIM1998/APT**",
        "curl https%3A%2F%2Fgithub.com%2FROIM1998%2FAPT",
        "https://user:token@github.com:443/ROIM1998/APT",
        "https://\uff47\uff49\uff54hub.com/ROIM1998/APT",
        "https://github\u3002com/ROIM1998/APT",
        "https://git\u00adhub.com/ROIM1998/APT",
        "https://github.com/a,https://github.com/ROIM1998/APT",
        "https://github.com/x/../ROIM1998/./APT/tree/main",
    ],
)
def test_references_inside_a_text(text: str) -> None:
    assert [found.rule for found in Blacklist.parse(FORBIDDEN).references(text)] == [FORBIDDEN]


@pytest.mark.parametrize("path", ["%" + "25" * 40 + "41", "a/../" * 70 + "x"])
def test_what_is_disguised_in_a_text_is_no_error(path: str) -> None:
    text = f"github.com/{path} https://github.com/ROIM1998/APT"
    assert [found.rule for found in Blacklist.parse(FORBIDDEN).references(text)] == [FORBIDDEN]


def test_a_text_about_something_else_holds_no_reference() -> None:
    text = "github.com/ROIM1998/APT2, /home/ROIM1998/APT, apt install, ROIM1998.github.io, mygithub.com/ROIM1998/APT"
    assert list(Blacklist.parse(FORBIDDEN).references(text)) == []


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "0x7f.1",
        "::1",
        "[::ffff:10.0.0.1]",
        "fe80::1%eth0",
        "1.2.3.4.5",
        "256.256.256.256",
        "1.2.3.0x4",
    ],
)
def test_every_spelling_of_an_address_is_known(host: str) -> None:
    assert is_ip_literal(host)


def test_a_name_is_no_address() -> None:
    assert not any(map(is_ip_literal, ["github.com", "1.example.org", "0x7f.example.org", "a1", "cafe.babe"]))


@pytest.mark.parametrize(
    ("spelled", "host"),
    [
        ("GitHub.COM.", "github.com"),
        ("user:pw@github.com:443", "github.com"),
        ("git%48ub.com", "github.com"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("\uff47ithub\uff61com", "github.com"),
        ("[::1]:80", "::1"),
        ("github.com..", None),
        ("a b", None),
        ("-x.org", None),
        ("", None),
        ("a" * 3000, None),
    ],
)
def test_hosts_are_read_as_a_resolver_reads_them(spelled: str, host: str | None) -> None:
    assert normal_host(spelled) == host


def test_what_only_hides_something_is_refused() -> None:
    blacklist = Blacklist.parse(FORBIDDEN)
    for path, reason in [
        ("/%" + "25" * 40 + "41", "percent-encoded"),
        ("/a/.." * 100, "goes up"),
        ("/" + "a" * 40000, "longer than"),
    ]:
        verdict = blacklist.verdict("github.com", path)
        assert not verdict.allowed
        assert reason in verdict.reason


def test_the_real_blacklists(shared_data: Path) -> None:
    files = sorted(shared_data.glob("paperbench/papers/*/blacklist.txt"))
    found = {file.parent.name: Blacklist.read(file).entries for file in files}
    assert found["semantic-self-consistency"] == ()
    assert found["rice"] == ("https://github.com/chengzelei/RICE",)
    assert len(found) == 5
    assert forbids(Blacklist(found["rice"]), "codeload.github.com/chengzelei/rice/zip/main")


# What may be done to a URL that a server would still answer with the same content.

_names = st.text(alphabet=string.ascii_letters + string.digits + "-_", min_size=1, max_size=12)


def _cased(draw: st.DrawFn, text: str) -> str:
    return "".join(char.upper() if draw(st.booleans()) else char.lower() for char in text)


def _encoded(draw: st.DrawFn, text: str) -> str:
    def once(char: str) -> str:
        return f"%{ord(char):02x}" if char != "/" and draw(st.integers(0, 3)) == 0 else char

    for _ in range(draw(st.integers(0, 3))):
        text = "".join(map(once, text))
    return text


@st.composite
def _disguised(draw: st.DrawFn) -> tuple[str, str]:
    host = _cased(draw, draw(st.sampled_from(["github.com", "www.github.com", "raw.githubusercontent.com"])))
    host = draw(st.sampled_from(["", "user@", "a:b@"])) + host
    host += draw(st.sampled_from(["", "."])) + draw(st.sampled_from(["", ":443", ":80"]))
    segments: list[str] = []
    for name in (OWNER, REPOSITORY):
        fillers = draw(st.lists(st.sampled_from(["", ".", "x/..", "a/b/../..", "%2e", ";"]), max_size=2))
        segments += [*fillers, _cased(draw, name)]
    segments[-1] += draw(st.sampled_from(["", ".git", ";v=1", "@main", "%00", "%20", "?x", "%3Fx"]))
    path = draw(st.sampled_from(["/", "//", "\\"])) + "/".join(segments)
    path += draw(st.sampled_from(["", "/", "/tree/main", "/info/refs", "/archive/x.zip", "/../x", "/../../x/y"]))
    return host, _encoded(draw, path)


@given(disguised=_disguised())
def test_no_disguise_of_a_forbidden_url_is_allowed(disguised: tuple[str, str]) -> None:
    host, path = disguised
    verdict = Blacklist.parse(FORBIDDEN).verdict(host, path)
    assert not verdict.allowed
    assert verdict.rule == FORBIDDEN


@given(owner=_names, repository=_names, tail=st.lists(_names, max_size=3))
@example(owner="ROIM1998", repository="APT2", tail=[])
@example(owner="ROIM1998", repository="AP", tail=["APT"])
def test_every_other_url_is_allowed(owner: str, repository: str, tail: list[str]) -> None:
    assume((owner.lower(), repository.lower()) != (OWNER.lower(), REPOSITORY.lower()))
    path = "/".join(["", owner, repository, *tail])
    blacklist = Blacklist.parse(FORBIDDEN)
    for host in ("github.com", "raw.githubusercontent.com", "codeload.github.com", "example.org"):
        assert blacklist.verdict(host, path).allowed


@given(text=st.text(max_size=200), host=st.text(max_size=40))
def test_any_text_gets_a_verdict(text: str, host: str) -> None:
    blacklist = Blacklist.parse(f"{FORBIDDEN}\n.example.org")
    blacklist.verdict(host, text, text)
    list(blacklist.references(text))
