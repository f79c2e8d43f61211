"""PromptBank: the prompts of a frozen backbone, by name; what a batch reads of them, and their files."""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastprompt.nn import Prefix, Prompt

from . import checkpoint
from .bottleneck import Adapters
from .config import PromptConfig
from .distributed import wants_all_gradients
from .packed import PackedBackbone, PackedEncoderDecoder, PromptInputs, layout, packed_model
from .packed.backbone import computed_in
from .prompt_init import new_prompt

DEFAULT = "default"  # PEFT's name of a first adapter


class PromptBank(nn.Module):
    """What trains beside, and of, a backbone that is frozen: `fastprompt.PromptModel` is one that runs.

    Args:
        backbone: a transformers model of a supported family. Its parameters are frozen, in place, except those of a
            classification or span head.
        config: what kind of prompts.

    Attributes:
        prompt_config: `config`.
        prompt: the one named "default".
        other_prompts: the others, by their names.
        adapters: common to all, or None.
    """

    def __init__(self, backbone: nn.Module, config: PromptConfig) -> None:
        nn.Module.__init__(self)  # not that of another base of a subclass, such as transformers' PreTrainedModel
        self.prompt_config, self.backbone = config, backbone
        freeze(backbone)
        self._head = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
        packed = self._packed
        self.prompt = new_prompt(config, packed)
        self.other_prompts = nn.ModuleDict()
        self.adapters = None
        if config.adapter_size is not None:
            self.adapters = Adapters(packed.layers, packed.geometry, config.adapter_size).to(self.prompt.weight)

    @property
    def _packed(self) -> PackedBackbone | PackedEncoderDecoder:
        return packed_model(self.backbone, fused=True)

    @property
    def position_offset(self) -> int:
        """What is added to the tokens' positions."""
        return self.prompt_config.num_virtual_tokens if self.prompt_config.position_offset == "peft" else 0

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """The prompts; their order gives the ids."""
        return DEFAULT, *self.other_prompts

    def _prompt_of(self, name: str) -> Prompt | Prefix:
        if name not in self.prompt_names:
            raise ValueError(f"name must be one of {self.prompt_names}, got {name!r}")
        return self.prompt if name == DEFAULT else self.other_prompts[name]

    def add_prompt(self, name: str, init_from: str | None = None) -> None:
        """Add a prompt, which trains, at the end of the bank.

        Args:
            name: new, not empty, without ".", "/" and "\\"; it is also the name of a folder.
            init_from: the prompt it begins as a copy of; None: it begins as the configuration says.

        Raises:
            ValueError: a name that does not fit.
        """
        self._check_new(name)
        if init_from is None:
            prompt = new_prompt(self.prompt_config, self._packed)
        else:
            prompt = copy.deepcopy(self._prompt_of(init_from))
        self.other_prompts[name] = prompt.train(self.training).requires_grad_(True)

    def drop_prompt(self, name: str) -> None:
        """Take a prompt other than the default out of the bank: the ids of later ones go down by one."""
        if name == DEFAULT:
            raise ValueError(f"name must not be {DEFAULT!r}: a model keeps its first prompt")
        self._prompt_of(name)
        del self.other_prompts[name]

    def freeze_prompt(self, name: str) -> None:
        """Leave a prompt as it is from now on: it is read and gets no gradient."""
        self._prompt_of(name).requires_grad_(False)

    def save_prompt(self, name: str, directory: str | Path) -> None:
        """Write one prompt as `save_pretrained` writes a model that has no other."""
        self._save(self._prompt_of(name), Path(directory))

    def load_prompt(
        self, name: str, directory: str | Path, *, trainable: bool = False, subfolder: str | None = None
    ) -> None:
        """Add a prompt that `save_prompt`, `save_pretrained` or PEFT wrote. A head and adapters beside it are not read.

        Other weights beside it, such as rows of added tokens, must be the model's own.

        Args:
            name: as in `add_prompt`.
            directory, subfolder: as of `from_pretrained`.
            trainable: whether it goes on training; an encoder is needed for that, and is left out otherwise.

        Raises:
            FileNotFoundError, ValueError: a name that does not fit; a file that is missing or of another kind or shape.
        """
        self._check_new(name)
        folder = checkpoint.locate(directory, subfolder)
        prompt = checkpoint.load_prompt(self.prompt_config, self._packed, folder, trainable)
        self.other_prompts[name] = prompt.train(self.training).requires_grad_(trainable)

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str) or not name or set(name) & set("./\\"):
            raise ValueError(f"name must be a string, not empty, without '.', '/' and '\\', got {name!r}")
        if name == DEFAULT or hasattr(self.other_prompts, name):  # of a ModuleDict's entries, and its own attributes
            raise ValueError(f"name must be new, and none that torch.nn.ModuleDict has for itself, got {name!r}")

    def prompt_inputs(
        self,
        prompt_ids: Tensor | np.ndarray | Sequence[str | int] | None = None,
        shared_prefix_ids: Tensor | None = None,
    ) -> PromptInputs:
        """What a packed forward, or `fastprompt.models.generation.generate`, takes of the prompts that a batch reads.

        Args:
            prompt_ids, shared_prefix_ids: as of `forward`. Prompts that no sample reads are left out.
        """
        ids, names, index = self._numbers(prompt_ids), self.prompt_names, None
        if isinstance(ids, Tensor):
            ids = layout.read({"prompt_ids": ids})["prompt_ids"]
        used = names[:1]
        if ids is not None:
            found, index = np.unique(ids, return_inverse=True)
            index, found = index.reshape(ids.shape), found.tolist()
            if found and not 0 <= found[0] <= found[-1] < len(names):
                wrong = found[0] if found[0] < 0 else found[-1]
                raise IndexError(f"prompt_ids must be in [0, {len(names)}), got {wrong}")
            used = [names[i] for i in found]
        rows = [self._prompt_of(name).rows().unsqueeze(0) for name in used]
        rows = rows[0] if len(rows) == 1 else torch.cat(rows)
        if torch.is_grad_enabled() and wants_all_gradients(self):
            for name in self.prompt_names:
                for parameter in self._prompt_of(name).parameters() if name not in used else ():
                    if parameter.requires_grad:  # of no element, whatever the values are
                        rows = rows + parameter.flatten()[:0].sum()
        # It is kept in float32 where the backbone runs in less: brought to that once, not layer by layer.
        rows = rows.to(computed_in(self.backbone.get_input_embeddings().weight.dtype, rows.device))
        prompts = {self.prompt_config.kind: rows if self.prompt_config.kind == "prompt" else self.prompt.split(rows)}
        return PromptInputs(
            **prompts,
            index=index,
            shared_ids=shared_prefix_ids,
            position_offset=self.position_offset,
            prefix_in_window=self.prompt_config.prefix_in_window,
            adapters=self.adapters,
        )

    def _numbers(self, prompt_ids: Tensor | np.ndarray | Sequence[str | int] | None) -> Tensor | np.ndarray | None:
        """The numbers of names; a tensor is still to be read."""
        if prompt_ids is None or isinstance(prompt_ids, Tensor | np.ndarray):
            if isinstance(prompt_ids, Tensor) and prompt_ids.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"prompt_ids must be torch.int32 or torch.int64, got {prompt_ids.dtype}")
            return prompt_ids
        names = self.prompt_names
        unknown = [prompt_ids] if isinstance(prompt_ids, str) else [n for n in prompt_ids if n not in names]
        unknown = [n for n in unknown if type(n) is not int]
        if unknown:
            raise ValueError(f"prompt_ids must be a list of names in {names}, or a tensor, got {unknown[0]!r}")
        return np.array([n if type(n) is int else names.index(n) for n in prompt_ids], dtype=np.int64)

    # -- files ---------------------------------------------------------------------------------------------------

    def head(self) -> dict[str, nn.Parameter]:
        """The parameters of a task's head, which train and are saved with the prompt, by their name in the backbone."""
        return {name: self.backbone.get_parameter(name) for name in self._head}

    def save_pretrained(self, directory: str | Path) -> None:
        """Write all prompts, and what goes with them: see `PromptModel.save_pretrained`."""
        directory = Path(directory)
        for name in self.other_prompts:
            self.save_prompt(name, directory / name)
        self._save(self.prompt, directory, others=list(self.other_prompts))

    def _save(self, prompt: Prompt | Prefix, directory: Path, others: Sequence[str] = ()) -> None:
        beside = {"head": self._head, "adapters": self.adapters, "others": others}
        checkpoint.save(self.prompt_config, self._packed, prompt, directory, **beside)

    @classmethod
    def from_pretrained(
        cls, backbone: nn.Module, directory: str | Path, *, trainable: bool = False, subfolder: str | None = None
    ) -> "PromptBank":
        """Load what `save_pretrained`, or PEFT, wrote: of PEFT's the one adapter in the folder; see `load_prompt`.

        Args:
            backbone: the model it was trained on.
            directory: folder with `adapter_config.json` and `adapter_model.safetensors` (or `adapter_model.bin`, as
                older versions of PEFT wrote it); or a string, the id of a repository of such files on the hub.
            trainable: whether to go on training; encoders are needed for that, and are left out otherwise.
            subfolder: of the directory, or of the repository, with the files.

        Raises:
            FileNotFoundError, ValueError: a file is missing, of another kind, or of a shape that does not fit.
        """
        stored = checkpoint.read(checkpoint.locate(directory, subfolder))
        beside = stored.fitting(backbone)
        model = cls(backbone, stored.start(stored.config, trainable))
        model.prompt_config = stored.config
        stored.fill(model.prompt, model.adapters)
        for own, tensor in beside.values():
            own.data.copy_(tensor)
        # What came from a file goes into the next one.
        parameters = {name for name, _ in backbone.named_parameters()}
        model._head += [name for name in beside if name in parameters and name not in model._head]
        for name in stored.others:
            inside = name if subfolder is None else f"{subfolder}/{name}"
            model.load_prompt(name, directory, trainable=trainable, subfolder=inside)
        if not trainable:
            model.requires_grad_(False)
        return model


def freeze(backbone: nn.Module) -> None:
    """No gradients for the base model and for a language-model head; a head for a task goes on training."""
    backbone.base_model.requires_grad_(False)
    output = backbone.get_output_embeddings()
    if output is not None:
        backbone.requires_grad_(False)
