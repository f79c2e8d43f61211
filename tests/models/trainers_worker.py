"""What each of two processes does for test_trainers_processes.py; process 0 writes what came out to results.json.

Everything is in float64: a batch split over two processes trains what the whole one trains in a single process.
"""

import datetime
import json
import sys
import warnings
from functools import partial
from pathlib import Path

import peft
import torch
import torch.distributed as dist
import transformers
from helpers import batch, build
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastprompt
from fastprompt import PromptConfig, PromptModel

P, RATE, CLM = 3, 0.5, "AutoModelForCausalLM"
NAMES = [["default", "cy"], ["cy", "cy"]]  # by process, of its two samples; nothing reads the third prompt


def bank() -> PromptModel:
    torch.manual_seed(1)
    model = PromptModel(build("llama", CLM), PromptConfig("prefix", P, init_scale=1.0))
    for name in ("cy", "gd"):
        model.add_prompt(name)
    return model.train()


def prompt(kind: str) -> PromptModel:
    torch.manual_seed(1)
    return PromptModel(build("llama", CLM), PromptConfig(kind, P, init_scale=1.0)).train()


def fused(kind: str) -> peft.PeftModel:
    made = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[kind]
    torch.manual_seed(1)
    model = peft.get_peft_model(build("llama", CLM), made(task_type="CAUSAL_LM", num_virtual_tokens=P)).double()
    return fastprompt.fuse(model).train()


def halves(name: str) -> list[dict]:
    """Of one batch, with as many labels in each."""
    torch.manual_seed(2)
    whole = batch((7, 4, 7, 4))
    whole["labels"] = whole["input_ids"].masked_fill(whole["attention_mask"] == 0, -100)
    whole["labels"][:, 0] = -100  # the Trainer does not count it, though a prompt predicts it
    parts = [{key: x[2 * n : 2 * n + 2] for key, x in whole.items()} for n in range(2)]
    return [part | ({"prompt_ids": NAMES[n]} if name.startswith("bank") else {}) for n, part in enumerate(parts)]


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def steps(model, run, inputs: dict, reduce: bool) -> dict[str, torch.Tensor]:
    """Two steps of gradient descent on one's own half; the parameters they lead to."""
    for _ in range(2):
        run(**inputs).loss.backward()
        for parameter in trained(model).values():
            if reduce and not hasattr(
                parameter, "full_tensor"
            ):  # as transformers' Trainer does for what is not sharded
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
            with torch.no_grad():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
            parameter.grad = None
    return {name: full(parameter.detach()) for name, parameter in trained(model).items()}


def alone(make, name: str) -> dict[str, torch.Tensor]:
    """What the mean over both halves trains in one process."""
    model = make()
    for _ in range(2):
        loss = sum(model(**half).loss for half in halves(name)) / 2
        parameters = list(trained(model).values())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0 if gradient is None else RATE * gradient
    return {name: parameter.detach() for name, parameter in trained(model).items()}


def in_ddp(make, name: str, **options) -> dict[str, torch.Tensor]:
    model = make()
    return steps(model, DistributedDataParallel(model, **options), halves(name)[dist.get_rank()], False)


def in_fsdp(make, name: str, what: str) -> dict[str, torch.Tensor]:
    """The frozen weights are sharded: "layers" with the prompt whole; or "all", each head and embedding by itself too.

    "root" shards everything, what trains as well.
    """
    model = make()
    backbone = model.get_base_model() if isinstance(model, peft.PeftModel) else model.backbone
    for layer in backbone.model.layers:
        fully_shard(layer)
    if what == "all":
        for module in (backbone.model.embed_tokens, backbone.lm_head, backbone):
            fully_shard(module)
    if what == "root":
        fully_shard(model)
    assert any(hasattr(p, "full_tensor") for p in backbone.parameters())
    return steps(model, model, halves(name)[dist.get_rank()], True)


def in_trainer(make, name: str, folder: Path) -> dict[str, torch.Tensor]:
    model, data = make(), [{key: x[n] for key, x in half.items()} for half in halves(name) for n in range(2)]
    arguments = transformers.TrainingArguments(
        *(str(folder / name),),
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=RATE,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0,
        report_to="none",
        use_cpu=True,
        save_steps=1,
        disable_tqdm=True,
    )
    collate = transformers.default_data_collator
    transformers.Trainer(model, arguments, train_dataset=data, data_collator=collate).train()
    return {name: parameter.detach() for name, parameter in trained(model).items()}


def cases(folder: Path):
    """Name, how the model is made, how it is run."""
    yield "bank, DDP", bank, partial(in_ddp, bank, "bank")
    yield "bank, DDP that looks for what is unused", bank, partial(in_ddp, bank, "bank", find_unused_parameters=True)
    yield "bank, FSDP2 of all", bank, partial(in_fsdp, bank, "bank", "root")
    for name, make in (("PromptModel", partial(prompt, "prefix")), ("fused", partial(fused, "prompt"))):
        yield f"{name}, DDP", make, partial(in_ddp, make, name)
        yield f"{name}, FSDP2 of layers", make, partial(in_fsdp, make, name, "layers")
        yield f"{name}, FSDP2 of the backbone", make, partial(in_fsdp, make, name, "all")
        yield f"{name}, FSDP2 of all", make, partial(in_fsdp, make, name, "root")
        yield f"{name}, Trainer", make, partial(in_trainer, make, name, folder)


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    results = {}
    for name, make, run in cases(folder):
        try:
            got = run()
            expected = alone(make, name)
            if dist.get_rank() == 0:
                single = name.endswith("the backbone")  # its loss is transformers' own, in float32, of a sharded head
                torch.testing.assert_close(got, expected, rtol=1e-5 if single else 1e-9, atol=1e-7 if single else 1e-12)
            result = "equal"
        except Exception as error:  # noqa: BLE001  the next case may do
            result = f"{type(error).__name__}: {error}"
        if dist.get_rank() == 0:
            results[name] = result
            (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
