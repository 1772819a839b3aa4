"""Every way in which reading from a Hub fails, as one of our errors with the next step; and where the token is not."""

from __future__ import annotations

import logging
import pickle
import re
import socket
import ssl
import traceback
from collections.abc import Iterator

import pytest
from hub.double import NOBODY, READER, STRANGER, TOKEN, Cut, DropBefore, Edit, Headers, Status, Swap, Truncate
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import close_session

from lorahub.errors import AccessDenied, IntegrityError, LorahubError, NotFound, Offline, Unavailable, UsageError
from lorahub.hub.huggingface import HuggingFaceHub
from lorahub.hub.huggingface.errors import TRANSPORT, typed
from lorahub.names import Ref

INK = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": bytes(range(251)) * 4000,
    "README.md": b"# Ink\n",
}
REF = Ref.parse("acme/ink@1.0.0")


@pytest.fixture
def repo(double):
    repo = double.repo("acme/ink")
    repo.commit(INK, "v1.0.0")
    return repo


def whole(hub: HuggingFaceHub) -> None:
    """All the requests of a pull."""
    hub.pull(hub.resolve(REF))


def failure(hub: HuggingFaceHub) -> LorahubError:
    with pytest.raises(LorahubError) as caught:
        whole(hub)
    return caught.value


def codes(error: LorahubError) -> list[str]:
    return [finding.code for finding in error.findings]


# --------------------------------------------------------------------------------------------- who may read what


@pytest.mark.parametrize("who", ["anonymous", "stranger"])
def test_a_missing_and_a_private_repository_look_alike_and_are_said_to(double, request, who):
    double.repo("acme/secret", private=True).commit(INK, "v1.0.0")
    asks = request.getfixturevalue(who)
    told = []
    for name in ("acme/none", "acme/secret"):
        with pytest.raises(NotFound, match=f"there is no {name}, or it is private") as caught:
            asks.resolve(Ref.parse(name))
        assert codes(caught.value) == ["repo-missing"]
        told.append(caught.value.hint.replace(name, "NAME"))
    assert told[0] == told[1]
    assert "hf auth login" in told[0]


def test_a_bare_401_means_a_missing_repository_to_who_has_no_token_and_a_bad_token_to_who_has_one(
    double, repo, hub, anonymous
):
    double.fault(Status(401, body=b'{"error": "Invalid username or password."}'), "/refs", times=None)
    assert isinstance(failure(anonymous), NotFound)
    error = failure(hub)
    assert isinstance(error, AccessDenied)
    assert codes(error) == ["token-refused"]
    assert "hf auth login" in error.hint


def test_a_token_of_nobody_is_a_bad_token(double, repo, cache):
    error = failure(HuggingFaceHub(api=double.api(NOBODY), cache=cache))
    assert codes(error) == ["token-refused"]
    assert "unset HF_TOKEN" in error.hint


def test_a_token_that_only_reads_is_enough_to_read(double, repo, reader):
    repo.private = True
    repo.gate()
    whole(reader)


@pytest.mark.parametrize("who", ["anonymous", "stranger"])
def test_a_forbidden_answer_tells_with_and_without_a_token_what_helps(double, repo, request, who):
    double.fault(Status(403), "/refs", times=None)
    error = failure(request.getfixturevalue(who))
    assert isinstance(error, AccessDenied)
    assert ("the token" in error.message) == (who == "stranger")
    assert f"{double.endpoint}/acme/ink" in error.hint


def test_a_file_that_is_listed_and_not_there_is_not_found(double, repo, hub):
    double.fault(Status(404, {"X-Error-Code": "EntryNotFound"}), "/resolve/", times=None)
    assert isinstance(failure(hub), NotFound)


# ------------------------------------------------------------------------------------------ limits and failures


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("part", ["/refs", "/revision/", "/resolve/", "adapter_model"])
def test_what_passes_is_waited_for_on_every_read(double, repo, hub, status, part):
    fault = double.fault(Status(status), part, times=2)
    whole(hub)
    assert fault.hits == 2


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (429, {"RateLimit": '"api";r=0;t=7', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, 7),
        (429, {"Retry-After": "3"}, 3),
        (503, {"Retry-After": "5"}, 5),
        (503, {"Retry-After": "9" * 5000}, 0.0),
        (503, {"Retry-After": "-1"}, 0.0),
        (503, {"Retry-After": "Wed, 21 Oct 2037 07:28:00 GMT"}, 0.0),
    ],
    ids=lambda each: str(each)[:40],
)
def test_the_delay_that_the_server_names_is_kept_to(double, repo, hub, monkeypatch, status, headers, seconds):
    waited: list[float] = []
    monkeypatch.setattr("lorahub.hub.huggingface.download.time.sleep", waited.append)
    double.fault(Status(status, headers), "/refs")
    whole(hub)
    assert waited[0] == seconds


@pytest.mark.parametrize("who", ["anonymous", "hub"])
def test_a_long_limit_names_its_end_and_what_raises_it(double, repo, request, who):
    double.fault(Status(429, {"RateLimit": '"api";r=0;t=240'}), "/refs", times=None)
    error = failure(request.getfixturevalue(who))
    assert re.search(r"for 240 seconds, until \d\d:\d\d:\d\d", error.message)
    assert ("log in for a higher limit: hf auth login" in error.hint) == (who == "anonymous")
    assert codes(error) == ["rate-limited"]
    assert len(double.log) == 1


def test_a_hub_that_stays_broken_is_told_after_a_few_tries(double, repo, hub):
    fault = double.fault(Status(503), "/refs", times=None)
    error = failure(hub)
    assert (type(error), error.exit_code) == (Unavailable, 6)
    assert "503" in error.message
    assert fault.hits == 4


@pytest.mark.parametrize("part", ["/refs", "/revision/", "/resolve/", "adapter_model"])
def test_a_connection_that_breaks_is_made_again(double, repo, hub, part):
    fault = double.fault(DropBefore(), part, times=2)
    whole(hub)
    assert fault.hits == 2


@pytest.mark.parametrize("part", ["/refs", "/revision/"])
def test_an_answer_that_breaks_off_is_asked_for_again(double, repo, hub, part):
    fault = double.fault(Cut(after=5), part, times=1)
    whole(hub)
    assert fault.hits == 1


def test_a_connection_that_always_breaks_is_a_typed_error(double, repo, hub):
    double.fault(DropBefore(), "/refs", times=None)
    error = failure(hub)
    assert type(error) is Unavailable
    assert "Run it again" in error.hint


@pytest.mark.parametrize(
    "body",
    [b"<!DOCTYPE html><title>Welcome to the airport</title>", b"", b"null", b"[]", b"7", b'{"tags": 3}', b'"x"'],
    ids=repr,
)
@pytest.mark.parametrize("part", ["/refs", "/revision/"])
def test_another_page_in_place_of_the_answer_is_told_with_what_it_may_be(double, repo, hub, part, body):
    double.fault(Swap(body), part, times=None)
    error = failure(hub)
    assert type(error) is Unavailable
    assert "log-in page" in error.hint


def test_json_that_ends_early_is_a_typed_error(double, repo, hub):
    double.fault(Truncate(20), "/refs", times=None)
    assert type(failure(hub)) is Unavailable


@pytest.mark.parametrize("field", ["id", "cardData", "gated", "private", "lastModified"])
@pytest.mark.parametrize(
    "value", [None, 7, [], {"a": []}, "\x1b[31m", "x" * 100_000], ids=lambda value: repr(value)[:9]
)
def test_fields_of_any_shape_do_no_harm(double, repo, hub, field, value):
    double.fault(Edit(lambda info: info.update({field: value})), "/api/models/acme/ink", times=None)
    whole(hub)
    standing = hub.standing("acme/ink")
    assert standing.repo == "acme/ink"
    assert "\x1b" not in repr(standing)


def test_a_page_of_a_login_in_place_of_the_weights_leaves_nothing(double, repo, hub, cache):
    double.fault(Swap(b"<html>log in</html>"), "adapter_model", where="cdn", times=None)
    assert isinstance(failure(hub), IntegrityError)
    assert not list(cache.root.rglob("pin.json"))


# ---------------------------------------------------------------------------------------- a hub that is not there


def unreachable(cache, endpoint: str) -> LorahubError:
    close_session()
    return failure(HuggingFaceHub(api=HfApi(endpoint=endpoint, token=False), cache=cache))


@pytest.mark.parametrize(("status", "code"), [(402, "payment-required"), (413, "too-large"), (507, "storage-full")])
def test_a_refusal_for_room_or_money_says_so(double, repo, hub, status, code):
    double.fault(Status(status), "/refs", times=None)
    error = failure(hub)
    assert [each.code for each in error.findings] == [code]
    assert error.hint


def test_an_address_where_nobody_answers_is_offline(double, cache):
    with socket.socket() as taken:  # bound, not listening: nobody else answers there either
        taken.bind(("127.0.0.1", 0))
        error = unreachable(cache, f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert type(error) is Offline
    assert "nobody answers" in error.message
    assert "HF_HUB_OFFLINE=1" in error.hint


def test_a_name_that_cannot_be_looked_up_is_offline(double, cache, monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    error = unreachable(cache, "https://hub.invalid")
    assert type(error) is Offline
    assert "nobody knows its name" in error.message


@pytest.fixture
def plain_server() -> Iterator[int]:
    """A port that speaks no TLS."""
    import threading

    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1]


def test_a_server_that_cannot_be_trusted_is_told_so(double, cache, plain_server):
    error = unreachable(cache, f"https://127.0.0.1:{plain_server}")
    assert type(error) is Unavailable
    assert "certificate" in error.message
    assert "SSL_CERT_FILE" in error.hint


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (ConnectionError("hf_xet: CAS 500 with a token hf_secretsecret"), Unavailable),
        (OfflineModeIsEnabled("no"), Offline),
        (ssl.SSLError("bad"), None),
        (TRANSPORT("whatever"), Unavailable),
        (ValueError("Illegal header value b'Bearer hf_secretsecret'"), Unavailable),
        (RecursionError(), Unavailable),
    ],
    ids=lambda each: type(each).__name__,
)
def test_what_the_client_raises_bare_becomes_an_error_of_ours_without_its_text(raised, kind):
    def call() -> None:
        raise raised

    if kind is None:  # the system's own errors about files pass as they are; a connection's never come bare
        with pytest.raises(type(raised)):
            typed(call, what="acme/ink", page="https://huggingface.co/acme/ink")
        return
    with pytest.raises(kind) as caught:
        typed(call, what="acme/ink", page="https://huggingface.co/acme/ink")
    assert "secret" not in "".join(traceback.format_exception(caught.value))


def test_errors_survive_another_process(double, repo, hub):
    double.fault(Status(429, {"Retry-After": "3600"}), "/refs", times=None)
    error = failure(hub)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.findings) == (str(error), error.findings)


# ------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    "token", ["", " ", "hf_secret\nInjected: yes", "hf_secret more", "hf_secretü", "hf_\x00secret", "hf_\x7fsecret"]
)
def test_a_token_that_is_none_is_refused_without_being_shown(cache, token):
    with pytest.raises(UsageError) as caught:
        HuggingFaceHub(token=token, cache=cache)
    told = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert "secret" not in told
    assert "Injected" not in told


@pytest.mark.parametrize("token", ["hf_secret more", "hf_secret\tmore", "hf_sécret"])
def test_a_token_of_the_environment_that_is_none_is_refused_before_it_is_sent(double, repo, cache, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UsageError) as caught:
        HuggingFaceHub(endpoint=double.endpoint, cache=cache).resolve(REF)
    assert "secret" not in str(caught.value)
    assert double.log == []


def test_a_token_with_a_line_end_around_it_is_taken_without(double, repo, cache):
    repo.private = True
    whole(HuggingFaceHub(endpoint=double.endpoint, token=f" {TOKEN}\n", cache=cache))


def test_a_client_that_demands_a_token_and_has_none_is_told_to_log_in(double, repo, cache):
    error = failure(HuggingFaceHub(api=HfApi(endpoint=double.endpoint, token=True), cache=cache))
    assert isinstance(error, AccessDenied)
    assert "hf auth login" in error.hint


FAULTS = {
    "none": None,
    "401": Status(401, body=f'{{"error": "{TOKEN}"}}'.encode()),
    "403": Status(403, body=f'{{"error": "{TOKEN}"}}'.encode()),
    "500": Status(500, body=TOKEN.encode()),
    "html": Swap(f"<html>{TOKEN}".encode()),
    "drop": DropBefore(),
}
"""Answers that tell the token back; in headers only the HTTP library's own trace of what it received would hold it."""


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("part", ["/refs", "/resolve/"])
def test_the_token_is_in_no_log_message_traceback_or_file(
    double, repo, hub, cache, caplog, capfd, monkeypatch, tmp_path, fault, part
):
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    if (action := FAULTS[fault]) is not None:
        double.fault(action, part, times=None)
    told = repr(hub)
    caplog.set_level(logging.DEBUG)
    for name in ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2"):
        caplog.set_level(logging.DEBUG, logger=name)
    client = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(client, "propagate", True)
    try:
        whole(hub)
    except LorahubError as error:
        told += "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error))
    captured = capfd.readouterr()
    assert caplog.text  # the logs were on
    for text in (told, caplog.text, captured.out, captured.err):
        assert TOKEN not in text
    for path in cache.root.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_a_redirect_to_another_origin_takes_no_token_along(double, repo, hub):
    """The double itself fails a test in which its CDN, another origin, sees an Authorization."""
    whole(hub)
    assert double.seen("adapter_model", where="cdn")
    assert all("authorization" in each.headers for each in double.log if each.where == "hub")


def test_the_tokens_of_several_hubs_do_not_mix(double, repo, cache):
    for token in (TOKEN, READER, STRANGER):
        double.log.clear()
        HuggingFaceHub(api=double.api(token), cache=cache).standing("acme/ink")
        assert {each.headers["authorization"] for each in double.log} == {f"Bearer {token}"}


@pytest.mark.parametrize("name", ["etag", "x-repo-commit", "x-linked-etag", "content-type", "x-linked-size"])
def test_hostile_headers_place_nothing_outside_the_cache(double, repo, hub, tmp_path, name):
    double.fault(Headers({name: '"../../../../evil"'}), "/resolve/", times=None)
    double.fault(Headers({name: '"../../../../evil"'}), where="cdn", times=None)
    whole(hub)
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "client-cache"}
    assert not list(tmp_path.rglob("*evil*"))
