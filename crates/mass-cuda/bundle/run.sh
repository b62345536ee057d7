#!/bin/sh
# Checks a GPU and measures it: ./run.sh [FILE], which gets the tables (cuda.md unless named).
#
# The machine needs a driver and a shell, nothing else. All is meant to take under six minutes. With MASS_BUNDLE_SMALL=1 sizes are
# tiny, for an emulated driver. Exit code 0 if everything passed.
set -u
here=$(cd "$(dirname "$0")" && pwd)
report=${1:-cuda.md}
case $report in /*) ;; *) report=$(pwd)/$report ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
small=${MASS_BUNDLE_SMALL:-}
failed=0
begin=$(date +%s)

say() { printf '%s\n' "$@" | tee -a "$report"; }
# A block of a command's output: block TITLE COMMAND...
block() {
    title=$1
    shift
    say "" "## $title" "" '```text'
    # The output is looked at as it comes, and its code kept. What leaves none has not ended by itself.
    echo 1 >"$work/code"
    { "$@" 2>&1; echo $? >"$work/code"; } | tee -a "$report"
    code=$(cat "$work/code")
    say '```'
    if [ "$code" -ne 0 ]; then
        failed=1
        say "" "FAILED, exit code $code."
    fi
}

: >"$report"
say "# On a GPU" "" "Made by \`run.sh\` of \`cargo xtask cuda-bundle\`, of $(cat "$here/version")."
say "Times are medians after steps that do not count; percentages are of the multiply-adds that the card makes in registers."

machine() {
    date -u
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv || true
    else
        echo 'no nvidia-smi'
    fi
}
block 'The machine' machine

# Results of tests alone: names of hundreds that passed help nobody.
tests() {
    name=$1
    shift
    if MASS_CUDA_REAL=1 "$here/bin/$name" --test-threads=1 "$@" >"$work/$name.log" 2>&1; then
        grep '^test result' "$work/$name.log"
        if grep -q '^test result: ok. 0 passed' "$work/$name.log"; then
            echo "no test of $name is called $*"
            return 1
        fi
    else
        grep -v ' ok$' "$work/$name.log"
        return 1
    fi
}
parity() {
    code=0
    if [ -n "$small" ]; then
        tests mass-cuda elementwise:: || code=1
        tests mass-model cuda::a_training_pass || code=1
    else
        tests mass-cuda --skip faults:: --skip buffers:: --skip without_driver:: --skip emulated_ || code=1
        tests mass-model cuda:: cuda_growth:: || code=1
    fi
    return $code
}
block 'Parity: every kernel, passes, growth, checkpoints' parity

# NVIDIA's own look for wrong accesses; it comes with toolkits, not with drivers.
sanitised() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo 'no compute-sanitizer'
        return 0
    fi
    which='moe:: attention:: routing:: norms:: --skip emulated_'
    [ -z "$small" ] || which=norms::
    # shellcheck disable=SC2086
    if MASS_CUDA_REAL=1 compute-sanitizer --error-exitcode 9 "$here/bin/mass-cuda" --test-threads=1 $which \
        >"$work/sanitised.log" 2>&1; then
        grep -E '^test result|ERROR SUMMARY' "$work/sanitised.log"
    else
        grep -v ' ok$' "$work/sanitised.log"
        return 1
    fi
}
block 'Accesses to memory' sanitised

# A text of its own, the same everywhere.
i=0
while [ $i -lt 400 ]; do
    echo "line $i: $((i * i % 97)) experts took $((i * 7 % 31)) tokens, and $((i * 13 % 11)) went nowhere."
    i=$((i + 1))
done >"$work/text"
sizes=
if [ -n "$small" ]; then
    sizes='--dim 16 --hidden 16 --heads 2 --seq 16 --batch 2'
fi
train() {
    out=$1
    shift
    # shellcheck disable=SC2086
    "$here/bin/mass-bench" train --text "$work/text" --out "$work/$out" --experts 4 --experts-max 8 $sizes "$@"
}
# The weights that a run has left.
weights() { find "$work/$1" -name model.safetensors | sort | tail -n 1; }

three() {
    code=0
    sums=
    for run in 1 2 3; do
        train "same$run" --steps 20 --device cuda >"$work/log" 2>&1 || { cat "$work/log"; return 1; }
        sums="$sums $(cksum <"$(weights "same$run")" | tr ' ' ':')"
    done
    # shellcheck disable=SC2086
    set -- $sums
    echo "weights after 20 steps, checksum:bytes: $*"
    [ "$1" = "$2" ] && [ "$2" = "$3" ] || { echo 'three runs differ'; code=1; }
    return $code
}
block 'The same bits in three runs' three

if [ -n "$small" ]; then
    block 'Kernels' "$here/bin/speed" 2 small
    block 'Steps' "$here/bin/cuda_steps" 2 small
else
    block 'Kernels' "$here/bin/speed" 20
    block 'Steps, with AdamW' "$here/bin/cuda_steps" 50
fi
peer() {
    if command -v python3 >/dev/null; then
        python3 "$here/peer.py" 20
    else
        echo 'no python3: PyTorch was not measured'
    fi
}
block 'PyTorch, eager and compiled' peer

crossing() {
    steps=300
    [ -z "$small" ] || steps=110
    train whole --steps $steps --device cuda || return 1
    train moved --steps $steps --device cuda >"$work/log" 2>&1 &
    child=$!
    while [ ! -d "$work/moved/checkpoints" ] && kill -0 $child 2>/dev/null; do sleep 0.05; done
    if kill -TERM $child 2>/dev/null; then
        wait $child
        echo 'interrupted on the GPU; the CPU goes on:'
    else
        wait $child || { cat "$work/log"; return 1; }
        echo 'it had ended before it could be interrupted: nothing crossed'
        return 0
    fi
    train moved --steps $steps --resume --device cpu || return 1
    grep -A 3 '"devices"' "$work/moved/results.json" || { echo 'it has not crossed'; return 1; }
    for run in whole moved; do
        grep -o '"test_loss": *[0-9.]*' "$work/$run/results.json" | head -n 1 | sed 's/.*: *//' >"$work/$run.loss"
        echo "$run: test loss $(cat "$work/$run.loss")"
    done
    # Sums of other orders, in a run that splits: a twentieth apart would be another run.
    paste "$work/whole.loss" "$work/moved.loss" | awk '{ d = $1 - $2; if (d < 0) d = -d; exit !(d < 0.05 * $1) }' ||
        { echo 'the losses differ'; return 1; }
}
block 'Training with growth, and a checkpoint that crosses to the CPU' crossing

seconds=$(($(date +%s) - begin))
if [ $failed -eq 0 ]; then
    say "" "All passed, in $seconds s."
else
    say "" "Something FAILED, see above; $seconds s."
fi
exit $failed
