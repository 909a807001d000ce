"""Real servers for tests: SeaweedFS as an object storage, OpenSSH's `sshd`, and one that answers wrongly.

Each is started on 127.0.0.1 in a temporary folder of its own and ended by its process id. The kernel ends
it, too, when the process that started it dies.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import hmac
import http.client
import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path

from obstore import sign
from obstore.store import S3Store

from casfs.storage.base import StorageOptions

_READY_S = 60
_PR_SET_PDEATHSIG = 1
_GRPC_DISTANCE = 10_000
"""SeaweedFS also listens on ports that are so far above the given ones."""

_STARTS = 3
_RANDOM = random.SystemRandom()
_LIBC = ctypes.CDLL(None)

SSHD = "/usr/sbin/sshd"
SFTP_SERVER = "/usr/lib/openssh/sftp-server"


@dataclass(frozen=True, slots=True)
class S3Server:
    """A server of the S3 protocol, and the keys that may do everything there."""

    endpoint: str
    access_key_id: str
    secret_access_key: str

    @property
    def port(self) -> int:
        """The port of 127.0.0.1 at which it listens."""
        return int(self.endpoint.rpartition(":")[2])

    @property
    def options(self) -> StorageOptions:
        """How casfs reaches the server."""
        return StorageOptions(
            endpoint=self.endpoint,
            region="us-east-1",
            access_key_id=self.access_key_id,
            secret_access_key=self.secret_access_key,
        )

    def variables(self) -> dict[str, str]:
        """Return the environment in which a program finds the server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "AWS_REGION": "us-east-1",
        }

    def request(self, method: str, bucket: str) -> int:
        """Make a signed request of a bucket itself and return its status."""
        store = S3Store(
            bucket,
            endpoint=self.endpoint,
            access_key_id=self.access_key_id,
            secret_access_key=self.secret_access_key,
            region="us-east-1",
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )
        url = sign(store, method, "", timedelta(minutes=5))  # type: ignore[call-overload]
        with urllib.request.urlopen(urllib.request.Request(url, method=method, data=b"")) as answer:
            status: int = answer.status
            return status

    def make_bucket(self, bucket: str) -> None:
        """Create a bucket."""
        assert self.request("PUT", bucket) == 200

    def make_locking_bucket(self, bucket: str) -> None:
        """Create a bucket that keeps versions and can lock them."""
        header = {"x-amz-bucket-object-lock-enabled": "true"}
        assert _signed(self, "PUT", f"/{bucket}", headers=header) == 200

    def set_default_lock(self, bucket: str, days: int) -> None:
        """Let a bucket lock every new object for some days."""
        body = (
            '<ObjectLockConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            "<ObjectLockEnabled>Enabled</ObjectLockEnabled><Rule><DefaultRetention>"
            f"<Mode>COMPLIANCE</Mode><Days>{days}</Days>"
            "</DefaultRetention></Rule></ObjectLockConfiguration>"
        )
        assert _signed(self, "PUT", f"/{bucket}", "object-lock=", body.encode()) == 200

    def delete_version(self, bucket: str, key: str, version: str) -> int:
        """Delete a version of an object with the keys that may do everything, and return the status."""
        return _signed(self, "DELETE", f"/{bucket}/{key}", f"versionId={version}")

    def put_policy(self, bucket: str, policy: bytes) -> None:
        """Give a bucket a policy, with a signature of its own: `obstore` signs no subresources."""
        assert _signed(self, "PUT", f"/{bucket}", "policy=", policy) in (200, 204)


def _signed(
    server: S3Server,
    method: str,
    path: str,
    query: str = "",
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
) -> int:
    """Make a request with AWS's signature version 4 and return its status."""
    host = server.endpoint.removeprefix("http://")
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    digest = hashlib.sha256(body).hexdigest()
    headers = {
        "host": host,
        "x-amz-content-sha256": digest,
        "x-amz-date": now,
        **(headers or {}),
    }
    headers = dict(sorted(headers.items()))
    names = ";".join(headers)
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    canonical = f"{method}\n{path}\n{query}\n{lines}\n{names}\n{digest}"
    scope = f"{now[:8]}/us-east-1/s3/aws4_request"
    to_sign = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = f"AWS4{server.secret_access_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    authorization = (
        f"AWS4-HMAC-SHA256 Credential={server.access_key_id}/{scope}, SignedHeaders={names}, "
        f"Signature={signature}"
    )
    request = urllib.request.Request(
        f"{server.endpoint}{path}?{query}",
        method=method,
        data=body,
        headers=headers | {"Authorization": authorization},
    )
    try:
        with urllib.request.urlopen(request) as answer:
            status: int = answer.status
            return status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that were free just now, with those that are _GRPC_DISTANCE above them.

    All are below those that Linux gives to outgoing connections, so that none of these takes one meanwhile.
    """
    found: list[int] = []
    while len(found) < count:
        port = _RANDOM.randrange(10_000, 32_000 - _GRPC_DISTANCE)
        with socket.socket() as one, socket.socket() as above:
            try:
                one.bind(("127.0.0.1", port))
                above.bind(("127.0.0.1", port + _GRPC_DISTANCE))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def running(
    command: Sequence[str], folder: Path, is_ready: Callable[[], bool], **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the end of the block; what it prints is in the folder's `log`."""
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | environment,
            preexec_fn=_die_with_parent,
        )
    try:
        deadline = time.monotonic() + _READY_S
        while not is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(
                    f"{command[0]} does not start: {log.read_text(errors='replace')[-3000:]}"
                )
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def _answers_http(port: int, path: str = "/") -> Callable[[], bool]:
    def ask() -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", path)
            return connection.getresponse().status < 500
        except OSError:
            return False
        finally:
            connection.close()

    return ask


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Make a folder with a short path, since names of sockets are limited, and remove it at the end."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def seaweedfs() -> Iterator[S3Server]:
    """Run SeaweedFS with its S3 gateway."""
    with ExitStack() as stack:
        yield _started(stack, _STARTS)


def _started(stack: ExitStack, starts: int) -> S3Server:
    """Start a server; begin again where another process took one of its eight ports meanwhile."""
    try:
        return stack.enter_context(_seaweedfs_once())
    except AssertionError:
        if starts == 1:
            raise
        return _started(stack, starts - 1)


@contextmanager
def _seaweedfs_once() -> Iterator[S3Server]:
    with temporary_folder("casfs-weed-") as folder:
        master, volume, filer, s3 = free_ports(4)
        server = S3Server(f"http://127.0.0.1:{s3}", "casfs-test", "casfs-test-secret")
        key = {"accessKey": server.access_key_id, "secretKey": server.secret_access_key}
        reader = {"accessKey": "casfs-reader", "secretKey": "casfs-reader-secret"}
        identities = [
            {"name": "admin", "credentials": [key], "actions": ["Admin", "Read", "Write", "List"]},
            {"name": "reader", "credentials": [reader], "actions": ["Read", "List"]},
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        command = [
            str(Path(sys.executable).with_name("weed")),
            *("server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-master.port={master}", "-master.telemetry=false", "-master.volumeSizeLimitMB=256"),
            *(f"-volume.port={volume}", "-volume.max=0", "-volume.preStopSeconds=0"),
            *("-filer=true", f"-filer.port={filer}", "-s3=true", f"-s3.port={s3}"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder}/s3.json"),
            *("-s3.autoCreateBucket=false", "-s3.iam=false"),
        ]
        with running(command, folder, _answers_http(s3, "/healthz"), TMPDIR=str(folder)):
            yield server


AZURITE = "azurite-blob"
"""Microsoft's own emulator of Azure's blob storage, from npm."""


@dataclass(frozen=True, slots=True)
class AzureServer:
    """A server of Azure's protocol, with the account that the emulator always has."""

    port: int
    account: str = "devstoreaccount1"
    key: str = (
        "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
    )

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}/{self.account}"

    def make_container(self, container: str) -> None:
        """Create a container, with a signature of its own: `obstore` signs no such request."""
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2023-11-03"}
        lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
        path = f"/{self.account}/{self.account}/{container}\nrestype:container"
        to_sign = "PUT" + 12 * "\n" + lines + path
        digest = hmac.digest(base64.b64decode(self.key), to_sign.encode(), "sha256")
        signature = base64.b64encode(digest).decode()
        headers |= {"Authorization": f"SharedKey {self.account}:{signature}", "Content-Type": ""}
        url = f"{self.endpoint}/{container}?restype=container"
        request = urllib.request.Request(url, method="PUT", data=b"", headers=headers)
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 201


@contextmanager
def azurite() -> Iterator[AzureServer]:
    """Run Azurite, which has to be installed."""
    with temporary_folder("casfs-azurite-") as folder:
        (port,) = free_ports(1)
        command = [
            *(AZURITE, "--silent", "--disableTelemetry", "--inMemoryPersistence"),
            *("--blobHost", "127.0.0.1", "--blobPort", str(port), "--skipApiVersionCheck"),
        ]
        with running(command, folder, _answers_http(port)):
            yield AzureServer(port)


@contextmanager
def rclone_s3(bucket: str) -> Iterator[S3Server]:
    """Run `rclone serve s3`, which ignores conditions of writes, with one bucket."""
    with temporary_folder("casfs-rclone-") as folder:
        (folder / "data" / bucket).mkdir(parents=True)
        (port,) = free_ports(1)
        server = S3Server(f"http://127.0.0.1:{port}", "casfs-test", "casfs-test-secret")
        command = [
            str(Path(sys.executable).with_name("rclone")),
            *("serve", "s3", str(folder / "data"), "--addr", f"127.0.0.1:{port}"),
            *("--auth-key", f"{server.access_key_id},{server.secret_access_key}"),
            *("--config", str(folder / "rclone.conf")),
        ]
        with running(command, folder, _answers_http(port)):
            yield server


@dataclass(frozen=True, slots=True)
class SshServer:
    """A running `sshd`; `folder` holds its keys, and is where what it stores may be put."""

    port: int
    user: str
    folder: Path

    @property
    def ssh_command(self) -> tuple[str, ...]:
        """The command that reaches it with its own keys and nothing of the user's configuration."""
        return ("ssh", "-F", str(self.folder / "ssh_config"))

    def url(self, path: Path | str) -> str:
        """Return the URL of a path on the server."""
        return f"sftp://{self.user}@127.0.0.1:{self.port}{path}"


@contextmanager
def sshd(folder: Path | None = None, port: int | None = None) -> Iterator[SshServer]:
    """Run OpenSSH's server for this user; a folder and a port make it the same server once more."""
    if folder is None:
        with temporary_folder("casfs-sshd-") as made, sshd(made, port) as server:
            yield server
        return
    server = SshServer(
        port if port is not None else free_ports(1)[0], pwd.getpwuid(os.getuid()).pw_name, folder
    )
    if not (folder / "host_key").exists():
        _make_ssh_keys(folder)
    known = (folder / "host_key.pub").read_text().split()[:2]
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{server.port} {' '.join(known)}\n")
    (folder / "sshd_config").write_text(
        f"Port {server.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\n"
        f"AuthorizedKeysFile {folder}/client_key.pub\nStrictModes no\nUsePAM no\nPidFile none\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nMaxStartups 100\n"
        f"PermitRootLogin prohibit-password\nSubsystem sftp {SFTP_SERVER}\n"
    )
    (folder / "ssh_config").write_text(
        f"UserKnownHostsFile {folder}/known_hosts\nGlobalKnownHostsFile /dev/null\n"
        f"IdentityFile {folder}/client_key\nIdentitiesOnly yes\nIdentityAgent none\n"
        "BatchMode yes\nStrictHostKeyChecking yes\nLogLevel ERROR\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    command = [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")]
    with running(command, folder, lambda: _accepts(server.port)):
        try:
            yield server
        finally:
            _kill_sessions(server)


def _make_ssh_keys(folder: Path) -> None:
    for name in ("host_key", "client_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True
        )


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2):
            return True
    except OSError:
        return False


def _kill_sessions(server: SshServer) -> None:
    """End the processes of `sshd` that serve connections: they outlive the one that listens."""
    for pid in session_pids(server):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def session_pids(server: SshServer) -> list[int]:
    """Return the processes of a server that serve connections, by the listening one's children."""
    found = []
    config = str(server.folder / "sshd_config")
    parents = {}
    listeners = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text().rpartition(")")[2].split()[1]
                )
                if config.encode() in (entry / "cmdline").read_bytes():
                    listeners.add(int(entry.name))
    for pid in parents:
        above = pid
        while above in parents and above not in listeners:
            above = parents[above]
        if above in listeners and pid not in listeners:
            found.append(pid)
    return found
