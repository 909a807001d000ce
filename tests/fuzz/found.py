"""Inputs that once made a parser raise an undocumented error, by target."""

from __future__ import annotations

_DEEP = b'{"a":' + b"[" * 3000
_LONG_NUMBER = b"9" * 5000

FOUND: list[tuple[str, bytes]] = [
    ("presence", _DEEP),
    ("removal notice", _DEEP),
    ("lock", _DEEP),
    ("missing objects of a mirror", _DEEP),
    ("state of a writer", _DEEP),
    ("state of trusted machines", _DEEP),
    ("state of trusted machines", b'{"\xff":1}'),
    ("pinned lock policy", _DEEP),
    ("pinned lock policy", b'{"\xff":1}'),
    ("pin of a place", _DEEP),
    ("pin of a place", b'{"\xff":1}'),
    ("record of runs", _DEEP),
    ("credentials", _DEEP),
    ("versions in S3", b'<?xml version="1.0" encoding="UiF-8"?><a/>'),
    ("versions in S3", b'<?xml version="1.0" encoding="utf-7"?><a/>'),
    ("retention in S3", b"<a><RetainUntilDate>0001-01-01T00:00:00+23:59</RetainUntilDate></a>"),
    (
        "settings of a bucket",
        b"<a><Status>Enabled</Status><ObjectLockEnabled>Enabled</ObjectLockEnabled><Days>\xc2\xb2</Days></a>",
    ),
    ("OpenPGP key", b"\xc6\xff" + (70_000).to_bytes(4, "big") + b"\x04" + bytes(69_999)),
    ("configuration", b"a = " + _LONG_NUMBER),
    ("configuration", b'[profiles.a]\nexclude-larger-than = "' + _LONG_NUMBER + b'"'),
    ("size", _LONG_NUMBER),
    ("size", b"1." + _LONG_NUMBER),
    ("range of sizes", b"+" + _LONG_NUMBER),
    ("rate", _LONG_NUMBER),
    ("count", _LONG_NUMBER),
    ("path", b"../\0"),
    ("table of mounts", rb"36 35 98:0 / /mnt\402 rw shared:1 - fuse.sshfs x rw"),
]
