"""Frozen weights that are elsewhere until their module runs, or of another type: nothing reads them outside it."""

import warnings

import accelerate
import peft
import pytest
import torch
import transformers
from helpers import batch, build
from torch import nn

import fastprompt
from fastprompt import PromptConfig, PromptModel

P, CLM = 3, "AutoModelForCausalLM"
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
MAKERS = ["prefix", "prompt", "fused prefix", "fused prompt"]


def model_of(maker: str, backbone, fused: bool = True):
    torch.manual_seed(1)
    kind = maker.split()[-1]
    if maker == kind:
        return PromptModel(backbone, PromptConfig(kind, P, init_scale=1.0)).train()
    made = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[kind]
    model = peft.get_peft_model(backbone, made(task_type="CAUSAL_LM", num_virtual_tokens=P))
    return (fastprompt.fuse(model) if fused else model).train()


def labelled() -> dict[str, torch.Tensor]:
    inputs = batch()
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def loss_and_gradients(model, inputs) -> list[torch.Tensor]:
    loss = model(**inputs).loss
    return [loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


def in_zero3(module: nn.Module) -> None:
    """What DeepSpeed's ZeRO-3 makes of a module: its parameters are there, whole, while it runs."""
    whole = dict(module._parameters)
    empty = {name: p if p is None else nn.Parameter(p.new_empty(0), requires_grad=False) for name, p in whole.items()}
    module._parameters.update(empty)
    module.register_forward_pre_hook(lambda module, args: module._parameters.update(whole))
    module.register_forward_hook(lambda module, args, output: module._parameters.update(empty))


def elsewhere(backbone, way: str, folder):
    """The same model with its weights away."""
    if way == "ZeRO-3":
        for module in list(backbone.modules()):
            if module._parameters:
                in_zero3(module)
        return backbone
    if way == "offloaded":
        accelerate.cpu_offload(backbone, execution_device=torch.device("cpu"))
        return backbone
    backbone.save_pretrained(folder / "base")
    where = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers": "disk", "model.norm": "disk"}
    options = {"device_map": where | {"lm_head": "disk"}, "offload_folder": str(folder / "off")}
    return type(backbone).from_pretrained(folder / "base", **options)


WAYS = [(maker, way) for maker in MAKERS for way in ("ZeRO-3", "offloaded", "device_map")]
NOT_PEFT = [(f"fused {kind}", "offloaded") for kind in ("prefix", "prompt")] + [("fused prefix", "device_map")]
WAYS = [
    each for each in WAYS if each not in NOT_PEFT
]  # where PEFT itself fails: its prompt is on meta, or mapped there


@pytest.mark.parametrize(
    ("family", "maker", "way"), [("llama", *each) for each in WAYS] + [("gemma3_text", "prompt", "offloaded")]
)
def test_weights_elsewhere(family, maker, way, tmp_path):
    there, inputs = model_of(maker, build(family, CLM, torch.float32, tie_word_embeddings=False)), labelled()
    away = model_of(maker, elsewhere(build(family, CLM, torch.float32, tie_word_embeddings=False), way, tmp_path))
    assert all(p.device.type == "cpu" for p in away.parameters() if p.requires_grad)
    weights = [p for p in away.parameters() if not p.requires_grad]
    assert all(p.is_meta or not p.numel() for p in weights[1:]), "they are away, but for an embedding"
    torch.testing.assert_close(
        loss_and_gradients(away, inputs), loss_and_gradients(there, inputs), rtol=1e-4, atol=1e-5
    )
    if isinstance(away, PromptModel):
        options = {"max_new_tokens": 3, "do_sample": False}
        got = [m.eval().generate(input_ids=inputs["input_ids"][:, :1], **options) for m in (away, there)]
        assert torch.equal(*got)
        away.save_pretrained(tmp_path / "saved")
        read = PromptModel.from_pretrained(there.backbone, tmp_path / "saved")
        assert torch.equal(read.prompt.weight, away.prompt.weight)


def test_weights_nowhere():
    with torch.device("meta"):
        backbone = build("llama", CLM)
    with pytest.raises(ValueError, match="backbone must have its weights on a device, or offloaded by accelerate"):
        PromptModel(backbone, PromptConfig("prefix", P))


def test_weights_on_several_devices():
    backbone = build("llama", CLM)
    backbone.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match=r"backbone must be on one device, .*hf_device_map with \['0', '1'\]"):
        PromptModel(backbone, PromptConfig("prefix", P))
    with pytest.raises(ValueError, match="backbone must be on one device"):
        model_of("fused prompt", backbone)


class Opaque(torch.Tensor):
    """A weight that can be multiplied by as a layer does it, and in no other way, as those that are quantised."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            args = [each.as_subclass(torch.Tensor) if isinstance(each, cls) else each for each in args]
        elif func.__name__ in ("__getitem__", "split", "chunk", "t", "permute", "transpose", "matmul", "mm"):
            raise NotImplementedError(f"{func} of an opaque weight")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def opaque(folder):
    backbone = build("llama", CLM, torch.float32, **SIZES).requires_grad_(False)
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            module._parameters["weight"] = module.weight.detach().as_subclass(Opaque)
    return backbone


def torchao(folder):
    quantization = pytest.importorskip("torchao.quantization")
    backbone = build("llama", CLM, torch.float32, **SIZES)
    quantization.quantize_(backbone, quantization.Int8WeightOnlyConfig())  # of the head as well
    return backbone.requires_grad_(False)


def bitsandbytes(folder, **options):
    pytest.importorskip("bitsandbytes")
    build("llama", CLM, torch.float32, **SIZES).save_pretrained(folder)
    bits = transformers.BitsAndBytesConfig(**options)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=bits, device_map={"": "cpu"}, dtype=torch.float32
    )


def eight_bits(folder):
    return bitsandbytes(folder, load_in_8bit=True)


def four_bits(folder):
    return bitsandbytes(folder, load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


def prepared(folder):
    return peft.prepare_model_for_kbit_training(four_bits(folder), use_gradient_checkpointing=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("load", [opaque, torchao, eight_bits, four_bits, prepared])
def test_quantized(load, kind, tmp_path):
    """As the unfused quantised model: a PromptModel of PEFT's prompt, and the fused PeftModel."""
    inputs = labelled()
    stock, fused = (model_of(f"fused {kind}", load(tmp_path), fused=each) for each in (False, True))
    fused.load_state_dict({name: p for name, p in stock.state_dict().items() if "prompt_encoder" in name}, strict=False)
    expected = loss_and_gradients(stock, inputs)
    torch.testing.assert_close(loss_and_gradients(fused, inputs), expected, rtol=1e-3, atol=1e-5)
    stock.save_pretrained(tmp_path / "saved")
    model = PromptModel.from_pretrained(load(tmp_path), tmp_path / "saved", trainable=True).train()
    torch.testing.assert_close(loss_and_gradients(model, inputs), expected, rtol=1e-3, atol=1e-5)


def test_checkpointing_of_a_quantized_model(tmp_path):
    """Of PEFT's preparation for it, the reentrant kind is refused in words where it would drop a prefix."""
    backbone, inputs = build("llama", CLM, torch.float32), labelled()
    backbone.is_loaded_in_4bit = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.prepare_model_for_kbit_training(backbone, gradient_checkpointing_kwargs={"use_reentrant": True})
        model = model_of("prefix", backbone)
        with pytest.raises(ValueError, match="gradient checkpointing needs use_reentrant=False"):
            model(**inputs)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        got = loss_and_gradients(model, inputs)
    expected = loss_and_gradients(model_of("prefix", build("llama", CLM, torch.float32)), inputs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
