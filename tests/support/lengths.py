"""How long test files take, and what may be skipped where."""

from __future__ import annotations

import re
from pathlib import Path

# Files that take minutes go first, the longest before all others, so that no process is left with one at the end.
LONG = (
    "test_interpreted.py",
    "test_notebooks.py",
    "test_readme.py",
    "test_examples.py",
    "test_schedules.py",
    "test_eagle3_train.py",
    "test_eagle3_engine.py",
    "test_browser.py",
    "test_real_model.py",
    "test_aot.py",
    "test_rescoring.py",
    "test_threads.py",
)

# Files and folders below tests/ that `make test` leaves to `make test-all`, which CI runs. Each with why a change is
# safe without them: none of them alone holds a promise on the machine at hand.
SLOW = {
    "triton_kernels/test_interpreted.py": "GPU kernels, interpreted: whoever changes one names this file",
    "triton_kernels/test_aot.py": "GPU kernels, compiled ahead of time",
    "eval": "benchmarks measure; they decide nothing",
    "test_notebooks.py": "four notebooks from beginning to end",
    "test_readme.py": "every command of the READMEs",
    "test_examples.py": "every example, as a process of its own",
    "test_real_model.py": "the tiny models' tests, once more with the model that ships",
    "heads/eagle3/test_eagle3_train.py": "trains drafters",
    "serve/test_browser.py": "the page in a browser",
    "serve/test_openai_real.py": "the API once more with the model that ships",
    "runtimes/cpu/test_arm.py": "Arm's compiled code, in an emulator",
    "test_packaging.py": "builds sdist and wheel",
}

# What a test may be skipped for even where $MEDUSA_APAR_CI says that everything is installed: another processor or
# system, data that are not ours to ship, or an environment of its own that another command makes and tests.
OTHERWHERE = re.compile(
    r"(Skipped: )?(this processor is no .*|no x86 processor with AVX2|torch without oneDNN|they run here|there is one"
    r"|this kernel does not tell of pages|nobody tells how long a thread waits|only Linux tells of memory by kind"
    r"|there is no uv|pytest collects the folder itself|needs the benchmarks' files|vLLM: .*"
    r"|(vLLM is not installed|litellm's environment is absent|lm-eval's environment is absent): make .* makes .*)"
)


def is_slow(path: Path, tests: Path) -> bool:
    """Whether `make test` leaves a test file out; `tests` is the folder above all of them."""
    if tests not in path.parents:
        return False
    name = path.relative_to(tests)
    return any(entry in SLOW for entry in (name.as_posix(), *(parent.as_posix() for parent in name.parents)))
