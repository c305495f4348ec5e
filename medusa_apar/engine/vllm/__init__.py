"""An `AsyncEngine` over vLLM: every thread of an answer is a request of its own, whose prompt is the thread's path.

Prefix caching shares the paths' blocks, closing a stream cancels a thread, and whatever vLLM distributes stays vLLM's.
Nothing of vLLM is imported before `compat` is asked for it.

options.py         `VllmOptions`: how answers become requests of vLLM
vllm_engine.py     `VllmEngine`: admission by answers, and one task for each
answer.py          one answer: a task for each of its threads, and what their tokens do to its tree
part.py            what one request of vLLM is asked for: a part of a thread
sampling.py        a request's processors in vLLM's words
lead.py            which threads wait, since nobody would read what they wrote now
reading_order.py   priorities by reading order
compat.py          every name of vLLM that is used, and the versions they were tried with
"""
