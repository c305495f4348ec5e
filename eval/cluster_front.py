"""How many tokens a second one process can look after:  python -m medusa_apar.eval.cluster_front [--in-flight 1000]

`VllmEngine` answers over a client without a model that has every token of recorded answers at once, so that nothing but
our own orchestrator takes time. vLLM's front end (messages, detokenizing) and the HTTP server come on top in the same
process: it is the most that one could do.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from medusa_apar.arguments import number
from medusa_apar.engine.vllm.options import GPU_FREE_ROWS, VllmOptions
from medusa_apar.engine.vllm.part import Part
from medusa_apar.engine.vllm.vllm_engine import VllmEngine
from medusa_apar.threads.request import Request

from .cluster import TREES
from .cluster_answers import Setting, options_of
from .cluster_trees import CHILD, TEXT, RecordedAnswer, Script, read


class Dialect:
    """The client is asked in our own words."""

    def prompt_of(self, part: Part) -> Sequence[int]:
        return part.prompt_ids

    def params_of(self, part: Part) -> Part:
        return part

    def check(self, client: Any, part: Part) -> None:
        """Nothing is refused."""

    def is_full(self, error: BaseException) -> bool:
        return False

    def is_dead(self, error: BaseException) -> bool:
        return False


class Recited:
    """A client that writes recorded answers, a token of every request in turn.

    written: tokens so far. The names of answers are numbers; answers come in turns, as in `cluster_answers`.
    """

    errored = False

    def __init__(self, recorded: Sequence[RecordedAnswer], threads: bool) -> None:
        self._prompts = [its.prompt for its in recorded]
        self._scripts = [Script(its.forked if threads else its.plain) for its in recorded]
        self.written = 0

    async def generate(
        self, prompt: Sequence[int], sampling_params: Part, request_id: str, **how: Any
    ) -> AsyncGenerator[Any, None]:
        number = int(request_id.split(".")[0]) % len(self._scripts)
        script, role, place = self._scripts[number], 0, 0
        for token in prompt[self._prompts[number] :]:
            role, place = (script.children[role, place - 1], 0) if token == CHILD else (role, place + 1)
        own = script.tokens[role]
        for _ in range(sampling_params.max_tokens):
            await asyncio.sleep(0)
            token = own[place] if place < len(own) else TEXT
            self.written, place = self.written + 1, place + 1
            yield SimpleNamespace(
                num_cached_tokens=0, outputs=[SimpleNamespace(token_ids=(token,), logprobs=None, finish_reason=None)]
            )
            if token in sampling_params.stop_ids:
                return


async def answered(recorded: Sequence[RecordedAnswer], setting: Setting) -> tuple[int, int, float]:
    """Tokens that were written and shown, and seconds of one core."""
    client, options = Recited(recorded, setting.threads), options_of(setting)
    its = VllmOptions(max_requests=setting.in_flight, max_waiting=None, free_rows=setting.free_rows or GPU_FREE_ROWS)
    engine = VllmEngine(client, 1 << 20, its, owned=False, dialect=Dialect())

    async def answer(name: int) -> int:
        request = Request(str(name), [TEXT] * recorded[name % len(recorded)].prompt, options, key=name)
        return sum([len(output.token_ids) async for output in engine.generate(request)])

    began = time.process_time()
    shown = await asyncio.gather(*map(answer, range(setting.answers)))
    seconds = time.process_time() - began
    await engine.close()
    return client.written, sum(shown), seconds


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser("medusa_apar.eval.cluster_front", description=(__doc__ or "").splitlines()[0])
    add, whole = made.add_argument, number(int, 1)
    add("--trees", type=Path, default=TREES, metavar="FILE", help="recorded ones (default: those of the repository)")
    add("--in-flight", type=whole, nargs="+", default=[1, 16, 1000], metavar="N", help="answers")
    add("--max-new-tokens", type=whole, default=256, metavar="N")
    args = made.parse_args(arguments)
    try:
        recorded = read(args.trees)
    except (OSError, ValueError) as error:
        made.error(str(error))
    for in_flight in args.in_flight:
        for threads in (False, True):
            setting = Setting(threads, in_flight, max(in_flight, len(recorded)), args.max_new_tokens)
            written, shown, seconds = asyncio.run(answered(recorded, setting))
            print(
                f"{in_flight:5} in flight, {'threads' if threads else 'one thread'}: {shown} tokens shown of {written} "
                f"written, {written / seconds:.0f} a second, {1e6 * seconds / written:.1f} us each",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
