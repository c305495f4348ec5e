#!/usr/bin/env bash
# Everything that waits for a GPU, in one command: are the kernels right, how fast are they, and what does it come to?
#
#   bash eval/gpu_check.sh OUT_DIR [PART...]
#
# Parts, in this order (default: all): kernels exactness steps bench sanitizer. Each leaves its log and results in
# OUT_DIR and has a limit of its own, so that one that hangs or fails does not keep the others from running; results
# are written as they come. Where a call may take ten minutes only: `kernels exactness` in one, the rest in another.
# Runs in a checkout that was installed with `pip install --no-deps --no-build-isolation -e .`. Only `bench` needs a
# model: MODEL (default smollm2-135m) must be a folder, or lie in $MEDUSA_APAR_CACHE; it is left out where it does not.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?where the results go}
shift
parts=${*:-kernels exactness steps bench sanitizer}
python=${PYTHON:-python}
model=${MODEL:-smollm2-135m}
mkdir -p "$out"
status=0

part() { # part NAME SECONDS COMMAND...
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    case " $parts " in *" $name "*) ;; *) return ;; esac
    echo "== $name"
    if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
        echo "   done in $((SECONDS - started)) s"
    else
        echo "   FAILED after $((SECONDS - started)) s; the end of $out/$name.log:"
        tail -n 5 "$out/$name.log" | sed 's/^/   /'
        status=1
    fi
}

nvidia-smi >"$out/nvidia-smi.txt" 2>&1
"$python" -m pip list >"$out/packages.txt" 2>/dev/null

# Kernel by kernel: right in every dtype (nothing is timed while one is wrong), then beside SDPA and FlexAttention.
part kernels 300 "$python" -m medusa_apar.eval.kernels --out "$out/kernels"
# The decoder: random models in float32, with graphs and without, token for token what masks give.
part exactness 240 "$python" -m medusa_apar.eval.gpu_exactness --out "$out/exactness.json"
# A forward pass beside reading its weights once.
part steps 180 "$python" -m medusa_apar.eval.kernel_steps --out "$out/steps"

# Whole answers, in turns with transformers' own static cache and compile, and every thread held against the model.
if [ -d "$model" ] || "$python" -c "import sys; from medusa_apar.models import hub; sys.exit(not hub.embedded_model_path('$model').is_dir())"; then
    part bench 360 "$python" -m medusa_apar bench --model "$model" --limit 8 --max-new-tokens 256 --dtype float32 --check \
        --systems hf hf-compiled ours-ar threads heads ours --out "$out/bench"
else
    echo "== bench: left out, $model is not here"
fi
if command -v compute-sanitizer >/dev/null; then
    part sanitizer 240 compute-sanitizer --error-exitcode 1 "$python" -m medusa_apar.eval.kernels --smoke --out "$out/sanitized"
fi
exit $status
