"""llama.cpp's own HTTP server: `llama_server.py FILE HOST PORT THREADS CLIENTS CONTEXT`; it ends with SIGTERM."""

import signal
import sys
import threading

import xllamacpp

file, host = sys.argv[1:3]
port, threads, clients, context = map(int, sys.argv[3:])
params = xllamacpp.CommonParams()
params.model.path = file
params.hostname, params.port = host, port
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
# Each of its slots has an equal part of the context.
params.n_parallel, params.n_ctx = clients, clients * context
params.cont_batching, params.cache_ram_mib = True, 0

ended = threading.Event()
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: ended.set())
server = xllamacpp.Server(params)
ended.wait()
