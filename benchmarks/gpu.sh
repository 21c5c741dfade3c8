#!/usr/bin/env bash
# Everything worth knowing on one GPU, in under nine minutes, on a machine that has Python, torch, Triton and numpy and needs neither a
# network nor an installation (transformers for the peer, pytest for the kernels' tests and safetensors for saves where they are there):
#
#   bash benchmarks/gpu.sh [FOLDER]     FOLDER (default: $OUT, or benchmarks/results/gpu-DATE) gets a file a question, and measured.md and
#                                       measured.json with all of them, the card and the versions
#
# First correctness: no timing is worth anything where it fails. Every question has its limit, together BUDGET seconds; one
# that fails or takes too long is named at the end and does not stop the others. DEVICE=cpu QUICK=1 tries the script without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-benchmarks/results/gpu-$(date +%Y-%m-%d)}}
mkdir -p "$out"
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
python=${PYTHON:-python} device=${DEVICE:-cuda} budget=${BUDGET:-530} failed=()
quick=(); [ -n "${QUICK:-}" ] && quick=(--quick)

ask() {     # ask NAME SECONDS COMMAND...
    local name=$1 limit=$2 left=$((budget - SECONDS)); shift 2
    local began=$SECONDS
    if [ "$left" -lt 5 ]; then failed+=("$name (no time left)"); return; fi
    echo "== $name"
    timeout -k 2 "$((limit < left ? limit : left))" "$@" > "$out/$name.txt" 2>&1 || failed+=("$name ($?)")
    tail -n 8 "$out/$name.txt"
    echo "   ($((SECONDS - began)) s)"
}

bench() {   # bench NAME SECONDS QUESTION ARGUMENTS...
    local name=$1 limit=$2 question=$3; shift 3
    [ -n "${QUICK:-}" ] && set --
    ask "$name" "$limit" "$python" launch/bench.py "$question" --device "$device" --rounds 5 --json "$out/$name.json" "${quick[@]}" "$@"
}

rm -f "$out"/*.json
nvidia-smi > "$out/nvidia-smi.txt" 2>&1
if "$python" -c 'import pytest' 2> /dev/null; then
    ask correctness 90 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/unit/test_nn_loss_kernel.py tests/unit/test_nn_loss.py \
        tests/process/test_no_sync.py tests/unit/test_graphed.py tests/unit/test_nn_fp8.py tests/unit/test_nn_attend_gpu.py
else
    failed+=("correctness (pytest is not installed; the questions below check themselves)")
fi

# each checks itself before it times: attention against fp64, a step's loss against the judge's and transformers'
bench attention_1024 30 attention --documents real --tokens 98304 --length 1024 --heads 12 --dtypes bfloat16
bench attention_8192 30 attention --documents 4x8192 --heads 12 --dtypes bfloat16
bench gemm_base 20 gemm --shape base --tokens 98304

base=(--shape base --row-tokens 16384) large=(--shape large --row-tokens 16384)
bench step_base_1024 65 step "${base[@]}" --length 1024 --rows 2,6 --compile off,blocks --profile
bench step_base_1024_backends 40 step "${base[@]}" --length 1024 --rows 4 --attention all
bench step_base_1024_hf 45 step "${base[@]}" --length 1024 --rows 2 --against hf --kinds padded,sorted --hf-attention best --hf-batch 32
bench step_base_8192 35 step "${base[@]}" --length 8192 --rows 2,4 --batches 2
bench step_large_1024 35 step "${large[@]}" --length 1024 --rows 3 --batches 2 --precision autocast,fp8
bench step_large_8192 35 step "${large[@]}" --length 8192 --rows 1,2 --batches 2
bench step_17m_1024 40 step --shape 17m --row-tokens 16384 --length 1024 --rows 1,8 --compile off,blocks --graphs off,micro_step --profile
bench gemm_large 10 gemm --shape large --tokens 65536
bench optimizer_base 20 optimizer --shape base
bench checkpoint_base 25 checkpoint --shape base
bench loss_memory 10 loss
bench step_base_1024_hf_compiled 60 step "${base[@]}" --length 1024 --rows 2 --against hf --kinds padded,sorted --hf-attention best --hf-batch 32 --hf-compile on

files=("$out"/*.json)
[ -e "${files[0]}" ] && "$python" -m benchmarks.merge "$out/measured" "${files[@]}"
echo "== done after $SECONDS s; failed: ${failed[*]:-nothing}"
