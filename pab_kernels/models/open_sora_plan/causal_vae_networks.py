"""Encoder and decoder of Open-Sora-Plan's autoencoder from its config, with the checkpoint's parameter names."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

from .causal_vae_kinds import (
    ATTENTIONS,
    CONVS,
    EPS,
    RESNETS,
    SPATIAL_DOWN,
    SPATIAL_UP,
    TEMPORAL_DOWN,
    TEMPORAL_UP,
    Kinds,
    Resampler,
    make,
)

Config = Mapping[str, Any]


def encoder(config: Config) -> nn.Sequential:
    """Video `[B, 3, F, H, W]` to moments `[B, 2 z_channels, F', H', W']`.

    Args:
        config: of a `CausalVAE`.

    Raises:
        ValueError: a kind is not supported, or the lists of kinds do not fit each other.
    """
    widths = _widths(config)
    last = len(widths) - 1
    kinds = {
        "downsample": ("encoder_spatial_downsample", SPATIAL_DOWN),
        "time_downsample": ("encoder_temporal_downsample", TEMPORAL_DOWN),
    }
    for field, _ in kinds.values():
        if _kinds(config, field)[last]:
            raise ValueError(f"{field} in config.json has a kind for the last level; only '' is supported there")
    before = (config["hidden_size"], *widths)
    levels = {
        str(i): _level(config, "encoder_resnet_blocks", i, before[i], config["num_res_blocks"], kinds)
        for i in range(len(widths))
    }
    return _named(
        conv_in=_conv(config, "encoder_conv_in", 3, before[0]),
        down=_named(**levels),
        mid=_mid(config, "encoder"),
        norm_out=nn.GroupNorm(config["norm_num_groups"], widths[-1], EPS),
        silu=nn.SiLU(),
        conv_out=_conv(config, "encoder_conv_out", widths[-1], 2 * config["z_channels"]),
    )


def decoder(config: Config) -> nn.Sequential:
    """Latents `[B, z_channels, F', H', W']` to video `[B, 3, F, H, W]`; its levels are numbered as the encoder's.

    Args:
        config: of a `CausalVAE`.

    Raises:
        ValueError: see `encoder`.
    """
    widths = _widths(config)
    kinds = {
        "upsample": ("decoder_spatial_upsample", SPATIAL_UP),
        "time_upsample": ("decoder_temporal_upsample", TEMPORAL_UP),
    }
    above = (*widths[1:], widths[-1])
    levels = {
        str(i): _level(config, "decoder_resnet_blocks", i, above[i], config["num_res_blocks"] + 1, kinds)
        for i in reversed(range(len(widths)))
    }
    return _named(
        conv_in=_conv(config, "decoder_conv_in", config["z_channels"], widths[-1]),
        mid=_mid(config, "decoder"),
        up=_named(**levels),
        norm_out=nn.GroupNorm(config["norm_num_groups"], widths[0], EPS),
        silu=nn.SiLU(),
        conv_out=_conv(config, "decoder_conv_out", widths[0], 3),
    )


def projection(config: Config, channels: int, out: int) -> nn.Module:
    """A projection of latents of the kind q_conv.

    Raises:
        ValueError: the kind is not supported.
    """
    return make(CONVS, "q_conv", config["q_conv"], channels, out, 1)


def factors(network: nn.Module) -> tuple[int, int]:
    """By how much the resamplers of a network change time and space together."""
    found = [module.factors for module in network.modules() if isinstance(module, Resampler)]
    return math.prod(time for time, _ in found), math.prod(space for _, space in found)


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _widths(config: Config) -> list[int]:
    return [config["hidden_size"] * m for m in config["hidden_size_mult"]]


def _kinds(config: Config, field: str) -> list[str]:
    """The kinds of each level."""
    levels = len(config["hidden_size_mult"])
    if len(config[field]) != levels:
        raise ValueError(f"{field} in config.json has {len(config[field])} kinds for {levels} levels")
    return list(config[field])


def _conv(config: Config, field: str, channels: int, out: int) -> nn.Module:
    return make(CONVS, field, config[field], channels, out)


def _level(
    config: Config, field: str, i: int, channels: int, blocks: int, resamplers: Mapping[str, tuple[str, Kinds]]
) -> nn.Sequential:
    """Residual blocks, then the resamplers that the config names for level i."""
    out, kind = _widths(config)[i], _kinds(config, field)[i]
    modules: dict[str, nn.Module] = {
        "block": nn.Sequential(
            *(make(RESNETS, field, kind, out if j else channels, out, config["norm_num_groups"]) for j in range(blocks))
        )
    }
    for name, (of, kinds) in resamplers.items():
        if _kinds(config, of)[i]:
            modules[name] = make(kinds, of, _kinds(config, of)[i], out)
    return _named(**modules)


def _mid(config: Config, part: str) -> nn.Sequential:
    resnet, attention = f"{part}_mid_resnet", f"{part}_attention"
    width, groups = _widths(config)[-1], config["norm_num_groups"]
    return _named(
        block_1=make(RESNETS, resnet, config[resnet], width, width, groups),
        attn_1=make(ATTENTIONS, attention, config[attention], width, groups),
        block_2=make(RESNETS, resnet, config[resnet], width, width, groups),
    )
