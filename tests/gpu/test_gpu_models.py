"""Tiny models of every family on a GPU, by public names and defaults, held to PEFT's by the rule of the operators."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import CONFIGS, DECODERS, batch
from stock import P, backbone_of, check, gradient_of, in_float64, peft_model, prompt_of, results, text_rows

import fastprompt
from fastprompt import PromptConfig, PromptModel

BF16 = torch.bfloat16
# dtype of the weights, that of the rule, and whether autocast is on
PRECISIONS = {
    "bfloat16": (BF16, BF16, False),
    "float32": (torch.float32, torch.float32, False),
    "autocast": (torch.float32, BF16, True),
}
GREEDY = {"do_sample": False, "pad_token_id": 1, "eos_token_id": None}


def compare(stock, dtype, folder, context=nullcontext):
    """fuse, and PromptModel with the same prompt, against PEFT."""
    inputs = batch()
    weight = torch.randn(int(inputs["attention_mask"].sum()), 48).to(BF16).double()
    exact = results(in_float64(stock), inputs, weight)
    run = partial(results, inputs=inputs, weight=weight, context=context)
    plain = run(stock)
    stock.save_pretrained(folder)
    check(run(fastprompt.fuse(stock)), exact, plain, dtype)
    check(run(PromptModel.from_pretrained(stock.get_base_model(), folder, trainable=True)), exact, plain, dtype)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", CONFIGS)
def test_fuse_and_prompt_model_against_peft(device, family, kind, precision, tmp_path):
    weights, dtype, autocast = PRECISIONS[precision]
    context = partial(torch.autocast, device, BF16) if autocast else nullcontext
    compare(peft_model(family, kind, weights, device), dtype, tmp_path, context)


@pytest.mark.parametrize(
    ("features", "heads", "kv_heads"), [(64, 2, 2), (96, 8, 1), (112, 6, 2), (128, 4, 1), (256, 4, 2), (64, 6, 1)]
)
def test_head_sizes_and_groups(device, features, heads, kv_heads, tmp_path):
    sizes = dict(head_dim=features, num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=2)
    compare(peft_model("llama", "prefix", BF16, device, **sizes), BF16, tmp_path)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_bank_against_peft_prompt_by_prompt(device, family, kind, tmp_path):
    names, ids = ("default", "cy", "mi"), torch.tensor([1, 0, 2, 1])
    stocks = [peft_model(family, kind, BF16, device) for _ in names]
    for name, stock in zip(names, stocks, strict=True):
        stock.save_pretrained(tmp_path / name)
    bank = PromptModel.from_pretrained(backbone_of(family, BF16, device), tmp_path / "default", trainable=True)
    for name in names[1:]:
        bank.load_prompt(name, tmp_path / name, trainable=True)
    inputs = {name: x.to(device) for name, x in batch().items()}
    of_token = inputs["attention_mask"].bool().nonzero()[:, 0].cpu()
    features = 61 if family in DECODERS else 48
    weight = torch.randn(len(of_token), features, dtype=torch.float64)

    def each(models) -> dict:
        found, rows = {}, torch.zeros_like(weight)
        for n, (name, model) in enumerate(zip(names, models, strict=True)):
            mine = (ids[of_token] == n)[:, None]
            own = text_rows(model.eval(), inputs)
            (own * (weight * mine).to(device)).sum().backward()
            rows += own.detach().cpu() * mine
            found[f"gradient of {name}"] = gradient_of(model)
        return {"rows": rows} | found

    exact, plain = each(map(in_float64, stocks)), each(stocks)
    rows = text_rows(partial(bank.eval(), prompt_ids=ids.to(device)), inputs)
    (rows * weight.to(device)).sum().backward()
    prompts = bank.prompt, *(bank.other_prompts[name] for name in names[1:])
    got = {
        f"gradient of {name}": prompt.weight.grad.double().cpu() for name, prompt in zip(names, prompts, strict=True)
    }
    check({"rows": rows.detach().cpu()} | got, exact, plain, BF16)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_generation(device, family, kind):
    """Ragged and past Gemma's window: the logits of each word are those of the packed forward."""
    model = PromptModel(backbone_of(family, BF16, device), PromptConfig(kind, P, init_scale=1.0)).eval()
    inputs = {name: x.to(device) for name, x in batch((7, 1, 12), "left").items()}
    options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    made = model.generate(**inputs, **options)
    assert made.sequences.shape == (3, 18)
    mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(3, 6)], 1)
    whole = {"input_ids": made.sequences, "attention_mask": mask}
    exact, plain = (each(**whole).logits[:, 11:17].double() for each in (in_float64(model), model))
    check({"": torch.stack(made.logits, 1)}, {"": exact}, {"": plain}, BF16)
    words = made.sequences[:, 12:, None]
    behind = exact.amax(2) - exact.gather(2, words)[..., 0]  # what it wrote may be second only by its rounding
    assert behind.max() <= 4 * (plain - exact).abs().max() + torch.finfo(BF16).eps * exact.abs().max()


@pytest.mark.parametrize(("family", "kind"), [("llama", "prefix"), ("gemma3_text", "prompt")])
def test_a_training_run(device, family, kind):
    """Twenty steps: the loss goes down as it does on a CPU in float64."""
    stock = peft_model(family, kind, torch.float32, device)
    exact, batches = in_float64(stock).cpu(), [batch() for _ in range(3)]
    fused = fastprompt.fuse(peft_model(family, kind, torch.float32, device))
    with torch.no_grad():
        prompt_of(fused).copy_(prompt_of(stock))

    def losses(model) -> dict:
        optimizer, found = torch.optim.AdamW([prompt_of(model)], 0.05), []
        for n in range(20):
            inputs = {name: x.to(prompt_of(model).device) for name, x in batches[n % len(batches)].items()}
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            loss = model.train()(**inputs, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach().double().cpu())
        return {"losses": torch.stack(found)}

    got, want, plain = losses(fused), losses(exact), losses(stock)
    assert want["losses"][-3:].mean() < 0.9 * want["losses"][:3].mean()
    check(got, want, plain, torch.float32)
