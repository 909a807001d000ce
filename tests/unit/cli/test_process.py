"""What the command line does to its own process."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import resource
resource.setrlimit(resource.RLIMIT_CORE, (4096, 4096))
from casfs.cli.app import run
run(["version"])
print(resource.getrlimit(resource.RLIMIT_CORE))
"""


def test_a_command_writes_no_core_dump_of_its_secrets() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "(0, 4096)"
