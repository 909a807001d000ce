"""Select the entries of a snapshot that a restore writes, and track the patterns that match nothing.

An entry that `--include` matches is restored with everything below it. An entry that `--exclude` matches is
excluded with everything below it, included or not. Patterns are matched against paths in the snapshot. Used
by one thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from casfs.errors import NotFoundError
from casfs.monitor import Problem, ProblemKind
from casfs.patterns import Pattern, PatternMatcher, levels
from casfs.wildmatch import show_pattern


class Selection:
    """The patterns of one restore. Ask about the entries from the root to the leaves."""

    def __init__(self, include: Sequence[Pattern], exclude: Sequence[Pattern]) -> None:
        self._include = PatternMatcher(include) if include else None
        self._exclude = PatternMatcher(exclude) if exclude else None
        self._unmatched = [("--include", pattern) for pattern in include]
        self._unmatched += [("--exclude", pattern) for pattern in exclude]
        self._has_included = False
        self._has_excluded = False

    def begin(self, path: bytes, is_directory: bool) -> bool:
        """Return whether everything below the path to restore is included.

        Raises NotFoundError where a pattern excludes the path or a directory above it.
        """
        if self._exclude is not None:
            found = self._exclude.select(path, is_directory)
            if found is not None:
                raise NotFoundError(
                    f"--exclude '{show_pattern(found.pattern.text)}' excludes the path to restore; "
                    "nothing was restored"
                )
        for level, is_level_directory in levels(path, is_directory):
            self._note(level, is_level_directory)
        if self._include is None:
            return True
        self._has_included = self._include.select(path, is_directory) is not None
        return self._has_included

    def excludes(self, path: bytes, is_directory: bool) -> bool:
        """Return whether a pattern excludes an entry, of the snapshot or of the target."""
        if self._unmatched:
            self._note(path, is_directory)
        return self._exclude is not None and self._exclude.matches(path, is_directory)

    def excludes_node(self, path: bytes, is_directory: bool) -> bool:
        """Return whether a pattern excludes an entry of the snapshot with everything below it."""
        excluded = self.excludes(path, is_directory)
        self._has_excluded = self._has_excluded or excluded
        return excluded

    def includes(self, path: bytes, is_directory: bool, is_parent_included: bool) -> bool:
        """Return whether an entry that is not excluded is restored."""
        included = (
            is_parent_included or self._include is None or self._include.matches(path, is_directory)
        )
        self._has_included = self._has_included or included
        return included

    def require_match(self) -> None:
        """Raise NotFoundError where the patterns selected no entry of the snapshot."""
        if self._has_included or not (self._include is not None or self._has_excluded):
            return
        included = self._include.patterns if self._include is not None else ()
        unmatched = [pattern for option, pattern in self._unmatched if option == "--include"]
        if included and len(unmatched) == len(included):
            patterns = ", ".join(f"'{show_pattern(pattern.text)}'" for pattern in included[:3])
            more = ", …" if len(included) > 3 else ""
            where = " that is not excluded" if self._has_excluded else ""
            reason = f"nothing{where} matches --include {patterns}{more}"
        else:
            reason = "the patterns exclude everything"
        raise NotFoundError(f"{reason}; nothing was restored")

    def problems(self, path: bytes) -> Iterator[Problem]:
        """Yield a problem for each pattern that matched nothing; `path` is the restored path."""
        for option, pattern in self._unmatched:
            text = show_pattern(pattern.text)
            where = " that is not excluded" if self._has_excluded else ""
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
