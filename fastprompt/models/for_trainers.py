"""What transformers' Trainer, TRL's trainers, accelerate and the Hub ask of a model, as a PromptModel answers it."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fastprompt._card import CARD
from fastprompt._files import write_tensors, write_text

RESUME = "model.safetensors"  # where transformers' Trainer looks for the weights to go on with
_CARD = """---
library_name: fastprompt
{base}tags:
{tags}
---

A prompt of {rows} virtual tokens ({kind}) for the frozen model {name}.

```python
from fastprompt import PromptModel

model = PromptModel.from_pretrained(backbone, "the folder of this repository")
```
"""


def _of_backbone(name: str, what: str) -> property:
    return property(lambda self: getattr(self.backbone, name), doc=f"The backbone's: {what}.")


class ForTrainers:
    """What stands between a bank of prompts and the trainers: it has a `backbone`, and is a module."""

    model_tags = ["fastprompt", "prompt-tuning"]
    supports_gradient_checkpointing = True

    config = _of_backbone("config", "transformers' configuration; `prompt_config` is the prompt's")
    generation_config = _of_backbone("generation_config", "what generate does unless it is told otherwise")
    loss_type = _of_backbone("loss_type", "transformers' Trainer counts the labels accordingly")
    hf_device_map = _of_backbone("hf_device_map", "where its parts are, if accelerate has placed them")
    _no_split_modules = _of_backbone("_no_split_modules", "what FSDP wraps")

    @property
    def device(self) -> torch.device:
        """The prompt's: the backbone's weights may be offloaded, or on several."""
        return self.prompt.weight.device

    @property
    def base_model(self):
        """What gives hidden states (B, L, D) for the inputs of a forward, prompts included: TRL runs the head on it."""
        return self.hidden_states

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's."""
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The backbone's."""
        return self.backbone.get_output_embeddings()

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Add tags to those of the model's card."""
        tags = [tags] if isinstance(tags, str) else tags
        self.model_tags = [*self.model_tags, *(tag for tag in tags if tag not in self.model_tags)]

    @property
    def prepare_decoder_input_ids_from_labels(self) -> Callable[[Tensor], Tensor]:
        """Of an encoder-decoder, what its decoder reads; transformers' DataCollatorForSeq2Seq asks for it."""
        if not self.config.is_encoder_decoder:
            raise AttributeError(f"{type(self.backbone).__name__} has no prepare_decoder_input_ids_from_labels")
        return self._packed.shifted

    def tie_weights(self, *args, **kwargs) -> None:
        """As the backbone's own."""
        self.backbone.tie_weights(*args, **kwargs)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """As the backbone's own."""
        return self.backbone.resize_token_embeddings(*args, **kwargs)

    def set_attn_implementation(self, *args, **kwargs) -> None:
        """As the backbone's own; a packed pass has its own in any case."""
        self.backbone.set_attn_implementation(*args, **kwargs)

    def enable_input_require_grads(self) -> None:
        """As the backbone's own. Gradients reach the prompt without it."""
        self.backbone.enable_input_require_grads()

    def disable_input_require_grads(self) -> None:
        """As the backbone's own."""
        self.backbone.disable_input_require_grads()

    def activation_checkpointing_enable(self, *args, **kwargs) -> None:
        """As the backbone's own."""
        self.backbone.activation_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """As the backbone's own."""
        self.backbone.activation_checkpointing_disable()

    def gradient_checkpointing_enable(self, *args, **kwargs) -> None:
        """The same under the name that transformers 4 has for it."""
        self.backbone.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """The same under the name that transformers 4 has for it."""
        self.backbone.gradient_checkpointing_disable()

    def _get_name(self) -> str:
        """The backbone's: by it transformers' Trainer knows whether labels are to be shifted for label smoothing."""
        return type(self.backbone).__name__

    def __repr__(self) -> str:
        return super().__repr__().replace(self._get_name(), type(self).__name__, 1)

    # -- files ----------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool | None = None,
        save_function=None,
        max_shard_size=None,
    ) -> None:
        """Write `adapter_config.json`, `adapter_model.safetensors` (both PEFT's) and `fastprompt_config.json`.

        With an encoder, PEFT's file holds what it makes, and `encoder.safetensors` beside it what trains; adapters go
        into `adapters.safetensors`. Prompts other than the default go into subfolders of their names, as adapters do in
        PEFT; each is whole. What else of the backbone trains, was loaded with a prompt, or was added to it (as by
        `resize_token_embeddings`) goes into PEFT's file as well.

        Args:
            directory: where.
            state_dict: the model's tensors, where those that it holds are not whole, as in a model that is sharded.
            is_main_process: as transformers' Trainer and accelerate give it. False: nothing is written. True: what
                trains is also written by its names in the model, as `model.safetensors`, from which the Trainer
                resumes.
            save_function, max_shard_size: of transformers, and not read: files are written by safetensors, whole.

        Raises:
            ValueError: a tensor that is not whole, and is not in state_dict.
        """
        if is_main_process is False:
            return
        with self._holding(state_dict or {}):
            tensors = self.state_dict()
            tensors = {name: tensors[name] for name in self._saved_names()}
            for name, tensor in tensors.items():
                if not tensor.numel() or tensor.is_meta or hasattr(tensor, "full_tensor"):
                    raise ValueError(
                        "state_dict must be given for a model whose tensors are not whole, as accelerate's "
                        f"get_state_dict gathers them, got none with {name}"
                    )
            super().save_pretrained(directory)
            if is_main_process:
                write_tensors(Path(directory) / RESUME, tensors)

    @contextmanager
    def _holding(self, state_dict: dict[str, Tensor]) -> Iterator[None]:
        """For a while, the parameters of those names are those tensors."""
        own = {name: parameter for name, parameter in self.named_parameters() if name in state_dict}
        try:
            for name, parameter in own.items():
                self._put(name, nn.Parameter(state_dict[name].detach(), requires_grad=parameter.requires_grad))
            yield
        finally:
            for name, parameter in own.items():
                self._put(name, parameter)

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        module, _, name = name.rpartition(".")
        self.get_submodule(module)._parameters[name] = parameter

    def _saved_names(self) -> list[str]:
        """Of what is not the frozen backbone's, in `state_dict`: prompts, adapters, and what else trains or was loaded.

        Of tied weights the first.
        """
        kept, names, seen = {f"backbone.{name}" for name in self._head}, [], set()
        for name, tensor in self.state_dict(keep_vars=True).items():
            wanted = not name.startswith("backbone.") or tensor.requires_grad or name in kept
            if wanted and id(tensor) not in seen:
                names.append(name)
                seen.add(id(tensor))
        return names

    @property
    def _keys_to_ignore_on_save(self) -> list[str]:
        """What `model.safetensors` does not hold: transformers' Trainer does not miss it there."""
        return list(self.state_dict().keys() - set(self._saved_names()))

    def push_to_hub(self, repo_id: str, *, token=None, private=None, commit_message: str = "Upload prompt", **upload):
        """Write what `save_pretrained` writes, and a card, into a repository of the Hugging Face Hub.

        Args:
            repo_id: of the repository, made if there is none.
            token, private, commit_message, upload: as `HfApi.upload_folder` and `HfApi.create_repo` take them.

        Returns:
            What `upload_folder` returns.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            write_text(Path(folder) / CARD, self.card())
            return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message, **upload)

    def card(self) -> str:
        """The text of a model card."""
        name, prompt = self.config._name_or_path, self.prompt_config
        return _CARD.format(
            base=f"base_model: {name}\n" if name else "",
            tags="\n".join(f"- {tag}" for tag in self.model_tags),
            rows=prompt.num_virtual_tokens,
            kind=prompt.kind,
            name=f"`{name}`" if name else f"of family `{self.config.model_type}`",
        )
