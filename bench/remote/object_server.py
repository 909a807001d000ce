"""SeaweedFS as the object storage of the benchmark, in a folder of its own."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.request import Request, urlopen

from obstore import sign
from obstore.store import S3Store

KEY, SECRET, REGION = "casfs-bench", "casfs-bench-secret", "us-east-1"
_READY_S = 60.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class ObjectServer:
    """A running server: its port on 127.0.0.1, and its version."""

    port: int
    version: str

    def make_bucket(self, bucket: str) -> None:
        """Create a bucket."""
        store = S3Store(
            bucket,
            endpoint=f"http://127.0.0.1:{self.port}",
            access_key_id=KEY,
            secret_access_key=SECRET,
            region=REGION,
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )
        url = sign(store, "PUT", "", timedelta(minutes=5))
        with urlopen(Request(url, method="PUT", data=b"")):
            pass
        # The first object of a bucket takes seconds, which belong to no measurement.
        store.put("first", b"first")


def credentials() -> Mapping[str, str]:
    """Return the variables in which both programs find the key."""
    return {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": REGION}


@contextmanager
def object_server(folder: Path) -> Iterator[ObjectServer]:
    """Run SeaweedFS until the end of the block; raise OSError where it does not start."""
    program = _find_program()
    master, volume, filer, s3 = _free_ports(4)
    identity = {
        "name": "bench",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    command = [
        program,
        *("server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(f"-master.port={master}", "-master.telemetry=false", "-master.volumeSizeLimitMB=1024"),
        *(f"-volume.port={volume}", "-volume.max=0", "-volume.preStopSeconds=0"),
        *("-filer=true", f"-filer.port={filer}", "-s3=true", f"-s3.port={s3}"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder}/s3.json"),
        *("-s3.autoCreateBucket=false", "-s3.iam=false"),
    ]
    version = subprocess.run([program, "version"], capture_output=True, text=True, check=False)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"TMPDIR": str(folder)},
        )
    try:
        deadline = time.monotonic() + _READY_S
        while not _answers(s3):
            if process.poll() is not None or time.monotonic() > deadline:
                raise OSError("SeaweedFS does not start; its log is in the scratch folder")
            time.sleep(_POLL_S)
        yield ObjectServer(s3, version.stdout.strip().partition("\n")[0])
    finally:
        process.kill()
        process.wait()


def _find_program() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        raise OSError("SeaweedFS is missing; `make dev` installs it")
    return found


def _free_ports(count: int) -> list[int]:
    """Return free ports below 55,000: SeaweedFS also uses each port plus 10,000."""
    sockets: list[socket.socket] = []
    ports: list[int] = []
    while len(ports) < count:
        one = socket.socket()
        sockets.append(one)
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        if port < 55_000:
            ports.append(port)
    for one in sockets:
        one.close()
    return ports


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status < 500
    except OSError:
        return False
    finally:
        connection.close()
