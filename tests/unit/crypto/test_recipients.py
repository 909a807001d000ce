"""Recipients: what names one, the public list of them, and the sentences for what is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from casfs.crypto import gpg, openpgp
from casfs.crypto.recipients import (
    Recipient,
    RecipientKind,
    RecipientList,
    decode_recipients,
    encode_recipients,
    merged,
    parse_recipient,
    parse_recipients_file,
    read_recipients,
    write_recipients,
)
from casfs.digest import digest_of
from casfs.errors import IntegrityError, WrongKeyError
from casfs.format.generation import MAX_GENERATIONS
from casfs.storage.local import LocalStorage
from tests.support.encryption import (
    GENERATION,
    GPG_FINGERPRINT,
    GPG_KEY,
    GPG_SUBKEY_OFFSET,
    OTHER,
    OTHER_GPG_KEY,
    OTHER_PUBLIC,
    PUBLIC,
    RECIPIENT,
    SECRET,
)

SSH = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAII87UJ7DbprNb0GcdIKWqsBxYGGCrdpxnetqmALPMvjc"

pytestmark = pytest.mark.usefixtures("own_home")


class TestRecipient:
    def test_an_age_public_key_is_a_recipient(self) -> None:
        assert parse_recipient(f"  {PUBLIC}\n") == RECIPIENT
        assert RECIPIENT.public_key == PUBLIC

    def test_an_ssh_public_key_is_a_recipient_without_its_comment(self) -> None:
        assert parse_recipient(f"{SSH} me@example.org") == Recipient(RecipientKind.SSH, SSH)

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            (SECRET, "secret identity"),
            (SECRET.lower(), "secret identity"),
            (PUBLIC[:-1] + "p", "not a recipient"),
            (PUBLIC[:-5], "not a recipient"),
            ("age1", "not a recipient"),
            ("ssh-ed25519 AAAA", "not a recipient"),
            ("ssh-ed25519", "not a recipient"),
            ("", "is not a recipient"),
            ("somebody", "is not a recipient"),
            ("--output=/etc/passwd", "is not a recipient"),
            ("a b@c", "is not a recipient"),
        ],
    )
    def test_other_text_is_no_recipient(self, text: str, reason: str) -> None:
        with pytest.raises(WrongKeyError, match=reason) as caught:
            parse_recipient(text)
        assert SECRET[20:] not in str(caught.value).upper()

    def test_a_gpg_recipient_must_be_in_the_keyring_of_the_user(self) -> None:
        with pytest.raises(WrongKeyError, match=r"no public key nobody@example\.org"):
            parse_recipient("nobody@example.org")

    def test_a_gpg_recipient_needs_the_gpg_command(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(WrongKeyError, match="gpg is not installed"):
            parse_recipient("0xDEADBEEF")


class TestRecipientsFile:
    def test_a_recipients_file_has_one_recipient_a_line_and_may_have_comments(self) -> None:
        data = f"# mine\n{PUBLIC}\n\n  \n{SSH} me\n# another\n{OTHER_PUBLIC}".encode()
        found = parse_recipients_file(data, "file")
        assert [one.value for one in found] == [PUBLIC, SSH, OTHER_PUBLIC]

    def test_a_recipients_file_without_recipients_is_refused(self) -> None:
        for data in (b"", b"\n", b"# only a comment\n"):
            with pytest.raises(WrongKeyError, match="list contains no recipient"):
                parse_recipients_file(data, "list")

    def test_an_invalid_recipients_file_is_refused_with_the_line(self) -> None:
        with pytest.raises(WrongKeyError, match=r"list, line 3: .*is not a recipient"):
            parse_recipients_file(f"{PUBLIC}\n\nnobody\n".encode(), "list")
        with pytest.raises(WrongKeyError, match="not text"):
            parse_recipients_file(b"\xff\xfe", "list")


class TestRecipientList:
    GPG = Recipient(RecipientKind.GPG, GPG_FINGERPRINT, OTHER_PUBLIC, GPG_KEY)

    def test_a_recipient_list_is_decoded_as_it_was_encoded(self) -> None:
        everybody = [RECIPIENT, Recipient(RecipientKind.SSH, SSH), self.GPG]
        assert decode_recipients(encode_recipients(everybody)) == RecipientList.of(everybody)
        assert encode_recipients(everybody) == encode_recipients(list(everybody))
        assert self.GPG.public_key == OTHER_PUBLIC

    def test_a_list_with_a_replaced_domain_is_decoded_as_it_was_encoded(self) -> None:
        listed = RecipientList.of([RECIPIENT], [GENERATION])
        assert decode_recipients(listed.data) == listed
        assert listed.data.startswith(b"casfs recipients 2\n")

    @pytest.mark.parametrize(
        "changes",
        [
            {"number": 2},
            {"domain": "x" * 64},
            {"session": "00"},
            {"snapshots": ""},
            {"key": "F" * 64},
            {"code": "0" * 63},
            {"signature": "0" * 64},
        ],
    )
    def test_a_list_with_an_invalid_record_of_a_domain_is_refused(
        self, changes: dict[str, Any]
    ) -> None:
        forged = msgspec.structs.replace(GENERATION, **changes)
        with pytest.raises(IntegrityError, match="the record of generation 1 is invalid"):
            decode_recipients(encode_recipients([RECIPIENT], [forged]))

    def test_a_list_with_too_many_replaced_domains_is_refused(self) -> None:
        records = [
            msgspec.structs.replace(GENERATION, number=number)
            for number in range(1, MAX_GENERATIONS + 2)
        ]
        assert len(decode_recipients(encode_recipients([RECIPIENT], records[:-1])).generations)
        with pytest.raises(IntegrityError, match="more than 1000 generations"):
            decode_recipients(encode_recipients([RECIPIENT], records))

    @pytest.mark.parametrize(
        "data", [encode_recipients([RECIPIENT]), encode_recipients([RECIPIENT], [GENERATION])]
    )
    def test_a_recipient_list_with_any_changed_bit_is_damaged(self, data: bytes) -> None:
        for place in range(len(data)):
            changed = bytearray(data)
            changed[place] ^= 1
            with pytest.raises(IntegrityError, match="list of recipients is damaged"):
                decode_recipients(bytes(changed))
        for size in range(len(data)):
            with pytest.raises(IntegrityError):
                decode_recipients(data[:size])

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{}",
            b"[1]",
            b'[{"kind":"age"}]',
            b'[{"kind":"nobody","value":"x"}]',
            b'[{"kind":"age","value":"\xff"}]',
            b"[" * 5000,
            b'[{"kind":"age","value":"age1\\u001b[2Jforged"}]',
            b'[{"kind":"gpg","value":"one\\nage two"}]',
            b'[{"kind":"age","value":""}]',
        ],
    )
    def test_a_recipient_list_that_breaks_the_format_is_refused(self, body: bytes) -> None:
        text = b"casfs recipients 1\n" + body
        with pytest.raises(IntegrityError, match="list of recipients is damaged"):
            decode_recipients(text + b"\nblake3 %s\n" % digest_of(text).hex().encode())

    @pytest.mark.parametrize(
        "forged",
        [
            Recipient(RecipientKind.AGE, PUBLIC, age=OTHER_PUBLIC),
            Recipient(RecipientKind.PASSPHRASE, PUBLIC, age=OTHER_PUBLIC),
            Recipient(RecipientKind.SSH, SSH, age=OTHER_PUBLIC),
            Recipient(RecipientKind.AGE, PUBLIC, key=OTHER_GPG_KEY),
            Recipient(RecipientKind.AGE, SSH),
            Recipient(RecipientKind.SSH, PUBLIC),
            Recipient(RecipientKind.GPG, GPG_FINGERPRINT, PUBLIC, OTHER_GPG_KEY),
            Recipient(RecipientKind.GPG, GPG_FINGERPRINT, PUBLIC, GPG_KEY + OTHER_GPG_KEY),
            Recipient(RecipientKind.GPG, GPG_FINGERPRINT, PUBLIC, OTHER_GPG_KEY + GPG_KEY),
            Recipient(RecipientKind.GPG, GPG_FINGERPRINT, PUBLIC, GPG_KEY[:-1]),
            Recipient(RecipientKind.GPG, GPG_FINGERPRINT, PUBLIC, b""),
            Recipient(RecipientKind.GPG, GPG_FINGERPRINT, "", GPG_KEY),
            Recipient(RecipientKind.GPG, GPG_FINGERPRINT, "age1x\x1b[2J", GPG_KEY),
        ],
    )
    def test_a_recipient_list_whose_values_hide_other_keys_is_refused(
        self, forged: Recipient
    ) -> None:
        with pytest.raises(IntegrityError, match="list of recipients is damaged"):
            decode_recipients(encode_recipients([RECIPIENT, forged]))

    def test_gpg_refuses_an_encryption_subkey_that_the_primary_key_did_not_sign(self) -> None:
        grafted = GPG_KEY[:GPG_SUBKEY_OFFSET] + OTHER_GPG_KEY[GPG_SUBKEY_OFFSET:]
        assert openpgp.fingerprint(grafted) == GPG_FINGERPRINT
        with pytest.raises(WrongKeyError, match="cannot encrypt"):
            gpg.wrap(b"secret", [grafted])
        assert gpg.wrap(b"secret", [GPG_KEY])

    def test_a_recipient_lists_every_key_that_sessions_are_encrypted_to(self) -> None:
        assert RECIPIENT.line == PUBLIC and RECIPIENT.keys == {PUBLIC}
        assert self.GPG.line == f"{GPG_FINGERPRINT} {OTHER_PUBLIC}"
        assert self.GPG.keys == {GPG_FINGERPRINT, OTHER_PUBLIC}

    def test_a_recipient_list_has_no_more_recipients_than_a_reader_tries(self) -> None:
        assert len(RecipientList.of([RECIPIENT] * 100).recipients) == 100
        with pytest.raises(WrongKeyError, match="the limit is 100"):
            RecipientList.of([RECIPIENT] * 101)

    def test_a_recipient_list_is_replaced_in_the_storage(self, tmp_path: Path) -> None:
        (tmp_path / "tmp").mkdir()
        storage = LocalStorage(tmp_path, writer="test", sync=False)
        with pytest.raises(IntegrityError, match="missing"):
            read_recipients(storage)
        write_recipients(storage, RecipientList.of([RECIPIENT]))
        write_recipients(storage, RecipientList.of([OTHER]))
        assert read_recipients(storage) == RecipientList.of([OTHER])

    def test_a_recipient_list_holds_each_recipient_once(self) -> None:
        assert merged([RECIPIENT], [OTHER, RECIPIENT, OTHER]) == [RECIPIENT, OTHER]
