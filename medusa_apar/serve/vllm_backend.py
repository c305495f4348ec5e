"""vLLM behind our own server: its flags, the model as it reads it, and drafting by heads that it knows."""

from __future__ import annotations

import asyncio
import os
import threading
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import GenerationConfig

from medusa_apar.facts import ModelFacts
from medusa_apar.job import slow
from medusa_apar.json_files import json_object
from medusa_apar.loading import control_tokens, heads_name
from medusa_apar.models import hub
from medusa_apar.models.fingerprint import files_at, name_of
from medusa_apar.models.merge import plain_folder
from medusa_apar.models.sources import Source, locate, read_tokenizer
from medusa_apar.threads.control_tokens import DEFAULT_MAX_DEPTH, ControlTokens

from .backends import NoEngine
from .options import ServeOptions

if TYPE_CHECKING:
    from medusa_apar.engine.async_engine import AsyncEngine

USAGE = "medusa-apar serve --engine vllm MODEL [our flags] [vLLM's engine flags]"
_CPU_BLOCK = 32  # tokens; a fork computes half a block anew, and no kernel of vLLM's for CPUs takes fewer
_THREADS = 3  # of an answer, as far as places in vLLM's batch go
_VLLM_SEQUENCES = 128  # what vLLM takes by itself, at least
_DRAFTING = ("speculative_config", "spec_method", "spec_model", "spec_tokens")

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Served:
    """What is served, in our own words.

    model: a name that `medusa_apar.load` takes. heads: a folder of Medusa heads or an EAGLE-3 drafter, a Hub id, or a
    name beside the model's own; None drafts nothing. dtype: of torch; None is vLLM's choice. fork, max_threads: where a
    request does not say.
    """

    model: str
    heads: str | None = None
    dtype: str | None = None
    fork: str = "auto"
    max_threads: int | None = None
    trust_remote_code: bool = False


def parsed(flags: Sequence[str], served: Served, options: ServeOptions) -> Namespace:
    """vLLM's engine flags, read by vLLM itself: SystemExit, in its words, for what it does not know.

    Where they say nothing, threads decide: small blocks, places for several threads an answer, and priorities.
    ValueError for what our own flags say otherwise.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this process has threads, which no fork survives
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    defaults: dict[str, Any] = {
        "model": served.model,
        "scheduling_policy": "priority",
        "enable_prefix_caching": options.prefix_cache,
        "disable_log_stats": True,
    }
    if current_platform.is_cpu():
        defaults["block_size"] = _CPU_BLOCK
    if options.max_requests is not None and _THREADS * options.max_requests > _VLLM_SEQUENCES:
        defaults["max_num_seqs"] = _THREADS * options.max_requests
    if served.dtype is not None:
        defaults["dtype"] = served.dtype
    if served.trust_remote_code:
        defaults["trust_remote_code"] = True
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="medusa-apar", usage=USAGE))
    parser.set_defaults(**defaults)
    args: Namespace = parser.parse_args(list(flags))
    if args.structured_outputs_config.backend == "auto":
        args.structured_outputs_config.backend = "guidance"  # what our own guides are made with
    if args.model != served.model:
        raise ValueError("--model is MODEL's own flag in vLLM: name the model behind `--engine vllm`")
    if len(args.served_model_name or ()) > 1:
        raise ValueError("--served-model-name has several names, and this server has one")
    if served.heads is not None and any(getattr(args, name, None) is not None for name in _DRAFTING):
        raise ValueError("--heads and vLLM's own flags for speculation exclude each other")
    return args


def start_vllm(args: Namespace) -> tuple[Any, Any]:
    """vLLM's client, once its engine has loaded the model, and what it counts."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    from medusa_apar.engine.vllm import compat

    return compat.started(AsyncEngineArgs.from_cli_args(args))


class VllmBackend:
    """vLLM, in processes of its own that this one starts.

    Args:
        args: as of `parsed`.
        started: makes the client of them; called in a thread that is not the event loop's.
    """

    name = "vllm"
    pool_slots: int | None = None

    def __init__(
        self,
        served: Served,
        args: Namespace,
        options: ServeOptions,
        started: Callable[[Namespace], tuple[Any, Any]] = start_vllm,
    ) -> None:
        self._served, self._args, self._options, self._started = served, args, options, started
        self.engine: AsyncEngine = NoEngine()

    @property
    def model_name(self) -> str:
        """The name by which clients know it."""
        name: str = (self._args.served_model_name or [self._served.model])[0]
        return name

    async def start(self) -> ModelFacts:
        tokenizer, control, (client, counts) = await _beside(self._load)
        self.engine = engine_over(client, self._options, counts=counts)
        return facts_of(client, tokenizer, control, fork=self._served.fork, max_threads=self._served.max_threads)

    def _load(self) -> tuple[Any, ControlTokens | None, tuple[Any, Any]]:
        served, args = self._served, self._args
        source = locate(served.model, args.revision, args.hf_token)
        with slow(f"making {served.model} ready for vLLM"):
            folder = plain_folder(source, _torch_dtype(served.dtype), args.trust_remote_code)
        args.model = source.base if folder is None else str(folder)
        args.revision = source.revision
        if folder is None and args.tokenizer is None:
            args.tokenizer = source.tokenizer
        revision = args.tokenizer_revision or (None if args.tokenizer else args.revision)
        access = {"revision": revision, "token": args.hf_token, "trust_remote_code": args.trust_remote_code}
        tokenizer = read_tokenizer(args.tokenizer or args.model, **access)
        control = control_tokens("auto", source, tokenizer, served.model)
        if served.heads is not None:
            args.speculative_config = _drafter(served, source, args)
        try:
            return tokenizer, control, self._started(args)
        except RuntimeError as error:  # its own processes have said why by now
            raise ValueError(f"vLLM did not start: {error}") from error


def engine_over(client: Any, options: ServeOptions, **how: Any) -> AsyncEngine:
    """Our engine over a client of vLLM's; how: `counts` and `owned` of `VllmEngine`."""
    from medusa_apar.engine.vllm.options import CPU_FREE_ROWS, GPU_FREE_ROWS, VllmOptions
    from medusa_apar.engine.vllm.vllm_engine import VllmEngine

    parallel = client.vllm_config.parallel_config
    # Where somebody else spreads requests over ranks, those of this process are not ours to choose.
    spread = parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb
    on_cpu = client.vllm_config.device_config.device_type == "cpu"
    its = VllmOptions(
        max_requests=options.max_requests,
        max_waiting=options.max_queue,
        data_parallel_size=1 if spread else parallel.data_parallel_size,
        free_rows=CPU_FREE_ROWS if on_cpu else GPU_FREE_ROWS,
        speculates=client.vllm_config.speculative_config is not None,
    )
    return VllmEngine(client, client.model_config.max_model_len, its, **how)


def facts_of(client: Any, tokenizer: Any, control: ControlTokens | None, **others: Any) -> ModelFacts:
    """The facts of the model that a client of vLLM's answers with; others: what vLLM does not know."""
    config = client.model_config
    rows, known = config.get_vocab_size(), config.try_get_generation_config()
    if config.generation_config == "vllm":  # whose way it is to take nothing else from the model
        known = {name: value for name, value in known.items() if name.endswith("_token_id")}
    if control is not None:
        control.check_matches(rows)
    known |= config.override_generation_config
    # vLLM ends answers at the tokenizer's end token, too.
    named = known.get("eos_token_id")
    ends = {*([named] if isinstance(named, int) else named or ()), getattr(tokenizer, "eos_token_id", None)}
    known["eos_token_id"] = sorted(ends - {None}) or None
    return ModelFacts(
        tokenizer=tokenizer,
        generation_config=GenerationConfig(**known),
        vocabulary=rows,
        input_vocabulary=rows,
        context=config.max_model_len,
        positions=config.max_model_len,
        control_token_ids=control,
        max_depth=DEFAULT_MAX_DEPTH if control is None else control.max_depth,
        unforked=("presence_penalty", "frequency_penalty"),
        **others,
    )


def _drafter(served: Served, source: Source, args: Namespace) -> dict[str, Any]:
    """vLLM's `speculative_config` for heads, which are written as it reads them, once, into the cache folder."""
    from medusa_apar.heads import checkpoints, vllm_layout
    from medusa_apar.heads.eagle3.convert import convert, refused_by_vllm
    from medusa_apar.heads.eagle3.heads import holds
    from medusa_apar.heads.eagle3.writing import CHAIN

    assert served.heads is not None
    heads = heads_name(served.heads, source)
    attends = holds(checkpoints.locate(heads))
    made_from = [str(heads), *files_at(heads), args.model, str(served.dtype)]  # heads on the Hub by their name alone
    target = hub.cache_dir() / "models" / f"vllm-heads-{name_of(made_from)}"

    def build(_: Path, folder: Path) -> None:
        dtype, trusted = _torch_dtype(served.dtype), args.trust_remote_code
        if attends:
            made = convert(heads, "eagle3", folder, base=args.model, dtype=dtype, trust_remote_code=trusted)
            if refused := refused_by_vllm(made[1].file):
                raise ValueError(refused[0])
        else:
            vllm_layout.export(heads, args.model, folder, dtype, trust_remote_code=trusted)

    folder = hub.build_once(target, build)
    number = CHAIN if attends else json_object(folder / "config.json")["num_heads"]
    return {"method": "eagle3" if attends else "medusa", "model": str(folder), "num_speculative_tokens": number}


def _torch_dtype(name: str | None) -> Any:
    import torch

    return None if name is None else getattr(torch, name)


async def _beside(work: Callable[[], Result]) -> Result:
    """What `work` returns, in a thread that the process's end does not wait for."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def tell(result: Result | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(result)  # type: ignore[arg-type]
        else:
            done.set_exception(error)

    def run() -> None:
        try:
            outcome: tuple[Any, BaseException | None] = work(), None
        except BaseException as error:
            outcome = None, error
        if not loop.is_closed():
            loop.call_soon_threadsafe(tell, *outcome)

    threading.Thread(target=run, name="medusa-apar loads vLLM", daemon=True).start()
    return await done
