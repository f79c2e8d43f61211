"""Runs whose weights changed, as plain transformers folders."""

from pathlib import Path

from .backbone import check_plain, save, without_lora
from .heads import save_beside, with_head


def write(learner, directory: Path, copy_backbone: bool) -> dict:
    """Write the backbone with what trained in it, its head if it has one, and its tokenizer.

    Returns:
        "beside": what else trained, in a file of fastprompt's own; "model": what is loaded from the folder.

    Raises:
        ValueError: a prompt or a prefix, which are no weights of the backbone.
    """
    if learner.adapted.prompted is not None:
        kind = learner.adapted.prompted.prompt_config.kind
        raise ValueError(
            f"'merged' is for methods lora, full and head: a {kind} is not in the backbone's weights. "
            "'tokens' is for method prompt, 'sentence-transformers' and 'peft' are for both"
        )
    check_plain(learner, "merged")
    model, head = with_head(learner)
    save(without_lora(model, merge=True), learner.tokenizer, directory)
    return {"beside": save_beside(learner, directory, task=not head), "model": model}
