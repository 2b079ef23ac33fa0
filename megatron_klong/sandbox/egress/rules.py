"""What a task forbids: a `blacklist.txt`, and the verdict on one host or URL.

    # a comment; blank lines are ignored; `none` means that nothing is forbidden
    https://github.com/owner/repo      a URL and all below it, under all its names (repositories.py)
    owner/repo                         the same: without a host it is GitHub's
    git@gitlab.com:group/project.git   any way to write it
    huggingface.co/datasets/owner/set
    openreview.net/forum?id=x1         the query must hold these pairs
    example.org                        a host, also as www.example.org
    .example.org                       a host and all its subdomains, also written *.example.org

Always (tests/unit/sandbox/test_egress_rules.py): no spelling of a forbidden URL is allowed; a URL outside all rules
is, unless it names a forbidden one in its path or query, as proxies and archives do. Pure: no file but the
blacklist is read, no name is resolved. Not caught: a URL that is disguised in a way of the server's own (base64).
"""

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from megatron_klong.sandbox.egress.repositories import FETCHERS, TRANSLATED, Name, names_of
from megatron_klong.sandbox.egress.urls import (
    Disguised,
    begins_with,
    decodings,
    folded,
    has_pairs,
    is_ip_literal,
    normal_host,
    readings,
    rule_host,
    visible,
)

_SCHEME = re.compile(r"^(?:git\+)?(?:https?|git|ssh)://", re.IGNORECASE)
_SCP = re.compile(r"^[\w.-]+@([\w.-]+):(?!\d+/)(.*)$")
_COMMENT = re.compile(r"(?:^|\s)#.*$")
_SEPARATOR = re.compile(r"^(?:[/\\:]|%2f|%3a)+")  # between the host and the path of a URL inside a text
_REST = re.compile(r"(?:[/\\:?]|%2f|%3a)[^\s\"'<>|^`{}]*")
_PUNCTUATION = ".,;:!?)]}*_\u2026"  # of the text around it
_LONGEST_REST = 600  # of a URL inside a text that is no URL itself
_LONGEST_URL = 32768
_MOST_NAMED = 2 * _LONGEST_URL  # characters of all URLs inside one, at all levels: what looking at them may cost


class BlacklistError(ValueError):
    """An entry that cannot be read; the message names file and line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether something may be fetched. `rule`: the entry that forbids it, if it was an entry; `reason`: for people."""

    allowed: bool
    rule: str | None = None
    reason: str = ""


ALLOWED = Verdict(allowed=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A place in a text that names something forbidden: the entry, and what stood there."""

    rule: str
    url: str


class Blacklist:
    """The entries of one task. `entries` is what they read, in order; `Blacklist(entries)` is the same blacklist."""

    def __init__(self, entries: Iterable[str] = (), *, fetchers: Iterable[str] = (), source: str = "blacklist") -> None:
        """`fetchers`: further hosts whose URLs name the URL to fetch. BlacklistError."""
        self.entries = tuple(entries)
        self._domains: dict[str, str] = {}
        self._names: defaultdict[str, list[tuple[Name, str]]] = defaultdict(list)
        for number, entry in enumerate(self.entries, 1):
            try:
                self._add(entry)
            except ValueError as error:
                raise BlacklistError(f"{source}: entry {number}: {error}") from None
        self._fetchers = FETCHERS | {rule_host(host) for host in fetchers}
        self._inside = self._host_pattern()

    @classmethod
    def read(cls, file: Path, *, fetchers: Iterable[str] = ()) -> "Blacklist":
        """A `blacklist.txt`. BlacklistError, with the line."""
        try:
            return cls.parse(file.read_text("utf-8-sig"), source=str(file), fetchers=fetchers)
        except (OSError, UnicodeDecodeError) as error:
            raise BlacklistError(f"{file}: cannot be read: {error}") from error

    @classmethod
    def parse(cls, text: str, *, source: str = "blacklist", fetchers: Iterable[str] = ()) -> "Blacklist":
        """The text of one. BlacklistError."""
        entries = []
        for number, line in enumerate(text.splitlines(), 1):
            entry = _COMMENT.sub("", line).strip()
            if not entry or entry.lower() == "none":
                continue
            try:
                _parsed(entry)
            except ValueError as error:
                raise BlacklistError(f"{source}:{number}: {error}") from None
            entries.append(entry)
        return cls(entries, fetchers=fetchers, source=source)

    def __bool__(self) -> bool:
        return bool(self.entries)

    @property
    def repositories(self) -> dict[str, str]:
        """`owner/name` of each forbidden repository that tools know by that alone -> its entry."""
        homes = {"github.com": 0, "gitlab.com": 0, "huggingface.co": 0}
        return {
            "/".join(name.path[-2:]): rule
            for host in homes
            for name, rule in self._names.get(host, ())
            if len(name.path) >= 2 and name.path[0] not in ("api", "graphql")
        }

    def opens(self, host: str) -> bool:
        """Whether a verdict on `host` takes more than its name, so that its TLS must be opened."""
        name = rule_host(host)
        if not self.entries or not self.host_verdict(host).allowed:
            return False
        return name in self._fetchers or name.endswith(TRANSLATED) or name in self._names

    def host_verdict(self, host: str) -> Verdict:
        """On a host whatever is fetched from it. `host` is normal (urls.normal_host)."""
        name = rule_host(host)
        for domain, rule in self._domains.items():
            if host == domain or host.endswith(f".{domain}"):
                return _forbidden(rule)
        for found, rule in self._names.get(name, ()):
            if found.whole_host:
                return _forbidden(rule)
        return ALLOWED

    def verdict(self, host: str, path: str, query: str = "", *, body: bool = False) -> Verdict:
        """On one URL. `host` in any spelling; `path` and `query` as they were sent; `body`: there may be one."""
        if len(path) + len(query) > _LONGEST_URL:
            return Verdict(allowed=False, reason=f"the URL is longer than {_LONGEST_URL} characters")
        try:
            found = normal_host(host)
            if found is None:
                return Verdict(allowed=False, reason=f"{host[:100]!r} is not the name of a host")
            verdict = self.host_verdict(found)
            if not verdict.allowed or not self.entries:
                return verdict
            if body and rule_host(found) in self._fetchers:
                return Verdict(allowed=False, reason=f"a body could name what {found} is to fetch, so it gets none")
            return self._path_verdict(found, path, query)
        except Disguised as error:
            return Verdict(allowed=False, reason=str(error))

    def references(self, text: str) -> Iterator[Reference]:
        """Where a text names something forbidden, in whatever spelling, as URL, `git@host:path` or plain `host/path`.

        A text that is encoded too deeply is searched as it stands, and a URL in it that is Disguised is none.
        """
        seen = set()
        for level in _levels(folded(text)):
            for url, host, rest in self._urls_in(folded(level), _LONGEST_REST):
                with contextlib.suppress(Disguised):
                    for rule in self._rules_for(host, rest):
                        reference = Reference(rule=rule, url=url)
                        if reference not in seen:
                            seen.add(reference)
                            yield reference

    def _add(self, entry: str) -> None:
        host, path, query = _parsed(entry)
        if host.startswith("."):
            self._domains[host[1:]] = entry
            return
        names = [Name(host=host, path=path, query=query)] if query else names_of(host, path)
        for name in names:
            self._names[rule_host(name.host)].append((name, entry))

    def _path_verdict(self, host: str, path: str, query: str) -> Verdict:
        for rule in self._rules_at(host, path, query):
            return _forbidden(rule)
        translated = rule_host(host).removesuffix(TRANSLATED)
        if translated != rule_host(host):
            original = translated.replace("--", "\0").replace("-", ".").replace("\0", "-")
            for rule in self._rules_for(original, f"{path}?{query}"):
                return _forbidden(rule)
        seen, named = set(), 0
        for level in decodings(folded(f"{path}?{query}")):
            for text in _spellings(level):
                for _, inner, rest in self._urls_in(text, len(text)):
                    if (inner, rest) in seen:
                        continue
                    seen.add((inner, rest))
                    named += len(rest)
                    if named > _MOST_NAMED:
                        raise Disguised("names hosts with rules more often than any honest URL")
                    for rule in self._rules_for(inner, rest):
                        return _forbidden(rule)
        return ALLOWED

    def _urls_in(self, text: str, longest: int) -> Iterator[tuple[str, str, str]]:
        """Where a (folded) text names a host with rules: the URL as it stands, the host, its path and query.

        One URL may be inside another. Of each, `longest` characters after the host are looked at.
        """
        for match in () if self._inside is None else self._inside.finditer(text):
            rest = _REST.match(text, match.end(), match.end() + longest)
            found = "" if rest is None else rest[0]
            yield (
                (match[0] + found).rstrip(_PUNCTUATION),
                match["host"],
                _SEPARATOR.sub("/", found).rstrip(_PUNCTUATION),
            )

    def _rules_for(self, host: str, rest: str) -> Iterator[str]:
        """The rules for a host and the path and query after it."""
        verdict = self.host_verdict(host)
        if verdict.rule is not None:
            yield verdict.rule
            return
        path, _, query = rest.partition("?")
        yield from self._rules_at(host, path, query)

    def _rules_at(self, host: str, path: str, query: str) -> Iterator[str]:
        names = self._names.get(rule_host(host))
        if not names:
            return
        segments = set(readings(path))
        for name, rule in names:
            if any(begins_with(found, name.path) for found in segments) and has_pairs(query, name.query):
                yield rule

    def _host_pattern(self) -> re.Pattern[str] | None:
        hosts = [re.escape(host) for host in sorted(self._names, key=len, reverse=True)]
        hosts += [rf"(?:[a-z0-9_-]+\.)*{re.escape(domain)}" for domain in self._domains]
        if not hosts:
            return None
        before, port = r"(?<![a-z0-9_.-])(?:www\.)?", r"(?::\d+(?=[/\\?]|%2f|%5c))?"
        return re.compile(rf"{before}(?P<host>{'|'.join(hosts)})\.?(?![a-z0-9_-]|\.[a-z0-9]){port}")


def _forbidden(rule: str) -> Verdict:
    return Verdict(allowed=False, rule=rule, reason=f"the task's blacklist forbids {rule}")


def _spellings(level: str) -> Iterable[str]:
    """In what ways a server may read a part of a URL: Go writes a capital A as !a, a search may escape dots."""
    plain = folded(level)
    texts = (plain, visible(plain))
    return dict.fromkeys(spelled for text in texts for spelled in (text, text.replace("!", ""), text.replace("\\", "")))


def _levels(text: str) -> Sequence[str]:
    try:
        return decodings(text)
    except Disguised:
        return [text]


def _parsed(entry: str) -> tuple[str, tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Host (with a dot in front: and its subdomains), path, pairs of the query. ValueError."""
    text = decodings(entry.strip().strip("<>\"'"))[-1]
    bare = _SCHEME.sub("", text)
    if bare == text and (scp := _SCP.match(text)):
        bare = f"{scp[1]}/{scp[2]}"
    elif "://" in bare:
        raise ValueError(f"{entry!r}: only http, https, git and ssh URLs can be blocked")
    address, _, query = bare.partition("#")[0].partition("?")
    authority, *rest = address.replace("\\", "/").split("/")
    subdomains = authority.startswith((".", "*."))
    authority = authority.removeprefix("*").removeprefix(".")
    if rest[-1:] == ["*"]:
        rest.pop()
    segments = tuple(part.lower() for part in rest if part not in ("", "."))
    if "." not in authority.partition(":")[0] and bare == text and len(segments) >= 1 and authority:
        authority, segments = "github.com", (authority.lower(), *segments)
    host = normal_host(authority)
    if host is None or "." not in host:
        raise ValueError(f"{entry!r} is neither a URL, a host nor owner/repo (write `none` to forbid nothing)")
    if is_ip_literal(host):
        raise ValueError(f"{entry!r}: IP addresses need no entry, they are always refused")
    if any(part == ".." or re.search(r"[*\s]", part) for part in segments):
        raise ValueError(f"{entry!r}: an entry is a prefix, with neither .. nor wildcards")
    if subdomains and (segments or query):
        raise ValueError(f"{entry!r}: an entry with all subdomains takes no path")
    pairs = tuple((key.lower(), value.lower()) for key, value in parse_qsl(query, keep_blank_values=True))
    return (f".{host}" if subdomains else rule_host(host)), segments, pairs
