"""bfloat16 as upstream's CUDA autocast has it (docs/infinity.md), written once more and literally.

Every rule is a switch of the literal form: with all of them it gives the port's numbers, and without any single one it
does not, so none is left to chance. The official vectors are float32 only.
"""

from __future__ import annotations

import math
from functools import cache

import infinity_golden as golden
import pytest
import torch
import torch.nn.functional as F
from infinity_golden import Run
from recorder import Recorder
from torch import Tensor

from heatkv_cli.models.infinity.model import InfinityModel
from heatkv_cli.models.infinity.schedules import rope_base
from heatkv_cli.models.infinity.tokenizer import resize
from heatkv_cli.models.infinity.transformer import Infinity, InfinityConfig

pytestmark = pytest.mark.golden
LOW = torch.bfloat16
RULES = ("word_embed", "start", "projected", "first residual", "gate", "temperature", "keys")
RUNS = ("A_forced", "B_forced")


@cache
def port(name: str) -> tuple[InfinityModel, Run]:
    """The golden network with blocks in bfloat16, one temperature beyond the clamp, and its run."""
    run = Run(name, golden.RUNS[name])
    net = Infinity(InfinityConfig(4, 64, 4, 2, run.codes, golden.TEXT_CHANNELS, golden.TEXT_LENGTH))
    net.load_state_dict(golden.weights(f"model{run.model}"))
    net.requires_grad_(False).block_chunks.to(LOW)
    assert any(bool((block.sa.scale_mul_1H11 > math.log(100)).any()) for block in net.layers())
    base = rope_base(run.settings["h_div_w"])
    return InfinityModel(run.geometry, net.eval(), None, None, base), run  # type: ignore[arg-type]


@cache
def ours(name: str) -> Tensor:
    """Raw logits of all rows (2, T, V)."""
    model, run = port(name)
    return torch.cat(golden.generate(run, Recorder(), model).raw, 1).flatten(2)


def low(w: dict[str, Tensor], name: str, x: Tensor, exact: bool = False) -> Tensor:
    """A linear layer under autocast."""
    dtype = torch.float32 if exact else LOW
    return F.linear(x.to(dtype), w[f"{name}.weight"].to(dtype), w[f"{name}.bias"].to(dtype))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """(N, H, D) each -> (N, H * D)."""
    parts = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(*parts, scale=scale)[0].transpose(0, 1).flatten(1)


def turn(x: Tensor, table: Tensor) -> Tensor:
    out, (cos, sin) = torch.empty_like(x), table[:, :, None]
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return out


def literal(name: str, without: str = "") -> Tensor:
    """One row at a time, scale by scale; `without`: a rule that is left out, its numbers staying float32."""
    model, run = port(name)
    w = golden.weights(f"model{run.model}")
    w = {n: t.to(LOW) if n.startswith("block_chunks") else t for n, t in w.items()}
    heads, rows = golden.HEADS, []
    text = golden.tensor(f"text/{run.settings['text'][0]}")
    latent = torch.zeros(1, run.codes.bits, *run.codes.grid(run.sizes[-1]))
    inputs = []
    for s, bits in enumerate(run.forced[:-1]):
        latent = latent + resize(run.codes.embed(bits), tuple(latent.shape[2:]))  # type: ignore[arg-type]
        inputs.append(run.codes.to_tokens(resize(latent, run.codes.grid(run.sizes[s + 1]))))
    for features in (text, w["cfg_uncond"][: len(text)]):
        t = features * torch.rsqrt((features**2).mean(-1, keepdim=True) + 1e-6) * w["text_norm.weight"]
        p = "text_proj_for_sos.ca"
        exact = torch.float32 if without == "start" else LOW
        bias = torch.cat((w[f"{p}.zero_k_bias"], w[f"{p}.v_bias"]))
        k, v = (
            F.linear(t.to(exact), w[f"{p}.mat_kv.weight"].to(exact), bias.to(exact)).unflatten(-1, (2, 2, -1)).unbind(1)
        )
        pooled = attend(w[f"{p}.mat_q"].to(exact), k, v, 1 / math.sqrt(k.shape[-1]))
        sos = low(w, f"{p}.proj", pooled, without == "start").float()
        rough = without == "projected"
        projected = F.gelu(low(w, "text_proj_for_ca.0", t, rough), approximate="tanh")
        projected = low(w, "text_proj_for_ca.2", projected, rough)
        six = F.linear(F.silu(sos), w["shared_ada_lin.1.weight"], w["shared_ada_lin.1.bias"]).view(6, -1)
        past: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * 4
        out = []
        for s in range(len(run.sizes)):
            x = sos + w["pos_start"][0] if s == 0 else low(w, "word_embed", inputs[s - 1], without == "word_embed")[0]
            if without == "first residual":
                x = x.float()
            x = (x.float() + w["lvl_embed.weight"][s]).to(x.dtype)
            table = model.rope[:, run.geometry.schedule.offsets[s] : run.geometry.schedule.offsets[s + 1]]
            for index in range(4):
                b = f"block_chunks.{index // 2}.module.{index % 2}"
                gate1, gate2, scale1, scale2, shift1, shift2 = (w[f"{b}.ada_gss"].float()[0, 0] + six).unbind(0)
                u = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1
                bias = torch.cat((w[f"{b}.sa.q_bias"], w[f"{b}.sa.zero_k_bias"], w[f"{b}.sa.v_bias"]))
                q, k, v = F.linear(u.to(LOW), w[f"{b}.sa.mat_qkv.weight"], bias).unflatten(-1, (3, heads, -1)).unbind(1)
                temperature = w[f"{b}.sa.scale_mul_1H11"].view(1, heads, 1)
                if without == "temperature":
                    temperature = temperature.float()
                temperature = temperature.clamp_max(math.log(100)).float().exp()
                q = turn(F.normalize(q.float(), dim=-1) * temperature, table)
                k = turn(F.normalize(k.float(), dim=-1), table)
                if s:
                    k, v = torch.cat((past[index][0], k)), torch.cat((past[index][1], v))
                past[index] = k, v  # keys in float32, as upstream's cache has them
                exact = torch.float32 if without == "keys" else LOW
                y = low(w, f"{b}.sa.proj", attend(q.to(exact), k.to(exact), v.to(exact), 1.0))
                x = x + (gate1 * y if without == "gate" else (y * gate1).to(LOW))
                u = F.layer_norm(
                    x.float(), x.shape[-1:], w[f"{b}.ca_norm.weight"].float(), w[f"{b}.ca_norm.bias"].float(), 1e-6
                )
                q = low(w, f"{b}.ca.mat_q", u).unflatten(-1, (heads, -1))
                bias = torch.cat((w[f"{b}.ca.zero_k_bias"], w[f"{b}.ca.v_bias"]))
                k, v = (
                    F.linear(projected.to(LOW), w[f"{b}.ca.mat_kv.weight"], bias)
                    .unflatten(-1, (2, heads, -1))
                    .unbind(1)
                )
                x = x + low(w, f"{b}.ca.proj", attend(q, k, v, 1 / math.sqrt(q.shape[-1]))).float()
                u = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
                u = low(w, f"{b}.ffn.fc2", F.gelu(low(w, f"{b}.ffn.fc1", u), approximate="tanh"))
                x = x + u * gate2
            scale, shift = F.linear(F.silu(sos), w["head_nm.ada_lin.1.weight"], w["head_nm.ada_lin.1.bias"]).chunk(
                2, -1
            )
            u = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
            out.append(F.linear(u, w["head.weight"], w["head.bias"]))
        rows.append(torch.cat(out))
    return torch.stack(rows)


@cache
def distance(name: str, without: str = "") -> float:
    """Mean difference between the port and the literal form."""
    return (ours(name) - literal(name, without)).abs().mean().item()


@pytest.mark.parametrize("name", RUNS)
def test_the_port_follows_every_rule(name: str) -> None:
    """What is left, 2e-4 at most, is a rounding that another kernel shape turns the other way."""
    assert distance(name) < 4e-4


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", RUNS)
def test_no_rule_could_be_left_out(name: str, rule: str) -> None:
    assert distance(name, rule) > max(1e-3, 3 * distance(name))


@pytest.mark.parametrize("name", RUNS)
def test_it_is_as_near_to_float32_as_bfloat16_can_be(name: str) -> None:
    exact = golden.tensor(f"run/{name}/raw_logits")
    assert 1e-3 < (ours(name) - exact).abs().mean() < 0.03
