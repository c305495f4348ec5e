"""The command line of the server: what it refuses before anything is loaded, and what it hands on."""

import socket
import sys

import pytest

from medusa_apar import loading
from medusa_apar.commands import cli, serve
from medusa_apar.serve import server
from medusa_apar.serve.options import ServeOptions


@pytest.fixture
def served(monkeypatch):
    """The service that would be served."""
    services = []
    monkeypatch.setattr(server, "serve", lambda service: services.append(service) or 0)
    return services


def test_options_reach_the_server(served, monkeypatch):
    monkeypatch.setenv(serve.KEYS, "third,fourth")
    words = "my-model --host 0.0.0.0 --port 0 --api-key first --api-key second --cors-origin * --max-requests 3"
    words += " --max-queue 0 --pool-slots 900 --max-prefill-rows 8 --no-prefix-cache --max-body-bytes 1000"
    assert cli.main(["serve", *words.split(), "--shutdown-timeout", "2.5", "--no-access-log"]) == 0
    (service,) = served
    assert service.model_name == "my-model"
    assert service.options == ServeOptions(
        host="0.0.0.0",
        port=0,
        api_keys=("first", "second", "third", "fourth"),
        max_requests=3,
        max_queue=0,
        pool_slots=900,
        max_prefill_rows=8,
        prefix_cache=False,
        cors_origins=("*",),
        max_body_bytes=1000,
        shutdown_timeout=2.5,
        access_log=False,
    )


def test_options_of_the_model_reach_its_loading(served, monkeypatch):
    monkeypatch.delenv(serve.KEYS, raising=False)
    loaded = []
    monkeypatch.setattr(loading, "load", lambda *names, **options: loaded.append((names, options)))
    for words in ((), ("m", "--heads", "none", "--speculation", "off", "--fork", "lists", "--max-threads", "4")):
        assert cli.main(["serve", *words]) == 0
        served[-1].backend._load()
    assert served[0].options == ServeOptions()
    (names, options), (_, others) = loaded
    assert names == ("smollm2-135m",) and options["heads"] == "auto" and options["speculation"] is None
    assert (others["heads"], others["speculation"], others["fork"], others["max_threads"]) == (None, "off", "lists", 4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--port", "65536"), "argument --port: '65536' must be a whole number at least 0 and at most 65535"),
        (("--max-requests", "0"), "argument --max-requests: '0' must be a whole number at least 1"),
        (("--speculation", "forest"), "argument --speculation: invalid choice: 'forest'"),
        (("--engine", "other"), "argument --engine: invalid choice: 'other'"),
    ],
)
def test_what_cannot_be_is_one_sentence(words, said, capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", *words])
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_key_that_no_header_can_carry_is_refused(served, capsys):
    assert cli.main(["serve", "--api-key", "a b"]) == 2 and not served
    assert capsys.readouterr().err.startswith("medusa-apar: an API key is empty, or holds spaces")


@pytest.mark.parametrize("name", ["fastapi", "uvicorn", "prometheus_client"])
def test_what_is_not_installed_is_named(name, served, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["serve"]) == 2 and not served
    assert capsys.readouterr().err == f"medusa-apar: {name} is not installed: pip install 'medusa-apar[serve]'\n"


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--port", str(port)]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"medusa-apar: cannot listen at 127.0.0.1:{port}: Address already in use\n")


def test_a_model_that_is_not_there_ends_the_command_with_a_sentence(capsys):
    assert cli.main(["serve", "/no/such/model", "--port", "0"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("medusa-apar serves /no/such/model at http://127.0.0.1:") and "ready" not in out
    assert err.startswith("medusa-apar: ") and "/no/such/model" in err and err.count("\n") == 1
