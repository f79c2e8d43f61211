"""TaskLearner: an adapted backbone, a task's head and, beside them, the alignment's projection."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fastprompt._files import read_tensors, write_tensors
from fastprompt.models.methods import AdaptedBackbone, keep_layers
from fastprompt.models.packed.layout import tensor_on
from fastprompt.nn import AlignmentLoss
from fastprompt.nn.pooling import pool

from .encoding import tokenize
from .generated import GeneratedAnswers
from .task_config import RETRIEVAL, TaskConfig
from .tasks import Aligned, Item, PairClassification, Retrieval, SpanAnswers, Task, Verbaliser, inputs_of

TRAINED = "trained.safetensors"


class TaskLearner(nn.Module):
    """All that trains in a run on a task.

    Args:
        backbone: a base model, or a causal language model with its head; changed in place.
        tokenizer: transformers' tokenizer for it.
        config: of the run.

    Raises:
        ValueError: a setting that does not fit the backbone.
    """

    def __init__(self, backbone: nn.Module, tokenizer: Callable, config: TaskConfig) -> None:
        super().__init__()
        base = backbone.base_model
        device, width = next(base.parameters()).device, base.config.hidden_size
        if config.num_layers is not None:
            keep_layers(base, config.num_layers)
        self.config = config
        options = {"lora_rank": config.lora_rank, "norms": config.norms, "top_layers": config.top_layers}
        self.adapted = AdaptedBackbone(base, config.method, config.prompt(tokenizer), **options)
        room = self.adapted.text_positions
        if room is not None and config.max_length > room:
            raise ValueError(
                f"max_length must be at most {room}, what the position table has room for, got {config.max_length}"
            )
        self.alignment, self.mean, self.deviation = None, None, None
        if config.alignment_layer is not None and config.alignment_layer > len(self.adapted.layers):
            raise ValueError(
                f"alignment_layer must be at most {len(self.adapted.layers)}, the backbone's layers, "
                f"got {config.alignment_layer}"
            )
        if config.alignment:
            options = {"distance": config.distance, "temperature": config.temperature}
            self.alignment = AlignmentLoss(width, width, **options)
        if config.task == RETRIEVAL:
            read = partial(tokenize, tokenizer, prefix_text=config.prefix_text, max_length=config.max_length)
            self.task = Retrieval(read, config.pooling, self.alignment)
        else:
            self.task = _task(config, tokenizer, backbone)
        if config.alignment and config.alignment_form == "task" and type(self.task).align is Task.align:
            raise ValueError(f"alignment_form must be 'sentence' for {type(self.task).__name__}, got 'task'")
        if not config.train_head and isinstance(self.task, PairClassification):
            raise ValueError("train_head must be True for pawsx with an encoder, whose head begins at 0, got False")
        self.task.requires_grad_(config.train_head)
        self.to(device)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def groups(self) -> list[dict]:
        """The optimizer's groups: what trains, at the learning rate of its kind."""
        config, heads = self.config, [p for p in self.task.parameters() if p.requires_grad]
        projection = [] if self.alignment is None else list(self.alignment.parameters())
        groups = [
            {"params": [p for p in self.adapted.prompt_parameters() if p.requires_grad], "lr": config.lr},
            {"params": self.adapted.weights(), "lr": config.weights_lr},
            {"params": heads, "lr": config.head_lr},
            {"params": projection, "lr": config.projection_lr},
        ]
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise ValueError(f"nothing trains with method {config.method!r} and train_head {config.train_head}")
        return groups

    def standardized(self, teacher: Tensor) -> Tensor:
        """(N, D) with mean 0 and deviation 1 of each feature; what student vectors are to be brought to as well."""
        deviation, self.mean = torch.std_mean(teacher, 0, correction=0)
        self.deviation = torch.where(deviation > 0, deviation, 1)
        return (teacher - self.mean) / self.deviation

    def loss(
        self, items: Sequence[Item], aligned: Sequence[Aligned] = (), teacher: Tensor | None = None
    ) -> dict[str, Tensor]:
        """ "task" of labelled inputs and "alignment" of parts of others with their teacher's vectors.

        Either may be none. Both share one packed pass.

        Args:
            items: labelled inputs.
            aligned: inputs of the alignment.
            teacher: (N, D) vectors of all pairs; those of a layer `standardized`.
        """
        batch = [*items, *(each.item for each in aligned)]
        inputs = inputs_of(batch, self.device, self.adapted)
        layer = self.config.alignment_layer if aligned else None
        hidden, mask = self.adapted(layer=layer, **inputs), inputs["attention_mask"]
        hidden, middle = (hidden, hidden) if layer is None else hidden
        losses = {}
        if items:
            losses["task"] = self.task.loss(hidden[: len(items)], mask[: len(items)], items)
        if aligned:
            columns = hidden.shape[1]
            parts = [
                (n * columns + begin, n * columns + end, pair)
                for n, each in enumerate(aligned, len(items))
                for begin, end, pair in each.parts
            ]
            rows = tensor_on([row for begin, end, _ in parts for row in range(begin, end)], self.device)
            bounds = tensor_on([0, *(end - begin for begin, end, _ in parts)], self.device).cumsum(0).int()
            student = pool(middle.flatten(0, 1)[rows], self.config.pooling, cu_seqlens=bounds)
            if layer is not None:
                student = (student - self.mean) / self.deviation
            pairs = tensor_on([pair for _, _, pair in parts], self.device)
            losses["alignment"] = self.alignment(student, teacher[pairs])
        return losses

    def predict(self, examples: Sequence) -> dict:
        """Predictions by the example's id."""
        return self.task.predict(self.adapted, examples)

    def save(self, folder: Path) -> None:
        """Write what trained; of a prompt PEFT's files as well."""
        write_tensors(folder / TRAINED, {name: parameter.detach() for name, parameter in self.trained().items()})
        if self.adapted.prompted is not None:
            self.adapted.prompted.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: it is not there, is damaged, or of another configuration or backbone.
        """
        file = folder / TRAINED
        if not file.is_file():
            raise FileNotFoundError(f"adapter {folder} holds no {TRAINED}")
        tensors = read_tensors(file).tensors
        expected, got = ({n: tuple(t.shape) for n, t in each.items()} for each in (self.trained(), tensors))
        if got != expected:
            wrong = sorted(expected.items() ^ got.items())
            raise ValueError(f"{file} does not fit the backbone and configuration: {wrong[:4]} in one of them only")
        self.load_state_dict(tensors, strict=False)


def _task(config: TaskConfig, tokenizer: Callable, backbone: nn.Module) -> Task:
    """The task's side: with a head of its own on an encoder, with the model's own words on a causal model."""
    speaks, width = backbone.get_output_embeddings() is not None, backbone.config.hidden_size
    if config.task == "pawsx":
        if speaks:
            return Verbaliser(tokenizer, backbone, config.max_length)
        return PairClassification(tokenizer, width, config.pooling, config.prefix_text, config.max_length)
    if speaks:
        return GeneratedAnswers(tokenizer, backbone, config.task, config.max_length)
    return SpanAnswers(tokenizer, width, config.task, config.prefix_text, config.max_length, config.stride)
