"""A profile that is run night by night, and everyone who hears of its runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.support.cli import Casfs, Result
from tests.support.ping_server import PingServer


@dataclass(slots=True)
class Night:
    """A profile `home` with two sources, a repository, and all who hear of its runs."""

    casfs: Casfs
    folder: Path
    pings: PingServer
    sources: list[Path]

    @property
    def config(self) -> Path:
        return self.folder / "config.toml"

    @property
    def metrics(self) -> dict[str, float]:
        """The values of the metrics file by name and step."""
        text = (self.folder / "casfs.prom").read_text()
        return {
            f"{sample.name.removeprefix('casfs_')} {sample.labels.get('step', '')}".strip(): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    @property
    def calls(self) -> list[str]:
        """The hooks that were called so far."""
        file = self.folder / "calls"
        return file.read_text().split() if file.exists() else []

    def configure(
        self,
        *more: str,
        before: str = "true",
        repository: str = "",
        url: str = "",
        prunes: bool = True,
    ) -> None:
        """Write the configuration; `more` are lines of the profile, `repository` those of `nas`."""
        folder = self.folder
        hooks = ", ".join(
            f"{name} = '''echo {name} >> {folder}/calls; cat > {folder}/{name}.json; {command}'''"
            for name, command in (
                ("before", before),
                ("after", "true"),
                ("failure", "true"),
                ("finally", "true"),
            )
        )
        lines = [
            "[repositories.nas]",
            f'url = "{url or self.casfs.where}"',
            repository,
            "[profiles.home]",
            'repository = "nas"',
            f"sources = {json.dumps([str(source) for source in self.sources])}",
            'tags = ["home"]',
            "patience = '1s'",
            "keep = { last = 2 }",
            'prune-every = "7d"' if prunes else "",
            'check = { older-than = "30d", every = "1d" }',
            f'metrics-file = "{folder}/casfs.prom"',
            f'ping = "{self.pings.url}/uuid"',
            f"notify = {{ command = 'cat > {folder}/mail' }}",
            f"hooks = {{ {hooks} }}",
            *more,
        ]
        self.config.write_text("\n".join(lines) + "\n")
        self.config.chmod(0o600)

    def run(self, *options: str, expect: int = 0, **how: Any) -> Result:
        """Run the profile, and require that all who hear of the run hear the same."""
        result = self.casfs.json(
            "run", "--config", self.config, *options, "home", expect=expect, **how
        )
        if result.of_type("run"):
            self.require_reports(result)
        return result

    def require_reports(self, result: Result) -> None:
        """Require that hooks, ping, mail and metrics report the exit code of the last run."""
        run = result.one("run")
        outcome = {0: "success", 4: "warning"}.get(result.exit, "failed")
        assert (run["exit"], run["outcome"]) == (result.exit, outcome)
        after = "failure" if outcome == "failed" else "after"
        assert self.calls[-3:] == ["before", after, "finally"]
        for hook in (after, "finally"):
            summary = json.loads((self.folder / f"{hook}.json").read_text())
            assert (summary["exit"], summary["outcome"]) == (result.exit, outcome)
        _, path, body = self.pings.requests[-1]
        assert path == ("/uuid/fail" if outcome == "failed" else "/uuid")
        assert f"(exit {result.exit})" in body.splitlines()[0]
        if outcome != "success":
            assert (self.folder / "mail").read_text() == body
        metrics = self.metrics
        assert metrics["run_exit_code"] == result.exit
        assert (metrics["run_consecutive_failures"] == 0) == (outcome != "failed")

    def steps(self, result: Result) -> dict[str, str]:
        """Return the exit code of every step that ran, and why each of the others did not."""
        return {
            line["step"]: str(line["exit"]) if line["status"] == "ran" else line["status"]
            for line in result.of_type("step")
        }

    def age(self, step: str, days: float) -> None:
        """Let a step have succeeded so many days earlier than it did."""
        (path,) = (self.casfs.home / ".local/state/casfs/profiles").glob("home-*.json")
        state = json.loads(path.read_text())
        state["steps"][step]["last_success_s"] -= days * 86_400
        path.write_text(json.dumps(state))
