"""The other names of one repository: what else serves the content of `github.com/owner/repo` and its like.

A name is a host and a path that every URL of that content begins with. What cannot be derived from owner and name is
not here: a fork, a repository under another name (GitHub redirects from old names to the new one, so a blacklist that
has the new one catches the old ones by their redirect), numeric ids (api.github.com/repositories/ID,
gitlab.com/api/v4/projects/ID), content addresses (SWHIDs, LFS objects on signed URLs: the request that yields such a
URL is covered), package registries, and a mirror that nobody listed here or in the configuration (`fetchers`).
"""

import re
from dataclasses import dataclass

from megatron_klong.sandbox.egress.urls import Segments

# Sites that fetch a URL named in their path or query. Their TLS is opened to look for one that is blacklisted, and
# they get no bodies.
_FETCHERS = """
    web.archive.org archive.org archive.is archive.ph archive.today archive.li archive.vn archive.fo archive.md
    archive.softwareheritage.org webcache.googleusercontent.com translate.google.com 12ft.io
    r.jina.ai s.jina.ai md.dhr.wtf txtify.it api.microlink.io api.allorigins.win corsproxy.io api.codetabs.com
    cors-anywhere.herokuapp.com thingproxy.freeboard.io
    ghproxy.com mirror.ghproxy.com ghproxy.net ghproxy.cc gh-proxy.com ghfast.top ghps.cc gh.llkk.cc
    gh.api.99988866.xyz github.moeyy.xyz gitclone.com hub.gitmirror.com
    sourcegraph.com proxy.golang.org goproxy.io goproxy.cn
"""
FETCHERS = frozenset(re.findall(r"\S+", _FETCHERS))
TRANSLATED = ".translate.goog"  # github-com.translate.goog serves github.com

_GITHUB_PLACES = """
    github.com raw.githubusercontent.com raw.github.com codeload.github.com ssh.github.com
    api.github.com/repos uploads.github.com/repos media.githubusercontent.com/media
    cdn.jsdelivr.net/gh fastly.jsdelivr.net/gh gcore.jsdelivr.net/gh testingcf.jsdelivr.net/gh
    data.jsdelivr.com/v1/package/gh data.jsdelivr.com/v1/packages/gh esm.sh/gh esm.run/gh
    cdn.statically.io/gh raw.githack.com rawcdn.githack.com rawgit.com cdn.rawgit.com
    github.dev github1s.com raw.github1s.com deepwiki.com gitingest.com uithub.com zread.ai gitmcp.io
    colab.research.google.com/github nbviewer.org/github nbviewer.jupyter.org/github mybinder.org/v2/gh
    codesandbox.io/p/github codesandbox.io/s/github stackblitz.com/github
    kkgithub.com raw.kkgithub.com bgithub.xyz raw.bgithub.xyz githubfast.com dgithub.xyz raw.gitmirror.com
    hub.nuaa.cf raw.nuaa.cf hub.yzuu.cf raw.yzuu.cf
"""
_GITHUB = re.findall(r"\S+", _GITHUB_PLACES)
_GITHUB_OWNER = ["api.github.com/users", "api.github.com/orgs", "gist.github.com", "gist.githubusercontent.com"]
_GITHUB_RAW = ("raw.githubusercontent.com", "raw.github.com", "codeload.github.com", "ssh.github.com")
_HUGGING_FACE = ("huggingface.co", "hf.co", "hf-mirror.com")


@dataclass(frozen=True, kw_only=True, slots=True)
class Name:
    """A host without `www.`, a path that the URL begins with, pairs that its query holds; all in lower case."""

    host: str
    path: Segments = ()
    query: tuple[tuple[str, str], ...] = ()

    @property
    def whole_host(self) -> bool:
        return not self.path and not self.query


# Finds a repository by any pattern that its name fits.
_SEARCH = Name(host="sourcegraph.com", path=(".api",))


def names_of(host: str, path: Segments) -> tuple[Name, ...]:
    """All names of what `host/path` serves, that one first. Anything inside a repository stands for the repository.

    A clone carries all of a repository, so a rule for one folder of it would protect nothing.
    """
    if host in _GITHUB_RAW and len(path) >= 2:
        host = "github.com"
    elif host == "api.github.com" and path[:1] == ("repos",) and len(path) >= 3:
        host, path = "github.com", path[1:]
    if host == "github.com" and path:
        return _github(path[:2])
    if host == "gist.github.com" and len(path) >= 2:
        return _at(path[:2], ["gist.github.com", "gist.githubusercontent.com"]) + _at(
            path[1:2], ["api.github.com/gists"]
        )
    if host in _HUGGING_FACE and path:
        return _hugging_face(path)
    if host == "bitbucket.org" and len(path) >= 2:
        api = ["api.bitbucket.org/2.0/repositories", "bitbucket.org/!api/2.0/repositories", "cdn.statically.io/bb"]
        return _at(path[:2], ["bitbucket.org", *api, "bbcdn.githack.com"])
    if "gitlab" in host.split(".") and len(path) >= 2:
        return _gitlab(host, path)
    if len(path) >= 2 and (host == "codeberg.org" or host.split(".")[0] in ("gitea", "forgejo")):
        return _at(path[:2], [host, f"{host}/api/v1/repos"])
    return (Name(host=host, path=path),)


def _github(path: Segments) -> tuple[Name, ...]:
    owner = path[0]
    if len(path) == 1:
        return (*_at(path, [*_GITHUB, *_GITHUB_OWNER]), Name(host=f"{owner}.github.io"), _SEARCH)
    repository = path[1].removesuffix(".git")
    pages = () if repository == f"{owner}.github.io" else (repository,)
    others = (
        Name(host=f"{owner}.github.io", path=pages),
        Name(host="api.github.com", path=("graphql",)),  # names a repository in its body, which is not read
        _SEARCH,
    )
    return _at((owner, repository), _GITHUB) + others


def _gitlab(host: str, path: Segments) -> tuple[Name, ...]:
    end = next((n for n, part in enumerate(path) if n >= 2 and part in ("-", "tree", "blob", "raw")), len(path))
    path = (*path[: end - 1], path[end - 1].removesuffix(".git"))
    places = [host, f"{host}/api/v4/projects"]
    if host != "gitlab.com":
        return _at(path, places)
    pages = Name(host=f"{path[0]}.gitlab.io", path=path[1:])
    return (*_at(path, [*places, "cdn.statically.io/gl", "glcdn.githack.com", "gl.githack.com"]), pages, _SEARCH)


def _hugging_face(path: Segments) -> tuple[Name, ...]:
    kind, folder, rest = "models", "", path
    if path[0] in ("datasets", "spaces", "models"):
        kind, rest = path[0], path[1:]
        folder = "" if kind == "models" else f"/{kind}"
    rest = rest[:2]
    places = [place for host in _HUGGING_FACE for place in (f"{host}{folder}", f"{host}/api/{kind}")]
    places += [f"{host}/api/resolve-cache/{kind}" for host in _HUGGING_FACE]
    names = _at(rest, places)
    if kind == "spaces" and len(rest) == 2:
        label = "-".join(rest).replace("_", "-").replace(".", "-")
        names += (Name(host=f"{label}.hf.space"), Name(host=f"{label}.static.hf.space"))
    if kind == "datasets" and len(rest) == 2:
        names += (Name(host="datasets-server.huggingface.co", query=(("dataset", "/".join(rest)),)),)
    return names


def _at(path: Segments, places: list[str]) -> tuple[Name, ...]:
    names = []
    for place in places:
        host, *folders = place.split("/")
        names.append(Name(host=host, path=(*folders, *path)))
    return tuple(names)
