"""What was trained, in the forms that other software opens: sentence-transformers, PEFT, plain transformers folders."""

import inspect
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from fastprompt._card import CARD, card
from fastprompt._files import read_json, write_text
from fastprompt.training import Learner, RunInfo

from . import merged, peft, tokens

FORMS = ("sentence-transformers", "peft", "tokens", "merged")
TAGS = "AutoModelForTokenClassification"


def export(
    learner: Learner,
    to: str,
    directory: str | Path,
    *,
    info: RunInfo | None = None,
    scores: Mapping[str, float] | None = None,
    copy_backbone: bool = False,
) -> Path:
    """Write what a learner trained, and a model card, into a folder that other software opens.

    Args:
        learner: what `fastprompt.training.load_learner` gives, or a Trainer's. It is not changed.
        to: "sentence-transformers": a folder for `SentenceTransformer(directory, trust_remote_code=True)`, where
            fastprompt is installed. "peft": PEFT's files of a prompt, a prefix or LoRA. "tokens": a plain transformers
            folder in which a soft prompt stands as new tokens, for software that knows no prompts. "merged": a plain
            transformers folder of a run whose weights changed.
        directory: a new folder, or an empty one.
        info: what `fastprompt.training.read_run` gives, for the card.
        scores: scores by name, for the card.
        copy_backbone: whether "sentence-transformers" and "peft" write the frozen backbone as well, and do not only
            name it.

    Returns:
        The directory.

    Example:
        >>> learner = fastprompt.training.load_learner("run")
        >>> export(learner, "sentence-transformers", "exported")
        PosixPath('exported')

    Raises:
        ValueError: a form that is unknown, or one that what was trained does not fit; a folder that is not empty.
        ImportError: a library that the form needs is missing.
    """
    if to not in FORMS:
        raise ValueError(f"to must be one of {FORMS}, got {to!r}")
    if copy_backbone and to in ("tokens", "merged"):
        raise ValueError(f"copy_backbone is for 'sentence-transformers' and 'peft': {to!r} always holds the backbone")
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"directory must be new, or empty, got {directory}, where something is")
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    aside.mkdir()
    try:
        written = _form(to).write(learner, aside, copy_backbone)
        about = {"beside": written["beside"], "auto": _auto(written["model"])}
        about["options"] = _options(written["model"], to)
        about |= {"scores": scores, "copied": copy_backbone}
        write_text(aside / CARD, card(info or _info(learner), to, **about))
        if directory.exists():
            directory.rmdir()
        aside.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return directory


def _form(to: str) -> ModuleType:
    if to == "sentence-transformers":
        from fastprompt._extras import require

        require("sentence_transformers", "export")
        from . import sentence_transformers  # which needs it to be imported

        return sentence_transformers
    return {"peft": peft, "tokens": tokens, "merged": merged}[to]


def _options(model, to: str) -> str:
    """What else must be said to transformers for the model to be loaded as it was."""
    if _auto(model) == TAGS:
        return f", num_labels={model.config.num_labels}" if to == "peft" else ""
    # Else an encoder gets a pooler that begins at random.
    pools = "add_pooling_layer" in inspect.signature(type(model).__init__).parameters
    return ", add_pooling_layer=False" if pools and getattr(model, "pooler", None) is None else ""


def _auto(model) -> str:
    """The class of transformers that loads a model."""
    if type(model).__name__.endswith("ForTokenClassification"):
        return TAGS
    if model.get_output_embeddings() is None:
        return "AutoModel"
    return "AutoModelForSeq2SeqLM" if model.config.is_encoder_decoder else "AutoModelForCausalLM"


def _info(learner: Learner) -> RunInfo:
    """What a learner knows of its run by itself."""
    task = None if learner.task is None else {"name": learner.task.name, "settings": learner.task.settings()}
    name = learner.backbone.config._name_or_path
    return RunInfo({"name": name}, learner.adapter, learner.inputs, task, learner.alignment_config, language="")


def push_to_hub(directory: str | Path, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Upload an exported folder, card included, to a repository of the Hugging Face Hub, made if there is none.

    Args:
        directory: what `export` wrote.
        repo_id: the repository, such as "me/model".
        private: whether a new repository is private; None: what the account has as its default.
        token: the account's token; None: the one that `hf auth login` stored.

    Returns:
        The address of the repository.

    Raises:
        ValueError: the directory holds no export, or one whose backbone is a folder of this machine.
    """
    from huggingface_hub import HfApi

    directory = Path(directory)
    if not (directory / CARD).is_file():
        raise ValueError(f"directory must be one that export wrote, with {CARD}, got {directory}")
    for file in (*directory.glob("adapter_config.json"), *directory.rglob("prompted_transformer.json")):
        about = read_json(file)
        name = about.get("backbone") or about.get("base_model_name_or_path")
        if name and Path(name).is_absolute():
            raise ValueError(
                f"directory must not name a folder of this machine as its backbone, got {name}: nobody else could open "
                "it; export it with copy_backbone=True"
            )
    api = HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(repo_id=repository.repo_id, folder_path=str(directory), commit_message="Upload model")
    return str(repository)
