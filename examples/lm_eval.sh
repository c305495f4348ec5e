#!/usr/bin/env bash
# lm-evaluation-harness against `medusa-apar serve`: the server scores each choice, as `echo` with `logprobs` tells it.
#
#     bash examples/lm_eval.sh
#
# Needs `medusa-apar serve` in another terminal, and `pip install 'lm-eval[api]' transformers`. The task is our own
# (examples/lm_eval/capitals.yaml), small and without a download; any other of `lm_eval ls tasks` goes in its place.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-smollm2-135m}
TOKENIZER=${TOKENIZER:-HuggingFaceTB/SmolLM2-135M-Instruct} # what counts the tokens of a prompt here: a name or a folder
OPENAI_BASE_URL=${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}

lm_eval run --model local-completions \
    --model_args "model=$MODEL,tokenizer=$TOKENIZER,base_url=$OPENAI_BASE_URL/completions,num_concurrent=8,max_length=2048" \
    --include_path examples/lm_eval --tasks capitals --output_path "${OUT:-lm-eval-results}"
