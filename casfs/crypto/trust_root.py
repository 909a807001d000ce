"""What decides whom this process trusts: a repository's configuration and its list of recipients.

A hostile storage may answer every read with something else. So a process reads each of the two once, and
what it has verified is what it uses, pins and encrypts to. The configuration is read when the repository is
opened, the list when a command first needs it. One thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from casfs.digest import digest_of
from casfs.errors import IntegrityError
from casfs.format.config import RepositoryConfig, decode_config, with_format
from casfs.format.versions import OLDEST_FORMAT
from casfs.storage.base import Storage
from casfs.storage.concurrency import begin

if TYPE_CHECKING:
    # A repository without encryption does not load what encrypts.
    from collections.abc import Callable, Sequence

    from casfs.crypto.recipients import Recipient, RecipientList
    from casfs.format.generation import Generation


class TrustRoot:
    """The configuration and, once it is read, the list of recipients of one repository.

    `config_digest` is the digest of the configuration as encoded in the oldest format, so an upgrade keeps
    it. `file_digest` is that of the file as it is.
    """

    def __init__(self, data: bytes, place: str) -> None:
        """Verify the bytes of the configuration; raise as `decode_config`, whose errors name `place`."""
        self.data = data
        self.config: RepositoryConfig = decode_config(data, place)
        self.config_digest = digest_of(with_format(data, OLDEST_FORMAT)).hex()
        self.file_digest = digest_of(data).hex()
        self._recipients: RecipientList | IntegrityError | None = None
        self._reading: Callable[[], RecipientList] | None = None

    def begin_recipients(self, storage: Storage) -> None:
        """Begin to read the list of recipients where that would cost a round trip later."""
        from casfs.crypto.recipients import read_recipients

        if self._recipients is None and self._reading is None:
            self._reading = begin(storage, lambda: read_recipients(storage))

    def recipients(self, storage: Storage) -> RecipientList:
        """Return the list of recipients, which the first call reads.

        Raise IntegrityError and StorageError.
        """
        if self._recipients is None:
            self.begin_recipients(storage)
            assert self._reading is not None
            try:
                self._recipients = self._reading()
            except IntegrityError as error:
                self._recipients = error
            finally:
                self._reading = None
        if isinstance(self._recipients, IntegrityError):
            raise self._recipients
        return self._recipients

    def replace_recipients(
        self,
        storage: Storage,
        recipients: Sequence[Recipient],
        generations: Sequence[Generation] | None = None,
    ) -> None:
        """Replace the list durably in the storage, and use the new one from now on.

        The records of replaced domains stay where `generations` gives no others.
        """
        from casfs.crypto.recipients import RecipientList, write_recipients

        if generations is None:
            generations = self.recipients(storage).generations
        new = RecipientList.of(recipients, generations)
        write_recipients(storage, new)
        self._recipients = new
