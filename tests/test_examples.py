"""Every file of examples/ runs as its own head says, and does what it says. litellm's and lm-eval's run in environments
of their own: tests/serve/test_litellm.py, tests/serve/test_lm_eval.py."""

import functools
import importlib.util
import json
import re
import shlex
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest
import uvicorn
from transformers import LlamaConfig

import medusa_apar
from medusa_apar.models.hub import embedded_model_dir
from medusa_apar.threads.request import Request
from tests.support.byte_chat import byte_tokenizer
from tests.support.examples import EXAMPLES, ROOT, command_of, run_example, surroundings
from tests.support.folders import forking_folder
from tests.support.models import IDS, WIDE, random_model
from tests.support.openai_answers import CHAT, byte_server, whole
from tests.support.serving import PLAIN, SECONDS, wait_until
from tests.support.tokenizers import tiny_tokenizer

FILES = sorted(path.name for path in EXAMPLES.iterdir() if path.is_file() and path.name != "README.md")
RUN_BY = ("tests/test_examples.py", "tests/serve/test_litellm.py", "tests/serve/test_lm_eval.py")
QUESTION = "How do I sleep better"


@pytest.fixture(scope="module")
def forking(tmp_path_factory):
    """A folder of a tiny model that forks and can be asked as a chat."""
    folder = forking_folder(tmp_path_factory.mktemp("examples") / "tiny", "wide_llama")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answers(forking):
    """What `generate` answers, by itself."""
    apar = medusa_apar.load(forking)

    @functools.cache
    def answer(question):
        inputs = apar.tokenizer(question, return_tensors="pt", return_token_type_ids=False)
        output = apar.generate(**inputs, do_sample=False, max_new_tokens=512)
        return apar.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


@pytest.mark.real
def test_drop_in(tmp_path):
    text, told = run_example("drop_in.py", tmp_path, embedded_model_dir()).rsplit("\n\n", 1)
    forks, tokens = re.fullmatch(r"(\d+) forks, (\S+) tokens a step\n", told).groups()
    assert int(forks) >= 2 and float(tokens) > 1
    assert "1. " in text and "\n2. " in text.replace("\n\n", "\n")


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_batch(tmp_path, forking, answers, name):
    prompts = [f"{QUESTION} {'x' * count}" for count in range(20)]  # more than run at once
    prompts.insert(3, "x " * 20_000)  # longer than any context
    lines = prompts if name == "prompts.txt" else [json.dumps({"prompt": prompt}) for prompt in prompts]
    (tmp_path / name).write_text("\n\n".join(lines) + "\n")
    words = command_of("batch.py")
    assert words[-2:] == ["prompts.txt", "answers.jsonl"]
    told = subprocess.run(
        [*words[:-2], name, "answers.jsonl", forking],
        cwd=tmp_path,
        env=surroundings(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    entries = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert sorted(entry["number"] for entry in entries) == list(range(21))
    (refused,) = (entry for entry in entries if "error" in entry)
    assert refused["number"] == 3 and "context" in refused["error"]
    for entry in entries:
        if entry is refused:
            continue
        assert entry["prompt"] == prompts[entry["number"]] and entry["ended"] in ("stop", "length")
        assert entry["answer"] == answers(entry["prompt"])
    assert re.match(r"21 prompts, [1-9]\d* forks", told)


@contextmanager
def _process(words, folder, **variables):
    """A server's process, and its address."""
    env = surroundings(folder, **variables)
    with subprocess.Popen(words, cwd=folder, env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = iter(process.stderr.readline, "")
            yield next(found[0] for line in said if (found := re.search(r"http://\S+", line)))
        finally:
            process.terminate()
            process.communicate(timeout=SECONDS)


def test_stream_route(tmp_path, forking, answers):
    words = command_of("stream_route.py")
    words[words.index("8080")] = "0"
    with (
        _process(words, tmp_path, MODEL=str(forking)) as url,
        httpx.stream("GET", f"{url}/answer", params={"question": QUESTION}, timeout=SECONDS, **PLAIN) as response,
    ):
        assert response.headers["content-type"].startswith("text/event-stream")
        events = "".join(response.iter_text()).split("\n\n")
    assert events[-2:] in (['event: end\ndata: "stop"', ""], ['event: end\ndata: "length"', ""])
    pieces = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert len(pieces) > 3 and all(pieces)
    assert "".join(pieces) == answers(QUESTION)


def test_a_client_of_the_route_that_goes_away_ends_its_answer(forking, monkeypatch):
    monkeypatch.setenv("MODEL", str(forking))
    spec = importlib.util.spec_from_file_location("stream_route", EXAMPLES / "stream_route.py")
    route = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(route)
    asked = route.apar.request

    def slow(*args, **options):
        """A token in 50 ms: the whole answer would take 25 seconds."""
        request = asked(*args, **options, fork="off")
        return Request(
            request.id,
            request.prompt_ids,
            replace(request.options, stop=lambda _: time.sleep(0.05), eos_ids=frozenset()),
        )

    monkeypatch.setattr(route.apar, "request", slow)
    server = uvicorn.Server(uvicorn.Config(route.app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}/answer"
        with httpx.stream("GET", url, params={"question": QUESTION}, timeout=SECONDS, **PLAIN) as response:
            next(response.iter_text())
            assert route.engine.stats().running == 1
        wait_until(lambda: not route.engine.stats().running)
        assert 0 < route.engine.stats().written_tokens < 150
    finally:
        server.should_exit = True
        thread.join(SECONDS)


def test_openai_client(tmp_path):
    asked = shlex.join(command_of("openai_client.py"))
    with byte_server(seed=3) as server:
        told = run_example("openai_client.py", tmp_path, OPENAI_BASE_URL=f"{server.its.url}/v1", OPENAI_API_KEY="x")
        question = [{"role": "user", "content": shlex.split(asked)[-1]}]
        answer = server.ask(CHAT, messages=question, temperature=0, max_tokens=256)
    text, stats = told.rsplit("\n\n", 1)
    assert text == whole(answer)["text"]
    tokens, threads, steps = map(int, re.findall(r"\d+", stats))
    assert tokens == answer["usage"]["completion_tokens"] and threads > 1 and 0 < steps < tokens


def _chats():
    """Some that say two things: what is needed, as a list, and one sentence."""
    details = "plan it early and write it down", "ask somebody who has done it", "most beginners spend too much on this"
    for number in range(80):
        heads = zip(("Soil", "Water", "Light"), details, strict=True)
        items = "\n".join(f"{place}. {head}: {detail}." for place, (head, detail) in enumerate(heads, 1))
        answer = f"For thing {number} you need:\n\n{items}"
        if number % 4 == 3:
            answer = f"There is much to say about thing {number}, and little of it long."
        messages = [{"role": "user", "content": f"Tell me of {number}."}, {"role": "assistant", "content": answer}]
        yield json.dumps({"id": str(number), "messages": messages})


def test_tune_on_200_chats(tmp_path):
    sizes = WIDE | {"vocab_size": len(byte_tokenizer()), "max_position_embeddings": 1024}
    # Of larger weights, so that few of its answers loop: those that do are left out.
    base = random_model(LlamaConfig(**sizes, **IDS), seed=0, scale=10.0)
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "chats.jsonl").write_text("\n".join(_chats()) + "\n")
    told = run_example("tune_on_200_chats.sh", tmp_path, tmp_path / "base")
    assert json.loads(told.splitlines()[-1])["text"]
    adapter = tmp_path / "my-model/tuned/adapter"
    apar = medusa_apar.load(adapter)
    assert apar.control_token_ids is not None and apar.heads.acceptance
    report = json.loads((tmp_path / "my-model/tuned/report.json").read_text())
    assert report["held_out"]["loss"] < report["held_out_before"]["loss"]


def test_every_example_is_run():
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in RUN_BY)
    assert set(re.findall(r'(?:run_example|command_of)\("([\w.]+)"', text)) == set(FILES)
    made = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert {"test-litellm", "test-lm-eval"} <= set(made.split())


def test_every_file_beside_the_examples_is_used_by_one():
    beside = [path for path in EXAMPLES.rglob("*") if path.is_file() and path.parent != EXAMPLES]
    for path in beside:
        others = [other for other in EXAMPLES.rglob("*") if other.is_file() and other != path and other.suffix != ".md"]
        assert any(path.name in other.read_text(encoding="utf-8") for other in others), path


@pytest.mark.parametrize("name", FILES)
def test_the_table_has_every_example_with_its_command(name):
    rows = [line for line in (EXAMPLES / "README.md").read_text(encoding="utf-8").splitlines() if f"({name})" in line]
    assert len(rows) == 1
    (command,) = re.findall(r"`([^`]+)` \|$", rows[0])
    assert shlex.split(command) == command_of(name)
