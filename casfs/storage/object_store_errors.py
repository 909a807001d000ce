"""Translate the errors of `obstore` into errors of casfs, with a sentence that says what to do.

`obstore` puts the status and the body of an answer into the text of its exceptions. Its version is pinned,
and tests against real servers verify the patterns below.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

from obstore import exceptions

from casfs.errors import NotFoundError, StorageDeniedError, StorageError, StorageUnavailableError

ERRORS = (exceptions.BaseError, OSError, ValueError, NotImplementedError)
"""The exceptions of obstore's calls. A missing object or bucket is FileNotFoundError."""

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(
    r"<Code>(\w{1,64})</Code>|\(code: (\w{1,64})\)|x-ms-error-code[\"': ]+(\w{1,64})"
)
_BEYOND_THE_END = re.compile(r"Wanted range starting at \d+, but object was only \d+ bytes long")
"""What obstore itself says where a server, such as Azure's, answers a range beyond the end as a whole."""

_MESSAGE = re.compile(r"<Message>([^<]{1,300})</Message>")
_MESSAGE_OF_CAUSE = re.compile(r'(?:error|message): "([^"]{1,200})"')

_BUSY_STATUSES = frozenset([408, 409, 425, 429, 500, 502, 503, 504])
"""409 is AWS's answer to a creation beside a deletion of the same name: nothing was written."""

_CREDENTIALS = (
    "the credentials are not accepted; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the profile, or "
    "the credentials in casfs's configuration"
)
_REGION = "the bucket is in another region; set AWS_REGION, or `region` in casfs's configuration"
_CLOCK = (
    "this machine's clock is too far from the server's; set it right (timedatectl) and try again"
)
_BUCKET = "there is no such bucket; create it, or correct the name in the URL"

_SENTENCES = {
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "InvalidSecurity": _CREDENTIALS,
    "AuthenticationFailed": _CREDENTIALS,
    "ExpiredToken": "the credentials have expired; get new ones and try again",
    "TokenRefreshRequired": "the credentials have expired; get new ones and try again",
    "RequestTimeTooSkewed": _CLOCK,
    "RequestExpired": _CLOCK,
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
    "TemporaryRedirect": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "NoSuchBucket": _BUCKET,
    "ContainerNotFound": _BUCKET,
    "InvalidBucketName": "this is no valid name of a bucket; correct it in the URL",
}

_BUSY_CODES = frozenset(
    [
        "SlowDown",
        "ServiceUnavailable",
        "InternalError",
        "RequestTimeout",
        "Throttling",
        "ServerBusy",
    ]
)


@dataclass(frozen=True, slots=True)
class Answer:
    """The parts of an error answer; each is None where the exception does not contain it."""

    status: int | None
    code: str | None
    message: str | None
    is_beyond_the_end: bool = False

    @property
    def is_out_of_range(self) -> bool:
        """Whether the requested range begins after the end of the object."""
        return self.is_beyond_the_end or self.status == 416 or self.code == "InvalidRange"

    @property
    def is_not_implemented(self) -> bool:
        """Whether the server lacks a feature: this is the answer of B2 to conditional writes."""
        return self.status == 501 or self.code == "NotImplemented"


def parse_answer(error: BaseException) -> Answer:
    """Parse the text of an exception into the parts of the answer."""
    text = str(error)
    status = _STATUS.search(text)
    code = _CODE.search(text)
    message = _MESSAGE.search(text)
    return Answer(
        int(status[1]) if status else None,
        next((group for group in code.groups() if group), None) if code else None,
        message[1] if message else None,
        _BEYOND_THE_END.search(text) is not None,
    )


def parse_body(status: int, body: bytes) -> Answer:
    """Parse the body of an answer that did not come through `obstore`."""
    text = body.decode("utf-8", "replace")
    code = _CODE.search(text)
    message = _MESSAGE.search(text)
    return Answer(
        status,
        next((group for group in code.groups() if group), None) if code else None,
        message[1] if message else None,
    )


def error_of_answer(answer: Answer, action: str, where: str) -> Exception:
    """Return the error of casfs for a refusal that did not come through `obstore`."""
    sentence = _SENTENCES.get(answer.code or "")
    if sentence is None and answer.status in (301, 307):
        sentence = _REGION
    if sentence is not None:
        return StorageDeniedError(action, where, OSError(errno.EACCES, sentence))
    if answer.status == 404:
        return NotFoundError(f"{where} does not exist")
    if answer.code in _BUSY_CODES or answer.status in _BUSY_STATUSES:
        return StorageUnavailableError(action, where, OSError(errno.EAGAIN, _status_text(answer)))
    if answer.status in (401, 403):
        return StorageDeniedError(action, where, OSError(errno.EACCES, _denied(action, answer)))
    return StorageError(action, where, OSError(errno.EIO, _status_text(answer)))


def already_exists(error: BaseException) -> bool:
    """Return whether a creation failed because the name is taken."""
    return isinstance(error, exceptions.AlreadyExistsError | exceptions.PreconditionError)


def translate(error: BaseException, action: str, place: str, name: str) -> Exception:
    """Return the error of casfs for an exception that `obstore` raised during an action on an object."""
    answer = parse_answer(error)
    where = f"{place}/{name}" if name else place
    sentence = _SENTENCES.get(answer.code or "")
    if sentence is None and (answer.status == 301 or "redirect without LOCATION" in str(error)):
        sentence = _REGION
    if sentence is not None:
        return StorageDeniedError(action, where, OSError(errno.EACCES, sentence))
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"{name} is not in the repository")
    if _is_unavailable(error, answer):
        reason = _connection_problem(error) if answer.status is None else _status_text(answer)
        return StorageUnavailableError(action, where, OSError(errno.EAGAIN, reason))
    if isinstance(
        error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError
    ) or answer.status in (401, 403):
        return StorageDeniedError(action, where, OSError(errno.EACCES, _denied(action, answer)))
    if "non-partial response" in str(error):
        reason = "the server ignores ranges, so no repository can be kept there; use another server"
        return StorageError(action, where, OSError(errno.EIO, reason))
    reason = _status_text(answer) if answer.status is not None else _first_line(error)
    return StorageError(action, where, OSError(errno.EIO, reason))


def _is_unavailable(error: BaseException, answer: Answer) -> bool:
    if answer.code in _BUSY_CODES or answer.status in _BUSY_STATUSES:
        return True
    if answer.status is not None:
        return False
    text = str(error)
    if "InvalidCertificate" in text or "certificate" in text.lower():
        return False
    kinds = ("kind: Connect", "kind: Request", "kind: Timeout", "kind: Interrupted", "kind: Decode")
    return "HTTP error" in text or any(kind in text for kind in kinds)


def _connection_problem(error: BaseException) -> str:
    text = str(error)
    if "dns error" in text:
        return "the name of the server cannot be resolved; check the endpoint and the network"
    if "TimedOut" in text or "timed out" in text or "kind: Timeout" in text:
        return "the server did not answer in time"
    if "ConnectionRefused" in text or "Connection refused" in text:
        return "the server refuses connections; check the endpoint, and that the server runs"
    if "InvalidContentType" in text:
        return "the server does not speak TLS; use http:// in the endpoint if that is meant"
    return "the connection failed"


def _status_text(answer: Answer) -> str:
    said = ": ".join(part for part in (answer.code, answer.message) if part)
    return f"the server answered {answer.status}" + (f" ({said})" if said else "")


def _denied(action: str, answer: Answer) -> str:
    said = f" (the server said {answer.code})" if answer.code else ""
    return f"the credentials do not allow it{said}; check the policy of the bucket and of the user"


def _first_line(error: BaseException) -> str:
    text = str(error)
    if "certificate" in text.lower():
        return (
            "the server's certificate is not trusted; set `ca-file` in casfs's configuration to the file of "
            "the authority that signed it"
        )
    cause = _MESSAGE_OF_CAUSE.search(text)
    return cause[1] if cause else text.partition("\n")[0][:300]
