"""Further tiny random transformers, for sound, proteins and embeddings, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch

from tests.adapters.tiny_models import TEXT, Tiny
from tests.adapters.tiny_parts import HEADS, timestep, tiny


class Bare(Tiny):
    """One whose `forward` has no `return_dict`."""

    def __call__(self, seed: int) -> dict[str, Any]:
        given = super().__call__(seed)
        del given["return_dict"]
        return given


OTHERS = [
    tiny(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "in_channels": 9,  # the latents' 4 and 5 of their context
            "audio_acoustic_hidden_dim": 4,
            "sliding_window": 2,
            "encoder_hidden_size": 6,
        },
        lambda r: {
            "hidden_states": r(1, 13, 4),
            "timestep": timestep(0.5),
            "timestep_r": timestep(0.25),
            "encoder_hidden_states": r(1, TEXT, 6),
            "context_latents": r(1, 13, 5),
        },
    ),
    tiny(
        "LongCatAudioDiTTransformer",
        {"dit_dim": 16, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 6, "latent_dim": 4},
        lambda r: {
            "hidden_states": r(1, 7, 4),
            "encoder_hidden_states": r(1, TEXT, 6),
            "encoder_attention_mask": torch.ones(1, TEXT).bool(),
            "timestep": timestep(0.5),
            "latent_cond": r(1, 7, 4),
        },
    ),
    tiny(
        "MiniMaxMusic3RVQDepthDecoder",
        {
            "hidden_size": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "audio_vocab_size": 8,
            "num_codebooks": 3,
        },
        lambda r: {"inputs_embeds": r(1, 3, 16)},
        of=Bare,
    ),
    tiny(
        "MiniMaxMusic3Transformer1DModel",
        {
            **HEADS,
            "in_channels": 4,
            "condition_dim": 6,
            "ff_inner_dim": 24,
            "rotary_dim": 4,
            "fourier_embedding_dim": 8,
        },
        lambda r: {"hidden_states": r(1, 4, 7), "timestep": timestep(0.5), "encoder_hidden_states": r(1, 7, 6)},
    ),
    tiny(
        "PriorTransformer",
        {**HEADS, "embedding_dim": 6, "num_embeddings": TEXT},
        lambda r: {
            "hidden_states": r(1, 6),
            "timestep": timestep(),
            "proj_embedding": r(1, 6),
            "encoder_hidden_states": r(1, TEXT, 6),
            "attention_mask": torch.ones(1, TEXT).bool(),
        },
    ),
    tiny(
        "RFD4ProteinaTransformer",
        {
            "nlayers": 1,
            "token_dim": 16,
            "nheads": 2,
            "dim_cond": 8,
            "pair_repr_dim": 4,
            "latent_dim": 2,
            "token_type_emb_dim": 2,
            "t_emb_dim": 4,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents", "recycle_remaining"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists", "bond_mask"),
            "tri_mult_c": 4,
            "num_sequence_classes": 3,
        },
        lambda r: {
            "bb_ca": r(1, 7, 3),
            "local_latents": r(1, 7, 2),
            "bb_ca_time": timestep(0.5),
            "local_latents_time": timestep(0.5),
            "padding_mask": torch.ones(1, 7).bool(),
            "token_type": torch.arange(7)[None],
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(1, 7).bool(),
                "supports_local_latent": torch.ones(1, 7).bool(),
            },
            "recycle_depth": 2,  # every layer runs twice
        },
    ),
    tiny(
        "StableAudio3DiTModel",
        {
            "io_channels": 4,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "cond_token_dim": 6,
            "global_cond_dim": 6,
            "local_add_cond_dim": 3,
            "timestep_features_dim": 8,
            "ff_mult": 2.0,
            "num_memory_tokens": 2,
        },
        lambda r: {
            "hidden_states": r(1, 4, 7),
            "timestep": timestep(0.5),
            "encoder_hidden_states": r(1, TEXT, 6),
            "global_hidden_states": r(1, 6),
            "local_add_cond": r(1, 3, 7),
        },
    ),
    tiny(
        "StableAudioDiTModel",
        {
            **HEADS,
            "num_key_value_attention_heads": 1,
            "sample_size": 7,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 8,
            "time_proj_dim": 8,
            "global_states_input_dim": 6,
            "cross_attention_input_dim": 6,
        },
        lambda r: {
            "hidden_states": r(1, 4, 7),
            "timestep": timestep(0.5),
            "encoder_hidden_states": r(1, TEXT, 6),
            "global_hidden_states": r(1, 1, 6),
            "rotary_embedding": (torch.ones(8, 4), torch.zeros(8, 4)),
        },
    ),
    Bare(
        "T5FilmDecoder",
        {"input_dims": 4, "targets_length": 7, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 24},
        lambda r: {
            "encodings_and_masks": [(r(1, TEXT, 16), torch.ones(1, TEXT)), (r(1, 3, 16), torch.ones(1, 3))],
            "decoder_input_tokens": r(1, 7, 4),
            "decoder_noise_time": timestep(0.5),
        },
        {"decoders.*.layer.0.attention": "spatial", "decoders.*.layer.1.attention": "cross"},
    ),
]
