"""Completion in bash, zsh and fish: commands, options, snapshots, tags, hosts, and paths inside `SNAP:`.

The script of a shell runs casfs at each press of the completion key with the line so far, and gets one
candidate a line: its kind, its text and a description, separated by tabs. Where casfs has no candidate, the
script completes file names. A completion asks for no passphrase and reads no remote repository; of an
encrypted repository it knows only the ids of the snapshots.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import (
    CompletionItem,
    ShellComplete,
    add_completion_class,
    split_arg_string,
)

from casfs.cli.output import format_time
from casfs.cli.settings import Settings
from casfs.digest import short_id
from casfs.errors import CasfsError

if TYPE_CHECKING:
    from casfs.format.snapshot import Snapshot
    from casfs.repository.repository import Repository

_MAX_DESCRIBED = 500
"""Each description reads a snapshot's file; a repository with more snapshots gets none."""

_MAX_NAMES = 2_000

_BASH = r"""_casfs_completion() {
    local kind value description
    COMPREPLY=()
    while IFS=$'\t' read -r kind value description; do
        case $kind in
            dir) compopt -o dirnames ;;
            plain)
                [[ $value == *[/:] ]] && compopt -o nospace
                printf -v value %q "$value"
                COMPREPLY+=("$value")
                ;;
        esac
    done < <(_CASFS_COMPLETE=bash_complete _CASFS_LINE=${COMP_LINE:0:COMP_POINT} \
        _CASFS_WORDBREAKS=$COMP_WORDBREAKS "$1" 2>/dev/null </dev/null)
}
complete -o nosort -o default -F _casfs_completion casfs
"""

_ZSH = r"""#compdef casfs
_casfs_completion() {
    local kind value description wants_dirs
    local -a closed closed_shown open open_shown
    while IFS=$'\t' read -r kind value description; do
        case $kind in
            dir) wants_dirs=1 ;;
            plain)
                if [[ $value == *[/:] ]]; then
                    open+=("$value")
                    open_shown+=("$value${description:+  -- $description}")
                else
                    closed+=("$value")
                    closed_shown+=("$value${description:+  -- $description}")
                fi
                ;;
        esac
    done < <(_CASFS_COMPLETE=zsh_complete _CASFS_LINE="${words[1,CURRENT]}" casfs 2>/dev/null </dev/null)
    [[ $words[CURRENT] == --*=* ]] && compset -P '*='
    if (( $#closed + $#open )); then
        (( $#closed )) && compadd -l -V casfs -d closed_shown -- $closed
        (( $#open )) && compadd -l -V casfs -S '' -d open_shown -- $open
        return 0
    fi
    if [[ -n $wants_dirs ]]; then
        _files -/
    else
        _files
    fi
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _casfs_completion "$@"
else
    compdef _casfs_completion casfs
fi
"""

_FISH = r"""function _casfs_completion
    set -l line (commandline -cp)
    set -l found (env _CASFS_COMPLETE=fish_complete "_CASFS_LINE=$line" casfs 2>/dev/null </dev/null)
    set -l has_plain
    for candidate in $found
        set -l parts (string split \t -- $candidate)
        if test "$parts[1]" = plain
            set has_plain 1
            printf '%s\t%s\n' $parts[2] "$parts[3]"
        else if test "$parts[1]" = dir
            set has_plain 1
            __fish_complete_directories (commandline -ct)
        end
    end
    if test -z "$has_plain"
        __fish_complete_path (commandline -ct)
    end
end
complete --no-files --command casfs --arguments '(_casfs_completion)'
"""


def completion_script(shell: str) -> str:
    """Return the script that a user of a shell loads."""
    return {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}[shell]


class _LineComplete(ShellComplete):
    """The candidates for a line up to the cursor, which the script passes in the environment."""

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ.get("_CASFS_LINE", "")
        words = split_arg_string(line)[1:]
        if not words or line[-1:].isspace():
            return words, ""
        return words[:-1], words[-1]

    def format_completion(self, item: CompletionItem[Any]) -> str:
        return f"{item.type}\t{self.inserted(str(item.value))}\t{item.help or ''}"

    def inserted(self, value: str) -> str:
        """Return the text that the shell inserts for a candidate."""
        return value


class _BashComplete(_LineComplete):
    """Bash takes a colon for the end of a word, and replaces only what follows it."""

    name = "bash"
    source_template = _BASH

    def inserted(self, value: str) -> str:
        incomplete = self.get_completion_args()[1]
        if ":" not in os.environ.get("_CASFS_WORDBREAKS", "") or ":" not in incomplete:
            return value
        return value.removeprefix(incomplete[: incomplete.rindex(":") + 1])


class _ZshComplete(_LineComplete):
    name = "zsh"
    source_template = _ZSH


class _FishComplete(_LineComplete):
    """Fish replaces the whole word, also where it is an option with its value."""

    name = "fish"
    source_template = _FISH

    def inserted(self, value: str) -> str:
        incomplete = self.get_completion_args()[1]
        option, equals, _ = incomplete.partition("=")
        is_value = equals and option.startswith("--") and not value.startswith("--")
        return f"{option}={value}" if is_value else value


def register_shells() -> None:
    """Make click use these classes in place of its own."""
    for shell in (_BashComplete, _ZshComplete, _FishComplete):
        add_completion_class(shell)


@contextmanager
def _repository(ctx: click.Context) -> Iterator[Repository | None]:
    """Yield the repository of the command, or None where it is remote or cannot be opened."""
    from casfs.repository.opening import OpenOptions, open_for_reading
    from casfs.repository.place import LocalPlace

    place = ctx.ensure_object(Settings).repository()
    if not isinstance(place, LocalPlace):
        yield None
        return
    with open_for_reading(place, OpenOptions(allow_no_identity=True)) as repository:
        yield repository


def _candidates(
    complete: Callable[[Repository, str], Iterator[CompletionItem[str]]],
) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem[str]]]:
    """Return a completion of click that reads the repository; it has no candidates after an error."""

    def found(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        try:
            with _repository(ctx) as repository:
                return list(complete(repository, incomplete)) if repository is not None else []
        except (CasfsError, OSError):
            return []

    return found


def _snapshots(repository: Repository, incomplete: str) -> Iterator[CompletionItem[str]]:
    name, colon, path = incomplete.partition(":")
    if colon:
        yield from _paths_inside(repository, name, path)
        return
    if "latest".startswith(incomplete):
        yield CompletionItem("latest", help="the newest snapshot")
    ids = repository.snapshots.ids()
    if repository.lacks_identity or len(ids) > _MAX_DESCRIBED:
        described: list[tuple[str, str]] = [(short_id(one), "") for one in ids]
    else:
        described = [
            (short_id(one), _description(snapshot))
            for one, snapshot in reversed(list(repository.snapshots.iterate()))
        ]
    for text, description in described:
        if text.startswith(incomplete.lower()):
            yield CompletionItem(text, help=description)


def _description(snapshot: Snapshot) -> str:
    paths = b" ".join(snapshot.paths).decode("utf-8", "replace")
    text = f"{format_time(snapshot.time_ns)} {snapshot.host} {paths}"
    return "".join(character if character.isprintable() else "?" for character in text)


def _paths_inside(repository: Repository, name: str, text: str) -> Iterator[CompletionItem[str]]:
    """Yield the entries of a directory of a snapshot; names that a line cannot show are left out."""
    if repository.lacks_identity:
        return
    above, slash, beginning = text.rpartition("/")
    _, _, _, node = repository.snapshots.resolve_path(f"{name}:{above or '/'}")
    if node.tree is None:
        return
    found = 0
    for entry in repository.trees.nodes(node.tree):
        shown = entry.name.decode("utf-8", "replace")
        if not shown.startswith(beginning) or not shown.isprintable() or "\ufffd" in shown:
            continue
        end = "/" if entry.tree is not None else ""
        yield CompletionItem(f"{name}:{above}{slash}{shown}{end}")
        found += 1
        if found == _MAX_NAMES:
            return


def _tags(repository: Repository, incomplete: str) -> Iterator[CompletionItem[str]]:
    before, comma, beginning = incomplete.rpartition(",")
    if repository.lacks_identity:
        return
    tags = {tag for _, snapshot in repository.snapshots.iterate() for tag in snapshot.tags}
    for tag in sorted(tags):
        if tag.startswith(beginning) and tag.isprintable():
            yield CompletionItem(f"{before}{comma}{tag}")


def _hosts(repository: Repository, incomplete: str) -> Iterator[CompletionItem[str]]:
    if repository.lacks_identity:
        return
    for host in sorted({snapshot.host for _, snapshot in repository.snapshots.iterate()}):
        if host.startswith(incomplete) and host.isprintable():
            yield CompletionItem(host)


snapshot_candidates = _candidates(_snapshots)
tag_candidates = _candidates(_tags)
host_candidates = _candidates(_hosts)
