#!/bin/sh
# From logs to a better model: pairs of recorded answers against sampled ones, DPO and SimPO with an adapter on them,
# a page that compares the two, an evaluation, an answer of the result beside its reference's, and the result in the
# forms that other programs take, each compared with it.
#
#     examples/from_logs.sh HuggingFaceTB/SmolLM2-135M-Instruct logs.jsonl runs/from_logs
#
# Usage: from_logs.sh MODEL LOGS OUT [PROMPT [GGUF]]
# GGUF is a file of MODEL for llama.cpp, in 4 bits perhaps, on which the adapter is tried.
# With 60 prompts and a model of 135M parameters it takes about 35 minutes on 2 cores, the exports 4 of them. What was
# interrupted is continued by the same command.
set -eu
model=$1 logs=$2 out=$3 prompt=${4:-How do I keep bread fresh?} base=${5:-}
pairs=$out/pairs.jsonl run=$out/compare/runs/sigmoid-beta-0.1-seed0

mkdir -p "$out"
if [ ! -f "$pairs" ]; then
    dpo-wrapper pairs "$logs" --model "$model" --max-length 384 --max-new-tokens 96 --out "$pairs"
fi
dpo-wrapper compare --losses 'sigmoid(beta=0.1)' 'simpo(beta=2.0, gamma=0.5)' --seeds 2 --out "$out/compare" \
    --model "$model" --lora --lora-r 8 --data "$pairs" --eval-fraction 0.25 --max-length 384 --batch-size 4 --epochs 1
dpo-wrapper evaluate "$run" --data "$pairs" --out "$out/evaluation"
dpo-wrapper chat "$run" --prompt "$prompt" --reference --max-new-tokens 96

dpo-wrapper export "$run" --to peft mlx merged gguf --out "$out/exports"
dpo-wrapper export "$run" --to gguf ollama --quantize q8_0 --out "$out/exports/q8_0"
if [ -n "$base" ]; then
    dpo-wrapper export "$run" --to gguf ollama --adapter --base "$base" --out "$out/exports/adapter"
fi
