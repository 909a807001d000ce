"""Where the repositories of the end-to-end tests are: in a folder, in object storage, or behind `sshd`.

Every test that takes the repository from the fixtures holds in each of these places, except for those of
`LOCAL_ONLY`. They run with a local repository, and those of `CORE` in all places. `CASFS_PLACES` chooses the
places for all (`make test-elsewhere`): the tests of `LOCAL_ONLY` are skipped then with their reasons, and the
tests that have no place are deselected.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests.support.cli import Casfs

MakeCasfs = Callable[[Path, Path], Casfs]
"""Return the command for a folder and a home, with a repository in the place that is not yet made."""

LOCAL, S3, SFTP = "local", "s3", "sftp"

PLACES = (LOCAL, S3, SFTP)

CORE = frozenset({"test_fidelity", "test_incremental", "test_mount"})
"""The modules that run in all places every time."""

_SERVERS_OF_ITS_OWN = "its repositories are at servers of its own, whatever the place"
_NO_REPOSITORY = "it stores nothing: the place makes no difference"
_FOLDER = "it is about the folder that a local repository is"
_DISK = "it is about the disk of a local repository"
_LOCAL_FORMS = "it is about the names of local repositories"
_TRACES = "it watches the files of a repository while a command runs"

LOCAL_ONLY: dict[str, str] = {
    "test_bad_input::TestInvalidRepository::test_a_file_in_place_of_a_repository_is_refused": _FOLDER,
    "test_bad_input::TestInvalidRepository::test_init_refuses_a_directory_with_other_content": _FOLDER,
    "test_bad_input::TestInvalidRepository::test_init_refuses_a_path_below_a_file": _FOLDER,
    "test_bad_input::TestInvalidSource::test_a_repository_inside_a_source_is_left_out_and_reported": _FOLDER,
    "test_bad_input::TestInvalidSource::test_a_repository_as_its_own_source_is_refused": _FOLDER,
    "test_bad_input::TestInvalidMountpoint::test_a_mountpoint_inside_the_repository_is_refused": _FOLDER,
    "test_bad_input::TestInvalidMountpoint::"
    "test_a_mountpoint_inside_the_repository_behind_a_symlink_is_refused": _FOLDER,
    "test_encryption::TestWriteOnlyHost::"
    "test_a_write_only_host_may_run_as_a_user_with_only_the_recipients": _FOLDER,
    "test_full_disk": _DISK,
    "test_interruption::test_an_interrupted_check_exits_with_130": _TRACES,
    "test_maintenance_commands::TestPrune::test_prune_drops_a_draft_that_is_named_and_old_enough": (
        "it makes a draft older than any server lets a client make an object"
    ),
    "test_mirror::test_a_mirror_into_the_repository_itself_is_refused": _FOLDER,
    "test_mount::TestMountCommand::test_mount_accepts_a_relative_repository": _LOCAL_FORMS,
    "test_mount_dying_disk": _DISK,
    "test_no_plaintext::test_no_source_text_is_found_during_a_backup_or_after_a_kill": _TRACES,
    "test_object_lock": _SERVERS_OF_ITS_OWN,
    "test_profiles_remote": _SERVERS_OF_ITS_OWN,
    "test_query_commands::TestInit::test_init_accepts_an_existing_empty_directory": _FOLDER,
    "test_query_commands::TestInit::test_init_keeps_stored_data_private_to_its_owner": _FOLDER,
    "test_query_commands::TestLocks::test_locks_changes_nothing": _FOLDER,
    "test_query_commands::TestStats::test_stats_of_requests_are_refused_for_a_local_repository": _LOCAL_FORMS,
    "test_remote": _SERVERS_OF_ITS_OWN,
    "test_restore::TestSelection::test_restore_refuses_the_repository_as_its_target": _FOLDER,
    "test_signals::test_a_signal_at_a_sample_of_the_lines_of_a_verb_ends_it_and_is_never_lost": (
        "each of its runs has to reach the same lines, which runs over a network do not"
    ),
    "test_upgrade": _SERVERS_OF_ITS_OWN,
    "test_usage::test_a_repository_copied_without_its_empty_folders_works": _FOLDER,
}
"""The tests that make no sense elsewhere, with the reasons: a module, a class of it, or a test."""


def chosen_places() -> tuple[str, ...] | None:
    """Return the places that CASFS_PLACES names, None where it does not say."""
    named = tuple(os.environ.get("CASFS_PLACES", "").split())
    unknown = set(named) - set(PLACES)
    if unknown:
        raise ValueError(
            f"CASFS_PLACES names {', '.join(sorted(unknown))}, not {' or '.join(PLACES)}"
        )
    return named or None


def places_of(module: str) -> tuple[str, ...]:
    """Return the places in which the tests of a module run."""
    return chosen_places() or (PLACES if module in CORE else (LOCAL,))


def local_only_reason(module: str, names: list[str]) -> str | None:
    """Return why a test runs with a local repository only; `names` are those of its classes and its own."""
    for count in range(len(names) + 1):
        reason = LOCAL_ONLY.get("::".join([module, *names[:count]]))
        if reason is not None:
            return reason
    return None
