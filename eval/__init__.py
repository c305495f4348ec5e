"""Measuring: latency, throughput, quality and kernels. Benchmarks live here, never in tests.

`medusa-apar bench`:

    bench.py           the same prompts through several systems, prompt by prompt and turn by turn
    plan.py            what a run is, so that nothing is compared that was not run alike
    systems.py         transformers and our own systems
    peers.py           other engines, each in an environment and a process of its own
    peer_files.py      what those need on disk
    peer_worker.py     our end of such a process
    peers_workers/     the other end, a script an engine
    prompts.py         prompt sets, by name or file
    check.py           whether every thread's tokens are what the model itself would have written
    statistics.py      medians of repeats, and what chance could do to a ratio
    bench_tables.py    a run's tables
    bench_plots.py     a run's pictures
    comparison.py      ours against every other system, and question by question against the best of its own parts
    rows.py            what a forward pass costs by its number of rows, alone and beside other processes
    roofline.py        what forward passes read and multiply, from a model's shapes
    tiles.py           int8 products by instruction set and rows of a tile
    ceilings.py        what this machine can read and multiply at most
    speculation.py     what each part of speculation brings, from a run's results
    profile.py         where a step's time goes
    judge.py           what a language model thinks of the answers
    judge_files.py     the answers as FastChat's llm_judge has them
    chat_endpoint.py   a model behind an OpenAI-compatible endpoint
    host_time.py       host time of a step and tokens per second, in two checkouts that take turns
    sampling.py        what choosing tokens costs a step
    engine.py          requests in flight in one engine: throughput, latency, slots
    second_turn.py     what share of a chat's second turn the prefix cache has

`medusa-apar bench --quality`:

    quality.py             figures of answers that are there, and whether threads and tuning cost any quality
    quality_answers.py     every question answered by every system, many at once
    quality_text.py        what a text tells by itself: lists, heads, details, repetition
    quality_base.py        how likely the untuned base finds an answer, seams apart
    quality_similarity.py  details, heads and prompts by MiniLM, references by chrF and ROUGE-L
    quality_compare.py     systems question by question, and the three figures that decide
    quality_table.py       the report as Markdown
    quality_plot.py        its picture
    instructions.py        instructions that a program can check

`medusa-apar bench --serve`:

    serve_bench.py     the same loads on every server, load by load and turn by turn
    serve_client.py    the client: one question and its stream, closed and open loops
    serve_figures.py   from when what came to latencies, tokens per second and slots
    serve_metrics.py   what a server tells of itself while it works
    serve_launch.py    what is settled before a server starts
    serve_vllm.py      vLLM's own server, and ours over vLLM
    serve_servers.py   these, ours and llama.cpp as processes, or a URL
    llama_server.py    llama.cpp's own server, compiled
    serve_tables.py    the figures side by side, pools, and what was aimed at
    serve_plots.py     latency and throughput against clients, throughput against a capped pool

Threads on vLLM:

    vllm_answers.py    the same questions answered by our own engine and by ours over vLLM
    vllm_parallel.py   whether they are equal where vLLM divides the model, or its answers
    cluster.py         many engines of vLLM, simulated: threads against one thread an answer
    cluster_answers.py what answers ask of those engines, step by step
    cluster_engine.py  which requests an engine runs, and which blocks of KV they hold
    cluster_trees.py   recorded paragraph trees, how long and where they fork
    cluster_front.py   how many tokens a second the process before them can look after

Servers that have to stand all of it:

    faults.py          a campaign of bad clients, rounds of them, and what has to hold at the end
    fault_kinds.py     what clients do
    fault_judge.py     whether what they get is right
    fault_cases.py     questions whose answers are known, and bodies that have to be refused
    fault_host.py      the server, and whether it leaves anything behind
    fault_memory.py    whether the process grows

The weights we ship:

    weights.py         a tuned model and its heads, measured against their goals
    goals.py           the figures, and the table that puts them beside the goals
    questions.py       what is asked and read
    answering.py       answers with what they took
    replay.py          what heads would have done for answers that are already there
    draft_levels.py    what drafting costs, level by level
    recycling.py       what token recycling brings beside them, node by node
    loops.py           answers that loop
    runs.py            what was answered, on disk
    quantisation.py    what int8 costs in quality

Kernels and host code:

    kernels.py         the kernels on this machine's GPU: right, and how fast
    kernel_choices.py  those that choose tokens
    kernel_packing.py  the one that packs a forest
    kernel_forests.py  the forests they run over
    kernel_timing.py   how they are timed
    kernel_steps.py    whole forward passes on a GPU
    kernel_host.py     what a forest costs the host before kernels run
    budget_host.py     what choosing a step's nodes costs the host
    larger.py          what a model of a billion parameters takes to start: time, and memory by kind
    linear_layers.py   linear layers on a CPU, packed and not
    gpu_exactness.py   kernels and CUDA graphs, token for token what masks give
"""
