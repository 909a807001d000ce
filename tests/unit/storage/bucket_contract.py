"""What every bucket does: one suite, run for each by a subclass with a fixture `versioned`."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

from casfs.errors import NotFoundError
from casfs.storage.base import Storage
from casfs.storage.bucket import Bucket, BucketSettings


def bucket_of(storage: Storage) -> Bucket:
    assert storage.bucket is not None
    return storage.bucket


class BucketContract:
    """Tests of the promises in `casfs.storage.bucket`. `versioned` has a bucket that can lock."""

    def test_the_settings_of_a_locking_bucket_are_found(self, versioned: Storage) -> None:
        assert bucket_of(versioned).settings() == BucketSettings(True, True, None)

    def test_an_object_has_no_lock_until_it_is_given_one(self, versioned: Storage) -> None:
        bucket = bucket_of(versioned)
        versioned.create("packs/lock/a", b"1")
        assert bucket.locked_until_s("packs/lock/a") is None
        until_s = int(time.time()) + 3
        bucket.lock("packs/lock/a", until_s)
        assert bucket.locked_until_s("packs/lock/a") == until_s

    def test_a_lock_is_extended_and_never_shortened(self, versioned: Storage) -> None:
        bucket = bucket_of(versioned)
        versioned.create("packs/extend/a", b"1")
        until_s = int(time.time()) + 3
        for wanted_s, found_s in ((0, 0), (-1, 0), (2, 2), (0, 2)):
            bucket.lock("packs/extend/a", until_s + wanted_s)
            assert bucket.locked_until_s("packs/extend/a") == until_s + found_s

    def test_a_missing_object_cannot_be_locked(self, versioned: Storage) -> None:
        with pytest.raises(NotFoundError):
            bucket_of(versioned).lock("packs/none/a", int(time.time()) + 3)
        with pytest.raises(NotFoundError):
            bucket_of(versioned).locked_until_s("packs/none/a")

    def test_old_versions_and_deletions_are_listed_from_the_newest(
        self, versioned: Storage
    ) -> None:
        bucket = bucket_of(versioned)
        versioned.create("packs/old/b", b"other")
        versioned.create("packs/old/a", b"first")
        versioned.write("packs/old/a", b"second one")
        versioned.delete("packs/old/a")
        versions = list(bucket.versions("packs/old"))
        assert [(one.name, one.size, one.is_deletion) for one in versions] == [
            ("packs/old/a", 0, True),
            ("packs/old/a", 10, False),
            ("packs/old/a", 5, False),
            ("packs/old/b", 5, False),
        ]
        assert all(later.mtime_ns >= one.mtime_ns for later, one in pairwise(versions[:3]))
        assert list(bucket.versions("packs/old/a")) == versions[:3]
        assert list(bucket.versions("packs/ol")) == []
        assert bucket.read_version("packs/old/a", versions[1].version, 0, 100) == b"second one"
        assert bucket.read_version("packs/old/a", versions[2].version, 1, 3) == b"irs"
        assert bucket.read_version("packs/old/a", versions[2].version, 5, 3) == b""
        with pytest.raises(NotFoundError):
            bucket.read_version("packs/old/missing", versions[2].version, 0, 1)
