"""Which entries of a snapshot a restore takes, and which of its patterns matched nothing.

What `--include` selects is restored with everything below it; what `--exclude` selects is left out with
everything below it, included or not. Both are matched against paths in the snapshot. Used by one thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from casfs.errors import NotFoundError
from casfs.monitor import Problem, ProblemKind
from casfs.patterns import Pattern, PatternMatcher, levels, show_pattern


class Selection:
    """The patterns of one restore, asked about each entry on its way from the root to the leaves."""

    def __init__(self, include: Sequence[Pattern], exclude: Sequence[Pattern]) -> None:
        self._include = PatternMatcher(include) if include else None
        self._exclude = PatternMatcher(exclude) if exclude else None
        self._unmatched = [("--include", pattern) for pattern in include]
        self._unmatched += [("--exclude", pattern) for pattern in exclude]
        self._has_taken = False
        self._has_left_out = False

    def begin(self, path: bytes, is_directory: bool) -> bool:
        """Return whether all below the path that is restored is included.

        Raises NotFoundError where it is excluded, by its own name or by a directory above it.
        """
        if self._exclude is not None:
            found = self._exclude.select(path, is_directory)
            if found is not None:
                raise NotFoundError(
                    f"--exclude '{show_pattern(found.pattern.text)}' leaves out all that was named; "
                    "nothing was restored"
                )
        for level, is_level_directory in levels(path, is_directory):
            self._note(level, is_level_directory)
        if self._include is None:
            return True
        self._has_taken = self._include.select(path, is_directory) is not None
        return self._has_taken

    def excludes(self, path: bytes, is_directory: bool) -> bool:
        """Return whether an entry is left out, be it in the snapshot or in the target."""
        if self._unmatched:
            self._note(path, is_directory)
        return self._exclude is not None and self._exclude.matches(path, is_directory)

    def leaves_out(self, path: bytes, is_directory: bool) -> bool:
        """Return whether an entry of the snapshot is left out with all below it."""
        left_out = self.excludes(path, is_directory)
        self._has_left_out = self._has_left_out or left_out
        return left_out

    def takes(self, path: bytes, is_directory: bool, is_parent_taken: bool) -> bool:
        """Return whether an entry that is not left out is restored."""
        taken = (
            is_parent_taken or self._include is None or self._include.matches(path, is_directory)
        )
        self._has_taken = self._has_taken or taken
        return taken

    def require_match(self) -> None:
        """Raise NotFoundError where the patterns left nothing of what there was."""
        if self._has_taken or not (self._include is not None or self._has_left_out):
            return
        included = self._include.patterns if self._include is not None else ()
        unmatched = [pattern for option, pattern in self._unmatched if option == "--include"]
        if included and len(unmatched) == len(included):
            patterns = ", ".join(f"'{show_pattern(pattern.text)}'" for pattern in included[:3])
            more = ", …" if len(included) > 3 else ""
            where = " outside what --exclude leaves out" if self._has_left_out else ""
            reason = f"nothing{where} matches --include {patterns}{more}"
        else:
            reason = "the patterns leave out everything"
        raise NotFoundError(f"{reason}; nothing was restored")

    def problems(self, path: bytes) -> Iterator[Problem]:
        """Yield a problem for each pattern that matched nothing; `path` is the one that was restored."""
        for option, pattern in self._unmatched:
            text = show_pattern(pattern.text)
            where = "" if not self._has_left_out else " outside what is left out"
            message = f"nothing here{where} matches {option} '{text}'"
            yield Problem(
                ProblemKind.UNMATCHED_PATTERN, path, message, {"option": option, "pattern": text}
            )

    def _note(self, path: bytes, is_directory: bool) -> None:
        self._unmatched = [
            (option, pattern)
            for option, pattern in self._unmatched
            if not pattern.matches(path, is_directory)
        ]
