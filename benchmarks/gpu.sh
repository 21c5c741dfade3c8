#!/usr/bin/env bash
# Everything worth knowing on one GPU, in under nine minutes, on a machine that has Python, torch, Triton, transformers and
# pytest and needs neither a network nor an installation:
#
#   bash benchmarks/gpu.sh [FOLDER]          FOLDER (default: $OUT, or benchmarks/results/gpu) gets one file a question
#
# First correctness: no timing is worth anything where it fails. A question that fails or takes too long is named at the end
# and does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-benchmarks/results/gpu}}
mkdir -p "$out"
export PYTHONPATH=. PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
failed=()

ask() {     # ask NAME SECONDS COMMAND...
    local name=$1 limit=$2; shift 2
    local began=$SECONDS
    echo "== $name"
    timeout "$limit" "$@" > "$out/$name.txt" 2>&1 || failed+=("$name ($?)")
    tail -n 6 "$out/$name.txt"
    echo "   ($((SECONDS - began)) s)"
}

step() {    # step NAME SECONDS ARGUMENTS...
    local name=$1 limit=$2; shift 2
    ask "step_$name" "$limit" python benchmarks/step.py --device cuda --rounds 5 --json "$out/step_$name.json" "$@"
}

nvidia-smi > "$out/nvidia-smi.txt" 2>&1
ask correctness 150 python -m pytest -q -p no:cacheprovider -m gpu tests/unit/test_nn_attend_gpu.py tests/unit/test_nn_loss.py
ask gemm_base 30 python benchmarks/gemm.py --shape base --json "$out/gemm_base.json"
ask attention_1024 40 python benchmarks/attention.py --device cuda --documents 96x1024 --heads 12 --dtypes bfloat16 --json "$out/attention_1024.json"
ask attention_8192 40 python benchmarks/attention.py --device cuda --documents 4x8192 --heads 12 --dtypes bfloat16 --json "$out/attention_8192.json"

base=(--shape base --length 1024 --row-tokens 16384)
step base_1024_eager 60 "${base[@]}" --rows 6
step base_1024 90 "${base[@]}" --rows 6 --compile --profile "$out/profile_base_1024.txt"
step base_1024_half 60 "${base[@]}" --rows 3 --compile
step base_1024_hf 90 "${base[@]}" --rows 2 --compile --dropout 0 --against hf --hf-batch 32
step base_8192 60 --shape base --length 8192 --row-tokens 16384 --rows 4 --compile
step large_1024 90 --shape large --length 1024 --row-tokens 16384 --rows 3 --compile
step large_8192 90 --shape large --length 8192 --row-tokens 16384 --rows 2 --compile
step 17m_1024 60 --shape 17m --length 1024 --row-tokens 16384 --rows 8 --compile

echo "== done after $SECONDS s; failed: ${failed[*]:-nothing}"
