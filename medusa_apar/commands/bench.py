"""Times the same prompts under several systems, side by side.

  hf        transformers' generate, its control tokens suppressed     hf-pld   the same with prompt lookup
  hf-compiled  the same with a static cache and torch.compile (needs a C++ compiler; compiling takes a minute or more)
  ours-ar   our engine without threads and heads                     threads  heads  ours (both)
  base      the same with the untuned base model: the answers that its users have today
  lists     the same with threads that a rule forks at list items
  other-heads  other-ours    heads and ours once more, with the draft heads of --other-heads

  static    Medusa's draft trees, one for all threads            ngrams  threads that guess without heads
  ngrams+recycling                                               the same, and from recycled tokens
  budget  budget+weighted  budget+forks  budget+ngrams: parts of `ours`, to see what each brings
  budget+recycling  ours+recycling: with recycled tokens, too

Other engines take part when they are named, each in an environment of its own under the cache folder, made the first
time (from PyPI; llama.cpp is compiled):

  llama.cpp-q4_1  llama.cpp-q8_0   the untuned base model     vllm  in bfloat16     openvino  in int8
  medusa-llm                       Medusa's own decoder in float32, with the model's Medusa heads

The systems take turns at every prompt, so that the machine's drift hits all alike; each is warmed up and has the same
limit; the table says which weights it has. DIR gets results.jsonl (every answer: tokens, seconds, time to the first
token, steps, threads, slots, text), summary.json, table.md, plots and logs; the same command started again goes on
where it stopped. Answers that loop are counted apart, since loops flatter drafting. --check then proves on this
machine, thread by thread, that the timed answers of `ours` (else `threads`) are what the model itself would write, and
says where a tie in low precision fell the other way.

Answers are greedy, or sampled with --temperature and --top-p, a seed for each question and repeat, whatever else the
model's generation config asks for; then they differ in length from system to system, and tokens per second are what is
compared. medusa-llm and --check are greedy only.

comparison.md has `ours` against every other system, on all questions and without loops, and the questions on which it
is slower than the best of its own parts; --repeat 3 tells those from a busy moment, by medians.

Beside our systems on the compiled CPU runtime stand the bytes and products a second that their forward passes came to,
and the machine's ceilings: those of --ceilings (`python -m medusa_apar.eval.ceilings FILE` measures them), else
measured in a few seconds at the start, and kept as DIR/ceilings.json unless the machine was busy.

--profile answers some prompts once more with `ours` and writes profile.md: what a step's time goes into, and what a
forward pass costs by its rows.

--serve asks servers over HTTP instead, many questions at once: tokens per second, latency, time to the first token and
between tokens, KV slots. Each server is started for one load and stopped after it, so that one is alive at a time:

  plain     one thread and no guesses       threads  heads  both
  vllm  llama.cpp-q4_1  llama.cpp-q8_0      in environments of their own, as above
  vllm-plain  vllm-threads  vllm-heads  vllm-both    our server over vLLM's engine, in vLLM's environment
  --url     whatever runs there already

--clients are so many at once, each of which asks anew when it is answered; --rates are questions a second, whether or
not others are answered. Answers go on past their ends to --max-new-tokens, so that all write equally much, unless
--may-stop. --pool-slots-sweep tries ever smaller KV pools with our servers, and says which is the smallest that keeps
97 % of the tokens per second. DIR gets load.jsonl (a line per server, load and turn), load.md, report.json, plots and
the servers' logs; --repeat is the number of turns, of which the middle one counts.

--quality measures what answers are like, without a judge: how they end, their lists, loops and repetition, how likely
the untuned base finds them, checked instructions of our own, and others; `python -m medusa_apar.eval.quality --help`
has them all. Systems are base, ours-ar, threads and lists; new weights are judged as --model FOLDER before they are
shipped. DIR gets answers.jsonl, from which a killed run goes on, report.md, report.json and quality.png.

--kernels leaves prompts and systems alone and times the Triton kernels on this machine's GPU, once each of them has
shown that it is right.

DIR/judge gets the answers in FastChat's llm_judge format, for whoever has a judge. --judge asks one right away, behind
any OpenAI-compatible endpoint (key: $OPENAI_API_KEY): a rating of every answer, and with --judge-against wins, ties and
losses against that system, in both orders.

  medusa-apar bench --out results                                       # our own prompts
  medusa-apar bench --prompts vicuna --limit 10 --systems hf ours --out results --check
  medusa-apar bench --out results --judge http://localhost:8000/v1 --judge-against hf
  medusa-apar bench --systems hf ours llama.cpp-q4_1 openvino --quantize int8 --out results
  medusa-apar bench --temperature 0.7 --top-p 0.9 --systems hf base ours-ar threads heads ours --out sampled
  medusa-apar bench --quality --quantize int8 --prompts vicuna --out quality
  medusa-apar bench --serve --quantize int8 --prompts vicuna --out serve
  medusa-apar bench --serve --quantize int8 --prompts vicuna --clients 16 --systems both vllm llama.cpp-q8_0 --out peers
  medusa-apar bench --serve --prompts vicuna --clients 1 4 16 --systems vllm-plain vllm-threads vllm --out over-vllm
  medusa-apar bench --serve --quantize int8 --clients 16 --systems plain threads --pool-slots-sweep --out pools
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_apar.arguments import MAX_THREADS, number, out_folder

from . import bench_quality, bench_serve

if TYPE_CHECKING:
    from medusa_apar.eval.runs import Runs
    from medusa_apar.job import Job

HELP = "time systems side by side on the same prompts"
SYSTEMS = ("hf", "ours-ar", "threads", "heads", "ours")
MAX_NEW_TOKENS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompts", default="default", metavar="NAME|FILE",
        help="default, vicuna, mt, spec, gsm8k, humaneval, instructions, or JSON lines "
        "(default: %(default)s)")  # fmt: skip
    add("--systems", nargs="+", metavar="NAME",
        help="the first one is what the others are compared with (default: all of ours, and hf)")  # fmt: skip
    add("--trust-remote-code", action="store_true", help="let code from the model's repository run")
    add("--out", type=out_folder, required=True, metavar="DIR", help="folder of the results")
    add("--limit", type=number(int, 1), metavar="N", help="only the first N prompts")
    add("--max-new-tokens", type=number(int, 1), metavar="N",
        help=f"of an answer (default: {MAX_NEW_TOKENS}, and {bench_serve.MAX_NEW_TOKENS} with --serve)")  # fmt: skip
    add("--repeat", type=number(int, 1), default=1, metavar="N", help="times of every answer (default: %(default)s)")
    add("--temperature", type=number(float, 0), default=0.0, metavar="T", help="sample; 0 is greedy (default)")
    add("--top-p", type=number(float, 0, 1, open_low=True), default=1.0, metavar="P",
        help="sample among the likeliest tokens that have this probability together (default: among all)")  # fmt: skip
    add("--model", default="smollm2-135m", help="name, folder, GGUF file or Hub id (default: %(default)s)")
    add("--heads", default="auto", metavar="NAME|DIR", help="draft heads (default: those that come with the model)")
    add("--other-heads", metavar="NAME|DIR", help="draft heads of the systems other-heads and other-ours")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, bfloat16 on CUDA")
    add("--quantize", choices=("int8",), help="round weights and activations of our own systems")
    add("--runtime", choices=("auto", "torch", "cpu"), default="auto", help="of our systems (default: %(default)s)")
    add("--budget", type=number(int, 1), metavar="N", help="rows of every forest of ours (default: what pays)")
    add("--threads", type=number(int, 1, MAX_THREADS), metavar="N", help="CPU threads for torch")
    add("--ceilings", type=Path, metavar="FILE", help="this machine's, as medusa_apar.eval.ceilings measured them")
    add("--check", action="store_true", help="prove the answers exact afterwards")
    add("--profile", action="store_true", help="say where a step's time goes, and what a step costs by its rows")
    add("--kernels", action="store_true", help="check and time the GPU kernels instead")
    add("--judge", metavar="URL", help="have the answers judged; base of an endpoint, as in http://localhost:8000/v1")
    add("--judge-model", metavar="NAME", help="the model that judges (default: the only one that the endpoint lists)")
    add("--judge-against", metavar="SYSTEM", help="also compare every system's answers with this one's")
    bench_serve.add_arguments(parser)
    bench_quality.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.serve:
        return bench_serve.run(args)
    bench_serve.refuse_without(args)
    if args.quality:
        return bench_quality.run(args, MAX_NEW_TOKENS)
    bench_quality.refuse_without(args)
    args.systems, args.max_new_tokens = args.systems or list(SYSTEMS), args.max_new_tokens or MAX_NEW_TOKENS
    from medusa_apar.eval import (
        bench,
        ceilings,
        check,
        comparison,
        judge,
        judge_files,
        peers,
        profile,
        prompts,
        systems,
    )
    from medusa_apar.eval.plan import open_results, plan_of
    from medusa_apar.job import Job, quiet, slow
    from medusa_apar.loading import load
    from medusa_apar.models.chat import encode
    from medusa_apar.requests import Sampling

    if args.kernels:
        from medusa_apar.eval import kernels

        kernels.run(args.out)
        print((args.out / "kernels.md").read_text(encoding="utf-8"))
        return 0
    _check_arguments(args)
    asked = prompts.read(args.prompts, args.limit)
    judging = judge.Judge(args.judge, args.judge_model, args.prompts) if args.judge else None

    import torch

    quiet()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.ceilings:
        ceilings.read(args.ceilings)
    heads = None if args.heads == "none" else args.heads
    options: dict[str, Any] = {"dtype": args.dtype, "quantize": args.quantize, "runtime": args.runtime}
    options["trust_remote_code"] = args.trust_remote_code
    with_base = _has_base(args)
    with slow(f"loading {args.model}"):
        apar = load(args.model, heads=heads, budget=args.budget, **options)
        untuned = load(args.model, heads=None, apar=None, speculation="off", **options) if with_base else None
        others = None
        if args.other_heads:
            others = load(args.model, heads=args.other_heads, budget=args.budget, **options)
    longest = max(len(encode(apar.tokenizer, p.text)["input_ids"][0]) for p in asked) + args.max_new_tokens
    if longest > peers.CONTEXT and set(args.systems) & set(peers.PEERS):
        raise ValueError(
            f"prompts and answers may have {longest} tokens here, and other engines have room for {peers.CONTEXT}: "
            "lower --max-new-tokens or leave them out"
        )
    made = [
        peers.make(name, apar, args.model, args.out)
        if name in peers.PEERS
        else systems.make(name, apar, longest, untuned, others)
        for name in args.systems
    ]
    checked = next((system for name in ("ours", "threads") for system in made if system.name == name), made[0])
    if args.check:
        check.check_greedy(apar)
    if args.temperature:
        for model in filter(None, (apar, untuned)):
            check.check_sampled(model)
    kinds = {system.shapes.kind for system in made if system.shapes}
    if args.ceilings and not kinds:
        raise ValueError("--ceilings is for the compiled CPU runtime, and none of these systems runs in it")
    plan = plan_of(apar, args.model, asked, args.max_new_tokens, Sampling(args.temperature, top_p=args.top_p), others)
    with Job(args.out, "bench", vars(args)) as job, ExitStack() as stack:
        for system in made:
            stack.callback(system.close)
        results = open_results(args.out, plan)
        most = ceilings.of_run(args.out, kinds, args.ceilings) if kinds else None
        bench.run(job, results, apar, made, asked, plan, args.repeat)
        summary = bench.write(job, results, args.systems, plan, args.repeat, most)
        _plot(job, results, summary)
        judge_files.write(job, results, asked, args.systems, args.prompts)
        if judging:
            judge.run(job, judging, results, asked, args.systems, args.judge_against)
        print((args.out / bench.TABLE).read_text(encoding="utf-8"))
        if comparison.OURS in args.systems and len(args.systems) > 1:
            print(comparison.write(args.out, results, args.systems, args.repeat))
        if args.profile:
            profile.run(job, apar, asked, args.max_new_tokens, plan.sampling)
        if args.check:
            found = check.check(job, checked, results, asked, args.max_new_tokens)
            print(check.sentence(found))
            return 0 if not found["wrong"] else 1
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    """ValueError, in one sentence and before anything is loaded, for what cannot be asked together."""
    from medusa_apar.eval import peers, systems

    for name in args.systems:
        if name not in (known := [*systems.NAMES, *peers.PEERS]):
            raise ValueError(f"system {name!r} is none of {', '.join(known)}")
    if bool(args.other_heads) != bool(set(systems.OTHERS) & set(args.systems)):
        raise ValueError(f"--other-heads and a system that drafts with them ({', '.join(systems.OTHERS)}) go together")
    if len(set(args.systems)) < len(args.systems):
        raise ValueError(f"--systems names one twice: {' '.join(args.systems)}")
    if args.check and "ours" not in args.systems and "threads" not in args.systems:
        raise ValueError("--check proves the answers of `ours` or `threads`: name one of them in --systems")
    if args.top_p < 1 and not args.temperature:
        raise ValueError(f"--top-p {args.top_p:g} needs a --temperature above 0: answers are greedy without one")
    if args.check and args.temperature:
        raise ValueError("--check proves greedy answers, and a sampled one is not the model's likeliest: leave one out")
    for name in args.systems:
        if args.temperature and name in peers.PEERS and not peers.PEERS[name].samples:
            raise ValueError(f"{name} samples by a rule of its own: leave it out, or --temperature")
    if not args.judge and (args.judge_model or args.judge_against):
        raise ValueError("--judge-model and --judge-against need --judge, the endpoint to ask")
    if args.judge_against and args.judge_against not in args.systems:
        raise ValueError(f"--judge-against {args.judge_against} is none of --systems {' '.join(args.systems)}")


def _has_base(args: argparse.Namespace) -> bool:
    """Whether the untuned base takes part. ValueError where nobody knows what the model was before it was tuned."""
    from medusa_apar.eval.systems import OF_BASE
    from medusa_apar.models.sources import locate

    name = next((name for name in OF_BASE if name in args.systems), None)
    if name is None:
        return False
    if locate(args.model).adapter is None:
        raise ValueError(f"{name} needs a model tuned by an adapter, and {args.model} has none: leave it out")
    return True


def _plot(job: Job, results: Runs, summary: dict[str, Any]) -> None:
    try:
        from medusa_apar.eval.bench_plots import plot
    except ImportError:
        job.say("No plots: they need matplotlib (pip install 'medusa-apar[eval]').")
        return
    plot(job.folder, results, summary)
