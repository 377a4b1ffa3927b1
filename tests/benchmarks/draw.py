"""Draw the README's picture, docs/step.svg, from the records of `step.py`.

    python tests/benchmarks/draw.py [OUTPUT.svg]

Two panels of horizontal bars show the seconds and the peak memory of one training step.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
BARS = {
    "Llama": ("hh_zen4.json", {"tree": "dpo_wrapper", "trl": "TRL 1.16"}),
    "x-transformers decoder": (
        "xt_zen4.json",
        {"tree": "dpo_wrapper", "x-transformers": "x-transformers DPO"},
    ),
}
"""By model, the record and the contestants that are drawn."""

COLORS = {"dpo_wrapper": "#2563eb"}
OTHER_COLOR, TEXT_COLOR = "#b6bcc6", "#1f2937"
CAPTION = (
    "Forward and backward, float32, 2 cores of an AMD EPYC (Zen 4), {version}. Width 512, 8 layers,\n"
    "vocabulary 16,384. 8 pairs with the lengths of hh_harmless: {padded:,} tokens with padding,\n"
    "{unique:,} if each shared prefix counts once."
)


def draw_panel(axes: Axes, records: dict[str, Any], quantity: str, title: str, label: str) -> None:
    """One bar for each contestant, in groups by model, with its value written at the end."""
    position = 0.0
    largest = max(record["results"][key][quantity] for record, names in records.values() for key in names)
    for model, (record, names) in records.items():
        axes.text(0, position - 0.72, model, color=TEXT_COLOR, fontsize=9.5, fontweight="bold", va="center")
        for key, name in names.items():
            value = record["results"][key][quantity]
            axes.barh(position, value, height=0.72, color=COLORS.get(name, OTHER_COLOR))
            text = label.format(value / 1000 if quantity == "peak_mb" else value)
            is_short = value < 0.45 * largest
            axes.text(
                value + 0.015 * largest if is_short else value - 0.015 * largest,
                position,
                f"{name}  {text}",
                ha="left" if is_short else "right",
                va="center",
                color=TEXT_COLOR,
                fontsize=9.5,
            )
            position += 0.85
        position += 1.0
    axes.set_title(title, loc="left", color=TEXT_COLOR, fontsize=11)
    axes.set_ylim(position - 1.2, -1.15)
    axes.set_xlim(0, largest)
    axes.axis("off")


def main() -> None:
    records = {
        model: (json.loads((RESULTS / file).read_text()), names) for model, (file, names) in BARS.items()
    }
    matplotlib.rcParams |= {"svg.hashsalt": "dpo_wrapper", "svg.fonttype": "none"}
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", "sans-serif"]
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.1), layout="constrained")
    figure.suptitle("One DPO training step on the CPU (shorter is better)", color=TEXT_COLOR, fontsize=12.5)
    draw_panel(panels[0], records, "seconds", "Time", "{:.1f} s")
    draw_panel(panels[1], records, "peak_mb", "Peak memory, without the models themselves", "{:.1f} GB")
    result = records["Llama"][0]["results"]["tree"]
    tokens = result["tokens"]
    version = f"torch {result['torch'].split('+')[0]}"
    caption = CAPTION.format(version=version, padded=tokens["padded"], unique=tokens["unique"])
    figure.supxlabel(caption, color="#4b5563", fontsize=8, x=0.012, ha="left")
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "step.svg"
    figure.savefig(output, facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
