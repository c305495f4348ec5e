"""A file of prompts in, a file of answers out: one engine, whose places are taken anew as answers end.

    python examples/batch.py prompts.txt answers.jsonl

Prompts are lines of text, or of JSON with a "prompt" where the file is called .jsonl. Answers are written as they end,
each with the number of its prompt, from 0. A prompt that cannot be answered is written with why.
"""

import json
import sys
from pathlib import Path

import medusa_apar

PROMPTS, ANSWERS = sys.argv[1:3]
MODEL = sys.argv[3] if len(sys.argv) > 3 else "smollm2-135m"

lines = [line for line in Path(PROMPTS).read_text(encoding="utf-8").splitlines() if line.strip()]
prompts = [json.loads(line)["prompt"] for line in lines] if PROMPTS.endswith(".jsonl") else lines

apar = medusa_apar.load(MODEL)
tokens: list[list[int]] = [[] for _ in prompts]
with apar.engine(max_requests=16) as engine, open(ANSWERS, "w", encoding="utf-8") as answers:

    def write(number: int, **entry: object) -> None:
        line = {"number": number, "prompt": prompts[number], **entry}
        print(json.dumps(line, ensure_ascii=False), file=answers, flush=True)

    for number, prompt in enumerate(prompts):
        chat = [{"role": "user", "content": prompt}]
        inputs = apar.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        try:
            engine.add(apar.request(str(number), inputs["input_ids"], max_new_tokens=512))
        except ValueError as error:  # longer than the model's context, say
            write(number, error=str(error))
    while engine.unfinished:
        for output in engine.step():
            number = int(output.request_id)
            tokens[number] += output.token_ids
            if output.error is not None:
                write(number, error=str(output.error))
            elif output.finish_reason is not None:
                answer = apar.tokenizer.decode(tokens[number], skip_special_tokens=True)
                write(number, answer=answer, ended=output.finish_reason)
    print(f"{len(prompts)} prompts, {engine.stats.forks} forks, {engine.stats.tokens_per_step:.1f} tokens a step")
