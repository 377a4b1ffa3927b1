#!/usr/bin/env bash
# Tests and measurements on a machine with one NVIDIA GPU, in at most seven minutes:
#
#     tests/gpu/run.sh OUT                        all stages
#     tests/gpu/run.sh OUT step profile           these stages, each with the time of all until its end
#     tests/gpu/run.sh --toy OUT                  on the CPU, at sizes that measure nothing
#     tests/gpu/run.sh --peak-flops 312e12 OUT    on a card that is no H100 (dense bfloat16)
#
# A stage ends at its second of the list below at the latest, and a failing one does not stop the next. Each
# writes OUT/STAGE.log, and OUT/STAGE.json as results come; OUT/summary.json is rewritten after each.
set -uo pipefail

declare -A ends=([tests]=150 [gather]=250 [step]=370 [profile]=420)
order=(tests gather step profile)

toy=() peak=()
while [ $# -gt 1 ]; do
    case $1 in
    --toy) toy=(--device cpu --toy --runs 1 --threads 1) && shift ;;
    --peak-flops) peak=(--peak-flops "$2") && shift 2 ;;
    *) break ;;
    esac
done
if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
    echo "usage: $0 [--toy] [--peak-flops N] OUT [STAGE ...], stages: ${order[*]}" >&2
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift
for stage in "$@"; do
    [ -n "${ends[$stage]:-}" ] || { echo "a stage should be one of ${order[*]}, but it is $stage." >&2; exit 2; }
done
[ $# -eq 0 ] || order=("$@")

cd "$(dirname "$0")/../.." || exit 2
export PYTHONPATH="$PWD:$PWD/tests/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export HF_DATASETS_DISABLE_PROGRESS_BARS=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT

run_pytest() { # LIMIT OUTCOMES ARGUMENT...
    local limit=$1 outcomes=$2
    shift 2
    PYTHONPATH="$PWD/tests:$PYTHONPATH" timeout -k 5 "$limit" python3 -m pytest -p no:cacheprovider -p no:logging -vv -ra \
        --tb=short --durations=10 -p helpers.outcomes --outcomes "$scratch/$outcomes.json" "$@"
}

# The tests marked `cuda`, in three processes, because most of their time goes to compiling: FlexAttention and
# the Triton kernel, each with its variants, and all others. On the CPU, what of tests/gpu runs there.
run_tests() { # LIMIT
    local attention=tests/gpu/test_tree_attention.py kernel=tests/log_probs/test_triton_tile.py
    local others name status=0
    declare -A running
    if [ ${#toy[@]} -gt 0 ]; then
        run_pytest "$1" tests -m "not cuda and not slow" tests/gpu
        return
    fi
    mapfile -t others < <(
        grep -rlE --include='test_*.py' 'mark\.cuda|def test_.*\bdevice\b' tests |
            grep -vxF -e $attention -e $kernel | sort
    )
    run_pytest "$1" kernel -m cuda $kernel >"$scratch/kernel.log" 2>&1 &
    running[kernel]=$!
    run_pytest "$1" others -m cuda "${others[@]}" >"$scratch/others.log" 2>&1 &
    running[others]=$!
    run_pytest "$1" attention -m cuda $attention || status=$?
    for name in others kernel; do
        wait "${running[$name]}" || status=$?
        cat "$scratch/$name.log"
    done
    return $status
}

run_script() { # LIMIT NAME SCRIPT OPTION...: no case begins when less than three tenths of the time are left
    local options=(--json "$out/$2.json" --seconds $(($1 * 7 / 10)) "${@:4}")
    timeout -k 5 "$1" python3 "tests/gpu/$3" "${options[@]}" ${toy[@]+"${toy[@]}"}
}

run_stage() { # NAME LIMIT
    case $1 in
    tests) run_tests "$2" ;;
    gather) run_script "$2" gather gather.py ;;
    step) run_script "$2" step train_step.py ${peak[@]+"${peak[@]}"} ;;
    profile) run_script "$2" profile profile_step.py ;;
    esac
}

for stage in "${order[@]}"; do
    began=$SECONDS
    limit=$((ends[$stage] - began))
    [ $limit -gt 0 ] || limit=1
    run_stage "$stage" $limit >"$out/$stage.log" 2>&1
    python3 tests/gpu/summary.py "$out" --stage "$stage" --status $? --limit $limit \
        --seconds $((SECONDS - began)) --outcomes "$scratch"/*.json
done
