"""Small random encoder-decoders of every supported family, and batches for them."""

import torch
import transformers
from helpers import PAD, VOCABULARY, batch

_T5 = dict(
    vocab_size=VOCABULARY, d_model=24, d_kv=8, d_ff=20, num_layers=3, num_decoder_layers=4, num_heads=3,
    relative_attention_num_buckets=8, relative_attention_max_distance=10, dropout_rate=0.0, pad_token_id=PAD,
    decoder_start_token_id=PAD, eos_token_id=2,
)  # fmt: skip
_BART = dict(
    vocab_size=VOCABULARY, d_model=24, encoder_layers=3, decoder_layers=4, encoder_attention_heads=3,
    decoder_attention_heads=3, encoder_ffn_dim=20, decoder_ffn_dim=20, max_position_embeddings=40, pad_token_id=PAD,
    dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
    eos_token_id=2, bos_token_id=0, decoder_start_token_id=2, scale_embedding=True, forced_eos_token_id=None,
)  # fmt: skip
CONFIGS = {
    "bart": transformers.BartConfig(**_BART),
    "mbart": transformers.MBartConfig(**_BART),
    "m2m_100": transformers.M2M100Config(**_BART),
    "t5": transformers.T5Config(**_T5),
    "mt5": transformers.MT5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "umt5": transformers.UMT5Config(**_T5),
}


def build_seq2seq(family: str, dtype: torch.dtype = torch.float64, auto: str = "AutoModelForSeq2SeqLM", **config):
    """A model with weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    settings = type(CONFIGS[family]).from_dict(CONFIGS[family].to_dict() | config)
    settings._attn_implementation = "sdpa"
    model = getattr(transformers, auto).from_config(settings)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.0 if "relative" in name else 0.25 if "embed" in name else 0.3)
    if family == "bart":  # mBART's stays zero, as all that have been released
        model.final_logits_bias.normal_()
    return model.to(dtype).eval()


def seq2seq_batch(side: str = "right") -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, all ragged."""
    inputs, targets = batch((7, 1, 12, 5), side), batch((3, 6, 1, 8))
    return inputs | {"labels": targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)}
