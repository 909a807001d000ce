"""What someone with the keys of a bucket does to the repository in it."""

from __future__ import annotations

from collections.abc import Iterator

import obstore
from obstore.store import S3Store

from tests.support.servers import S3Server


def store_of(server: S3Server, bucket: str) -> S3Store:
    """Return obstore's client of a bucket."""
    return S3Store(
        bucket,
        endpoint=server.endpoint,
        access_key_id=server.access_key_id,
        secret_access_key=server.secret_access_key,
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )


def _objects(store: S3Store, prefix: str) -> Iterator[str]:
    for page in obstore.list(store, prefix=prefix):
        yield from [entry["path"] for entry in page]


def delete_everything(server: S3Server, bucket: str, prefix: str) -> int:
    """Delete every object; return their number."""
    store = store_of(server, bucket)
    names = list(_objects(store, prefix))
    for name in names:
        obstore.delete(store, name)
    assert list(_objects(store, prefix)) == []
    return len(names)


def overwrite_everything(server: S3Server, bucket: str, prefix: str) -> int:
    """Replace the bytes of every object; return their number."""
    store = store_of(server, bucket)
    names = list(_objects(store, prefix))
    for name in names:
        obstore.put(store, name, b"forged")
    return len(names)
