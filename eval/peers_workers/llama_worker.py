"""llama.cpp through its C interface: decode, take the likeliest token or a sampled one, decode that."""

import ctypes
import time
from typing import Any

from serve import Answer, serve


def start(settings: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    import llama_cpp as lc

    lc.llama_backend_init()
    model = lc.llama_model_load_from_file(settings["model"].encode(), lc.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot read {settings['model']}")
    params = lc.llama_context_default_params()
    params.n_ctx = params.n_batch = settings["context"]
    params.n_threads = params.n_threads_batch = settings["threads"]
    context = lc.llama_init_from_model(model, params)
    eos = set(settings["eos"])

    def sampler_of(sampling: dict[str, Any] | None) -> Any:
        chain = lc.llama_sampler_chain_init(lc.llama_sampler_chain_default_params())
        parts = [lc.llama_sampler_init_greedy()]
        if sampling:  # the temperature first, as transformers has it
            parts = [
                lc.llama_sampler_init_temp(sampling["temperature"]),
                lc.llama_sampler_init_top_p(sampling["top_p"], 1),
                lc.llama_sampler_init_dist(sampling["seed"]),
            ]
        for part in parts:
            lc.llama_sampler_chain_add(chain, part)
        return chain

    def answer(ids: list[int], limit: int, sampling: dict[str, Any] | None) -> tuple[list[int], float, float | None]:
        sampler = sampler_of(sampling)
        try:
            return generate(ids, limit, sampler)
        finally:
            lc.llama_sampler_free(sampler)

    def generate(ids: list[int], limit: int, sampler: Any) -> tuple[list[int], float, float]:
        found, first, started = [], None, time.perf_counter()
        lc.llama_memory_clear(lc.llama_get_memory(context), True)
        given = (lc.llama_token * len(ids))(*ids)
        one = (lc.llama_token * 1)()
        while True:
            if status := lc.llama_decode(context, lc.llama_batch_get_one(given, len(given))):
                raise RuntimeError(f"llama_decode returned {status}")
            token = lc.llama_sampler_sample(sampler, context, -1)
            found.append(token)
            first = first or time.perf_counter() - started
            if token in eos or len(found) == limit:
                return found, time.perf_counter() - started, first
            one[0], given = token, one

    about = ctypes.create_string_buffer(256)
    lc.llama_model_desc(model, about, len(about))
    lc_info = lc.llama_print_system_info().decode()
    return {"versions": {"llama-cpp-python": lc.__version__}, "model": about.value.decode(), "system": lc_info}, answer


if __name__ == "__main__":
    serve(start)
