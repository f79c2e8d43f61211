"""The table of families: which are served, equal to PEFT or better, and which are refused, and why.

    python tests/compat/family_table.py [--out docs/families.md] [FAMILY ...]

Small random models in float64: every family of `tests/helpers.py` and `tests/families.py`, with every head that
transformers has for it and every kind of prompt, fused, against PEFT's own forward. Those whose prompt PEFT refuses or
leaves out are held to the same backbone sentence by sentence, without packing.
"""

import argparse
import sys
import traceback
import warnings
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))

from families import FAMILIES, HEADS, KINDS, NOT_IN_PEFT, REFUSED, compared, heads
from helpers import CONFIGS

from fastprompt import PromptConfig, PromptModel

LIMIT = 1e-5  # RMS norms, and losses of decoders, are taken in float32 whatever the dtype
SHORT = {"AutoModel": "base model", "AutoModelForCausalLM": "language model"}
SHORT |= {auto: auto.removeprefix("AutoModelFor") for auto in HEADS if auto not in SHORT}
LEGEND = """# Model families

`python tests/compat/family_table.py --out docs/families.md` writes this page.

There is no list of families: a rehearsal on tensors without values shows, before anything is changed, whether each
layer's attention reads what a packed pass hands to it. What is served here was compared number by number, on small
random models in float64: loss, logits, hidden states, and the gradient of the prompt, of ragged batches padded on the
right. Each cell says how prefix / prompt / P-tuning fare.

- **equal**: to PEFT's own forward, to {limit:.0e} relative (in float64, but RMS norms and losses of decoders).
- **ours**: PEFT refuses the prompt, or leaves it or a part of the model out without a word; equal to the backbone run
  sentence by sentence.
- **differs**: by the number that follows.
- A span or token head's logits are compared at the text's own rows: PEFT's are shifted by the virtual tokens. A
  decoder's classifier is compared without padding: PEFT pools it.

Encoder-decoders are held to PEFT by `tests/models/test_encoder_decoder.py`.
"""


def cell(family: str, auto: str) -> str:
    """How each kind of prompt fares with a head."""
    words = []
    for kind in KINDS:
        try:
            worst = max(compared(family, auto, kind).values())
        except Exception as error:  # PEFT's, or ours: the table says which
            who = "PEFT fails" if "/peft/" in traceback.extract_tb(error.__traceback__)[-1].filename else "fails"
            words.append(f"{who} ({type(error).__name__}: {' '.join(str(error).split())[:80]})")
            continue
        good = "ours" if (family, kind) in NOT_IN_PEFT else "equal"
        words.append(good if worst < LIMIT else f"differs ({worst:.0e})")
    return words[0] if len(set(words)) == 1 else " / ".join(words)


def reason(family: str) -> str:
    """What a refused family is told."""
    backbone = transformers.AutoModel.from_config(REFUSED[family])
    try:
        PromptModel(backbone, PromptConfig())
    except ValueError as error:
        return str(error).partition(" is not served: ")[2]
    return "served"


def table(families: list[str]) -> str:
    """The page."""
    lines = ["", "| family | " + " | ".join(SHORT.values()) + " |", "|" + "---|" * (len(SHORT) + 1)]
    for family in (each for each in [*CONFIGS, *FAMILIES] if not families or each in families):
        served = heads(family)
        cells = [cell(family, auto) if auto in served else "" for auto in SHORT]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    lines += ["", "## Refused", "", "| family | reason |", "|---|---|"]
    lines += [f"| {family} | {reason(family)} |" for family in REFUSED if not families or family in families]
    return LEGEND.format(limit=LIMIT) + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all if none is named")
    parser.add_argument("--out", type=Path, help="where the page is written; else it is printed")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    page = table(options.families)
    if options.out is None:
        print(page, end="")
    else:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
