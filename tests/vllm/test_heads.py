"""The Medusa heads that ship, as `convert --to vllm` writes them: vLLM loads them, and is as often right."""

import asyncio

from medusa_apar.eval.vllm_answers import asked_again, opened
from medusa_apar.heads import vllm_layout
from medusa_apar.models.sources import shipped_weights


def test_exported_heads_load_and_change_nothing(merged, answers, tmp_path):
    number = vllm_layout.export(shipped_weights("smollm2-135m") / "medusa", merged, tmp_path / "heads")
    drafter = {"method": "medusa", "model": str(tmp_path / "heads"), "num_speculative_tokens": number}

    async def asked():
        engine = await opened(merged, speculative_config=drafter)
        try:
            return await asked_again(engine, answers[:2]), engine.stats()
        finally:
            await engine.close()

    texts, stats = asyncio.run(asked())
    assert texts == [answer.text_ids for answer in answers[:2]]
    assert set(stats.drafted) == set(stats.accepted) == {"medusa"}
    # The first head is right one time in four; heads that are read wrongly hardly ever are.
    assert stats.accepted.total() > 0.15 * stats.drafts.total() > 0
