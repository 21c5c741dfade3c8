#!/usr/bin/env bash
# Everything worth knowing on one GPU, in under nine minutes, on a machine that has Python, torch, Triton and numpy and needs neither a
# network nor an installation (transformers for the peer, pytest for the kernels' tests and safetensors for saves where they are there):
#
#   bash benchmarks/gpu.sh [FOLDER]     FOLDER (default: benchmarks/results/gpu-DATE) gets a file a question, and measured.md and
#                                       measured.json with all of them, the card and the versions. Where OUT names a folder, as on
#                                       machines that give back a few files, it gets those two and all.tgz, after every question
#
# First correctness, but for what compiles long: no timing is worth anything where it fails. Every question has its limit, all
# together BUDGET seconds; one that fails, takes too long or finds no time left is named at the end (exit code 1) and does not stop
# the others. DEVICE=cpu QUICK=1 tries the script without a GPU, each question with its smallest settings.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/gpu-$(date +%Y-%m-%d)}
mkdir -p "$out"
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# torch 2.11 takes cuDNN's attention first on Hopper, which makes a plan for every shape of a batch: half a second each, by reports
export TORCH_CUDNN_SDPA_DEPRIORITIZED=1
set -m                    # each question is a process group, and Ctrl-C comes here
python=${PYTHON:-$(command -v python || command -v python3)} device=${DEVICE:-cuda} budget=${BUDGET:-530} failed=() files=() child=
quick=(); [ -n "${QUICK:-}" ] && quick=(--quick)

keep() {
    [ -n "${OUT:-}" ] || return 0
    tar -czf "$OUT/all.tgz" -C "$out" .
    cp "$out"/measured.* "$OUT" 2> /dev/null
}

stop() {
    [ -n "$child" ] && kill -TERM "$child" 2> /dev/null
    keep
    echo "== stopped; what was answered lies in $out"
    exit 130
}
trap stop INT TERM

ask() {     # ask NAME SECONDS COMMAND...
    local name=$1 limit=$2 left=$((budget - SECONDS)); shift 2
    local began=$SECONDS
    if [ "$left" -lt 5 ]; then failed+=("$name (no time left)"); return; fi
    echo "== $name"
    # INT: pytest still names what has failed
    [ "$device" = cpu ] && limit=$((6 * limit))
    limit=$((limit < left ? limit : left))
    timeout -s INT -k 5 "$limit" "$@" > "$out/$name.txt" 2>&1 & child=$!
    wait "$child"
    case $? in 0) ;; 124 | 137) failed+=("$name (longer than $limit s)") ;; *) failed+=("$name (see $out/$name.txt)") ;; esac
    child=
    tail -n 8 "$out/$name.txt"
    keep
    echo "   ($((SECONDS - began)) s)"
}

bench() {   # bench NAME SECONDS QUESTION ARGUMENTS...
    local name=$1 limit=$2 question=$3; shift 3
    [ -n "${QUICK:-}" ] && set --
    rm -f "$out/$name.json"
    ask "$name" "$limit" "$python" launch/bench.py "$question" --device "$device" --rounds 5 --json "$out/$name.json" "${quick[@]}" "$@"
    [ -e "$out/$name.json" ] && files+=("$out/$name.json")
}

nvidia-smi > "$out/nvidia-smi.txt" 2>&1
if "$python" -c 'import pytest' 2> /dev/null; then
    tests=("$python" -m pytest -q -p no:cacheprovider --show-capture=no --tb=short -m gpu)
    ask correctness 60 "${tests[@]}" -k "not flex and not sdpa and not tiles" tests/unit/nn/test_loss_kernel.py tests/unit/nn/test_loss.py \
        tests/unit/optim/test_rules.py tests/unit/engine/test_transfers.py tests/process/test_no_sync.py tests/unit/engine/test_graphed.py tests/unit/nn/test_fp8.py \
        tests/unit/nn/test_attend_gpu.py
else
    tests=()
    failed+=("correctness (pytest is not installed; the questions below check themselves)")
fi

# each checks itself before it times: attention against fp64, a step's loss against the judge's and transformers'
bench attention_1024 30 attention --documents real --tokens 98304 --length 1024 --heads 12 --dtypes bfloat16
bench attention_8192 30 attention --documents 4x8192 --heads 12 --dtypes bfloat16
bench gemm_base 20 gemm --shape base --tokens 98304

base=(--shape base --row-tokens 16384) large=(--shape large --row-tokens 16384)
bench step_base_1024 75 step "${base[@]}" --length 1024 --rows 2,6 --compile off,blocks --profile
bench step_base_1024_backends 60 step "${base[@]}" --length 1024 --rows 4 --attention all
peer=(--length 1024 --rows 2 --batches 2 --against hf --kinds padded,sorted --hf-attention best --hf-batch 32)
bench step_base_1024_hf 60 step "${base[@]}" "${peer[@]}"
bench step_base_8192 35 step "${base[@]}" --length 8192 --rows 2,4 --batches 2
bench step_large_1024 35 step "${large[@]}" --length 1024 --rows 3 --batches 2 --precision autocast,fp8
bench step_large_8192 35 step "${large[@]}" --length 8192 --rows 1,2 --batches 2
bench step_17m_1024 40 step --shape 17m --row-tokens 16384 --length 1024 --rows 1,8 --compile off,blocks --graphs off,micro_step --profile
bench gemm_large 10 gemm --shape large --tokens 65536
bench optimizer_base 20 optimizer --shape base
bench checkpoint_base 30 checkpoint --shape base --rounds 2
bench loss_memory 10 loss
bench step_base_1024_hf_compiled 60 step "${base[@]}" "${peer[@]}" --hf-compile on
# last, for every question above checks the backends that it times: flex compiles for each width, window and set of documents
[ ${#tests[@]} -gt 0 ] && ask correctness_slow 90 "${tests[@]}" -k "flex or sdpa or tiles" tests/unit/nn/test_attend_gpu.py

[ ${#files[@]} -gt 0 ] && "$python" -m benchmarks.merge "$out/measured" "${files[@]}"
keep
echo "== done after $SECONDS s; failed: ${failed[*]:-nothing}"
[ ${#failed[@]} -eq 0 ]
