"""Requests to Google Cloud Storage that end: repeated where that may help, bounded in time, told in one sentence.

In: a bucket's name and attempts at a request. Out: what an attempt gave, an `Answer` that the caller waits
for, or a `UserError`. Credentials are those of the platform's default chain.
"""

from __future__ import annotations

import dataclasses
import http.client
import os
import ssl
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import google.auth.exceptions
import requests
import requests.adapters
import urllib3
from google.api_core.exceptions import GoogleAPICallError, RetryError
from google.api_core.retry import Retry
from google.cloud import storage
from tqdm import tqdm

from jax_extract.errors import UserError

SAFE = "what is committed is safe: run the same command again to go on"

Once = dict[str, Any]  # arguments with which the client makes one request, with time-outs
T = TypeVar("T")

_CONNECTIONS = 96  # lanes of a writer, threads of a reader, and an upload beside them
_TELL_EVERY = 60.0  # seconds
_REASON = 200  # characters of what a server says
_EMULATOR = "STORAGE_EMULATOR_HOST"

_PASSING = {408, 429, 500, 502, 503, 504}
_PASSING_ERRORS = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    google.auth.exceptions.TransportError,
)
_LOG_IN = "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS"
_RENEW = f"renew them ({_LOG_IN}) and run the same command again: what is committed is safe"


@dataclass(frozen=True)
class Patience:
    """How long requests are waited for and repeated; all in seconds.

    Attributes:
      deadline: for one operation; no repetition begins later.
      at_start: the same before the service has answered this process at all, and for the check before a run: then a
        wrong address or no network is likelier than a fault that passes.
      connect: to be connected, and for each piece of 256 KiB to be taken.
      connect_at_start: the same before there was any answer; a name may stand for several addresses, each tried.
      answer: without a byte of an answer.
      first_wait, longest_wait: the most that is waited before the first, and before any, repetition.
      told_after: from the beginning of an operation to the line that says that it is repeated.
    """

    deadline: float = 300.0
    at_start: float = 15.0
    connect: float = 10.0
    connect_at_start: float = 3.0
    answer: float = 60.0
    first_wait: float = 1.0
    longest_wait: float = 32.0
    told_after: float = 3.0


class Answer(Exception):
    """The service answered with an error."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status} {reason}")
        self.status = status
        self.reason = reason


class Damaged(Exception):
    """What arrived is not what was sent."""


@dataclass
class _Line:
    """Attributes:
    answered: whether anything was, ever.
    told_at: when a person was told last that something is repeated.
    """

    answered: bool = False
    told_at: float = -_TELL_EVERY


class Requests:
    """Makes requests about one bucket; for all threads of a process, with one client, made when it is needed."""

    def __init__(self, bucket: str, patience: Patience) -> None:
        self._name = bucket
        self.patience = patience
        self._lock = threading.Lock()
        self._client: storage.Client | None = None
        self._line = _Line()

    def hurried(self) -> Requests:
        """The same client with the patience of the check before a run."""
        hurried = Requests(self._name, dataclasses.replace(self.patience, deadline=self.patience.at_start))
        hurried._client = self.client
        hurried._line = self._line
        return hurried

    @property
    def client(self) -> storage.Client:
        with self._lock:
            if self._client is None:
                self._client = _new_client()
            return self._client

    @property
    def session(self) -> requests.Session:
        return self.client._http

    def within(
        self,
        doing: str,
        attempt: Callable[[Once], T],
        expected: tuple[int, ...] = (),
    ) -> T:
        """Makes attempts until one succeeds or the time is over.

        Args:
          doing: for messages, as in `reading gs://bucket/name`.
          attempt: makes one request, with the arguments it is given.
          expected: answers that are the caller's business.

        Raises:
          Answer: one of the expected ones.
          UserError: everything else that goes wrong.
        """
        patience = self.patience if self._line.answered else _before_any_answer(self.patience)
        once = {"timeout": (patience.connect, patience.answer), "retry": None}
        begun = time.monotonic()

        def tried() -> T:
            try:
                result = attempt(once)
            except GoogleAPICallError as error:
                raise Answer(int(error.code or 0), reason_of(error.response)) from None
            self._line.answered = True
            return result

        def failed(error: Exception) -> None:
            self._line.answered |= isinstance(error, Answer)
            if time.monotonic() - begun >= patience.told_after:
                self._tell(f"{doing} ({_cause(error)}), for up to {patience.deadline:g} seconds")

        retry = Retry(
            _may_pass,
            initial=patience.first_wait,
            maximum=patience.longest_wait,
            timeout=patience.deadline,
            on_error=failed,
        )
        try:
            return retry(tried)()
        except Answer as answer:
            if answer.status in expected and not _is_about_the_bucket(answer):
                raise
            raise UserError(self._told(doing, answer)) from None
        except RetryError as error:
            mend = SAFE if self._line.answered else _unreachable()
            raise UserError(
                f"{doing} did not succeed within {patience.deadline:g} seconds (last: {_cause(error.cause)}); {mend}"
            ) from None
        except google.auth.exceptions.GoogleAuthError as error:
            raise UserError(_told_of_credentials(doing, error)) from None
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise UserError(f"{doing} failed ({_cause(error)}); {SAFE}") from None

    def _tell(self, what: str) -> None:
        """One line for a person who wonders why nothing happens; not from every thread, and not at every attempt."""
        with self._lock:
            now = time.monotonic()
            if now - self._line.told_at < _TELL_EVERY:
                return
            self._line.told_at = now
        tqdm.write(f"retrying: {what}", file=sys.stderr)  # above a bar, where there is one

    def _told(self, doing: str, answer: Answer) -> str:
        if answer.status == http.client.NOT_FOUND:  # a missing object is always expected
            return f"bucket gs://{self._name} does not exist; create it, or correct its name"
        if answer.status == http.client.UNAUTHORIZED:
            return f"{doing} failed: the credentials are not accepted (any more); {_RENEW}"
        if answer.status == http.client.FORBIDDEN:
            return (
                f"{doing} is not permitted ({answer.reason}); give the account the role Storage Object User on "
                f"gs://{self._name} (Storage Object Viewer to read only) and run the same command again"
            )
        return f"{doing} was refused ({answer}); {SAFE}"


def _before_any_answer(patience: Patience) -> Patience:
    return dataclasses.replace(
        patience,
        deadline=min(patience.deadline, patience.at_start),
        connect=min(patience.connect, patience.connect_at_start),
        answer=min(patience.answer, patience.at_start),
        longest_wait=min(patience.longest_wait, patience.at_start / 4),
    )


def _unreachable() -> str:
    emulator = os.environ.get(_EMULATOR)
    named = f"{_EMULATOR}, which names {emulator}, and " if emulator else ""
    return f"check {named}the network of this machine, and run the same command again"


def reason_of(response: requests.Response | None) -> str:
    """What the service says is wrong, in one line; never the address, which may hold an upload's key."""
    if response is None:
        return "no reason given"
    try:
        said = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = response.reason or "no reason given"
    return " ".join(said.split())[:_REASON]


def _new_client() -> storage.Client:
    emulator = os.environ.get(_EMULATOR)
    if emulator and "://" not in emulator:
        raise UserError(f"{_EMULATOR} {emulator!r} is no address; write it as http://{emulator}")
    # Otherwise the client starts threads that ask for the bucket's own metadata, a permission nobody else needs.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    try:
        # Objects need no project. To the emulator the client goes without credentials.
        endpoint = {"api_endpoint": emulator.rstrip("/")} if emulator else None
        client = storage.Client(project=None, client_options=endpoint)
    except google.auth.exceptions.GoogleAuthError as error:
        raise UserError(_told_of_credentials("logging in to Google Cloud", error)) from None
    client._http.hooks["response"].append(_release)
    adapter = requests.adapters.HTTPAdapter(pool_maxsize=_CONNECTIONS)
    client._http.mount("http://", adapter)
    if not client._http.is_mtls:  # that session has an adapter of its own, with its certificate
        client._http.mount("https://", adapter)
    return client


def _release(response: requests.Response, *_: object, **__: object) -> None:
    """Reads an error to its end; the session would leave its connection open where it renews credentials."""
    if response.status_code >= http.client.BAD_REQUEST:
        response.content  # noqa: B018 (asking for it reads it)


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, Answer):
        return error.status in _PASSING
    if isinstance(error, google.auth.exceptions.RefreshError):
        return bool(error.retryable)
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in _causes(error)):
        return False
    return isinstance(error, (Damaged, *_PASSING_ERRORS))


def _is_about_the_bucket(answer: Answer) -> bool:
    return answer.status == http.client.NOT_FOUND and "bucket does not exist" in answer.reason


def _told_of_credentials(doing: str, error: google.auth.exceptions.GoogleAuthError) -> str:
    if isinstance(error, google.auth.exceptions.DefaultCredentialsError):
        return f"no usable Google Cloud credentials were found; log in ({_LOG_IN}), or run where a service account is"
    return f"{doing} failed: the credentials have expired or were revoked; {_RENEW}"


def _cause(error: BaseException | None) -> str:
    """Why an attempt failed. The text of a connection error is left out: it holds the address."""
    if isinstance(error, Answer | Damaged):
        return str(error)
    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"the server's certificate is not trusted: {cause.verify_message}"
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    timeouts = (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)
    return "no answer in time" if any(isinstance(cause, timeouts) for cause in causes) else "the connection broke"


def _causes(error: BaseException | None) -> list[BaseException]:
    """An error and what led to it."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
