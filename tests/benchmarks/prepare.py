"""How fast data is prepared, against its tokenizer alone, and how fast it is read back.

    python tests/benchmarks/prepare.py --rows 1000000

Rows are synthetic pairs of about 100 tokens in each of prompt, chosen and rejected. The tokenizer alone is a
call of the Hugging Face tokenizer on the texts of both sequences of each pair, in batches of 1,000, on as
many threads as there are workers. Preparation and tokenizer work in turns; memory is the peak of the sum over
all processes of what each holds, where what several share counts once (PSS).
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from measure import add_running, environment, write_json

BATCH = 1000


def draw_vocabulary(size: int, seed: int) -> list[str]:
    """Words of one to four syllables."""
    rng = random.Random(seed)
    syllables = [
        start + vowel + end for start in "bdfgklmnprstvz" for vowel in "aeiou" for end in ("", "n", "r")
    ]
    return ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3, 4)))) for _ in range(size)]


def draw_texts(count: int, num_words: int, seed: int) -> Iterator[str]:
    """Texts whose words are as frequent as those of a language: the k-th of them in proportion to 1 / k."""
    words = draw_vocabulary(20_000, 0)
    weights = [1 / (rank + 2) for rank in range(len(words))]
    rng = random.Random(seed)
    stock = rng.choices(words, weights, k=1_000_000)
    for _ in range(count):
        start = rng.randrange(len(stock) - 2 * num_words)
        yield " ".join(stock[start : start + rng.randint(num_words // 2, num_words * 3 // 2)])


def train_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer, as GPT-2 has it, trained on such texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(draw_texts(4000, 100, 1), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(str(folder))


def write_rows(file: Path, count: int, num_words: int) -> None:
    texts = draw_texts(3 * count, num_words, 2)
    with file.open("w", encoding="utf-8") as stream:
        for prompt, chosen, rejected in zip(texts, texts, texts, strict=True):
            stream.write(
                json.dumps({"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected}) + "\n"
            )


def tokenize_alone(file: Path, tokenizer_folder: Path) -> tuple[float, int]:
    """Seconds of the tokenizer's calls, and the number of tokens of both sequences of all pairs."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    seconds, tokens = 0.0, 0
    with file.open(encoding="utf-8") as stream:
        while lines := list(islice(stream, BATCH)):
            rows = map(json.loads, lines)
            texts = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
            start = time.perf_counter()
            ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
            seconds += time.perf_counter() - start
            tokens += sum(map(len, ids))
    return seconds, tokens


def run_and_weigh(command: list[str], env: dict[str, str]) -> tuple[float, int]:
    """Seconds of a command and the peak of its memory in bytes, over all of its processes."""
    import psutil  # type: ignore[import-untyped]

    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))  # type: ignore[union-attr]
    reader.start()
    while process.poll() is None:
        total = 0
        try:
            parent = psutil.Process(process.pid)
            for one in (parent, *parent.children(recursive=True)):
                total += one.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
        peak = max(peak, total)
        time.sleep(0.5)
    reader.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {''.join(errors)[-2000:]}")
    return time.perf_counter() - start, peak


def read_back(folder: Path) -> dict[str, float]:
    """Pairs per second in a shuffled order, and the median microseconds of one access."""
    from dpo_wrapper.data import PreparedData, StepSampler

    examples = PreparedData.open(folder).examples
    order = [index for step in StepSampler(len(examples), 64) for index in step]
    start = time.perf_counter()
    for index in order:
        examples[index]
    rate = len(order) / (time.perf_counter() - start)
    moments = []
    for index in order[:20_000]:
        start = time.perf_counter()
        examples[index]
        moments.append(time.perf_counter() - start)
    return {"pairs_per_second": rate, "access_us": statistics.median(moments) * 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--words", type=int, default=75, help="of a text, about; default: %(default)s")
    parser.add_argument("--vocab", type=int, default=16384, help="default: %(default)s")
    parser.add_argument("--tokenizer", type=Path, help="a folder; by default a new one is trained")
    add_running(parser, 1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.tokenizer is None:
            train_tokenizer(folder / "tokenizer", args.vocab)
        tokenizer = args.tokenizer or folder / "tokenizer"
        write_rows(folder / "rows.jsonl", args.rows, args.words)
        results: dict[str, Any] = {"alone": [], "prepare": [], "peak_bytes": []}
        for run in range(args.runs):
            seconds, tokens = tokenize_alone(folder / "rows.jsonl", tokenizer)
            results["alone"].append(seconds)
            out = folder / f"out{run}"
            command = [sys.executable, "-m", "dpo_wrapper", "prepare", "--data", folder / "rows.jsonl"]
            command += ["--tokenizer", tokenizer, "--out", out, "--workers", args.threads]
            seconds, peak = run_and_weigh(list(map(str, command)), environment(args.threads))
            results["prepare"].append(seconds)
            results["peak_bytes"].append(peak)
        results["tokens"] = tokens
        results["reading"] = read_back(out)
        results["bytes"] = sum(file.stat().st_size for file in out.glob("data-*.arrow"))
    shares = [alone / ours for alone, ours in zip(results["alone"], results["prepare"], strict=True)]
    results["share_of_tokenizer"] = statistics.median(shares)
    print(f"{args.rows:,} rows, {tokens / args.rows:.0f} tokens in both sequences of a row")
    print(f"tokenizer alone: {args.rows / statistics.median(results['alone']):,.0f} rows/s")
    print(f"prepare: {args.rows / statistics.median(results['prepare']):,.0f} rows/s, all included")
    print(f"share of the tokenizer's speed: {results['share_of_tokenizer']:.0%}")
    print(f"peak memory of all processes: {max(results['peak_bytes']) / 2**20:,.0f} MiB")
    rate, access = results["reading"]["pairs_per_second"], results["reading"]["access_us"]
    print(f"read back shuffled: {rate:,.0f} pairs/s, {access:.1f} us an access")
    if args.json:
        write_json(args, results=results)


if __name__ == "__main__":
    main()
