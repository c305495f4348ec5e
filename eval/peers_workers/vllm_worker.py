"""vLLM on the CPU, in one process: a separate engine core would poll while other systems are timed."""

import os
import time
from itertools import count
from typing import Any

from serve import Answer, serve


def start(settings: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    threads = settings["threads"]
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_CPU_KVCACHE_SPACE="2",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )
    import torch
    import vllm
    from vllm import EngineArgs, LLMEngine, SamplingParams

    torch.set_num_threads(threads)
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=settings["model"],
            dtype="bfloat16",
            max_model_len=settings["context"],
            max_num_seqs=1,
            enable_prefix_caching=False,
            disable_log_stats=True,
            skip_tokenizer_init=True,
        )
    )
    numbers = count()

    def answer(ids: list[int], limit: int, sampling: dict[str, Any] | None) -> tuple[list[int], float, float | None]:
        options = SamplingParams(
            **(sampling or {"temperature": 0.0}),
            max_tokens=limit,
            stop_token_ids=settings["eos"],
            detokenize=False,
            logit_bias=dict.fromkeys(settings["banned"], -100.0),  # the least it takes
        )
        found, first, started = [], None, time.perf_counter()
        engine.add_request(str(next(numbers)), {"prompt_token_ids": ids}, options)
        while engine.has_unfinished_requests():
            for output in engine.step():
                found = output.outputs[0].token_ids
                if first is None and found:
                    first = time.perf_counter() - started
        return list(found), time.perf_counter() - started, first

    return {"versions": {"vllm": vllm.__version__, "torch": torch.__version__}}, answer


if __name__ == "__main__":
    serve(start)
