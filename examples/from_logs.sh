#!/bin/sh
# From logs to a better model: pairs of recorded answers against sampled ones, DPO and SimPO with an adapter on them,
# a page that compares the two, an evaluation, and an answer of the result beside its reference's.
#
#     examples/from_logs.sh HuggingFaceTB/SmolLM2-135M-Instruct logs.jsonl runs/from_logs
#
# Usage: from_logs.sh MODEL LOGS OUT [PROMPT]
# What was interrupted is continued by the same command.
set -eu
model=$1 logs=$2 out=$3 prompt=${4:-How do I keep bread fresh?}
pairs=$out/pairs.jsonl run=$out/compare/runs/sigmoid-beta-0.1-seed0

mkdir -p "$out"
if [ ! -f "$pairs" ]; then
    dpo-wrapper pairs "$logs" --model "$model" --max-length 384 --max-new-tokens 96 --out "$pairs"
fi
dpo-wrapper compare --losses 'sigmoid(beta=0.1)' 'simpo(beta=2.0, gamma=0.5)' --seeds 2 --out "$out/compare" \
    --model "$model" --lora --lora-r 8 --data "$pairs" --eval-fraction 0.25 --max-length 384 --batch-size 4 --epochs 1
dpo-wrapper evaluate "$run" --data "$pairs" --out "$out/evaluation"
dpo-wrapper chat "$run" --prompt "$prompt" --reference --max-new-tokens 96
