"""Each operator and backend, and tiny models, against float64. A process each: a bad kernel hides no other."""

from functools import partial

from .records import DEVICE, NotThere

LENGTHS = (37, 1, 0, 64, 129) if DEVICE == "cuda" else (7, 1, 0, 18)
ATTENTION = {  # options of prefix_attention; "bank": how many prefixes, "group": query heads a key head
    "causal": {"is_causal": True},
    "both": {"bank": 3},
    "window": {"is_causal": True, "window": 5, "group": 4},
    "prompt rows": {"is_causal": True, "prompt_rows": 9},
}
DISTANCES = ("cosine", "infonce+cosine", "mse+smooth_l1")
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of the largest exact entry


def attention(backend: str, dtype: str, *names: str) -> dict:
    import torch

    from fastprompt.ops import prefix_attention

    features = 64 if DEVICE == "cuda" else 16
    errors = {}
    for name in names or ATTENTION:
        form = dict(ATTENTION[name])
        bank, heads, prompt = form.pop("bank", 1), form.pop("group", 2) * 2, form.get("prompt_rows", 0)
        rows = sum(LENGTHS) + prompt
        shapes = [(rows, heads, features), *[(rows, 2, features)] * 2]
        shapes += [] if prompt else [(bank, 2, 19, features)] * 2
        bounds = _bounds()
        index = torch.arange(len(LENGTHS), device=DEVICE) % bank if bank > 1 else None

        def run(tensors, backend, bounds=bounds, index=index, form=form):
            prefix = tensors[3:] or (None, None)
            return prefix_attention(*tensors[:3], *prefix, bounds, prefix_index=index, backend=backend, **form)

        errors[name] = _compare(run, shapes, dtype, backend)
    return _judge(errors, dtype)


def alignment(backend: str, dtype: str, *names: str) -> dict:
    from fastprompt.ops import alignment_loss

    def run(tensors, backend, distance):
        return alignment_loss(*tensors, distance=distance, temperature=0.2, backend=backend)

    rows, width = (130, 96) if DEVICE == "cuda" else (20, 32)
    shapes = [(rows, width), (rows, width), (width, width), (width,)]
    errors = {name: _compare(partial(run, distance=name), shapes, dtype, backend) for name in names or DISTANCES}
    return _judge(errors, dtype)


def packing(backend: str, dtype: str) -> dict:
    import torch

    from fastprompt.ops import pack_prompt

    ids = torch.randint(50, (sum(LENGTHS),), device=DEVICE)
    table = torch.randn(50, 48, device=DEVICE, dtype=getattr(torch, dtype))

    def run(tensors, backend, per_segment):
        return pack_prompt(
            table.to(tensors[0].dtype), ids, _bounds(), *tensors, per_segment=per_segment, backend=backend
        )

    forms = {name: partial(run, per_segment=name == "segments") for name in ("causal", "segments")}
    return _judge({name: _compare(form, [(1, 11, 48)], dtype, backend) for name, form in forms.items()}, dtype)


def pooling(backend: str, dtype: str) -> dict:
    from fastprompt import ops

    def run(tensors, backend, name):
        return getattr(ops, name)(*tensors, _bounds(empty=False), backend=backend)

    shapes = [(sum(LENGTHS), 96)]
    names = ("segment_mean", "segment_first", "segment_last")
    return _judge({name: _compare(partial(run, name=name), shapes, dtype, backend) for name in names}, dtype)


def head(backend: str, dtype: str) -> dict:
    import torch

    from fastprompt.ops import linear_cross_entropy

    target = torch.randint(1000, (77,), device=DEVICE)
    weight = (torch.randn(1000, 48, device=DEVICE) / 7).to(getattr(torch, dtype))

    def run(tensors, backend):
        return linear_cross_entropy(tensors[0], weight.to(tensors[0].dtype), target, backend=backend)

    return _judge({"": _compare(run, [(77, 48)], dtype, backend)}, dtype)


def model(kind: str, prompt: str, dtype: str) -> dict:
    """A step of a tiny Llama: PromptModel and fuse against themselves in float64, and fuse against PEFT."""
    import torch

    import fastprompt

    peft, transformers = _packages("peft", "transformers")
    sizes = dict(vocab_size=97, hidden_size=64, num_hidden_layers=2, intermediate_size=96, head_dim=32)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    ids = torch.randint(5, 97, (4, 23), device=DEVICE)
    mask = torch.arange(23, device=DEVICE)[None] < torch.tensor([23, 4, 17, 11], device=DEVICE)[:, None]
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}

    def run(dtype, double: bool, fused: bool) -> list:
        torch.manual_seed(1)
        backbone = transformers.AutoModelForCausalLM.from_config(config).to(DEVICE, dtype)
        if kind == "fuse":
            make = peft.PrefixTuningConfig if prompt == "prefix" else peft.PromptTuningConfig
            adapter = make(task_type="CAUSAL_LM", num_virtual_tokens=6)
            whole = peft.get_peft_model(backbone, adapter).to(DEVICE, dtype)
            weight = whole.prompt_encoder["default"].embedding.weight
        else:
            whole = fastprompt.PromptModel(backbone, fastprompt.PromptConfig(prompt, 6)).to(DEVICE, dtype)
            weight = whole.prompt.weight
        whole = whole.double() if double else whole  # from the rounded weights
        whole = fastprompt.fuse(whole) if fused and kind == "fuse" else whole
        loss = whole.train()(**inputs).loss
        loss.backward()
        return [loss.detach().double(), weight.grad.double()]

    number = getattr(torch, dtype)
    exact, got = run(number, True, kind != "fuse"), run(number, False, True)
    errors = {name: _error(a, b) for name, a, b in zip(("loss", "gradient"), got, exact, strict=True)}
    # bfloat16 through layers, and stock norms that stay at float32's error in float64
    return _judge(errors, dtype, {"float32": 2e-4, "bfloat16": 0.1})


def _packages(*names: str) -> list:
    from importlib import import_module

    try:
        return [import_module(name) for name in names]
    except ImportError as error:
        raise NotThere(f"the package {error.name} is not installed") from None


def _bounds(empty: bool = True):
    import torch

    lengths = torch.tensor(LENGTHS)
    if not empty:  # the mean of nothing is nothing to compare
        lengths = lengths[lengths > 0]
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().to(DEVICE)


def _compare(run, shapes: list, dtype: str, backend: str | None) -> float:
    """Largest error of output and gradients, over the largest exact entry of each, of fresh inputs."""
    import torch

    torch.manual_seed(0)
    tensors = [torch.randn(shape, device=DEVICE).to(getattr(torch, dtype)).requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    out, want = run(tensors, backend), run(exact, "reference")
    grad = torch.randn(out.shape, device=DEVICE).to(out.dtype)
    got = [out, *torch.autograd.grad(out, tensors, grad)]
    wanted = [want, *torch.autograd.grad(want, exact, grad.double())]
    return max(_error(a, b) for a, b in zip(got, wanted, strict=True))


def _error(got, want) -> float:
    error = ((got.double() - want.double()).abs().max() / want.abs().max().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def _judge(errors: dict[str, float], dtype: str, tolerance: dict[str, float] = TOLERANCE) -> dict:
    errors = {name: float(f"{error:.2e}") for name, error in errors.items()}
    if wrong := {name: error for name, error in errors.items() if not error <= tolerance[dtype]}:
        raise AssertionError(f"wrong beyond {tolerance[dtype]:g}: {wrong}")
    return {"errors": errors}


NATIVE = "bfloat16" if DEVICE == "cuda" else "float32"
DTYPES = ("bfloat16", "float32")
CASES = {  # Triton's by form: compiling them is what takes long
    f"{name}-triton-{dtype}-{form.replace(' ', '-')}": partial(run, "triton", dtype, form)
    for name, run, forms in (("attention", attention, ATTENTION), ("alignment", alignment, DISTANCES))
    for dtype in DTYPES
    for form in forms
}
CASES |= {
    f"attention-native-{NATIVE}": partial(attention, "native", NATIVE),
    "alignment-native-bfloat16": partial(alignment, "native", "bfloat16"),
    "alignment-native-float32": partial(alignment, "native", "float32"),
    "packing-native-bfloat16": partial(packing, "native", "bfloat16"),
    "pooling-triton-float32": partial(pooling, "triton", "float32"),
    "head-chunked-bfloat16": partial(head, "chunked", "bfloat16"),
    "fuse-prefix-bfloat16": partial(model, "fuse", "prefix", "bfloat16"),
    "fuse-prompt-float32": partial(model, "fuse", "prompt", "float32"),
    "prompt_model-prefix-float32": partial(model, "prompt_model", "prefix", "float32"),
    "prompt_model-prompt-bfloat16": partial(model, "prompt_model", "prompt", "bfloat16"),
}
MEMCHECKED = [f"attention-native-{NATIVE}", "attention-triton-bfloat16-causal", "attention-triton-bfloat16-both"]
MEMCHECKED += ["alignment-native-float32", "alignment-triton-bfloat16-infonce+cosine", "packing-native-bfloat16"]
MEMCHECKED += ["pooling-triton-float32"]


def cases() -> dict:
    return CASES
