#!/usr/bin/env bash
# Everything that waits for a GPU, in one command: are the kernels right, how fast are they, and what does it come to?
#
#   bash eval/gpu_check.sh OUT_DIR [MODEL]
#
# MODEL: name or folder of a model with heads (default: smollm2-135m, which must lie in the cache: machines with a GPU may
# have no network). Runs from the repository root of a checkout that was installed with
# `pip install --no-deps --no-build-isolation -e .`; parts that fail do not keep the others from running, and each
# leaves its own log beside its results. Under ten minutes on an H100. Set QUICK=1 for what takes under two.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?where the results go}
model=${2:-smollm2-135m}
python=${PYTHON:-python}
mkdir -p "$out"
status=0

part() { # part NAME COMMAND...: its output is OUT/NAME.log
    local name=$1
    shift
    echo "== $name"
    local started=$SECONDS
    if "$@" >"$out/$name.log" 2>&1; then
        echo "   done in $((SECONDS - started)) s"
    else
        echo "   FAILED after $((SECONDS - started)) s; the end of $out/$name.log:"
        tail -n 5 "$out/$name.log" | sed 's/^/   /'
        status=1
    fi
}

nvidia-smi >"$out/nvidia-smi.txt" 2>&1
"$python" -m pip list >"$out/packages.txt" 2>/dev/null

# Right: every thread of real answers against plain greedy decoding; the next part checks kernel by kernel.
part exactness "$python" -m medusa_apar bench --model "$model" --limit 4 --max-new-tokens 256 --dtype float32 \
    --systems threads ours --check --out "$out/exactness"

# Fast: kernel by kernel, beside what else computes the same (nothing is timed while one is wrong).
if [ -n "${QUICK:-}" ]; then
    part kernels "$python" -m medusa_apar.eval.kernels --smoke --out "$out/kernels"
    exit $status
fi
part kernels "$python" -m medusa_apar.eval.kernels --out "$out/kernels"
part steps "$python" -m medusa_apar.eval.kernel_steps --out "$out/steps"
if command -v compute-sanitizer >/dev/null; then
    part sanitizer compute-sanitizer --error-exitcode 1 "$python" -m medusa_apar.eval.kernels --smoke --out "$out/sanitized"
fi

# What it comes to: whole answers, in turns with transformers' own static cache and compile.
part bench "$python" -m medusa_apar bench --model "$model" --limit 8 --max-new-tokens 256 \
    --systems hf hf-compiled ours-ar threads heads ours --out "$out/bench"
exit $status
