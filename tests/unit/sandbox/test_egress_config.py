"""What can be configured about the network, what contradicts itself, and the records between runner and proxy."""

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_klong.config import Config, load_config
from megatron_klong.sandbox.egress.config import EgressConfig
from megatron_klong.sandbox.egress.records import (
    Counts,
    EgressRequest,
    Outcome,
    Policies,
    RequestLog,
    read_counts,
    read_requests,
)
from megatron_klong.sandbox.egress.rules import Blacklist
from megatron_klong.sandbox.egress.trust import BUNDLE_INSIDE, ENVIRONMENT, files_inside, upstream_authorities


class Outer(Config):
    egress: EgressConfig = EgressConfig()


def test_there_is_no_network_by_default_and_a_file_can_open_it(tmp_path: Path) -> None:
    assert load_config(Outer).egress.mode == "off"
    file = tmp_path / "run.toml"
    file.write_text(
        '[egress]\nmode = "listed"\nallow = ["index.example.org"]\n[egress.addresses]\n'
        '"index.example.org" = "10.0.0.7:3141"\n'
    )
    egress = load_config(Outer, [file], ["--egress.connections", "7"]).egress
    assert egress.allow == ("index.example.org",)
    assert egress.address("index.example.org", 443) == ("10.0.0.7", 3141)
    assert egress.connections == 7


def test_which_hosts_a_mode_allows() -> None:
    listed = EgressConfig(mode="listed", allow=("index.example.org", ".files.example.org"))
    assert all(map(listed.allows, ["index.example.org", "files.example.org", "a.b.files.example.org"]))
    assert not any(map(listed.allows, ["a.index.example.org", "example.org", "xfiles.example.org"]))
    assert EgressConfig(mode="open").allows("anything.example.com")
    assert not EgressConfig().allows("index.example.org")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"mode": "listed"}, "there are none"),
        ({"mode": "listed", "allow": ("a.example",), "addresses": {"b.example": "10.0.0.1:80"}}, "add it to allow"),
        ({"allow": ("https://a.example",)}, "not the name of a host"),
        ({"allow": ("10.0.0.1",)}, "not the name of a host"),
        ({"addresses": {"a.example:x": "10.0.0.1:80"}}, "neither a host nor host:port"),
        ({"addresses": {"a.example": "b.example:80"}}, "not an IP address and a port"),
        ({"addresses": {"a.example": "10.0.0.1"}}, "an IP address and a port"),
        ({"fetchers": ("a b",)}, "not the name of a host"),
        ({"connections": 0}, "greater than or equal to 1"),
        ({"proxy": "x"}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        EgressConfig(**settings)


def request(number: int, verdict: Outcome, rule: str | None = None) -> EgressRequest:
    return EgressRequest(
        time_seconds=1.5, method="GET", host="a.example", port=80, path=f"/{number}", verdict=verdict, rule=rule
    )


def test_a_log_is_read_as_it_was_written_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "127.64.0.1.jsonl"
    assert (read_requests(file), read_counts(file)) == ([], Counts())
    written = [request(1, "allowed"), request(2, "refused", "owner/repo"), request(3, "failed")]
    for part in (written[:2], written[2:]):
        log = RequestLog(file, limit_bytes=10_000)
        for found in part:
            log.add(found)
        log.close()
    assert read_requests(file) == written
    assert read_counts(file) == Counts(allowed=1, refused=1, failed=1, forbidden=1)
    with file.open("ab") as half:
        half.write(b'{"time_sec')
    assert read_requests(file) == written


def test_a_log_is_bounded_and_so_is_each_line(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    log = RequestLog(file, limit_bytes=5_000)
    for _ in range(100):
        log.add(
            EgressRequest(time_seconds=1, method="GET", host="a", port=80, path="/" + "x" * 10**6, verdict="refused")
        )
    log.close()
    assert file.stat().st_size <= 5_000
    assert read_counts(file) == Counts(refused=100, unlogged=100 - len(read_requests(file)))
    assert len(read_requests(file)) > 3


def test_a_closed_log_writes_to_no_file_that_has_its_descriptors_now(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log.jsonl", limit_bytes=5_000)
    log.close()
    log.close()
    with (tmp_path / "another").open("wb"), (tmp_path / "third").open("wb"):
        log.add(request(1, "allowed"))
    assert [(tmp_path / name).stat().st_size for name in ("another", "third", "log.jsonl")] == [0, 0, 0]


def test_a_line_that_does_not_fit_on_the_disk_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    file = tmp_path / "log.jsonl"
    log = RequestLog(file, limit_bytes=5_000)
    log.add(request(1, "allowed"))
    monkeypatch.setattr("os.write", lambda descriptor, data: write(descriptor, data[:20]))
    log.add(request(2, "allowed"))
    monkeypatch.undo()
    log.add(request(3, "allowed"))
    log.close()
    assert read_requests(file) == [request(1, "allowed"), request(3, "allowed")]
    assert read_counts(file) == Counts(allowed=3, unlogged=1)


def test_policies_appear_whole_change_and_go(tmp_path: Path) -> None:
    policies = Policies(tmp_path)
    assert policies.find("127.64.0.1", fetchers=()) is None
    policies.write("127.64.0.1", Blacklist(["owner/repo"]))
    found = policies.find("127.64.0.1", fetchers=("mirror.example.org",))
    assert found is not None
    assert found.entries == ("owner/repo",)
    assert found.opens("mirror.example.org")
    assert policies.find("127.64.0.1", fetchers=()) is found
    assert [file.name for file in tmp_path.iterdir()] == ["127.64.0.1.json"]
    policies.remove("127.64.0.1")
    policies.remove("127.64.0.1")
    assert policies.find("127.64.0.1", fetchers=()) is None


def test_authorities_come_from_the_system_and_the_configuration(tmp_path: Path) -> None:
    extra = tmp_path / "extra.pem"
    extra.write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    assert upstream_authorities(extra).endswith(extra.read_bytes())
    assert files_inside(extra)[BUNDLE_INSIDE] == extra
    assert ENVIRONMENT["GIT_SSL_CAINFO"] == BUNDLE_INSIDE
    extra.write_bytes(b"-----BEGIN PRIVATE KEY-----")
    with pytest.raises(ValueError, match="no certificate in PEM"):
        upstream_authorities(extra)
