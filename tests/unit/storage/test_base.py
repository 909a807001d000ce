"""The names of objects, and options that keep their secrets."""

from __future__ import annotations

import pytest

from casfs.storage.base import StorageOptions, is_name


@pytest.mark.parametrize(
    "name", ["config", "packs/ab/abcd", "locks/0f3a", "README", "a.b-c_d/x.1", "-"]
)
def test_ordinary_names_are_names(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "/a", "a/", "a//b", ".", "..", "a/../b", "a/.hidden", "a b", "a\n", "ä", "a\0", "a" * 513],
)
def test_names_that_could_mean_something_else_are_refused(name: str) -> None:
    assert not is_name(name)


def test_options_do_not_show_their_secrets() -> None:
    options = StorageOptions(
        access_key_id="id", secret_access_key="hidden-1", session_token="hidden-2"
    )
    assert "hidden" not in repr(options)
    assert "id" in repr(options)
