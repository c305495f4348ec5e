"""An EAGLE-3 drafter that we train and `convert` writes: vLLM loads it, and accepts of it what a chain is worth here.

The drafter learns one of the answers that are asked for, so that it is often right. All is float32 and greedy, so that
both engines have the same drafts to accept, to the last one.
"""

import asyncio
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest

from medusa_apar.eval.vllm_answers import asked_again, native, opened
from medusa_apar.heads.convert import convert

QUESTIONS = ("How can I sleep better at night?", "Why do leaves change their colour in autumn?")
LIMIT, CHAIN = 64, 3


def trained(model, folder, answers):
    """Trains a drafter into `folder`; of our own engine, drafting with it in chains, the texts and how many nodes of
    each chain were accepted."""
    from medusa_apar import DraftTree
    from medusa_apar.heads.answers import AnswerFile
    from medusa_apar.heads.eagle3.train import Settings, train
    from medusa_apar.job import Job
    from medusa_apar.loading import load

    plain = load(model, heads=None, dtype="float32", device="cpu")
    records = [
        {"prompt_ids": prompt, "threads": [{"parent": -1, "fork_index": 0, "token_ids": text}]}
        for prompt, text in answers
    ]
    settings = Settings(draft_vocab=4096, epochs=60, lr=2e-3, batch=128, rounds=CHAIN, eval_every=1000)
    with Job(folder, "train-heads", {}) as job:
        train(plain.model, AnswerFile(records), folder, settings, job)
    tree = DraftTree([(0,) * depth for depth in range(1, CHAIN + 1)])
    apar = load(model, heads=folder, dtype="float32", device="cpu", speculation="even", draft_tree=tree)
    texts, drafts = [], Counter()
    for prompt, _ in answers:
        request = apar.request("one", prompt, max_new_tokens=LIMIT, fork="off")
        with apar.engine() as engine:
            engine.add(request)
            while engine.unfinished:
                engine.step()
            drafts.update(engine.stats.drafts)
        texts.append(list(request.text_ids))
    return texts, drafts


@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
def test_vllm_accepts_of_an_exported_drafter_what_we_do(merged, tmp_path, layout):
    answers = native(merged, [(question, "off") for question in QUESTIONS], LIMIT)
    asked = [(answer.prompt_ids, answer.text_ids) for answer in answers]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        texts, drafts = pool.submit(trained, str(merged), tmp_path / "drafter", asked).result()
    assert texts == [answer.text_ids for answer in answers]
    convert(tmp_path / "drafter", layout, tmp_path / "exported", base=str(merged))
    speculation = {"method": "eagle3", "model": str(tmp_path / "exported"), "num_speculative_tokens": CHAIN}

    async def over_vllm():
        engine = await opened(merged, speculative_config=speculation)
        try:
            return await asked_again(engine, answers), engine.stats()
        finally:
            await engine.close()

    again, stats = asyncio.run(over_vllm())
    assert again == texts
    # The last step of a text is cut at its end here and drafted in full there.
    for accepted in range(CHAIN + 1):
        assert abs(stats.drafts[accepted] - drafts[accepted]) <= len(QUESTIONS)
    # One of the two prompts is held out; a drafter that is read wrongly is hardly ever right.
    assert stats.accepted.total() > 0.15 * stats.drafts.total() * CHAIN > 0
