"""What is to be found in every transformer class of diffusers."""

from __future__ import annotations

JOINT = "spatial:transformer_blocks.attn mlp:transformer_blocks.ff mlp:transformer_blocks.ff_context"
SINGLE = "spatial:single_transformer_blocks.attn"
BASIC = "spatial:transformer_blocks.attn1 cross:transformer_blocks.attn2 mlp:transformer_blocks.ff"
SELF = "spatial:transformer_blocks.attn1 mlp:transformer_blocks.ff"
WAN = "spatial:blocks.attn1 cross:blocks.attn2 mlp:blocks.ffn"
AUDIO = (
    f"{BASIC} spatial:transformer_blocks.audio_attn1 cross:transformer_blocks.audio_attn2 mlp:transformer_blocks.audio_ff "
    "cross:transformer_blocks.audio_to_video_attn cross:transformer_blocks.video_to_audio_attn"
)
MODALITIES = " ".join(
    f"spatial:visual_transformer_blocks.{m}_dec_block.self_attention cross:visual_transformer_blocks.{m}_dec_block.cross_attention "
    f"mlp:visual_transformer_blocks.{m}_dec_block.feed_forward"
    for m in ("video", "audio")
)

EXPECTED = {
    "AceStepTransformer1DModel": "spatial:layers.self_attn cross:layers.cross_attn mlp:layers.mlp",
    "AllegroTransformer3DModel": BASIC,
    "AnyFlowFARTransformer3DModel": WAN,
    "AnyFlowTransformer3DModel": WAN,
    "AuraFlowTransformer2DModel": "spatial:joint_transformer_blocks.attn mlp:joint_transformer_blocks.ff "
    "mlp:joint_transformer_blocks.ff_context spatial:single_transformer_blocks.attn mlp:single_transformer_blocks.ff",
    "BriaFibo2Transformer2DModel": "spatial:layers.attention cross:layers.cross_attention mlp:layers.feed_forward",
    "BriaFiboTransformer2DModel": f"{JOINT} {SINGLE}",
    "BriaTransformer2DModel": f"{JOINT} {SINGLE}",
    "ChromaTransformer2DModel": f"{JOINT} {SINGLE}",
    "ChronoEditTransformer3DModel": WAN,
    "CogVideoXTransformer3DModel": SELF,
    "CogView3PlusTransformer2DModel": SELF,
    "CogView4Transformer2DModel": SELF,
    "ConsisIDTransformer3DModel": SELF,
    "Cosmos3OmniTransformer": "spatial:layers.self_attn mlp:layers.mlp mlp:layers.mlp_moe_gen",
    "CosmosTransformer3DModel": BASIC,
    "DiTTransformer2DModel": SELF,
    "DreamLiteTransformer2DModel": BASIC,
    "DualTransformer2DModel": "spatial:transformers.transformer_blocks.attn1 cross:transformers.transformer_blocks.attn2 "
    "mlp:transformers.transformer_blocks.ff",
    "EasyAnimateTransformer3DModel": f"{SELF} mlp:transformer_blocks.txt_ff",
    "ErnieImageTransformer2DModel": "spatial:layers.self_attention mlp:layers.mlp",
    "Flux2Transformer2DModel": f"{JOINT} {SINGLE}",
    "Flux3Transformer2DModel": "spatial:mode_blocks.image.attn mlp:mode_blocks.image.ff spatial:mode_blocks.image_cond.attn "
    f"mlp:mode_blocks.image_cond.ff {SINGLE} mlp:single_transformer_blocks.ff",
    "FluxTransformer2DModel": f"{JOINT} {SINGLE}",
    "GlmImageTransformer2DModel": SELF,
    "HeliosTransformer3DModel": WAN,
    "HiDreamImageTransformer2DModel": "spatial:double_stream_blocks.block.attn1 mlp:double_stream_blocks.block.ff_i "
    "mlp:double_stream_blocks.block.ff_t spatial:single_stream_blocks.block.attn1 mlp:single_stream_blocks.block.ff_i",
    "HunyuanDiT2DModel": "spatial:blocks.attn1 cross:blocks.attn2 mlp:blocks.ff",
    "HunyuanImageTransformer2DModel": f"{JOINT} {SINGLE}",
    "HunyuanVideo15Transformer3DModel": JOINT,
    "HunyuanVideoFramepackTransformer3DModel": f"{JOINT} {SINGLE}",
    "HunyuanVideoTransformer3DModel": f"{JOINT} {SINGLE}",
    "Ideogram4Transformer2DModel": "spatial:layers.attention mlp:layers.feed_forward",
    "JoyImageEditPlusTransformer3DModel": "spatial:double_blocks.attn mlp:double_blocks.img_mlp mlp:double_blocks.txt_mlp",
    "JoyImageEditTransformer3DModel": "spatial:double_blocks.attn mlp:double_blocks.img_mlp mlp:double_blocks.txt_mlp",
    "Kandinsky5Transformer3DModel": "spatial:visual_transformer_blocks.self_attention cross:visual_transformer_blocks.cross_attention "
    "mlp:visual_transformer_blocks.feed_forward",
    "Kandinsky6SRTransformer3DModel": "spatial:visual_transformer_blocks.self_attention mlp:visual_transformer_blocks.feed_forward",
    "Kandinsky6Transformer3DModel": f"{MODALITIES} cross:visual_transformer_blocks.va_cross_attention "
    "cross:visual_transformer_blocks.av_cross_attention",
    "Krea2Transformer2DModel": "spatial:transformer_blocks.attn mlp:transformer_blocks.ff",
    "LTX2VideoTransformer3DModel": AUDIO,
    "LTXVideoTransformer3DModel": BASIC,
    "LatteTransformer3DModel": f"{BASIC} temporal:temporal_transformer_blocks.attn1 mlp:temporal_transformer_blocks.ff",
    "LongCatAudioDiTTransformer": "spatial:blocks.self_attn cross:blocks.cross_attn mlp:blocks.ffn",
    "LongCatImageTransformer2DModel": f"{JOINT} {SINGLE}",
    "Lumina2Transformer2DModel": "spatial:layers.attn mlp:layers.feed_forward",
    "LuminaNextDiT2DModel": "spatial:layers.attn1 cross:layers.attn2 mlp:layers.feed_forward",
    "MiniMaxH3Transformer3DModel": "spatial:transformer_blocks.attn mlp:transformer_blocks.ff",
    "MiniMaxMusic3RVQDepthDecoder": "spatial:layers.attn",
    "MiniMaxMusic3Transformer1DModel": "spatial:transformer_blocks.attn",
    "MochiTransformer3DModel": f"{SELF} mlp:transformer_blocks.ff_context",
    "MotifVideoTransformer3DModel": f"{JOINT} {SINGLE}",
    "NucleusMoEImageTransformer2DModel": "spatial:transformer_blocks.attn mlp:transformer_blocks.img_mlp",
    "OmniGenTransformer2DModel": "spatial:layers.self_attn mlp:layers.mlp",
    "OvisImageTransformer2DModel": f"{JOINT} {SINGLE}",
    "PRXTransformer2DModel": "spatial:blocks.attention",
    "PixArtTransformer2DModel": BASIC,
    "PriorTransformer": SELF,
    "QwenImage21Transformer2DModel": "spatial:transformer_blocks.attn mlp:transformer_blocks.img_mlp",
    "QwenImageTransformer2DModel": "spatial:transformer_blocks.attn mlp:transformer_blocks.img_mlp mlp:transformer_blocks.txt_mlp",
    "RFD4ProteinaTransformer": "spatial:transformer_layers.mhba",
    "SD3Transformer2DModel": JOINT,
    "SanaTransformer2DModel": BASIC,
    "SanaVideoTransformer3DModel": BASIC,
    "SanaWMLTX2RefinerTransformer3DModel": AUDIO,
    "SanaWMTransformer3DModel": "spatial:blocks.attn cross:blocks.cross_attn mlp:blocks.mlp",
    "SkyReelsV2Transformer3DModel": WAN,
    "StableAudio3DiTModel": "spatial:transformer_blocks.self_attn cross:transformer_blocks.cross_attn mlp:transformer_blocks.ff",
    "StableAudioDiTModel": BASIC,
    "T5FilmDecoder": "spatial:decoders.layer.attention cross:decoders.layer.attention",
    "Transformer2DModel": BASIC,
    "TransformerTemporalModel": "temporal:transformer_blocks.attn1 temporal:transformer_blocks.attn2 mlp:transformer_blocks.ff",
    "WanAnimate2Transformer3DModel": "spatial:blocks.self_attn cross:blocks.cross_attn mlp:blocks.ffn",
    "WanAnimateTransformer3DModel": f"{WAN} cross:face_adapter",
    "WanTransformer3DModel": WAN,
    "WanVACETransformer3DModel": f"{WAN} spatial:vace_blocks.attn1 cross:vace_blocks.attn2 mlp:vace_blocks.ffn",
    "ZImageTransformer2DModel": "spatial:layers.attention mlp:layers.feed_forward",
}
"""Kind and module, without numbers, of every sublayer but blocks, by class.

Refiners, text encoders and embedders are not among them.
"""


def kinds(name: str) -> dict[str, str]:
    """The kind of every sublayer but blocks of the class `name`, by its name without numbers."""
    return {module: kind for kind, _, module in (part.partition(":") for part in EXPECTED[name].split())}
