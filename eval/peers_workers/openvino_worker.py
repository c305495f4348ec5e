"""OpenVINO GenAI on the CPU."""

import time
from typing import Any

from serve import Answer, serve


def start(settings: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    import numpy
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = settings["context"]
    scheduler.cache_size = 1  # GB
    pipe = openvino_genai.LLMPipeline(
        settings["model"], "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=settings["threads"]
    )
    eos = set(settings["eos"])

    def answer(ids: list[int], limit: int, sampling: dict[str, Any] | None) -> tuple[list[int], float, float | None]:
        config = openvino_genai.GenerationConfig(max_new_tokens=limit, do_sample=False, stop_token_ids=eos)
        if sampling:
            config.do_sample, config.rng_seed = True, sampling["seed"]
            config.temperature, config.top_p = sampling["temperature"], sampling["top_p"]
        config.include_stop_str_in_output = True  # else an end token counts for nothing
        given = numpy.array([ids], numpy.int64)
        started = time.perf_counter()
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(given), openvino.Tensor(numpy.ones_like(given)))
        result = pipe.generate(inputs, config)
        seconds = time.perf_counter() - started
        return list(result.tokens[0]), seconds, result.perf_metrics.get_ttft().mean / 1e3

    core = openvino.Core()
    about = {name: str(core.get_property("CPU", name)) for name in ("KV_CACHE_PRECISION", "INFERENCE_PRECISION_HINT")}
    return {"versions": {"openvino-genai": openvino_genai.__version__}, **about}, answer


if __name__ == "__main__":
    serve(start)
