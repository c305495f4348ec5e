"""Runs steps for requests that join and leave at any of them: plan, forward, verify, commit, draft.

engine.py        `Engine`: add, abort, step, close
outputs.py       what a step brings one request
async_engine.py  the same for asyncio, over a thread that steps
inbox.py         what one reader of its outputs has not read yet
vllm/            the same verbs over vLLM
options.py       how an engine decodes, whatever its requests ask for
admission.py     which requests can ever be answered
scheduler.py     the queue, and which threads run in a step with how many draft nodes
plan.py          what a step will run
segments.py      a planned step's threads as segments of a forest
row_worth.py     which threads are worth their row beside so many others
slot_needs.py    how many slots an answer will hold at most
prefix_hits.py   what requests take from the prefix cache
commit.py        what a verified segment does to threads and slots
stopping.py      stopping criteria, limits and end tokens as transformers says them, and stop strings
rescoring.py     a finished answer held against plain decoding, weak threads written anew
draft_watch.py   says once where heads guess no better than chance
counting.py      what is counted of its steps, and how it stands between two
stats.py         what an engine counted and measured
"""
