"""The model card of a run, or of one of the forms that it is exported in."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastprompt._extras import require

CARD = "README.md"  # the file that the Hub shows
_LIBRARIES = {"run": "fastprompt", "sentence-transformers": "sentence-transformers", "peft": "peft"}
_PIPELINES = {
    "classification": "text-classification",
    "pawsx": "text-classification",
    "tagging": "token-classification",
    "qa": "question-answering",
    "xquad": "question-answering",
    "mlqa": "question-answering",
    "generation": "text-generation",
    "retrieval": "sentence-similarity",
}
_METHODS = {
    "prefix": "a prefix of {num_virtual_tokens} trained keys and values in the layers of the frozen model",
    "prompt": "a soft prompt of {num_virtual_tokens} trained rows before the text, read by the frozen model",
    "lora": "LoRA of rank {lora_rank} in the frozen model",
    "full": "all weights of the model",
    "head": "nothing of the model itself",
}
_LOAD = {
    "run": """```python
import fastprompt

model = fastprompt.load("THIS FOLDER")
```""",
    "sentence-transformers": """```python
from sentence_transformers import SentenceTransformer  # pip install fastprompt sentence-transformers

model = SentenceTransformer("THIS FOLDER", trust_remote_code=True)
queries = model.encode_query(["texts in the language that was trained"])
documents = model.encode_document(["texts in English"])
```

fastprompt must be installed: the model's first module is its `PromptedTransformer`, and sentence-transformers asks for
`trust_remote_code=True` for a module that is not its own. No code is in this folder. Queries, and `encode`, run through
what was trained; documents through the frozen model alone.""",
    "peft": """```python
import peft
import transformers

base = transformers.{auto}.from_pretrained("{base}"{options})
model = peft.PeftModel.from_pretrained(base, "THIS FOLDER")
```""",
    "tokens": """```python
import transformers

tokenizer = transformers.AutoTokenizer.from_pretrained("THIS FOLDER")
model = transformers.{auto}.from_pretrained("THIS FOLDER"{options})
```

The prompt is the tokens `<|prompt_0|>`, `<|prompt_1|>`, ..., {num_virtual_tokens} of them. The tokenizer puts them
before every text, and so does its chat template, if it has one. Software that does neither must be given them as text.
They are never to be written: `generate` of transformers suppresses them.""",
    "merged": """```python
import transformers

tokenizer = transformers.AutoTokenizer.from_pretrained("THIS FOLDER")
model = transformers.{auto}.from_pretrained("THIS FOLDER"{options})
```""",
}


def card(
    info,
    form: str = "run",
    *,
    scores: Mapping | None = None,
    auto: str = "AutoModel",
    options: str = "",
    copied: bool = False,
    beside: Sequence[str] = (),
) -> str:
    """The text of a model card, with the Hub's header.

    Args:
        info: a `fastprompt.training.run.RunInfo`, or what has its fields.
        form: "run", or one of `fastprompt.export.FORMS`.
        scores: by name; a value may be such names and values again.
        auto, options: the class of transformers that loads the model, and what else it must be told.
        copied: whether the backbone is in the folder.
        beside: what else trained, and is in a file of its own.
    """
    hub = require("huggingface_hub", "train")
    name, base, adapter = _hub_name(info.backbone["name"]), info.backbone["name"], info.adapter
    changes = adapter.method in ("prefix", "prompt", "lora") and form not in ("tokens", "merged")
    relation = {"base_model": name, "base_model_relation": "adapter" if changes else "finetune"} if name else {}
    language = re.fullmatch(r"([a-z]{2,3})([-_].*)?", info.language or "")
    data = hub.ModelCardData(
        language=language and language[1],
        library_name=_LIBRARIES.get(form, "transformers"),
        pipeline_tag=_pipeline(info, form, beside),
        tags=["fastprompt", adapter.method],
        **relation,
    )
    said = vars(adapter) | {
        "auto": auto,
        "options": options,
        "base": "THIS FOLDER/backbone" if copied else name or "THE BASE MODEL",
    }
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_title(info, name or Path(base).name)}",
        f"What trained: {_METHODS[adapter.method].format(**said)}{_more(adapter)}. Base model: {_shown(base)}.",
        f"## How to load it\n\n{_filled(_LOAD[form], said)}",
    ]
    if beside:
        what = " and the ".join({"task": "task's head", "projection": "projection"}[each] for each in beside)
        stands = "stand" if len(beside) > 1 else "stands"
        where = "`fastprompt_head.safetensors`, which only fastprompt reads"
        parts.append(f"The {what} {stands} in {where}.")
    parts += [
        _section("Settings", _settings(info)),
        _section("Data", _data(info)),
        _section("Scores", _flat(scores or {})),
        "## Licence\n\nNone is named here. The base model's terms, and the data's, hold for what is made of them: add "
        "`license:` to the header of this file.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _hub_name(name: str) -> str | None:
    """A model's name on the hub, which the header takes no other in place of."""
    return name if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) and not Path(name).exists() else None


def _shown(name: str) -> str:
    """A name on the hub, or the last part of a folder's: where it lies is nobody's business."""
    return f"`{name if _hub_name(name) else Path(name).name}`"


def _more(adapter) -> str:
    """What of the model's own weights trained as well."""
    layers = f"the last {adapter.top_layers} of the layers" if adapter.top_layers else None
    found = [each for each in ("the norms" if adapter.norms else None, layers) if each]
    return "".join(f", and {each}" for each in found)


def _title(info, base: str) -> str:
    what = info.task["name"] if info.task else "sentence vectors"
    return f"{what} with {info.adapter.method} on {base}"


def _pipeline(info, form: str, beside: Sequence[str]) -> str | None:
    if form == "sentence-transformers":
        return "sentence-similarity"
    if form != "run" and "task" in beside:
        return "feature-extraction"
    return _PIPELINES.get(info.task["name"]) if info.task else "feature-extraction"


def _filled(text: str, values: Mapping) -> str:
    return re.sub(r"{(\w+)}", lambda found: str(values[found[1]]), text)


def _settings(info) -> dict[str, str]:
    """What is not as it is by default."""
    found = {}
    for part in ("adapter", "inputs", "alignment"):
        config = getattr(info, part)
        for name, field in getattr(config, "__dataclass_fields__", {}).items():
            value = getattr(config, name)
            if value != field.default or name == "method":
                found[name if part != "alignment" else f"alignment {name}"] = str(value)
    if info.alignment is not None and not any(name.startswith("alignment") for name in found):
        found["alignment"] = "yes"
    return found | {name: str(value) for name, value in (info.arguments or {}).items()}


def _data(info) -> dict[str, str]:
    found = {f"number of {name}": str(value) for name, value in (info.counts or {}).items()}
    for name, value in (info.data or {}).items():
        if isinstance(value, str) and value:
            found[name] = Path(value).name if Path(value).is_absolute() or Path(value).exists() else value
    return found


def _flat(scores: Mapping, before: str = "") -> dict[str, str]:
    found = {}
    for name, value in scores.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name} ")
        elif isinstance(value, float | int) and not isinstance(value, bool):
            found[f"{before}{name}"] = f"{value:.4g}"
    return found


def _section(title: str, rows: Mapping[str, str]) -> str:
    if not rows:
        return ""
    cells = ([" ".join(each.replace("|", "\\|").split()) for each in row] for row in rows.items())
    return f"## {title}\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in cells)
