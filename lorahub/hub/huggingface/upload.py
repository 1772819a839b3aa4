"""One ``create_commit`` of huggingface_hub: what goes in, and what its many ways to fail mean.

Small files are given as the bytes that were hashed, large ones by path and compared once the client has hashed what it
sent, before there is a commit.  Nothing is tried again here.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported at first use
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
    hf_raise_for_status,
)

from lorahub.errors import AccessDenied, LorahubError, PushRefused
from lorahub.hub.hub import Progress
from lorahub.hub.huggingface.client import HubClient
from lorahub.hub.huggingface.errors import TRANSPORT, UNREACHED, stated_delay, status_of
from lorahub.hub.publication import Publication, changed, content_of, open_unlinked
from lorahub.names import printable

__all__ = ["Trouble", "Upload", "missing_xet", "trouble"]

_WHOLE = 16 << 20  # bytes; more than the Hub takes as anything but a large file
_AGAIN = frozenset({408, 409, 412, 425, 429, 500, 502, 503, 504})
_LONGEST_DELAY = 60
_TIMEOUT = 30.0
_CARD, _STORE = "Invalid metadata in README.md.", "LFS batch API returned errors:"
_SAID = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """A write that did not come back with success.

    Attributes:
        error: what the client raised, or None where it is ``refused``.
        refused: an error for people, where trying again is of no use and the reason is known.
        again: whether another try may go better.
        xetless: it may be that the hub has no Xet store, which the client takes for granted.
        delay: seconds the hub asked to wait, or None.
    """

    error: BaseException | None = None
    refused: LorahubError | None = None
    again: bool = False
    xetless: bool = False
    delay: int | None = None

    @property
    def status(self) -> int | None:
        """The HTTP status, or None."""
        return status_of(self.error) if self.error is not None else None

    @property
    def doubtful(self) -> bool:
        """Whether it may have been done all the same."""
        return self.again and self.status != 429


def trouble(call: Callable[[], object]) -> Trouble | None:
    """What goes wrong with a write, or None.

    Raises:
        LorahubError: of our own making, as it is.
        OSError: what the system says about files here.
    """
    try:
        call()
    except LorahubError:
        raise
    except (HfHubHTTPError, TRANSPORT, ConnectionError) as error:
        return _of_transfer(error)
    except RuntimeError as error:  # the client wraps what goes wrong with one of several large files
        if isinstance(error.__cause__, HfHubHTTPError | TRANSPORT | ConnectionError):
            return _of_transfer(error.__cause__)
        return Trouble(error=ConnectionError(type(error).__name__), again=True)
    except ValueError as error:
        return _of_answer(error)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:  # it trips over a strange answer
        return Trouble(error=error, again=True)
    return None


def _of_transfer(error: BaseException) -> Trouble:
    status, delay = status_of(error), stated_delay(error)
    again = status in _AGAIN if status is not None else type(error).__name__ not in UNREACHED
    if delay is not None and delay > _LONGEST_DELAY:
        again = False
    return Trouble(error=error, again=again, xetless=type(error) is ConnectionError, delay=delay)


def _of_answer(error: ValueError) -> Trouble:
    """A ValueError of the client: two that carry the hub's words, and answers that are no JSON."""
    text = str(error)
    words = printable(" ".join(text.partition("\n")[2].split()))[:_SAID]
    if text.startswith(_CARD):
        return Trouble(refused=_bad_card(words))
    if text.startswith(_STORE):
        message = f"the hub does not take the large files; nothing was published: {words}"
        return Trouble(refused=AccessDenied(message, "See how much storage the account has left."))
    return Trouble(error=error, again=True)


def _bad_card(words: str) -> PushRefused:
    said = printable(" ".join(words.split()))[:_SAID]
    message = f"the hub does not take the front matter of README.md; nothing was published: {said}"
    return PushRefused(message, "Correct it between the lines of dashes, and push again.")


@dataclass(slots=True, kw_only=True)
class Upload:
    """One commit to be made, in as many tries as it takes.

    Attributes:
        job: the folder.
        changed: the files of it that the parent has not, as they are called there.
        deleted: files of the repository that go.
        parent: the commit it builds on; None: the branch is empty.
        plain: store large files without Xet.
        made: what the last ``send`` came back with: (commit, ``refs/pr/N`` or "").
    """

    api: HfApi
    client: HubClient
    job: Publication
    changed: tuple[str, ...]
    deleted: tuple[str, ...]
    message: str
    parent: str | None
    create_pr: bool
    progress: Progress
    plain: bool = False
    made: tuple[str, str] = ("", "")

    def send(self) -> None:
        """Upload and commit.

        Raises:
            IntegrityError: a file is not what was hashed; there is no commit.
            Exception: what the client raises, see ``trouble``.
        """
        job, self.made = self.job, ("", "")
        with ExitStack() as open_files, _silent():
            adds = {path: self._add(path, open_files) for path in self.changed}
            if "README.md" in map(job.at, adds):
                self._test_card(next(path for path in adds if job.at(path) == "README.md"))
            failed: Exception | None = None
            try:
                self.api.preupload_lfs_files(
                    job.repo,
                    additions=adds.values(),
                    revision=job.branch,
                    create_pr=self.create_pr,
                    free_memory=False,
                )
            except Exception as error:  # noqa: BLE001 - whatever it is, a file that changed meanwhile explains it better
                failed = error
            if failed is not None:  # outside the handler, so that what holds the token is not chained
                self._test_large()
                raise failed
            done = sum(file.size for path, file in job.files.items() if path not in adds)
            for path, add in adds.items():
                if add.upload_info.sha256.hex() != job.files[path].sha256:
                    raise changed(job.folder / path)
                done += job.files[path].size
                self.progress(path, done, job.size)
            made = self.api.create_commit(
                job.repo,
                [*adds.values(), *(CommitOperationDelete(path, is_folder=False) for path in self.deleted)],
                commit_message=self.message,
                revision=job.branch,
                create_pr=self.create_pr,
                parent_commit=self.parent,
            )
        self.made = str(made.oid), str(made.pr_revision or "")

    def _test_card(self, path: str) -> None:
        """Ask whether the hub takes the card, before anything large is sent: the client asks after that.

        Raises:
            PushRefused: it does not.
        """
        asked = {"content": self.job.read(path).decode("utf-8", "replace"), "repoType": "model"}
        url = f"{self.client.endpoint}/api/validate-yaml"
        response = get_session().post(url, json=asked, headers=self.client.headers(), timeout=_TIMEOUT)
        if response.status_code != 400:
            hf_raise_for_status(response)
            return
        said = response.json()
        errors = said.get("errors") if isinstance(said, dict) else None
        words = [str(each.get("message")) for each in errors or [] if isinstance(each, dict)]
        raise _bad_card("; ".join(words))

    def _add(self, path: str, open_files: ExitStack) -> CommitOperationAdd:
        job = self.job
        where = job.at(path)
        small = path in job.given or job.files[path].size <= _WHOLE
        if small and not self.plain:
            return CommitOperationAdd(where, job.read(path))
        if small:  # what is open already is what the client does not hand to Xet
            return CommitOperationAdd(where, io.BytesIO(job.read(path)))
        if self.plain:
            return CommitOperationAdd(where, open_files.enter_context(open_unlinked(job.folder / path)))
        open_unlinked(job.folder / path).close()
        return CommitOperationAdd(where, str((job.folder / path).absolute()))

    def _test_large(self) -> None:
        for path in self.changed:
            if path not in self.job.given and content_of(self.job.folder / path) != self.job.files[path]:
                raise changed(self.job.folder / path)


@contextmanager
def _silent() -> Iterator[None]:
    """Without the client's bars and warnings: what there is to say is said by the caller."""
    shown = not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if shown:
            disable_progress_bars()
        try:
            yield
        finally:
            if shown:
                enable_progress_bars()


def missing_xet(client: HubClient, job: Publication) -> bool:
    """Whether the hub has no Xet store for the repository: asked where the client failed for want of one."""
    url = f"{client.endpoint}/api/models/{job.repo}/xet-write-token/{quote(job.branch, safe='')}"
    try:
        return bool(get_session().get(url, headers=client.headers(), timeout=_TIMEOUT).status_code == 404)
    except TRANSPORT:  # it cannot be asked either: then the connection is what is wrong
        return False
