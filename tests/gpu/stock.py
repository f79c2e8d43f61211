"""PEFT's models, what is compared of a model, and the rule that ours are held to."""

import copy
from contextlib import nullcontext

import peft
import torch
from helpers import DECODERS, build
from torch import Tensor, nn

P = 5
CONFIGS = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}
CAUSAL, BASE = "AutoModelForCausalLM", "AutoModel"


def head_of(family: str) -> str:
    return CAUSAL if family in DECODERS else BASE


def backbone_of(family: str, dtype: torch.dtype, device: str, **config) -> nn.Module:
    """A tiny model; its weights are the same every time."""
    return build(family, head_of(family), dtype, **config).to(device)


def peft_model(family: str, kind: str, dtype: torch.dtype, device: str, **config):
    """PEFT's model of it, with a prompt large enough to matter."""
    task = "CAUSAL_LM" if family in DECODERS else "FEATURE_EXTRACTION"
    backbone = backbone_of(family, dtype, device, **config)
    model = peft.get_peft_model(backbone, CONFIGS[kind](task_type=task, num_virtual_tokens=P)).to(device, dtype)
    for parameter in model.prompt_encoder.parameters():
        nn.init.normal_(parameter)
    return model


def in_float64(model: nn.Module) -> nn.Module:
    """A copy with the same weights."""
    return copy.deepcopy(model).double()


def prompt_of(model: nn.Module) -> nn.Parameter:
    """The one Parameter of a prompt, of PEFT's model or ours."""
    return model.prompt.weight if hasattr(model, "prompt") else model.prompt_encoder["default"].embedding.weight


def text_rows(model: nn.Module, inputs: dict) -> Tensor:
    """Logits, or last hidden states, of the text's tokens, in float64."""
    output, valid = model(**inputs), inputs["attention_mask"].bool()
    rows = output.logits if "logits" in output else output.last_hidden_state
    return rows[:, -valid.shape[1] :][valid].double()  # PEFT's of a prompt are longer


def results(model: nn.Module, inputs: dict, weight: Tensor, context=nullcontext) -> dict[str, Tensor]:
    """What a model gives in evaluation and in a training step.

    Args:
        weight: (tokens, features) float64, of an encoder's loss.
        context: to compute in.
    """
    inputs = {name: x.to(prompt_of(model).device) for name, x in inputs.items()}
    with torch.no_grad(), context():
        found = {"rows": text_rows(model.eval(), inputs)}
    model.train().zero_grad()
    with context():
        if "CausalLM" in type(model.get_base_model() if hasattr(model, "peft_config") else model.backbone).__name__:
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            found["loss"] = loss = model(**inputs, labels=labels).loss
        else:
            loss = (text_rows(model, inputs) * weight.to(inputs["input_ids"].device)).sum()
    loss.backward()
    return {name: x.detach().double().cpu() for name, x in found.items()} | {"gradient": gradient_of(model)}


def gradient_of(model: nn.Module) -> Tensor:
    return prompt_of(model).grad.double().cpu()


def check(got: dict[str, Tensor], exact: dict[str, Tensor], plain: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Errors against float64 of at most twice those of the stock path in the same dtype, plus eps.

    Of the root mean square: through several layers the greatest error is a matter of luck, and may be twice as large
    again. A cross entropy is off by up to twice what its logits are off by; it may come closer by luck.
    """
    budgets = {}
    for name, want in exact.items():
        want, error, stock = want.cpu(), *(each[name].double().cpu() - want.cpu() for each in (got, plain))
        budgets[name] = [factor * size(stock) + torch.finfo(dtype).eps * size(want) for size, factor in SIZES.items()]
        if name == "loss":
            budgets[name] = [2 * budgets["rows"][-1]] * len(SIZES)
        for size, budget in zip(SIZES, budgets[name], strict=True):
            assert size(error) <= budget, f"{name}: {size.__name__} of the error {size(error):.3g}, budget {budget:.3g}"


def root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def greatest(x: Tensor) -> float:
    return x.abs().max().item()


SIZES = {root_mean_square: 2, greatest: 4}  # of errors: how many times the stock path's they may be
