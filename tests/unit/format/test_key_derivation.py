"""Sessions and domains: ids that commit to every secret, keys that differ, and nothing secret in print."""

from __future__ import annotations

import dataclasses

import pytest
from blake3 import blake3

from casfs.digest import keyed_digest
from casfs.format.key_derivation import DedupDomain, WriteSession
from tests.support.encryption import DOMAIN, REPOSITORY, SESSION

OTHER_REPOSITORY = bytes(32)
SECOND = DedupDomain(REPOSITORY, b"\x05" * 32)


def test_new_secrets_are_fresh_every_time() -> None:
    one, other = DedupDomain.new(REPOSITORY), DedupDomain.new(REPOSITORY)
    assert len(one.secret) == 32 and one.secret != other.secret
    first, second = WriteSession.new([one]), WriteSession.new([one])
    assert len(first.secret) == 32 and first.secret != second.secret
    assert first.repository == REPOSITORY and first.id != second.id


def test_the_id_of_a_session_commits_to_the_repository_and_to_every_secret_in_its_order() -> None:
    ids = {
        SESSION.id,
        dataclasses.replace(SESSION, repository=OTHER_REPOSITORY).id,
        dataclasses.replace(SESSION, secret=bytes(32)).id,
        dataclasses.replace(SESSION, domains=(SECOND,)).id,
        dataclasses.replace(SESSION, domains=(DOMAIN, SECOND)).id,
        dataclasses.replace(SESSION, domains=(SECOND, DOMAIN)).id,
    }
    assert len(ids) == 6


def test_the_id_of_a_domain_is_another_in_another_repository() -> None:
    assert DedupDomain(OTHER_REPOSITORY, DOMAIN.secret).id != DOMAIN.id


def test_every_pack_and_every_snapshot_has_a_key_of_its_own() -> None:
    keys = {
        SESSION.pack_key(bytes(32)),
        SESSION.pack_key(b"\1" * 32),
        SESSION.snapshot_key(bytes(32)),
    }
    assert len(keys) == 3
    assert SESSION.secret not in keys


def test_a_domain_derives_a_different_secret_for_each_use() -> None:
    seeds = DOMAIN.chunker_seed.to_bytes(8, "little") + DOMAIN.tree_seed.to_bytes(4, "little")
    found = [DOMAIN.secret, DOMAIN.digest_key, DOMAIN.file_cache_key, DOMAIN.id]
    assert len({one[:4] for one in [*found, seeds[:4], seeds[8:]]}) == 6


def test_printing_a_session_or_a_domain_shows_no_secret() -> None:
    for shown in (repr(SESSION), str(SESSION), repr(DOMAIN), f"{[SESSION, DOMAIN]}"):
        for secret in (SESSION.secret, DOMAIN.secret):
            assert secret.hex()[:12] not in shown
            assert repr(secret)[2:14] not in shown
    assert SESSION.id.hex()[:12] in repr(SESSION)


@pytest.mark.parametrize("place", [0, 1])
def test_a_blob_is_assigned_to_the_domain_that_keyed_its_digest(place: int) -> None:
    session = WriteSession(REPOSITORY, bytes(32), (DOMAIN, SECOND))
    plain = b"a blob that is moved"
    digest = keyed_digest(plain, session.domains[place].digest_key)
    assert session.domain_of(digest, plain) == place


def test_a_blob_without_a_known_digest_is_of_the_first_domain() -> None:
    session = WriteSession(REPOSITORY, bytes(32), (DOMAIN, SECOND))
    assert session.domain_of(blake3(b"plain").digest(), b"plain") == 0
