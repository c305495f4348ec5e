#!/usr/bin/env bash
# An adapter that forks, and heads that guess for it, from 200 chats of your own; then an answer that both write.
#
#     bash examples/tune_on_200_chats.sh chats.jsonl my-model
#
# Needs `pip install 'medusa-apar[train]'`. A line of chats.jsonl is a conversation whose last answer is learned:
# {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
# It takes a quarter of an hour on two cores, and goes on where it was when started again after a kill. What forks is
# lists and titled paragraphs: of 200 chats some fifty should have them, and they teach where to fork, no more than that.
set -euo pipefail
CHATS=$1 OUT=$2 BASE=${3:-smollm2-135m}

# Answers become paragraph trees, and the model learns to fork where they do. With so few of them nearly all are written
# forked, and plain answers get a smaller share than the half that is usual.
medusa-apar data "$CHATS" --out "$OUT/trees"
medusa-apar finetune --base "$BASE" --data "$OUT/trees" --out "$OUT/tuned" --epochs 4 --max-minutes 8 \
    --plain-share 0.3 --in-line-share 0.1 --mixed-share 0.1 --update-tokens 1024 --lr 1e-3 --row-lr 1e-2

# Heads learn from answers of the tuned model and from the chats' own. In the adapter's folder they are found with it.
medusa-apar train-heads --model "$OUT/tuned/adapter" --out "$OUT/tuned/adapter/medusa" --kind hydra \
    --prompts "$CHATS" --count 40 --max-new-tokens 160 --copy "$CHATS" --batch 512 --max-minutes 10
medusa-apar calibrate --model "$OUT/tuned/adapter" --heads "$OUT/tuned/adapter/medusa" --out "$OUT/calibration" --write \
    --prompts "$CHATS" --count 40 --max-new-tokens 160

medusa-apar generate "What are the key skills of a good leader?" --model "$OUT/tuned/adapter" --json
