"""litellm's client against the server, and the example with it. What it pins cannot stand beside what we pin, so it
runs in an environment of its own, which `make test-litellm` makes."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.examples import command_of, run_example
from tests.support.openai_answers import CHAT, QUESTION, byte_server, whole

TESTS = Path(__file__).parents[1]
PYTHON, CLIENT = TESTS.parent / ".venv-litellm/bin/python", TESTS / "support/litellm_client.py"
MORE = [{}, {"stop": ["e"], "temperature": 1.0, "seed": 7}, {"logit_bias": {"70": 9.0}}]


pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="litellm's environment is absent: make test-litellm makes it"
)


@pytest.mark.parametrize("more", MORE, ids=str)
def test_litellm_has_what_the_server_says(more):
    with byte_server(seed=3) as server:
        fields = {"max_tokens": 40, "temperature": 0.0} | more
        command = [str(PYTHON), str(CLIENT), server.its.url, json.dumps(QUESTION), json.dumps(fields)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert run.returncode == 0, run.stderr
        said = json.loads(run.stdout.splitlines()[-1])
        answer = server.ask(CHAT, model="tiny", messages=QUESTION, **fields)
    expected, usage = whole(answer), answer["usage"]
    for way in ("whole", "streamed"):
        assert said[way]["text"] == expected["text"] and said[way]["reason"] == expected["reason"]
        assert said[way]["usage"] == [usage[f"{kind}_tokens"] for kind in ("prompt", "completion", "total")]
    assert "context has" in said["refused"]


def test_the_example_prints_the_answer(tmp_path):
    question = [{"role": "user", "content": command_of("litellm_call.py")[-1]}]
    with byte_server(seed=3) as server:
        where = {"MODEL": "tiny", "OPENAI_BASE_URL": f"{server.its.url}/v1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        told = run_example("litellm_call.py", tmp_path, python=PYTHON, **where)
        answer = server.ask(CHAT, messages=question, temperature=0, max_tokens=256)
    assert told == whole(answer)["text"] + "\n"
