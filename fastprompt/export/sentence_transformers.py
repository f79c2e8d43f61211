"""PromptedTransformer: an adapted backbone as a module of sentence-transformers; and the folder of such a model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, InputModule, Router
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn

from fastprompt._extras import require
from fastprompt._files import read_json, read_tensors, write_json, write_tensors
from fastprompt.models import PromptModel
from fastprompt.models.load import without_pooler
from fastprompt.models.methods import keep_layers
from fastprompt.models.packed import PackedBackbone

from .backbone import LORA, changed, name_of, save, save_tokenizer, tell_quantized, without_lora
from .heads import save_beside
from .peft import write_lora

CONFIG, TRAINED, BACKBONE, TOKENIZER = "prompted_transformer.json", "trained.safetensors", "backbone", "tokenizer"
QUERY, DOCUMENT = "query", "document"
_POOLINGS = {"mean": "mean", "first": "cls", "last": "lasttoken"}
_PROBES = ["fastprompt", "One two three, four."]  # texts by which what is written is compared with the learner


class PromptedTransformer(InputModule):
    """Hidden states of texts: of the adapted backbone or, for the task "document", of the frozen backbone alone.

    Args:
        backbone: a base model, without a head.
        tokenizer: transformers' tokenizer for it.
        max_seq_length: the most tokens of a text.
        source: name of the frozen backbone, or its folder.
        prompted: a prompt over the backbone; None: what was trained is in the backbone.
        trained: names of the backbone's own weights that are not those of `source`.
        copy_backbone: whether `save` writes the backbone as well.
    """

    save_in_root = False
    forward_kwargs = {"task"}

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: Callable,
        max_seq_length: int,
        source: str,
        *,
        prompted: PromptModel | None = None,
        trained: Sequence[str] = (),
        copy_backbone: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.tokenizer, self.max_seq_length = backbone, tokenizer, max_seq_length
        self.source, self.prompted = source, prompted
        self.trained, self.copy_backbone = list(trained), copy_backbone
        PackedBackbone(backbone)  # gives its layers their fused forward
        self.eval()

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **kwargs) -> dict[str, Tensor]:
        """input_ids and attention_mask (B, L) of texts, each after `prompt`."""
        texts = [(prompt or "") + text for text in inputs]
        rows = self.tokenizer(texts, truncation=True, max_length=self.max_seq_length)["input_ids"]
        # Not the tokenizer's padding, for which not every one has a token; what stands there is not read.
        longest = max(1, *map(len, rows))
        ids = [[*row, *[0] * (longest - len(row))] for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    def forward(self, features: dict[str, Any], task: str | None = None, **kwargs) -> dict[str, Any]:
        """Add token_embeddings (B, L, D), float32 at least, zero at padding."""
        inputs = {name: features[name] for name in ("input_ids", "attention_mask")}
        if task == DOCUMENT:
            with _lora_off(self.backbone):
                output = PackedBackbone(self.backbone, fused=True)(inputs)
        elif self.prompted is not None:
            output = self.prompted(**inputs)
        else:
            output = PackedBackbone(self.backbone, fused=True)(inputs)
        hidden = output.last_hidden_state
        return features | {"token_embeddings": hidden.to(torch.promote_types(hidden.dtype, torch.float32))}

    def get_embedding_dimension(self) -> int:
        """D."""
        return self.backbone.config.get_text_config().hidden_size

    def save(self, output_path: str, *args, **kwargs) -> None:
        """Write what trained, the tokenizer and, if it is to be copied, the backbone."""
        folder, weights = Path(output_path), self.backbone.state_dict()
        folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(self.tokenizer, folder / TOKENIZER)
        has_lora = any(LORA in name for name in weights)
        if self.prompted is not None:
            self.prompted.save_pretrained(folder)  # and what trained of the backbone's own weights
        elif has_lora:
            write_lora(self.backbone, folder, self.source)
        if self.prompted is None and self.trained and not self.copy_backbone:
            write_tensors(folder / TRAINED, {name: weights[name] for name in self.trained})
        if self.copy_backbone:
            save(without_lora(self.backbone, merge=False), self.tokenizer, folder / BACKBONE)
        about = {
            "backbone": None if self.copy_backbone else self.source,
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "num_layers": self.backbone.config.get_text_config().num_hidden_layers,
            "max_seq_length": self.max_seq_length,
            "prompted": self.prompted is not None,
            "lora": has_lora,
        }
        write_json(folder / CONFIG, about)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs) -> "PromptedTransformer":
        """What `save` wrote, in a folder or on the hub. `model_kwargs` go to the backbone, such as dtype.

        Raises:
            FileNotFoundError, ValueError: something is missing, damaged or does not fit the backbone.
        """
        transformers = require("transformers", "train")
        hub = {name: kwargs.get(name) for name in ("token", "cache_folder", "revision", "local_files_only")}
        found = cls.load_dir_path(model_name_or_path, subfolder, **hub)
        if found is None or not (Path(found) / CONFIG).is_file():
            raise FileNotFoundError(f"{model_name_or_path} must hold {CONFIG} in {subfolder!r}")
        folder = Path(found)
        about = read_json(folder / CONFIG)
        copied = about["backbone"] is None
        source = str(folder / BACKBONE) if copied else about["backbone"]
        options = {"dtype": getattr(torch, about["dtype"])} | (kwargs.get("model_kwargs") or {})
        backbone = _base_model(source, options)
        _keep(backbone, about["num_layers"])
        if about["lora"]:
            backbone = require("peft", "lora").PeftModel.from_pretrained(backbone, folder).base_model.model
        trained = _fill(backbone, folder / TRAINED)
        made = cls(
            backbone,
            transformers.AutoTokenizer.from_pretrained(folder / TOKENIZER),
            about["max_seq_length"],
            source,
            prompted=PromptModel.from_pretrained(backbone, folder) if about["prompted"] else None,
            trained=trained,
            copy_backbone=copied,
        )
        return made.requires_grad_(False)


class Projection(Dense):
    """A linear map into the English space, computed in its own dtype, whatever the backbone's is."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Map "sentence_embedding"."""
        vectors = features[self.module_input_name].to(self.linear.weight.dtype)
        return super().forward(features | {self.module_input_name: vectors})


def write(learner, directory: Path, copy_backbone: bool) -> dict:
    """Write a folder that `SentenceTransformer` opens.

    Queries run through the adapted backbone and the projection, documents through the frozen backbone.

    Returns:
        "beside": what else trained, in a file of fastprompt's own; "model": what is loaded from the folder.

    Raises:
        ValueError: the learner's vectors are not what such a model computes.
    """
    if not copy_backbone:
        tell_quantized(learner)
    source, own, base = name_of(learner), changed(learner), learner.adapted.backbone
    if base.config.is_encoder_decoder:
        raise ValueError("'sentence-transformers' is for encoders and causal models, got an encoder-decoder")
    options = {"max_seq_length": learner.inputs.max_length, "source": source, "copy_backbone": copy_backbone}
    query = PromptedTransformer(*(base, learner.tokenizer), prompted=learner.adapted.prompted, trained=own, **options)
    document = query
    if own:  # the frozen one is another
        frozen = _base_model(source, {"dtype": base.dtype}).to(base.device)
        _keep(frozen, base.config.get_text_config().num_hidden_layers)
        document = PromptedTransformer(frozen, learner.tokenizer, **options)
    pooling = Pooling(query.get_embedding_dimension(), _POOLINGS[learner.inputs.pooling])
    routes = {QUERY: [query, pooling], DOCUMENT: [document, pooling]}
    if learner.alignment is not None:
        routes[QUERY].append(_projection(learner.alignment))
    before = learner.inputs.prefix_text
    model = SentenceTransformer(
        modules=[Router(routes, default_route=QUERY)],
        prompts={QUERY: before, DOCUMENT: before},
        default_prompt_name=QUERY,
        similarity_fn_name="cosine",
        device=str(base.device),
    )
    _check(model, learner)
    model.save(str(directory), create_model_card=False)
    return {"beside": save_beside(learner, directory, projection=False), "model": learner.backbone}


def _projection(alignment: nn.Module) -> Projection:
    weight, bias = alignment.weight.detach(), alignment.bias
    rows, columns = weight.shape
    made = Projection(columns, rows, bias is not None, None, weight, None if bias is None else bias.detach())
    return made.requires_grad_(False)


def _check(model: SentenceTransformer, learner) -> None:
    # The learner knows the frozen backbone's own vectors where nothing of it trained.
    knows = learner.adapted.prompted is not None and not changed(learner)
    for encode, from_source in ((model.encode_query, False), (model.encode_document, True))[: 1 + knows]:
        expected = learner.vectors(_PROBES, source=from_source).double()
        got = encode(_PROBES, convert_to_tensor=True).cpu().double()
        if not torch.allclose(got, expected, rtol=0, atol=2e-2 * float(expected.abs().max())):
            raise ValueError(
                "'sentence-transformers' is for vectors that are the pooled last hidden states of a text, projected: "
                f"this run's {'source' if from_source else 'target'} vectors are something else"
            )


def _base_model(source: str, options: dict) -> nn.Module:
    transformers = require("transformers", "train")
    config = transformers.AutoConfig.from_pretrained(source)
    return transformers.AutoModel.from_pretrained(source, **without_pooler(config), **options).eval()


def _keep(backbone: nn.Module, layers: int) -> None:
    if backbone.config.get_text_config().num_hidden_layers != layers:  # families that cannot be cut have all of theirs
        keep_layers(backbone, layers)


@torch.no_grad()
def _fill(backbone: nn.Module, file: Path) -> list[str]:
    """Give a backbone what trained of it, which may be nothing; the names."""
    own, trained = backbone.state_dict(), read_tensors(file).tensors if file.is_file() else {}
    for name, tensor in trained.items():
        if name not in own or own[name].shape != tensor.shape:
            expected = tuple(own[name].shape) if name in own else "no such weight"
            raise ValueError(f"{name} in {file} must fit the backbone: {expected}, got {tuple(tensor.shape)}")
    for name, tensor in trained.items():
        own[name].copy_(tensor)
    return list(trained)


@contextmanager
def _lora_off(backbone: nn.Module) -> Iterator[None]:
    layers = [module for module in backbone.modules() if hasattr(module, "lora_A")]
    trains = [(weight, weight.requires_grad) for layer in layers for weight in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for weight, so in trains:  # which PEFT changes, too
            weight.requires_grad_(so)
