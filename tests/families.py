"""Small random models of the families beside those of `helpers`: what differs from the common sizes, by model type."""

import copy
import math

import peft
import torch
import torch.nn.functional as F
import transformers as t
from helpers import CONFIGS, PAD, VOCABULARY, batch, build

import fastprompt
from fastprompt.models.fuse import FusedForward

SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, intermediate_size=40, pad_token_id=PAD)
SIZES |= dict(num_attention_heads=4)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
ENCODER = SIZES | NO_DROPOUT | dict(max_position_embeddings=66, type_vocab_size=1)
DECODER = SIZES | dict(num_key_value_heads=2, max_position_embeddings=64)
GPT = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=PAD)
GPT |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
SLIDING = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"])
EXPERTS = dict(num_experts_per_tok=2)
GEMMA = DECODER | dict(head_dim=16, query_pre_attn_scalar=16)
GEMMA_N = DECODER | dict(head_dim=16, num_hidden_layers=4, num_kv_shared_layers=2, sliding_window=6)
GEMMA_N |= dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY)
GEMMA_N |= dict(layer_types=["sliding_attention", "full_attention"] * 2)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16)
VISION |= dict(patch_size=8)

FAMILIES = {
    "qwen2": t.Qwen2Config(**DECODER),
    "qwen3": t.Qwen3Config(**DECODER, head_dim=16),
    "qwen3_moe": t.Qwen3MoeConfig(**DECODER, **EXPERTS, head_dim=16, num_experts=4, moe_intermediate_size=24),
    "mistral": t.MistralConfig(**DECODER, head_dim=8, sliding_window=6),
    "mixtral": t.MixtralConfig(**DECODER, **EXPERTS, num_local_experts=4),
    "gemma": t.GemmaConfig(**DECODER, head_dim=16),
    "gemma2": t.Gemma2Config(**GEMMA, **SLIDING, attn_logit_softcapping=3.0, final_logit_softcapping=5.0),
    "gemma3": t.Gemma3Config(
        text_config=GEMMA | SLIDING | {"final_logit_softcapping": 5.0}, vision_config=VISION, mm_tokens_per_image=4
    ),
    "gpt2": t.GPT2Config(**GPT),
    "gpt_neox": t.GPTNeoXConfig(**SIZES, max_position_embeddings=64),
    "phi3": t.Phi3Config(**DECODER, sliding_window=6, bos_token_id=None, eos_token_id=None),
    "olmo2": t.Olmo2Config(**DECODER),
    "smollm3": t.SmolLM3Config(**DECODER, no_rope_layers=[1, 0], bos_token_id=2, eos_token_id=3),
    "starcoder2": t.Starcoder2Config(**DECODER, sliding_window=6, residual_dropout=0.0, embedding_dropout=0.0),
    "roberta": t.RobertaConfig(**ENCODER),
    "camembert": t.CamembertConfig(**ENCODER),
    "xlm-roberta-xl": t.XLMRobertaXLConfig(**ENCODER),
    "electra": t.ElectraConfig(**ENCODER, embedding_size=32),
    "granite": t.GraniteConfig(
        **DECODER, logits_scaling=3.0, residual_multiplier=0.5, embedding_multiplier=2.0, attention_multiplier=0.3
    ),
    "cohere": t.CohereConfig(**DECODER, logit_scale=0.3),
    "cohere2": t.Cohere2Config(**DECODER, **SLIDING, logit_scale=0.3),
    "opt": t.OPTConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 40, "pad_token_id": PAD},
        **{"num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    ),
    "modernbert": t.ModernBertConfig(
        **SIZES, local_attention=8, layer_types=["sliding_attention", "full_attention"], classifier_pooling="cls",
        cls_token_id=0, sep_token_id=2, bos_token_id=0, eos_token_id=2,
    ),
    "eurobert": t.EuroBertConfig(**DECODER, mask_token_id=4, classifier_pooling="bos"),
    "distilbert": t.DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=40, pad_token_id=PAD,
        max_position_embeddings=64, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, qa_dropout=0.0,
    ),
    "albert": t.AlbertConfig(**ENCODER, embedding_size=32, num_hidden_groups=1, classifier_dropout_prob=0.0),
    "gemma3n_text": t.Gemma3nTextConfig(
        **GEMMA_N, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4, final_logit_softcapping=5.0
    ),
    "gemma4_text": t.Gemma4TextConfig(**GEMMA_N, per_layer_config={1: {"head_dim": 32}, 3: {"head_dim": 32}}),
}  # fmt: skip

REFUSED = {
    "gptj": t.GPTJConfig(**GPT, rotary_dim=4),
    "deberta-v2": t.DebertaV2Config(**ENCODER),
    "falcon": t.FalconConfig(**{k: v for k, v in SIZES.items() if k != "intermediate_size"}),
    "bloom": t.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, pad_token_id=PAD),
    "mpt": t.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4),
    "mamba": t.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4),
    "t5": t.T5Config(d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=1, vocab_size=10),
    "gpt_oss": t.GptOssConfig(**DECODER, **EXPERTS, head_dim=8, num_local_experts=4),
    "falcon_h1": t.FalconH1Config(**DECODER, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
    "qwen3_next": t.Qwen3NextConfig(**DECODER | {"num_hidden_layers": 4}, **EXPERTS, num_experts=4, head_dim=8),
    "deepseek_v3": t.DeepseekV3Config(
        **DECODER | {"num_key_value_heads": 4}, **EXPERTS, n_routed_experts=4, n_group=1, topk_group=1,
        kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, moe_intermediate_size=8,
    ),
}  # fmt: skip

P = 3
KINDS = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig, "p-tuning": peft.PromptEncoderConfig}
HEADS = {
    "AutoModel": "FEATURE_EXTRACTION",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}


def heads(family: str) -> list[str]:
    """The auto classes that have a model of that family; an encoder's causal language model is another model."""
    names = ["MODEL", "MODEL_FOR_CAUSAL_LM", "MODEL_FOR_SEQUENCE_CLASSIFICATION", "MODEL_FOR_TOKEN_CLASSIFICATION"]
    mappings = [getattr(t, f"{name}_MAPPING") for name in [*names, "MODEL_FOR_QUESTION_ANSWERING"]]
    config = type((CONFIGS | FAMILIES)[family])
    encoder = config in t.MODEL_FOR_MASKED_LM_MAPPING
    return [
        auto
        for auto, mapping in zip(HEADS, mappings, strict=True)
        if config in mapping and not (encoder and auto == "AutoModelForCausalLM")
    ]


def with_prompt(backbone: torch.nn.Module, auto: str, kind: str) -> peft.PeftModel:
    """PEFT's model, float64, its prompt far from zero."""
    more = {"encoder_hidden_size": 24} if kind == "p-tuning" else {}
    sizes = backbone.config.get_text_config()
    if not hasattr(sizes, "hidden_size") or "hidden_size" not in sizes.to_dict():  # PEFT does not find it
        more |= {"token_dim": sizes.hidden_size, "num_attention_heads": sizes.num_attention_heads}
    config = KINDS[kind](task_type=HEADS[auto], num_virtual_tokens=P, **more)
    model = peft.get_peft_model(backbone, config).double().train(auto == "AutoModelForCausalLM")
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    return model


def results(model: torch.nn.Module, auto: str, inputs: dict) -> dict[str, torch.Tensor]:
    """What a model gives for the valid rows of a batch, and the gradient of its prompt."""
    valid = inputs["attention_mask"].bool()
    labels = {"AutoModelForCausalLM": inputs["input_ids"].masked_fill(~valid, -100)}
    labels["AutoModelForSequenceClassification"] = torch.arange(len(valid)) % 2
    more = {"labels": labels[auto]} if auto in labels else {}
    if isinstance(model, FusedForward) and auto == "AutoModelForCausalLM":
        more["return_logits"] = True
    found = _named(model(**inputs, **more), valid)
    _weighted(found).backward()
    found = {name: x.detach() for name, x in found.items()} | {"gradient": _gradient(model)}
    if "loss" in found:  # as in training, where logits are not wanted
        found["loss alone"] = model(**inputs, labels=more["labels"]).loss.detach()
    return found


def results_alone(model: peft.PeftModel, auto: str, inputs: dict, kind: str) -> dict[str, torch.Tensor]:
    """The same of a backbone that is given its prompt sentence by sentence: a prefix by the formula of attention."""
    prompt, backbone = model.get_prompt(batch_size=1), model.get_base_model()
    table = next((m for name, m in backbone.named_modules() if name.endswith("position_embeddings")), None)
    first = 0 if getattr(table, "padding_idx", None) is None else table.padding_idx + 1
    found, losses = [], []
    for ids, mask in zip(*(inputs[name] for name in ("input_ids", "attention_mask")), strict=True):
        ids = ids[mask == 1].unsqueeze(0)
        if kind == "prefix":
            backbone.set_attn_implementation(FORMULA)
            positions = torch.arange(ids.shape[1]).unsqueeze(0) + P + first
            output = backbone(input_ids=ids, position_ids=positions, prefixes=iter(prompt.layers))
        else:
            rows, base = torch.cat([prompt, backbone.get_input_embeddings()(ids)], 1), backbone.base_model
            padded = torch.cat([ids.new_full((1, P), PAD), ids], 1)
            output = backbone(inputs_embeds=rows, per_layer_inputs=base.get_per_layer_inputs(padded))
        if auto == "AutoModelForCausalLM":
            losses.append(F.cross_entropy(output.logits[0, P - 1 : -1], ids[0], reduction="none"))
        found.append(_named(output, torch.ones_like(ids, dtype=torch.bool)))
    found = {name: torch.cat([each[name] for each in found]) for name in found[0]}
    if auto == "AutoModelForSequenceClassification":
        losses = [F.cross_entropy(found["logits"], torch.arange(len(found["logits"])) % 2).view(1)]
    if losses:
        found["loss"] = torch.cat(losses).mean()
    _weighted(found).backward()
    found = {name: x.detach() for name, x in found.items()} | {"gradient": _gradient(model)}
    return found | ({"loss alone": found["loss"]} if losses else {})


FORMULA = "formula"


def formula(module, query, key, value, attention_mask, scaling=None, sliding_window=None, prefixes=None, **others):
    """Attention of one sentence over a prefix, at positions -P..-1, and itself."""
    layer = next(prefixes)
    key, value = torch.cat([layer.keys, key], 2), torch.cat([layer.values, value], 2)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    rows = torch.arange(query.shape[2])
    apart = rows[:, None] - torch.arange(-P, len(rows))
    seen = torch.ones_like(apart, dtype=torch.bool) if not module.is_causal else apart >= 0
    if sliding_window is not None:
        seen &= apart.abs() < sliding_window
    scores = (query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)).masked_fill(~seen, -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


t.AttentionInterface.register(FORMULA, formula)


def _named(output, valid: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of an output what is compared, without padding and virtual tokens."""
    length = valid.shape[1]
    names = [name for name in output if name in ("loss", "last_hidden_state", "pooler_output") or "logits" in name]
    rows = {name: output[name] for name in names if output[name] is not None}
    whole = {name for name in ("loss", "pooler_output") if name in rows}
    whole |= {"logits"} if "logits" in rows and rows["logits"].ndim == 2 and "start_logits" not in rows else set()
    return {name: x if name in whole else x[:, -length:][valid] for name, x in rows.items()}


def _weighted(found: dict[str, torch.Tensor]) -> torch.Tensor:
    """A number with a gradient in all of them."""
    return sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in found.values())


def _gradient(model: peft.PeftModel) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.prompt_encoder.parameters()])


# What PEFT has no prompt for: it refuses, or leaves out the prefix, or what enters in each layer, without a word.
NOT_IN_PEFT = {(family, "prefix") for family in ("modernbert", "eurobert", "distilbert", "albert")}
NOT_IN_PEFT |= {(family, kind) for family in ("gemma3n_text", "gemma4_text") for kind in ("prompt", "p-tuning")}


def compared(family: str, auto: str, kind: str, **config) -> dict[str, float]:
    """The largest relative difference of each result of the fused model from PEFT's, or sentence by sentence."""
    backbone = build(family, auto, **config)
    for parameter in backbone.parameters():
        if parameter.ndim == 1 and not parameter.any():  # biases, and norms with an offset
            torch.nn.init.normal_(parameter, std=0.3)
    stock = with_prompt(backbone, auto, kind)
    fused = fastprompt.fuse(copy.deepcopy(stock))
    # PEFT's classification heads over decoders pool padding: a batch without any shows the rest.
    pools_padding = auto == "AutoModelForSequenceClassification" and kind != "prefix"
    inputs = batch((6, 6) if pools_padding else (7, 3, 8))
    if (family, kind) in NOT_IN_PEFT:
        expected = results_alone(stock, auto, inputs, kind)
    else:
        expected = results(stock, auto, inputs)
    got = results(fused, auto, inputs)
    assert expected.keys() == got.keys(), (expected.keys(), got.keys())
    return {n: float((got[n] - x).abs().max() / x.abs().max().clamp(min=1e-300)) for n, x in expected.items()}
