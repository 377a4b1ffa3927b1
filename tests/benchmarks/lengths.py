"""What the benchmarks compute on: preference pairs of given lengths, with random token ids.

Lengths come from a file of real pairs (`--data`), cut by a byte-level BPE tokenizer of 16,384 tokens that is
trained on that file, or from the lists below, which hold such lengths and no text, or from synthetic shapes.
"""

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LONGEST = 2048
"""Sequences are cut to this: answers to half of it, then the prompt to what is left."""

VOCAB = 16384

SHAPES = {"hh": 8, "en": 4, "long-prompt": 8, "long-answers": 8, "system-prompt": 16}
"""Each shape with its number of pairs, if no other is asked for."""

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt that all pairs share, then those of prompt, chosen and rejected answer of each."""

    system: int
    pairs: list[Triple]

    def ids(self, vocab: int, seed: int) -> tuple[list[list[int]], list[list[int]], list[int]]:
        """Random ids: the chosen sequences, the rejected ones, and how many tokens of each are prompt."""
        rng = random.Random(seed)

        def draw(n: int) -> list[int]:
            return [rng.randrange(1, vocab) for _ in range(n)]

        system = draw(self.system)
        chosen, rejected, prompts = [], [], []
        for prompt_length, chosen_length, rejected_length in self.pairs:
            prompt = system + draw(prompt_length)
            chosen.append(prompt + draw(chosen_length))
            rejected.append(prompt + draw(rejected_length))
            prompts.append(len(prompt))
        return chosen, rejected, prompts


def lengths(shape: str, pairs: int | None, seed: int, data: Path | None = None) -> Lengths:
    """The pairs that `seed` picks; a larger number of pairs holds the smaller ones."""
    pairs = SHAPES[shape] if pairs is None else pairs
    rng = random.Random(seed)

    def about(n: int) -> int:
        return round(n * rng.uniform(0.75, 1.25))

    if data is not None:
        known = of_file(data)
    elif shape in BUILT_IN:
        known = built_in(shape)
    elif shape == "long-prompt":
        return Lengths(0, [cut((about(1024), about(48), about(48))) for _ in range(pairs)])
    elif shape == "long-answers":
        return Lengths(0, [cut((about(48), about(512), about(512))) for _ in range(pairs)])
    else:
        return Lengths(512, [(about(48), about(64), about(64)) for _ in range(pairs)])
    if pairs > len(known):
        raise SystemExit(f"there are {len(known)} pairs, but {pairs} are asked for: lower --pairs.")
    rng.shuffle(known)
    return Lengths(0, [cut(triple) for triple in known[:pairs]])


def cut(triple: Triple) -> Triple:
    prompt, chosen, rejected = triple
    chosen, rejected = min(chosen, LONGEST // 2), min(rejected, LONGEST // 2)
    return min(prompt, LONGEST - max(chosen, rejected)), chosen, rejected


def built_in(shape: str) -> list[Triple]:
    return [tuple(map(int, triple.split("+"))) for triple in BUILT_IN[shape].split()]  # type: ignore[misc]


def of_file(path: Path) -> list[Triple]:
    """Lengths of real pairs under a tokenizer trained on them."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        raise SystemExit("--data needs a tokenizer: pip install tokenizers") from None

    texts = list(texts_of(path))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, initial_alphabet=bytes_.alphabet(), show_progress=False, special_tokens=[]
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = bytes_
    tokenizer.train_from_iterator((text for triple in texts for text in triple), trainer)
    return [tuple(len(e.ids) for e in tokenizer.encode_batch(list(triple))) for triple in texts]  # type: ignore[misc]


def texts_of(path: Path) -> Iterator[tuple[str, str, str]]:
    """Prompt, chosen and rejected answer of each pair: a JSON list of conversations with two answers, or JSON
    lines with two whole dialogues, of which the prompt is the shared turns."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    if text.lstrip().startswith("["):
        for row in json.loads(text):
            prompt = "\n".join(turn["value"] for turn in row["conversations"])
            yield prompt, row["chosen"]["value"], row["rejected"]["value"]
        return
    turn = "\n\nAssistant:"
    for row in map(json.loads, text.splitlines()):
        chosen, rejected = row["chosen"], row["rejected"]
        pairs = zip(chosen, rejected, strict=False)
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
        end = chosen.rfind(turn, 0, same) + len(turn)
        yield chosen[:end], chosen[end:], rejected[end:]


BUILT_IN = {
    "hh": """
        14+7+5 12+2+14 15+12+10 13+16+3 15+6+15 15+16+17 16+18+15 19+17+16 15+21+22 21+17+15
        23+16+14 21+19+17 19+17+22 16+22+27 13+31+21 16+22+29 16+30+16 45+2+2 18+30+31 29+10+21
        32+8+19 27+9+25 20+31+33 15+18+40 43+12+2 19+10+38 28+30+26 24+26+35 17+31+43 20+21+41
        48+11+13 21+42+37 20+42+44 25+40+27 14+32+52 43+24+4 15+53+13 15+22+54 43+12+26 42+7+29
        22+25+50 22+40+51 18+27+56 58+17+4 71+1+5 17+61+1 17+33+62 19+18+61 33+48+16 75+7+5 16+68+20
        19+25+66 21+65+37 26+61+22 64+24+9 71+18+13 63+28+12 57+11+35 67+25+26 18+16+77 43+53+48
        54+15+43 73+16+25 73+6+27 71+30+28 77+11+25 82+15+21 60+44+42 87+12+18 37+70+36 74+11+34
        89+13+20 27+81+84 84+20+28 88+25+9 76+16+38 100+8+14 30+83+86 84+11+33 21+98+3 87+33+14
        77+21+44 90+5+32 90+33+23 100+24+14 74+52+31 99+19+28 41+88+48 93+37+15 75+16+57 109+18+24
        78+11+57 115+21+13 23+10+115 107+17+31 15+9+126 128+13+12 91+53+45 117+17+28 98+49+37
        113+35+32 82+16+67 127+20+22 139+11+10 137+13+15 116+7+38 144+5+11 144+11+13 114+20+45
        115+20+46 111+51+14 74+90+62 85+38+80 116+16+50 79+89+31 112+58+56 135+36+12 124+41+49
        147+16+27 119+57+20 132+26+45 21+158+6 128+52+3 161+5+20 108+75+36 132+52+23 138+10+47
        130+9+57 108+81+50 76+33+114 113+78+70 147+45+16 101+9+94 173+25+9 145+55+23 49+154+36
        161+13+43 153+53+27 140+47+68 169+7+42 139+42+73 166+26+48 163+15+53 147+56+72 99+120+124
        96+128+38 141+86+69 157+24+72 167+64+41 163+57+71 139+63+98 209+29+17 157+85+65 155+36+90
        179+70+44 203+39+51 170+60+87 188+50+72 134+130+75 192+75+9 213+27+56 261+12+11 169+7+106
        202+76+28 194+24+87 238+46+38 185+76+103 230+60+42 270+15+23 208+92+44 269+10+32 232+74+66
        209+3+101 168+34+147 301+24+8 269+61+38 209+26+124 254+82+35 243+98+93 298+12+53 261+11+95
        169+191+178 268+31+98 308+68+55 250+55+131 279+74+107 331+63+56 260+146+75 246+122+166
        300+40+125 377+61+51 292+55+165 351+21+115 445+20+58 389+142+102 391+169+143 338+3+253
        451+180+108 546+29+188 706+173+62
    """,
    "en": """
        23+10+11 16+12+41 42+38+22 30+61+72 33+14+75 88+36+32 47+60+101 74+78+45 43+8+148 132+1+71
        178+42+39 7+226+90 59+183+51 92+91+167 167+35+97 14+262+50 78+205+129 42+250+217 77+180+232
        165+63+146 88+232+200 113+63+216 238+54+97 79+122+264 28+322+209 22+341+115 17+362+253
        293+93+78 14+382+226 70+14+328 10+417+148 113+316+40 21+6+418 405+34+43 154+29+302
        115+84+349 120+326+354 221+123+257 73+156+419 8+487+425 27+484+256 243+278+239 461+64+1
        178+202+352 68+429+478 24+533+433 30+528+446 397+2+166 17+554+305 43+545+514 15+578+240
        501+3+102 225+271+386 407+221+224 75+26+559 250+459+291 75+646+475 461+149+263 429+48+339
        523+228+256 407+426+330 107+641+744 459+454+417 463+251+452 493+425+281 368+396+560
        520+27+416 561+318+383 7+163+947 79+918+489 522+474+489 560+459+474 481+571+336 676+418+391
        962+15+138 741+385+377 660+487+343 639+354+563 675+540+422 800+427+369 730+527+542
        967+174+310 708+282+580 705+416+591 833+471+412 870+512+385 774+641+426 946+405+517
        1118+286+385 1104+471+432 1085+412+547 1227+495+343 814+572+939 1137+392+639 1197+483+603
        1177+658+228 1446+470+490 1387+591+464 1611+335+464 1549+673+613
    """,
}
"""`prompt+chosen+rejected` of 200 and 100 pairs, evenly spaced in order of length, of anthropics/hh-rlhf
(harmless-base, test) and of LLaMA-Factory's dpo_en_demo."""
