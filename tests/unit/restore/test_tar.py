"""What a dump writes is verified, exact, and ends where damage begins."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from casfs.cli.app import casfs as command
from casfs.cli.settings import Settings
from casfs.digest import digest_of
from casfs.errors import CasfsError, UsageError
from casfs.format.tree import Node, NodeExtra, NodeType, replace
from casfs.monitor import ProblemKind, RecordingMonitor
from casfs.restore.tar import MAX_LINKS, DamagedContentError, TarStats, TarWriter, file_bytes
from casfs.trees.content import EXTENT, HOLE
from tests.support.builders import MTIME_NS, Plan, RepositoryFixture, entry, file, flagged

NINE_GIB = 9 << 30


@pytest.fixture
def repo(tmp_path: Path) -> RepositoryFixture:
    return RepositoryFixture(tmp_path)


def of_chunks(*chunks: bytes | int, **fields: Any) -> Node:
    """Return the node of a file of chunks; a number is a hole of so many bytes."""
    records = b"".join(
        EXTENT.pack(chunk, HOLE) if isinstance(chunk, int) else chunk_record(chunk)
        for chunk in chunks
    )
    whole = b"".join(bytes(chunk) for chunk in chunks)
    known: dict[str, Any] = {"size": len(whole), "content": records, "captured": digest_of(whole)}
    return entry(b"", **(known | fields))


def chunk_record(chunk: bytes) -> bytes:
    return EXTENT.pack(len(chunk), digest_of(chunk))


class TestDumpOfFile:
    """The bytes of one file."""

    def test_dump_writes_zeros_for_holes(self, repo: RepositoryFixture) -> None:
        repo.store(b"begin", b"end")
        node = of_chunks(7, b"begin", 3 << 20, b"end", 1)
        with repo.reading() as repository:
            data = b"".join(file_bytes(node, b"f", repository.store.read))
        assert data == bytes(7) + b"begin" + bytes(3 << 20) + b"end" + bytes(1)

    def test_dump_holds_at_most_a_chunk_of_a_long_hole(self, repo: RepositoryFixture) -> None:
        node = of_chunks(20 << 20)
        with repo.reading() as repository:
            parts = [len(part) for part in file_bytes(node, b"f", repository.store.read)]
        assert sum(parts) == 20 << 20
        assert max(parts) <= 1 << 20

    @pytest.mark.parametrize("bad", [0, 1, 2])
    def test_dump_ends_before_a_damaged_chunk(self, repo: RepositoryFixture, bad: int) -> None:
        chunks = [os.urandom(1000), os.urandom(2000), os.urandom(3000)]
        repo.store(*chunks)
        repo.damage(digest_of(chunks[bad]))
        got = b""
        with repo.reading() as repository, pytest.raises(DamagedContentError) as caught:
            for part in file_bytes(of_chunks(*chunks), b"dir/f\n", repository.store.read):
                got += part
        assert got == b"".join(chunks[:bad])
        assert (caught.value.path, caught.value.offset) == (b"dir/f\n", len(got))
        assert caught.value.exit_code == 5
        assert f"dir/f\\n is damaged from byte {len(got)} on" in str(caught.value)

    def test_dump_of_a_missing_chunk_reports_damage(self, repo: RepositoryFixture) -> None:
        with repo.reading() as repository, pytest.raises(DamagedContentError, match="missing"):
            list(file_bytes(of_chunks(b"never stored"), b"f", repository.store.read))

    @pytest.mark.parametrize(
        "wrong",
        [
            {"captured": digest_of(b"something else")},
            {"size": 3},
            {"size": 9},
            {"content": EXTENT.pack(4, digest_of(b"chunk"))},
            {"content": EXTENT.pack(6, digest_of(b"chunk"))},
            {"content": chunk_record(b"chunk") * 2},
            {"content": b""},
        ],
        ids=str,
    )
    def test_dump_of_a_wrong_manifest_reports_damage_although_every_chunk_verifies(
        self, repo: RepositoryFixture, wrong: dict[str, Any]
    ) -> None:
        repo.store(b"chunk")
        node = of_chunks(b"chunk")
        got = 0
        with repo.reading() as repository:
            assert b"".join(file_bytes(node, b"f", repository.store.read)) == b"chunk"
            with pytest.raises(DamagedContentError):
                for part in file_bytes(replace(node, **wrong), b"f", repository.store.read):
                    got += len(part)
        assert got <= wrong.get("size", 5)


def tar_of(
    repo: RepositoryFixture, plan: Plan, max_links: int = MAX_LINKS, **fields: Any
) -> tuple[bytes, TarStats, RecordingMonitor]:
    """Publish a plan, whose files' contents must be stored, and return its tar."""
    _, snapshot = repo.publish(plan, **fields)
    out, monitor = io.BytesIO(), RecordingMonitor()
    with repo.reading() as repository:
        writer = TarWriter(repository, snapshot, out.write, monitor, max_links=max_links)
        writer.add_below(snapshot.root, b"")
        stats = writer.finish()
    return out.getvalue(), stats, monitor


def members(stream: bytes) -> dict[bytes, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(stream), errorlevel=2) as tar:
        return {os.fsencode(member.name): member for member in tar}


class TestDumpAsTar:
    """A directory as a tar, read back by Python's own reader."""

    def test_tar_keeps_every_kind_of_entry_with_its_metadata(self, repo: RepositoryFixture) -> None:
        repo.store(b"content")
        stream, stats, monitor = tar_of(
            repo,
            {
                b"dev": {
                    b"null": entry(
                        b"", NodeType.CHARACTER_DEVICE, extra=NodeExtra(rdev=os.makedev(1, 3))
                    ),
                    b"sda": entry(
                        b"", NodeType.BLOCK_DEVICE, extra=NodeExtra(rdev=os.makedev(8, 1000))
                    ),
                },
                b"fifo": entry(b"", NodeType.FIFO, mode=0o620),
                b"file": file(b"", b"content", mode=0o4751, uid=1000, gid=50),
                b"link": entry(b"", NodeType.SYMLINK, content=b"dev/null", mode=0o777),
            },
            users=((1000, "anna"),),
            groups=((50, "staff"),),
        )
        found = members(stream)
        assert list(found) == [b"dev", b"dev/null", b"dev/sda", b"fifo", b"file", b"link"]
        assert found[b"dev"].isdir() and found[b"fifo"].isfifo() and found[b"dev/null"].ischr()
        null, sda, data = found[b"dev/null"], found[b"dev/sda"], found[b"file"]
        assert (null.devmajor, null.devminor) == (1, 3)
        assert sda.isblk() and (sda.devmajor, sda.devminor) == (8, 1000)
        assert (data.mode, data.uid, data.gid) == (0o4751, 1000, 50)
        assert (data.uname, data.gname, data.size) == ("anna", "staff", 7)
        assert data.pax_headers["mtime"] == "1600000000.123456789"
        assert found[b"link"].issym() and found[b"link"].linkname == "dev/null"
        assert found[b"fifo"].mode == 0o620
        assert (stats.files, stats.directories, stats.others, stats.content_bytes) == (1, 1, 4, 7)
        assert monitor.problems == []
        assert len(stream) % tarfile.RECORDSIZE == 0
        assert stream.endswith(bytes(2 * tarfile.BLOCKSIZE))

    def test_tar_keeps_content_byte_for_byte(self, repo: RepositoryFixture) -> None:
        contents = {b"%d" % size: os.urandom(size) for size in (0, 1, 511, 512, 513, 5000)}
        repo.store(*filter(None, contents.values()))
        plan = {name: file(name, data) for name, data in contents.items()}
        plan[b"sparse"] = of_chunks(100_000, contents[b"513"], 3)
        stream, _, _ = tar_of(repo, plan)
        contents[b"sparse"] = bytes(100_000) + contents[b"513"] + bytes(3)
        with tarfile.open(fileobj=io.BytesIO(stream)) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                assert content.read() == contents.pop(os.fsencode(member.name)), member.name
        assert contents == {}

    @pytest.mark.parametrize(
        "time_ns",
        [
            0,
            1,
            -1,
            -1_500_000_000,
            10**9,
            MTIME_NS,
            5_000_000_000 * 10**9,
            8**11 * 10**9,
            -(10**18),
        ],
    )
    def test_tar_keeps_times_to_the_nanosecond(self, repo: RepositoryFixture, time_ns: int) -> None:
        stream, _, _ = tar_of(repo, {b"f": file(b"", mtime_ns=time_ns)})
        member = members(stream)[b"f"]
        exact = member.pax_headers.get("mtime")
        if exact is None:
            assert member.mtime * 10**9 == time_ns
            return
        seconds, _, rest = exact.lstrip("-").partition(".")
        assert len(rest) == 9
        assert (int(seconds) * 10**9 + int(rest)) * (-1 if exact[0] == "-" else 1) == time_ns

    @pytest.mark.parametrize(
        "name",
        [
            b"plain",
            b"x" * 100,
            b"x" * 101,
            b"x" * 255,
            b"caf\xc3\xa9",
            b"caf\xe9\xff",
            b"two\nlines\x1b[2J",
            b" ",
            b"-rf",
            b"a=b",
            b"\xe2\x80\xae",
        ],
    )
    def test_tar_keeps_names_and_targets_of_any_bytes_and_length(
        self, repo: RepositoryFixture, name: bytes
    ) -> None:
        link = entry(b"", NodeType.SYMLINK, content=name * 2)
        inside = {b"again" + name[:200]: file(b""), b"link": link}
        stream, _, _ = tar_of(repo, {name: inside})
        found = members(stream)
        assert set(found) == {name, name + b"/again" + name[:200], name + b"/link"}
        assert os.fsencode(found[name + b"/link"].linkname) == name * 2

    @pytest.mark.parametrize("name", [b"caf\xe9", b"\xff" * 100, b"\xe9" * 101, b"\xe9" * 255])
    def test_gnu_tar_lists_names_that_are_not_utf_8_without_a_warning(
        self, repo: RepositoryFixture, name: bytes
    ) -> None:
        link = entry(b"", NodeType.SYMLINK, content=name)
        stream, _, _ = tar_of(repo, {name: {b"f": file(b"")}, b"link": link})
        listing = [b"tar", b"--list", b"--quoting-style=literal", b"--show-transformed-names"]
        done = subprocess.run(listing, input=stream, capture_output=True, check=True)
        assert done.stderr == b""
        names = sorted([name + b"/", name + b"/f", b"link"])
        assert sorted(done.stdout.splitlines()) == names
        assert members(stream)[b"link"].linkname.encode("utf-8", "surrogateescape") == name

    def test_tar_writes_no_needless_pax_header(self, repo: RepositoryFixture) -> None:
        stream, _, _ = tar_of(repo, {b"f": file(b"", mtime_ns=10**18)})
        assert b"PaxHeaders" not in stream
        assert members(stream)[b"f"].pax_headers == {}

    def test_tar_keeps_numbers_that_do_not_fit_a_plain_header(
        self, repo: RepositoryFixture
    ) -> None:
        node = file(b"", uid=4_000_000_000, gid=8**7, mtime_ns=0)
        member = members(tar_of(repo, {b"f": node})[0])[b"f"]
        assert (member.uid, member.gid) == (4_000_000_000, 8**7)

    def test_tar_declares_a_size_beyond_8_gib(self, repo: RepositoryFixture) -> None:
        """The content is not there, so that the stream ends behind the header."""
        _, snapshot = repo.publish({b"f": entry(b"", size=NINE_GIB, captured=digest_of(b""))})
        out = io.BytesIO()
        with repo.reading() as repository, pytest.raises(DamagedContentError):
            TarWriter(repository, snapshot, out.write, RecordingMonitor()).add_below(
                snapshot.root, b""
            )
        with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
            member = tar.next()
        assert member is not None
        assert member.size == NINE_GIB

    def test_tar_keeps_long_and_non_ascii_owner_names(self, repo: RepositoryFixture) -> None:
        users, groups = ((1, "u" * 40),), ((2, "größe"),)
        plan = {b"f": file(b"", uid=1, gid=2), b"g": file(b"", uid=3, gid=4)}
        found = members(tar_of(repo, plan, users=users, groups=groups)[0])
        assert (found[b"f"].uname, found[b"f"].gname) == ("u" * 40, "größe")
        assert (found[b"g"].uname, found[b"g"].gname) == ("", "")

    def test_tar_keeps_xattrs_of_any_bytes(self, repo: RepositoryFixture) -> None:
        every_byte = bytes(range(256))
        xattrs = (
            (b"security.capability", b"\x01\0\0\x02\xff"),
            (b"user.a=b%", b"sign"),
            (b"user.empty", b""),
            (b"user.every", every_byte),
        )
        link = entry(b"", NodeType.SYMLINK, content=b"x", extra=NodeExtra(((b"trusted.t", b"1"),)))
        stream, _, _ = tar_of(repo, {b"f": file(b"", extra=NodeExtra(xattrs)), b"l": link})
        found = members(stream)
        reported = {
            keyword.removeprefix("SCHILY.xattr."): value.encode("utf-8", "surrogateescape")
            for keyword, value in found[b"f"].pax_headers.items()
            if keyword.startswith("SCHILY.xattr.")
        }
        expected = dict(xattrs) | {b"user.a%3Db%25": b"sign"}
        del expected[b"user.a=b%"]
        assert reported == {name.decode(): value for name, value in expected.items()}
        assert found[b"l"].pax_headers["SCHILY.xattr.trusted.t"] == "1"

    def test_tar_keeps_an_xattr_whose_name_is_not_utf_8(self, repo: RepositoryFixture) -> None:
        stream, _, _ = tar_of(repo, {b"f": file(b"", extra=NodeExtra(((b"user.\xe9", b"v"),)))})
        assert b"25 SCHILY.xattr.user.\xe9=v\n" in stream

    def test_tar_holds_an_acl_also_as_text(self, repo: RepositoryFixture) -> None:
        acl = bytes.fromhex(
            "02000000 01000700ffffffff 0200060039300000 04000500ffffffff"
            "0800000031d40000 10000700ffffffff 20000100ffffffff"
        )
        broken = acl[:-1]
        xattrs = ((b"system.posix_acl_access", acl), (b"system.posix_acl_default", broken))
        headers = members(tar_of(repo, {b"d": file(b"", extra=NodeExtra(xattrs))})[0])[
            b"d"
        ].pax_headers
        assert headers["SCHILY.acl.access"] == (
            "user::rwx,user:12345:rw-,group::r-x,group:54321:---,mask::rwx,other::--x"
        )
        assert "SCHILY.acl.default" not in headers
        assert (
            headers["SCHILY.xattr.system.posix_acl_access"].encode("utf-8", "surrogateescape")
            == acl
        )

    def test_tar_links_further_names_of_a_file_to_the_first(self, repo: RepositoryFixture) -> None:
        repo.store(b"content")
        one = file(b"", b"content", nlink=3, inode=5, extra=NodeExtra(device=1))
        other = replace(one, extra=NodeExtra(device=2))
        changed = replace(one, size=0, content=b"")
        stream, stats, _ = tar_of(
            repo, {b"a": {b"first": one}, b"b": one, b"c": other, b"d": changed, b"e": one}
        )
        found = members(stream)
        linked = {name: member.linkname for name, member in found.items() if member.islnk()}
        assert linked == {b"b": "a/first", b"e": "a/first"}
        assert found[b"c"].size == 7, "of another file system: another file"
        assert found[b"d"].size == 0, "its content is not that of the first"
        assert (stats.links, stats.files, stats.content_bytes) == (2, 5, 14)

    def test_tar_forgets_a_file_after_its_last_name(self, repo: RepositoryFixture) -> None:
        repo.store(b"content")
        pair = file(b"", b"content", nlink=2, inode=5, extra=NodeExtra(device=1))
        stream, stats, _ = tar_of(repo, {b"a": pair, b"b": pair, b"c": pair, b"d": pair})
        linked = [name for name, member in members(stream).items() if member.islnk()]
        assert linked == [b"b", b"d"]
        assert stats.links == 2

    def test_tar_remembers_a_bounded_number_of_links(self, repo: RepositoryFixture) -> None:
        repo.store(b"1", b"2")
        one = file(b"", b"1", nlink=2, inode=1, extra=NodeExtra(device=1))
        two = file(b"", b"2", nlink=2, inode=2, extra=NodeExtra(device=1))
        stream, _, _ = tar_of(repo, {b"a": one, b"b": two, b"c": one, b"d": two}, max_links=1)
        found = members(stream)
        assert [found[name].islnk() for name in (b"c", b"d")] == [False, False]
        assert [found[name].size for name in (b"c", b"d")] == [1, 1]

    def test_tar_links_a_hard_linked_symlink_to_the_first(self, repo: RepositoryFixture) -> None:
        link = entry(
            b"", NodeType.SYMLINK, content=b"x", nlink=2, inode=5, extra=NodeExtra(device=1)
        )
        found = members(tar_of(repo, {b"a": link, b"b": link})[0])
        assert found[b"a"].issym() and found[b"b"].islnk() and found[b"b"].linkname == "a"

    def test_tar_leaves_out_a_socket_and_reports_it(self, repo: RepositoryFixture) -> None:
        stream, stats, monitor = tar_of(
            repo, {b"run": {b"s": entry(b"", NodeType.SOCKET)}, b"z": file(b"")}
        )
        assert list(members(stream)) == [b"run", b"z"]
        (problem,) = monitor.problems
        assert (problem.kind, problem.path) == (ProblemKind.LEFT_OUT, b"run/s")
        assert stats.left_out == 1

    @pytest.mark.parametrize("rdev", [(1 << 64) - 1, os.makedev(8**7, 0)])
    def test_tar_leaves_out_a_device_with_an_impossible_number_and_reports_it(
        self, repo: RepositoryFixture, rdev: int
    ) -> None:
        node = entry(b"", NodeType.BLOCK_DEVICE, extra=NodeExtra(rdev=rdev))
        stream, stats, monitor = tar_of(repo, {b"a": node, b"b": file(b"")})
        assert list(members(stream)) == [b"b"]
        assert [problem.path for problem in monitor.problems] == [b"a"]
        assert stats.left_out == 1

    def test_tar_holds_a_flagged_file_as_captured_and_reports_it(
        self, repo: RepositoryFixture
    ) -> None:
        repo.store(b"mixture")
        stream, stats, monitor = tar_of(repo, {b"log": flagged(file(b"", b"mixture"))})
        assert members(stream)[b"log"].size == 7
        assert [(p.kind, p.path) for p in monitor.problems] == [(ProblemKind.CHANGED, b"log")]
        assert stats.flagged == 1

    def test_tar_ends_before_damage_without_an_end_marker(self, repo: RepositoryFixture) -> None:
        repo.store(b"first", b"second")
        _, snapshot = repo.publish(
            {b"a": file(b"", b"first"), b"b": file(b"", b"second"), b"c": file(b"", b"first")}
        )
        repo.damage(digest_of(b"second"))
        out = io.BytesIO()
        with repo.reading() as repository:
            writer = TarWriter(repository, snapshot, out.write, RecordingMonitor())
            with pytest.raises(DamagedContentError) as caught:
                writer.add_below(snapshot.root, b"")
        assert caught.value.path == b"b"
        with (
            pytest.raises(tarfile.ReadError),
            tarfile.open(fileobj=io.BytesIO(out.getvalue()), errorlevel=2) as tar,
        ):
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                assert content.read() in (b"first", b"second"[: member.size])


class TestDumpCommand:
    """`casfs dump`."""

    def run(self, repo: RepositoryFixture, *arguments: str) -> Result:
        return CliRunner().invoke(
            command,
            ["dump", "--repo", str(repo.root), *arguments],
            obj=Settings(),
            standalone_mode=False,
        )

    def test_dump_writes_a_file_to_stdout_or_to_a_file(
        self, repo: RepositoryFixture, tmp_path: Path
    ) -> None:
        data = os.urandom(100_000)
        (tmp_path / "source").write_bytes(data)
        repo.back_up(tmp_path / "source")
        assert self.run(repo, f"latest:{tmp_path}/source").stdout_bytes == data
        target = tmp_path / "target"
        target.write_bytes(bytes(200_000))
        result = self.run(repo, f"latest:{tmp_path}/source", "--output", str(target), "--json")
        assert target.read_bytes() == data
        reported = json.loads(result.stdout)
        assert (reported["type"], reported["kind"], reported["bytes"]) == (
            "summary",
            "file",
            100_000,
        )
        assert reported["path"] == str(tmp_path / "source").lstrip("/")

    def test_dump_writes_a_directory_as_a_tar(
        self, repo: RepositoryFixture, tmp_path: Path
    ) -> None:
        source = tmp_path / "source"
        (source / "sub").mkdir(parents=True)
        (source / "sub" / "file").write_bytes(b"content")
        repo.back_up(source)
        target = str(tmp_path / "x.tar")
        reported = json.loads(self.run(repo, f"latest:{source}", "-o", target, "--json").stdout)
        with tarfile.open(target) as tar:
            assert tar.getnames() == ["sub", "sub/file"]
        assert (reported["kind"], reported["files"], reported["dirs"], reported["bytes"]) == (
            "dir",
            1,
            1,
            7,
        )
        streamed = self.run(repo, f"latest:{source}").stdout_bytes
        assert (
            hashlib.sha256(streamed).digest() == hashlib.sha256(Path(target).read_bytes()).digest()
        )

    def test_dump_warns_of_a_flagged_file(self, repo: RepositoryFixture) -> None:
        repo.store(b"mixture")
        repo.publish({b"log": flagged(file(b"", b"mixture"))})
        result = self.run(repo, "latest:log")
        assert result.stdout_bytes == b"mixture"
        assert "log: it changed while it was captured" in result.stderr

    def test_dump_of_a_damaged_file_exits_with_5_after_the_intact_part(
        self, repo: RepositoryFixture
    ) -> None:
        intact, bad = os.urandom(1000), os.urandom(1000)
        repo.store(intact, bad)
        repo.publish({b"f": of_chunks(intact, bad, intact)})
        repo.damage(digest_of(bad))
        result = self.run(repo, "latest:f")
        assert result.stdout_bytes == intact
        assert isinstance(result.exception, DamagedContentError)
        assert result.exception.exit_code == 5

    @pytest.mark.parametrize("kind", [NodeType.FIFO, NodeType.SOCKET, NodeType.SYMLINK])
    def test_dump_of_an_entry_without_content_is_refused(
        self, repo: RepositoryFixture, tmp_path: Path, kind: NodeType
    ) -> None:
        repo.publish({b"it": entry(b"", kind, content=b"x" if kind == NodeType.SYMLINK else b"")})
        target = tmp_path / "target"
        result = self.run(repo, "latest:it", "-o", str(target))
        assert isinstance(result.exception, CasfsError)
        assert kind.name.lower() in str(result.exception)
        assert not target.exists()

    def test_dump_with_json_needs_an_output_file(self, repo: RepositoryFixture) -> None:
        repo.publish({b"f": file(b"")})
        assert isinstance(self.run(repo, "latest:f", "--json").exception, UsageError)

    def test_dump_of_a_directory_to_a_terminal_is_refused(
        self, repo: RepositoryFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        repo.publish({b"d": {b"f": file(b"")}})
        monkeypatch.setattr("casfs.cli.commands.dump._is_terminal", lambda: True)
        assert isinstance(self.run(repo, "latest:d").exception, UsageError)
        assert self.run(repo, "latest:d/f").exception is None
