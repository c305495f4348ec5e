"""The base teaches what it would write on each path without the control tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from medusa_apar.finetune.adapter import attach_lora, label_losses
from medusa_apar.finetune.distil import check_teaches, divergence, ending_tokens, without_control
from medusa_apar.finetune.lora_linear import frozen_alone, lean_lora
from medusa_apar.finetune.packing import Tokens, join, pack_threads
from tests.support.byte_chat import byte_model, byte_tokenizer

TOKENS = Tokens(fork=3, child=4, eos=2)
ENDS = torch.tensor([2, 10])


@st.composite
def forking_threads(draw):
    """Threads as training has them: every `[Fork]` may have a child, and every child begins with `[Child]`."""
    ids = st.lists(st.sampled_from([3, *range(5, 40)]), max_size=8)
    threads = [([7, *draw(ids)], -1, 0)]
    for _ in range(draw(st.integers(0, 5))):
        free = [(number, at) for number, (ids_, _, _) in enumerate(threads) for at, id in enumerate(ids_) if id == 3]
        if not free:
            break
        parent, fork = draw(st.sampled_from(free))
        threads.append(([4, *draw(ids), 2], parent, fork))
    return threads


@pytest.fixture(scope="module")
def tuned():
    tuned = attach_lora(byte_model(), byte_tokenizer(), TOKENS, rank=2)
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return tuned


def path(row, at):
    places = []
    while at >= 0:
        places.append(at)
        at = int(row.parents[at])
    return row.input_ids[places[::-1]].tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(forking_threads(), min_size=1, max_size=2))
def test_each_label_is_taught_by_the_base_on_its_plain_path(tuned, trees):
    row = join([pack_threads(threads) for threads in trees])
    with lean_lora(tuned):
        found = label_losses(tuned, row, TOKENS, ENDS).from_base
    base, expected = byte_model(), []
    labels = row.labels()
    for at in (labels >= 0).nonzero()[:, 0].tolist():
        if labels[at] == TOKENS.fork or row.input_ids[at] == TOKENS.fork:
            continue
        whole = path(row, at)
        plain = [token for token in whole if token not in (TOKENS.fork, TOKENS.child)]
        with torch.no_grad():
            teacher = base(input_ids=torch.tensor([plain])).logits[0, -1]
            student = tuned(input_ids=torch.tensor([whole])).logits[0, -1]
        left_out = [TOKENS.fork, TOKENS.child, *([] if row.in_trunk[at] else ENDS.tolist())]
        stay = torch.ones(len(teacher), dtype=torch.bool)
        stay[left_out] = False
        p, q = (logits[stay].softmax(-1) for logits in (teacher, student))
        expected.append((p * (p / q).log()).sum())
    torch.testing.assert_close(found, torch.stack(expected) if expected else torch.zeros(0), atol=1e-4, rtol=1e-3)


def test_an_adapter_that_changes_nothing_is_nowhere_from_the_base(tokens):
    fresh = attach_lora(byte_model(), byte_tokenizer(), tokens, rank=2)
    with lean_lora(fresh):
        found = label_losses(fresh, pack_threads([([5, 6, 7, 8, 9], -1, 0)]), tokens, ENDS).from_base
    assert len(found) == 4
    torch.testing.assert_close(found, torch.zeros(4), atol=1e-5, rtol=0)


def test_the_divergence_has_a_gradient_where_tokens_are_left_out():
    student = torch.randn(2, 12, requires_grad=True)
    loss = divergence(student, torch.randn(2, 12), torch.tensor([True, False]), TOKENS, ENDS)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert bool(gradient.isfinite().all()) and bool((gradient[:, [3, 4]] == 0).all())
    assert float(gradient[0, 2].abs()) > 0 and bool((gradient[1, [2, 10]] == 0).all())


def test_the_base_is_alone_in_its_own_thread_only(tuned):
    from concurrent.futures import ThreadPoolExecutor

    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), lean_lora(tuned):
        adapted = tuned(input_ids=ids).logits
        with frozen_alone(tuned), ThreadPoolExecutor(1) as other:
            # Without the control tokens' own rows, which are peft's to put in.
            alone, plain = (model(input_ids=ids).logits[..., 5:] for model in (tuned, byte_model()))
            torch.testing.assert_close(alone, plain)
            assert bool((other.submit(torch.no_grad()(lambda: tuned(input_ids=ids).logits)).result() == adapted).all())


def test_the_base_alone_is_refused_where_nothing_switches(tuned):
    with pytest.raises(RuntimeError, match="within lean_lora"), frozen_alone(tuned):
        pass


@pytest.mark.parametrize("changes", [{"modules_to_save": ["norm"]}, {"bias": "lora_only"}])
def test_an_adapter_that_changes_more_than_products_is_not_taught(changes):
    tuned = get_peft_model(byte_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **changes))
    with pytest.raises(ValueError, match="leave --distil out"):
        check_teaches(tuned)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(0, 2**32))
def test_the_gradient_is_that_of_the_formula(rows, seed):
    """Over more rows than are worked on at a time."""
    torch.manual_seed(seed)
    student, teacher = torch.randn(rows, 12, dtype=torch.double), torch.randn(rows, 12, dtype=torch.double)
    in_trunk, weights = torch.rand(rows) < 0.5, torch.rand(rows, dtype=torch.double)
    found = []
    for own in (True, False):
        logits = student.clone().requires_grad_()
        if own:
            values = divergence(logits, teacher, in_trunk, TOKENS, ENDS)
        else:
            left_out = torch.zeros(rows, 12, dtype=torch.bool)
            left_out[:, [3, 4]] = True
            left_out[~in_trunk, 2] = left_out[~in_trunk, 10] = True
            q, p = (each.masked_fill(left_out, -torch.inf).softmax(-1) for each in (logits, teacher))
            values = torch.where(left_out, 0.0, p * (p / q.masked_fill(left_out, 1.0)).clamp(min=1e-300).log()).sum(-1)
        found.append((values, torch.autograd.grad((values * weights).sum(), logits)[0]))
    torch.testing.assert_close(*found)


def test_a_prompt_that_begins_with_a_control_token_is_refused():
    with pytest.raises(ValueError, match="begins with"):
        without_control(pack_threads([([3, 5, 6], -1, 0)]), TOKENS)


def test_line_breaks_and_the_end_of_text_are_ends():
    tokenizer = byte_tokenizer()
    model = byte_model()
    model.generation_config.eos_token_id = [TOKENS.eos, 77]
    found = ending_tokens(tokenizer, model, TOKENS).tolist()
    assert 77 in found
    assert TOKENS.eos in found and tokenizer("\n", add_special_tokens=False)["input_ids"][0] in found
    assert not set(tokenizer("abc .", add_special_tokens=False)["input_ids"]) & set(found)
