#!/bin/sh
# Iterative DPO: a model answers prompts, a judge orders its answers, the model learns from the pairs; and again with
# what it has become. In each round the reference is the model that the round began with.
#
#     dpo-wrapper train --data examples/data/demonstrations.jsonl --out runs/imitates
#     examples/iterative_dpo.sh runs/imitates examples/data/preferences.jsonl examples/answer_key.py:score runs/rounds
#
# Usage: iterative_dpo.sh MODEL LOGS JUDGE OUT [ROUNDS]
# What was interrupted is continued by the same command. The last model is in OUT/ROUNDS.
set -eu
model=$1 logs=$2 judge=$3 out=$4 rounds=${5:-2}

mkdir -p "$out"
for round in $(seq "$rounds"); do
    pairs=$out/$round.jsonl run=$out/$round
    if [ ! -f "$pairs" ]; then
        dpo-wrapper pairs "$logs" --model "$model" --judge "$judge" --num-samples 4 --seed "$round" \
            --max-new-tokens 64 --batch-size 64 --out "$pairs"
    fi
    if ! grep -qs '"status": "finished"' "$run/run.json"; then
        dpo-wrapper train --data "$pairs" --model "$model" --stage dpo --learning-rate 1e-4 --out "$run"
    fi
    model=$run
done
