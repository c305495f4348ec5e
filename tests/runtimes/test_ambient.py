"""What a process is set to (default dtype and device, inference mode, deterministic fill) and what its other Python
threads do changes no token.

In processes of their own: a mistake here ends them.
"""

import subprocess
import sys
import textwrap
from pathlib import Path

PRELUDE = """
    import contextlib, copy, faulthandler, threading
    import torch
    import medusa_apar
    from medusa_apar.heads import HydraHeads, MedusaHeads
    from medusa_apar.drafting.step_cost import StepCost
    from tests.support.models import CONTROL, model_of
    from tests.support.prompts import prompts

    faulthandler.enable()
    torch.set_num_threads(1)
    COST = StepCost(((1, 10.0), (8, 14.0), (64, 70.0)), ((1, 0.5), (8, 1.0)))
    RUNTIMES = [("cpu", None), ("cpu", "int8"), ("torch", None)]
    CASES = [("cpu", None, "hydra"), ("cpu", "int8", "hydra"), ("cpu", None, "medusa"), ("torch", None, "medusa")]
    HEADS = {
        "hydra": lambda model: HydraHeads.random(model, 3, aux_layers=(1,)),
        "medusa": lambda model: MedusaHeads.random(model, 3),
    }
    CALLS = {
        "greedy": {"do_sample": False},
        "sampled": {"do_sample": True, "seed": 5, "temperature": 0.8, "top_k": 20, "repetition_penalty": 1.2},
    }

    def model():
        return model_of(seed=3, fork=1.5, eos=0.5)

    def attached(model, runtime, quantize, heads):
        how = {"runtime": runtime, "quantize": quantize, "step_cost": COST}
        return medusa_apar.attach(model, HEADS[heads](model), CONTROL, **how)

    def answers(hook):
        return [hook.generate(**INPUTS, **options, max_new_tokens=12).tolist() for options in CALLS.values()]

    INPUTS = prompts(2, 9)
"""

SETTINGS = """
    @contextlib.contextmanager
    def default(dtype):
        torch.set_default_dtype(dtype)
        yield
        torch.set_default_dtype(torch.float32)

    @contextlib.contextmanager
    def deterministic():
        torch.use_deterministic_algorithms(True)
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
        torch.use_deterministic_algorithms(False)

    SETTINGS = {
        "default dtype bfloat16": lambda: default(torch.bfloat16),
        "default dtype float64": lambda: default(torch.float64),
        "default device meta": lambda: torch.device("meta"),
        "inference mode": torch.inference_mode,
        "gradients": torch.enable_grad,
        "deterministic fill": deterministic,
    }
    its = model()
    for case in CASES:
        hook = attached(its, *case)
        alone = answers(hook)
        for name, setting in SETTINGS.items():
            other = copy.deepcopy(its)  # whose weights are packed under the setting
            with setting():
                assert answers(hook) == answers(attached(other, *case)) == alone, (name, case)
"""

TOGGLED = """
    expected = {case: answers(attached(model(), *case)) for case in CASES}
    done = threading.Event()

    def load_models():  # what `from_pretrained(dtype=...)` does to the process while it builds a model
        while not done.is_set():
            for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
                torch.set_default_dtype(dtype)

    its = {case: model() for case in CASES}
    loader = threading.Thread(target=load_models)
    loader.start()
    try:
        for case, alone in expected.items():
            for _ in range(2):
                assert answers(attached(its[case], *case)) == alone, case
    finally:
        done.set()
        loader.join()
        torch.set_default_dtype(torch.float32)
"""

AT_ONCE = """
    def at_once(*works):
        wrong, start = [], threading.Barrier(len(works))

        def run(work):
            try:
                start.wait()
                for _ in range(2):
                    work()
            except BaseException as error:
                wrong.append(repr(error))

        threads = [threading.Thread(target=run, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong, wrong

    greedy = {"do_sample": False, "max_new_tokens": 16}
    for runtime, quantize in RUNTIMES:
        fresh = model()
        heads = HydraHeads.random(fresh, 3, aux_layers=(1,))
        how = {"runtime": runtime, "quantize": quantize, "step_cost": COST}
        alone = medusa_apar.attach(copy.deepcopy(fresh), copy.deepcopy(heads), CONTROL, **how)
        alone = alone.generate(**INPUTS, **greedy)
        logits = fresh(**INPUTS).logits.detach()

        def attaches():  # nothing is packed yet
            hook = medusa_apar.attach(fresh, heads, CONTROL, **how)
            assert torch.equal(hook.generate(**INPUTS, **greedy), alone)

        at_once(*[attaches] * 4)
        shared = medusa_apar.attach(fresh, heads, CONTROL, **how)

        def generates():
            assert torch.equal(shared.generate(**INPUTS, **greedy), alone)

        def passes():
            torch.testing.assert_close(fresh(**INPUTS).logits, logits, rtol=1e-3, atol=1e-3)

        def trains():
            with torch.enable_grad():
                loss = fresh(INPUTS["input_ids"], labels=INPUTS["input_ids"]).loss
                assert all(map(torch.is_tensor, torch.autograd.grad(loss, list(fresh.parameters()))))

        other = "torch" if runtime == "cpu" else "cpu"

        def by_the_other_runtime():
            medusa_apar.attach(fresh, None, CONTROL, runtime=other).generate(**INPUTS, **greedy)

        at_once(generates, generates, passes, trains, by_the_other_runtime)
"""


def run(script):
    whole = textwrap.dedent(PRELUDE) + textwrap.dedent(script)
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", whole], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_under_whatever_a_process_is_set_to():
    run(SETTINGS)


def test_while_another_thread_changes_the_default_dtype():
    run(TOGGLED)


def test_calls_passes_and_training_at_once():
    run(AT_ONCE)
