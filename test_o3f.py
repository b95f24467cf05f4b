"""Tests of o3f.py: closed forms in float64, brute-force loops, D4RL's files and episodes, whole runs."""

import ast
import copy
import csv
import ctypes.util
import dataclasses
import functools
import http.server
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import filelock
import gymnasium as gym
import h5py
import mujoco
import numpy as np
import pooch
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import o3f

SHARED = Path(__file__).resolve().parent.parent / "shared"  # real data, not in the repository
a_needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared here")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def a_seeded():
    torch.manual_seed(0)


# ---- helpers: small agents, and their networks worked out by hand --------------------------------
def a_data(rows=50, obs_dim=7, act_dim=3, **changes):
    """A dataset with means and scales of its own; its last observation feature is constant."""
    rng = np.random.default_rng(2)
    obs = rng.normal(0.7, 3.0, (rows, obs_dim))
    obs[:, -1] = 0.3
    data = dict(observations=obs, actions=rng.uniform(-0.2, 0.9, (rows, act_dim)))
    data |= dict(rewards=rng.normal(size=rows), next_observations=rng.normal(size=(rows, obs_dim)))
    data |= dict(terminations=np.zeros(rows)) | changes
    return {name: x.astype(np.float32) for name, x in data.items()}


def a_draws(seed):
    return torch.Generator().manual_seed(seed)


def a_tensor(values, **kwargs):
    return torch.tensor(values, dtype=torch.float64, **kwargs)


def a_agent(base="iql", sizes=(7, 3), dtype=torch.float64, data=None, **flags):
    plain = dict(hidden_dim=16, layer_norm=False)
    plain |= {} if base == "lapo" else dict(standardise=False)
    plain |= dict(normalise_adv=False) if base in ("iql", "awac") else {}
    args = o3f.preset("Pendulum-v1", base, **(plain | flags))
    data = data or a_data(50, *sizes)
    agent = o3f.make_agent(args, data, None, torch.device("cpu")).to(dtype)
    agent.see_dataset(data)  # in float64's digits, if it is
    return agent


def a_batch(size=32, seed=1):
    draw = a_draws(seed)
    shapes = [(size, 7), (size, 3), (size,), (size, 7)]
    s, a, r, s2 = (torch.randn(x, generator=draw, dtype=torch.float64) for x in shapes)
    ends = (torch.rand(size, generator=draw) < 0.3).double()
    return o3f.Batch(s, a.clamp(-0.9, 0.9), r, s2, ends)


def a_net(net, *x, j=None, norm=False):
    """A ReLU network by matrix products; net: a module or its weights; j: which of the critics."""
    params = list(net.parameters() if isinstance(net, torch.nn.Module) else net)
    x = torch.cat(x, 1)
    for i in range(0, len(params), 2):
        weight, bias = params[i : i + 2]
        x = x @ weight.T + bias if j is None else x @ weight[j] + bias[j, 0]
        if norm and i < len(params) - 2:  # LayerNorm: a row's mean 0 and variance 1
            x = x - x.mean(1, keepdim=True)
            x = x / ((x**2).mean(1, keepdim=True) + 1e-5).sqrt()
        if i < len(params) - 2:
            x = x.clamp(min=0.0)
    return x


def a_critics(net, obs, actions, norm=False):
    return torch.stack([a_net(net, obs, actions, j=j, norm=norm)[:, 0] for j in range(5)])


def a_adam_step(net, loss, lr):
    """The weights after Adam's first step: its moments are g and g², so -lr·g/(|g| + 1e-8)."""
    params = list(net.parameters())
    grads = torch.autograd.grad(loss, params, retain_graph=True)
    return [p - lr * g / (g.abs() + 1e-8) for p, g in zip(params, grads)]


def a_slow(net, new, tau):
    return [(1 - tau) * slow + tau * fast for slow, fast in zip(net.parameters(), new)]


def a_disturb(*nets, size):
    with torch.no_grad():
        for weight in itertools.chain(*(net.parameters() for net in nets)):
            weight.add_(size * torch.randn_like(weight))


def a_same(module, expected, atol=1e-10):
    for weight, by_hand in zip(module.parameters(), expected, strict=True):
        assert torch.allclose(weight, by_hand, rtol=0, atol=atol)


# ---- losses and networks -------------------------------------------------------------------------
@pytest.mark.parametrize("kappa", [0.5, 0.7, 0.9])
def test_expectile_loss_and_its_gradient(kappa):
    u = a_tensor([-2.0, -0.5, 0.25, 3.0], requires_grad=True)
    weight = a_tensor([1 - kappa, 1 - kappa, kappa, kappa])
    loss = o3f.expectile_loss(u, kappa)
    loss.backward()
    assert torch.allclose(loss, (weight * u**2).sum() / 4)
    assert torch.allclose(u.grad, 2 * weight * u / 4)


def test_other_losses_in_closed_form():
    rewards, ends, next_v = torch.tensor([[1.0, 1.0], [0.0, 1.0], [10.0, 10.0]])
    assert o3f.td_target(rewards, ends, next_v, 0.9).tolist() == pytest.approx([10.0, 1.0])
    adv = a_tensor([-1.0, 0.0, 1.0, 1000.0])
    expected = [math.exp(-3), 1.0, math.exp(3), 100.0]
    assert o3f.advantage_weights(adv, 3.0, 100.0).tolist() == pytest.approx(expected)
    assert o3f.advantage_weights(adv, 0.0, 100.0).tolist() == [1.0] * 4
    mean, log_var = torch.randn(2, 9, 4).double()
    pair = torch.distributions.Normal(mean, (0.5 * log_var).exp()), torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(*pair).sum(1)
    assert torch.allclose(o3f.kl_to_standard_normal(mean, log_var), expected)
    x, normal = torch.randn(9, 4).double(), torch.distributions.Normal(mean, (0.5 * log_var).exp())
    assert torch.allclose(o3f.gaussian_nll(x, mean, 0.5 * log_var), -normal.log_prob(x).sum(1))
    q = a_tensor([[3.0, 1.0], [2.0, 8.0], [7.0, 5.0]])
    for lam, expected in ((1.0, [2, 1]), (0.7, [3.5, 3.1]), (0.0, [7, 8])):
        assert o3f.mixed_q(q, lam).tolist() == pytest.approx(expected)


def test_batched_critics_are_separate_mlps():
    """Values, and the gradients that every member would have if it stood alone."""
    critics = o3f.Critics(7, 3, 5, [16, 16]).double()
    obs, actions, y = (torch.randn(9, n).double() for n in (7, 3, 1))
    q, alone = critics(obs, actions), a_critics(critics, obs, actions)
    assert torch.allclose(q, alone, rtol=0, atol=1e-12)
    o3f.ensemble_mse(q, y[:, 0]).backward()
    for j in range(5):
        loss = ((alone[j] - y[:, 0]) ** 2).mean()
        grads = torch.autograd.grad(loss, critics.parameters(), retain_graph=True)
        for weight, grad in zip(critics.parameters(), grads, strict=True):
            assert torch.allclose(weight.grad[j], grad[j], rtol=0, atol=1e-12)


@pytest.mark.parametrize("base, layers", [("iql", 3), ("lapo", 4), ("so2", 4)])
def test_networks_start_as_the_authors(base, layers):
    """IQL: orthogonal, gain √2, no bias; others: U(±1/√in), PyTorch's. No two critics are equal."""
    agent = a_agent(base, hidden_dim=64, dtype=torch.float32)
    a_same(agent.qf_target, agent.qf.parameters(), atol=0)
    params = [x.detach() for x in agent.qf.parameters()]
    assert len(params) == 2 * layers
    for weight, bias in zip(params[::2], params[1::2]):
        assert len({tuple(w.flatten().tolist()) for w in weight}) == 5
        bound = weight.shape[1] ** -0.5
        if base != "iql":
            assert 0.9 * bound < weight.abs().max() <= bound
            assert 0.5 * bound < bias.abs().max() <= bound
            continue
        assert bias.abs().max() == 0
        for w in weight:
            gram = w.T @ w if len(w) >= len(w.T) else w @ w.T
            assert torch.allclose(gram, 2 * torch.eye(len(gram)), atol=1e-4)


# ---- IQL, AWAC -----------------------------------------------------------------------------------
@pytest.mark.parametrize("base, limit", [("iql", 0.4), ("awac", 1.1)])
@pytest.mark.parametrize("ours", [False, True], ids=["paper", "ours"])
def test_iql_and_awac_update_against_the_formulas(base, limit, ours):
    """In order: IQL's V on the slow critics; actor and critics on the new V; the slow copies."""
    kappa, beta, gamma, tau, lr = 0.7, 0.5, 0.97, 0.01, 3e-4
    flags = dict(layer_norm=ours, standardise=ours, normalise_adv=ours)
    agent = a_agent(base, beta=beta, exp_adv_max=limit, gamma=gamma, tau=tau, **flags)
    s, a, r, s2, d = batch = a_batch()
    if ours:
        mean, std = a_statistics()[:2]
        s, s2 = (s - mean) / std, (s2 - mean) / std
    a_disturb(agent.qf_target, size=0.05)
    agent.actor.log_std.data.copy_(torch.tensor([-0.3, 0.1, 0.4]) + (2 if base == "awac" else 0))
    old = copy.deepcopy(agent)
    mean, std = torch.tanh(a_net(old.actor.net, s)), old.actor.log_std.exp()
    if base == "awac":  # as published: from e⁻³ at 0 to 1 at most
        std = torch.exp(-6 + 6 / (1 + torch.exp(-old.actor.log_std)))
    q = a_critics(old.qf, s, a, ours)

    if base == "iql":
        target_q = a_critics(old.qf_target, s, a, ours).min(0).values
        u = target_q - a_net(old.vf, s)[:, 0]
        vf_loss = torch.where(u < 0, (1 - kappa) * u * u, kappa * u * u).mean()
        new_v = a_adam_step(old.vf, vf_loss, lr)
        v, next_v = (a_net(new_v, x)[:, 0].detach() for x in (s, s2))
        adv = target_q - v
    else:  # V rests: in its place, the least of five critics at a sample of π, within ±1
        next_mean = torch.tanh(a_net(old.actor.net, s2))
        torch.manual_seed(11)
        samples = [x + std * torch.randn(32, 3) for x in (next_mean, mean)]
        assert all((x.abs() > 1).any() for x in samples)  # what is clamped
        pairs = zip((old.qf_target, old.qf), (s2, s), samples)
        next_v, v = (a_critics(*x, b.clamp(-1, 1), ours).amin(0).detach() for *x, b in pairs)
        adv = q.min(0).values - v
    if ours:
        adv = adv / (statistics.pstdev(adv.tolist()) + 1e-6)
    weight = a_tensor([min(math.exp(beta * x), limit) for x in adv.tolist()])
    assert (weight == limit).any() and (weight < limit).any()
    log_prob = -((a - mean) ** 2) / (2 * std**2) - torch.log(std * math.sqrt(2 * math.pi))
    actor_loss = -(weight * log_prob.sum(1)).mean()
    y = r + gamma * (1 - d) * next_v
    qf_loss = sum(((q[j] - y) ** 2).mean() for j in range(5))
    new_q = a_adam_step(old.qf, qf_loss, lr)

    torch.manual_seed(11)
    metrics = agent.update([batch])
    if base == "iql":
        a_same(agent.vf, new_v)
    a_same(agent.actor, a_adam_step(old.actor, actor_loss, lr), atol=1e-8)
    a_same(agent.qf, new_q)
    a_same(agent.qf_target, a_slow(old.qf_target, new_q, tau))
    expected = {"losses/vf": vf_loss} if base == "iql" else {}
    expected |= {"losses/qf": qf_loss / 5, "losses/actor": actor_loss}
    expected |= {"q_mean": q.mean(), "q_std": q.std(0, correction=0).mean(), "v_mean": v.mean()}
    expected |= {"adv_weight": weight.mean(), "policy_std": std.mean()}
    # Of n rows, sum(w)² / sum(w²) count: all if the weights are equal, one if one is all.
    expected |= {"adv_weight_ess": weight.sum() ** 2 / (weight**2).sum() / len(weight)}
    assert metrics.keys() == expected.keys()
    for name, by_hand in expected.items():
        assert metrics[name].item() == pytest.approx(by_hand.item()), name


def test_awacs_policy_starts_narrow_and_near_zero():
    agent, obs = a_agent("awac"), torch.randn(64, 7).double()
    assert agent.log_std().tolist() == [-3.0] * 3 and agent.actor(obs).abs().max() < 0.05
    agent.actor.log_std.data.fill_(50.0)
    assert agent.log_std().exp().max() <= 1.0
    assert not hasattr(agent, "vf")


def test_layer_norm_bounds_q_far_from_the_data():
    """A ReLU network grows with its input without end, one with LayerNorm does not."""
    far = [torch.full((1, n), 1e4).double() for n in (7, 3)]
    farther = [1e4 * x for x in far]
    for layer_norm in (False, True):
        agent = a_agent(layer_norm=layer_norm)
        growth = agent.q_values(*farther).abs() / agent.q_values(*far).abs()
        assert (growth < 1.01).all() if layer_norm else (growth > 9e3).all()


@pytest.mark.parametrize("base", ["iql", "awac", "so2"])
def test_standardised_observations_leave_what_hardly_moves(base):
    """A joint whose std is below 0.01 is centred only; what is saved acts alike."""
    data = a_data()
    data["observations"][:, 0] = 5.0 + 0.005 * np.sign(data["observations"][:, 0])
    agent = a_agent(base, standardise=True, data=data)
    x = data["observations"].astype(float)
    std = x.std(0)
    std[[0, -1]] = 1.0  # the joint, and the constant
    plain = a_agent(base)
    plain.load_state_dict(agent.state_dict() | {"obs_mean": torch.zeros(7), "obs_std": torch.ones(7)})
    obs, action = torch.tensor(x), torch.tensor(data["actions"]).double()
    by_hand = torch.tensor((x - x.mean(0)) / std)
    assert torch.allclose(agent.policy(obs, False), plain.policy(by_hand, False), atol=1e-5)
    assert torch.allclose(agent.q_values(obs, action), plain.q_values(by_hand, action), atol=1e-5)


@pytest.mark.parametrize("base", ["iql", "awac"])
def test_dropout_acts_in_updates_and_nowhere_else(base):
    batch, losses = a_batch(), set()
    for rate in (0.0, 0.5):
        torch.manual_seed(0)
        agent = a_agent(base, actor_dropout=rate)
        losses.add(agent.update([batch])["losses/actor"].item())
        mean = torch.tanh(a_net(agent.actor.net, batch.observations))
        assert torch.allclose(agent.policy(batch.observations, sample=False), mean)
    assert len(losses) == 2


def test_policy_samples_are_the_clipped_gaussian():
    agent, n = a_agent(), 20_000
    agent.actor.log_std.data.fill_(math.log(0.1))
    for weight in agent.actor.net.parameters():
        weight.data.mul_(0.1)
    obs = torch.randn(1, 7).double().expand(n, 7)
    mean = torch.tanh(a_net(agent.actor.net, obs[:1]))[0]
    draws = agent.policy(obs, sample=True, generator=a_draws(0))
    assert torch.allclose(draws.mean(0), mean, atol=5 * 0.1 / math.sqrt(n))
    assert torch.allclose(draws.std(0), a_tensor([0.1] * 3), rtol=0.03)
    agent.actor.log_std.data.copy_(torch.tensor([5.0, -9.0, 0.5]))
    assert agent.log_std().tolist() == [2.0, -5.0, 0.5]
    assert agent.policy(obs, sample=True).abs().max() == 1.0


# ---- LAPO ----------------------------------------------------------------------------------------
def a_statistics():
    """Mean and std of a_data's observations and actions; a constant's std is 1."""
    found = []
    for name in ("observations", "actions"):
        x = torch.tensor(a_data()[name]).double()
        std = x.std(0, correction=0)
        found += [x.mean(0), torch.where(std > 1e-6, std + 1e-6, 1.0)]
    assert found[1][-1] == 1.0
    return found


@pytest.mark.parametrize("lam, clamp", [(1.0, "discounted"), (0.7, "discounted"), (0.7, "once")])
def test_lapo_update_against_the_formulas(lam, clamp):
    """Critics and V, CVAE, latent policy, each from its own loss alone; then the slow copies."""
    gamma, tau, lr = 0.99, 0.005, 2e-4
    agent, batch = a_agent("lapo", doubleq_min=lam, value_clamp=clamp), a_batch()
    a_disturb(agent.qf_target, agent.decoder_target, agent.actor_target, size=0.3)
    agent.qf_target.net[-1].weight.data.mul_(30.0)  # values beyond the limits of "once"
    old = copy.deepcopy(agent)
    obs_mean, obs_std, act_mean, act_std = a_statistics()
    s, s2 = ((x - obs_mean) / obs_std for x in (batch.observations, batch.next_observations))
    a, r, d = (batch.actions - act_mean) / act_std, batch.rewards, batch.terminations
    torch.manual_seed(11)
    members = torch.randperm(5)[:2]
    latent_noise = torch.randn(32, 6).double()
    cvae_noise = torch.randn(32, 6, dtype=torch.float64)

    def mix(obs, actions):
        q = a_critics(old.qf_target, obs, actions)[members].detach()
        return lam * q.min(0).values + (1 - lam) * q.max(0).values

    # 1. critics and V
    z = 2 * torch.tanh(a_net(old.actor_target, s)) + (0.1 * latent_noise).clamp(-0.2, 0.2)
    v_target = mix(s, a_net(old.decoder_target, s, z))
    scale = {"discounted": 100.0, "once": 1.0}[clamp]
    rewards = [0.0, *a_data()["rewards"].tolist(), *r.tolist()]
    low, high = scale * min(rewards), scale * max(rewards)
    assert clamp != "once" or v_target.min() < low or v_target.max() > high
    y = r + gamma * (1 - d) * a_net(old.vf, s2)[:, 0].detach()
    vf_loss = ((a_net(old.vf, s)[:, 0] - v_target.clamp(low, high)) ** 2).mean()
    qf_loss = ((a_critics(old.qf, s, a) - y) ** 2).mean(1).sum()
    new = {"qf": a_adam_step(old.qf, qf_loss, lr), "vf": a_adam_step(old.vf, vf_loss, lr)}
    # 2. CVAE, with the new V and the slow critics of before
    next_z = 2 * torch.tanh(a_net(old.actor_target, s2))
    next_q = mix(s2, a_net(old.decoder_target, s2, next_z))
    adv = (r + gamma * (1 - d) * next_q - a_net(new["vf"], s)[:, 0]).detach()
    assert (adv > 0).any() and (adv < 0).any()
    weight = a_tensor([0.9 if x > 0 else 0.1 for x in adv.tolist()])
    mu, log_var = a_net(old.encoder, s, a).split(6, 1)
    decoded = a_net(old.decoder, s, mu + torch.exp(log_var / 2) * cvae_noise)
    kl = -0.5 * (1 + log_var - mu**2 - log_var.exp()).sum(1)
    cvae_loss = (weight * (((decoded - a) ** 2).sum(1) + kl)).mean()
    # 3. latent policy: the mean of the new critics, through the slow decoder
    action = a_net(old.decoder_target, s, 2 * torch.tanh(a_net(old.actor, s)))
    actor_loss = -a_critics(new["qf"], s, action).mean()
    for name, loss in (("encoder", cvae_loss), ("decoder", cvae_loss), ("actor", actor_loss)):
        new[name] = a_adam_step(getattr(old, name), loss, lr)

    torch.manual_seed(11)
    metrics = agent.update([batch])
    for name, expected in new.items():
        a_same(getattr(agent, name), expected, atol=1e-8)
    for name in ("qf_target", "decoder_target", "actor_target"):
        expected = a_slow(getattr(old, name), new[name.partition("_")[0]], tau)
        a_same(getattr(agent, name), expected, atol=1e-8)
    expected = {"losses/qf": qf_loss / 5, "losses/vf": vf_loss, "losses/cvae": cvae_loss}
    expected |= {"losses/actor": actor_loss, "adv": adv.mean(), "kl": kl.mean()}
    for name, by_hand in expected.items():
        assert metrics[name].item() == pytest.approx(by_hand.item()), name


def test_lapo_subset_is_drawn_anew_and_evenly():
    """Slow critics say 1, 2, 4, 8, 16 and V says 0: V's loss tells which two were asked."""
    flags = dict(doubleq_min=0.5, learning_rate=0.0, tau=0.0)
    agent, batch, n = a_agent("lapo", **flags), a_batch(4), 600
    for weight in [*agent.qf_target.parameters(), *agent.vf.parameters()]:
        weight.data.zero_()
    agent.qf_target.net[-1].bias.data[:, 0, 0] = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    losses = [round(agent.update([batch])["losses/vf"].item(), 6) for _ in range(n)]
    pairs = {((2**i + 2**j) / 2) ** 2 for i in range(5) for j in range(i)}
    assert set(losses) == pairs
    for pair in pairs:  # one of ten
        assert abs(losses.count(pair) - n / 10) < 4.5 * math.sqrt(n * 0.1 * 0.9)


@pytest.mark.parametrize("clamp, scale", [("discounted", 100.0), ("once", 1.0)])
def test_lapo_value_limits_start_with_the_dataset_and_widen(clamp, scale):
    data, batch = a_data(rewards=np.linspace(-4.0, -1.0, 50)), a_batch()
    agent = a_agent("lapo", data=data, value_clamp=clamp)
    low, high = -4.0, 0.0  # 0 is what follows an end, whatever the data says
    for smallest, largest in ((-2.0, -2.0), (-5.0, 3.0), (-1.0, 1.0)):
        limits = agent.v_min.item(), agent.v_max.item()
        assert limits == pytest.approx((scale * low, scale * high))
        rewards = torch.linspace(smallest, largest, 32).double()
        agent.update([batch._replace(rewards=rewards)])
        low, high = min(low, smallest), max(high, largest)


def test_lapo_speaks_environment_units():
    agent, raw = a_agent("lapo"), a_batch()
    a_disturb(agent.decoder, size=1.0)  # acting is through the slow decoder
    obs_mean, obs_std, act_mean, act_std = a_statistics()
    s, a = (raw.observations - obs_mean) / obs_std, (raw.actions - act_mean) / act_std
    q = a_critics(agent.qf, s, a)
    assert torch.allclose(agent.q_values(raw.observations, raw.actions), q, rtol=0, atol=1e-10)
    # A sample moves z by 0.1·ε, cut at 0.2, and nothing else.
    noise = torch.randn(32, 6, generator=a_draws(4)).double()
    assert (noise.abs() > 2).any()
    for sample, shift in ((False, 0.0), (True, (0.1 * noise).clamp(-0.2, 0.2))):
        z = 2 * torch.tanh(a_net(agent.actor, s)) + shift
        action = (a_net(agent.decoder_target, s, z) * act_std + act_mean).clamp(-1, 1)
        assert torch.allclose(agent.policy(raw.observations, sample, a_draws(4)), action, atol=1e-6)
    agent.decoder_target[-1].bias.data.fill_(50.0)  # the decoder knows no box, what is executed does
    assert torch.equal(agent.policy(raw.observations, False), torch.ones(32, 3).double())


STEPS = {"iql": dict(qf=3, vf=3, actor=3), "awac": dict(qf=3, actor=3), "so2": dict(qf=3, actor=1)}
STEPS |= {"lapo": dict(qf=3, vf=3, actor=1, decoder=1, encoder=1)}


@pytest.mark.parametrize("base", STEPS)
def test_updates_are_one_per_batch_or_one_in_all(base):
    """Of three batches. Each step of Q is followed by its slow copy."""
    agent, batches = a_agent(base), [a_batch(seed=i) for i in range(3)]
    slow = copy.deepcopy(agent.qf_target)
    for i in (1, 2, 3):  # how the critics were after 1, 2, 3 batches
        after = copy.deepcopy(agent)
        torch.manual_seed(7)
        after.update(batches[:i])
        o3f.polyak_(slow, after.qf, 0.005)
    a_same(after.qf_target, slow.parameters())
    if base == "lapo":
        a_same(after.actor_target, a_slow(agent.actor_target, after.actor.parameters(), 0.005))
    for name, steps in STEPS[base].items():
        for weight in getattr(after, name).parameters():
            assert after.optimizer.state[weight]["step"] == steps


# ---- SO2 -----------------------------------------------------------------------------------------
def a_squashed(actor, obs, noise):
    """A sample of tanh(N(μ, σ²)) and its log π, a density as torch.distributions knows it."""
    mean, log_std = a_net(actor, obs).split(3, 1)
    normal = torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp())
    squash = torch.distributions.TanhTransform(cache_size=1)  # knows u where tanh(u) rounds to 1
    action, pi = squash(mean + normal.stddev * noise), torch.distributions.TransformedDistribution
    return action, pi(normal, squash).log_prob(action).sum(1)


def test_so2_samples_and_their_log_probability():
    agent, obs = a_agent("so2"), torch.randn(64, 7).double()
    agent.actor[-1].bias.data.copy_(torch.tensor([0.2, 2.0, -30.0, 0.3, 3.0, -9.0]))  # std < e²
    action, log_prob = agent.draw(obs, a_draws(4))
    by_hand = a_squashed(agent.actor, obs, torch.randn(64, 3, generator=a_draws(4)))
    assert torch.allclose(action, by_hand[0]) and torch.allclose(log_prob, by_hand[1])
    assert (action[:, 2] == -1).all() and torch.isfinite(log_prob).all()
    assert torch.allclose(agent.policy(obs, True, a_draws(4)), action)
    assert torch.allclose(agent.policy(obs, False), torch.tanh(a_net(agent.actor, obs)[:, :3]))


@pytest.mark.parametrize("online, log_std", [(False, -2.3), (False, -2.7), (True, 0.0)])
def test_so2_update_against_the_formulas(online, log_std):
    """Critics, on one minimum, or online each on its own; actor and α, on the new critics."""
    gamma, tau, lr, alpha = 0.97, 0.01, 3e-4, 0.3 if online else 0.6
    agent = a_agent("so2", gamma=gamma, tau=tau, online_alpha=0.3, standardise=True)
    agent.log_alpha.data.fill_(math.log(0.6))
    agent.actor[-1].bias.data[3:] = log_std
    a_disturb(agent.qf_target, size=0.05)
    agent.online = online
    s, a, r, s2, d = batch = a_batch()
    mean, std = a_statistics()[:2]
    s, s2, old = (s - mean) / std, (s2 - mean) / std, copy.deepcopy(agent)

    torch.manual_seed(11)
    next_a, next_log_prob = a_squashed(old.actor, s2, torch.randn(32, 3))
    if online:  # perturbed by 0.6 at most, within ±1; log π stays that of the sample
        noise = 0.3 * torch.randn(32, 3, dtype=torch.float64)
        next_a = next_a + noise.clamp(-0.6, 0.6)
        assert (noise.abs() > 0.6).any() and (next_a.abs() > 1).any()
    next_q = a_critics(old.qf_target, s2, next_a.clamp(-1, 1))
    next_q = next_q if online else next_q.amin(0).expand(5, 32)
    y = (r + gamma * (1 - d) * (next_q - alpha * next_log_prob)).detach()
    q = a_critics(old.qf, s, a)
    qf_loss = sum(((q[j] - y[j]) ** 2).mean() for j in range(5))
    new_q = a_adam_step(old.qf, qf_loss, lr)
    action, log_prob = a_squashed(old.actor, s, torch.randn(32, 3))
    actor_loss = (alpha * log_prob - a_critics(new_q, s, action).amin(0)).mean()
    # For three actions, α grows if the entropy is below −3, as -2.7 makes it; by Adam's step, lr.
    move = 0 if online else lr if log_std < -2.5 else -lr
    assert online or 2 < log_prob.mean() < 4 and (log_prob.mean() > 3) == (move > 0)

    torch.manual_seed(11)
    metrics = agent.update([batch])
    a_same(agent.qf, new_q, atol=1e-8)
    a_same(agent.qf_target, a_slow(old.qf_target, new_q, tau))
    a_same(agent.actor, a_adam_step(old.actor, actor_loss, lr), atol=1e-8)
    assert agent.log_alpha.item() == pytest.approx(math.log(0.6) + move, abs=1e-9)
    expected = {"losses/qf": qf_loss / 5, "losses/actor": actor_loss, "entropy": -log_prob.mean()}
    expected |= {"q_mean": q.mean(), "q_std": q.std(0, correction=0).mean()}
    expected["alpha"] = a_tensor(alpha * math.exp(move))
    assert metrics.keys() == expected.keys()
    for name, by_hand in expected.items():
        assert metrics[name].item() == pytest.approx(by_hand.item()), name


@pytest.mark.parametrize("m, noise, same", [(1, 0.0, True), (1, 0.3, False), (5, 0.0, False)])
def test_so2_with_one_critic_and_no_noise_has_one_target_in_both_phases(m, noise, same):
    agent = a_agent("so2", num_critics=m, target_noise=noise, online_alpha=1.0)  # α starts at 1
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        losses.append(copy.deepcopy(agent).update([a_batch()])["losses/qf"].item())
        agent.online = True
    assert (losses[1] == pytest.approx(losses[0])) == same


# ---- the optimistic action -----------------------------------------------------------------------
def a_optimistic(agent, obs, action, n, sigma, omega, draw):
    """Algorithm 1 and Eq. 2 as a loop over observations, candidates, critics."""
    noise = torch.randn(len(obs), n, 3, dtype=obs.dtype, generator=draw).tolist()
    chosen, optimism = [], []
    for b in range(len(obs)):
        found = []
        for eps in noise[b]:
            c = [min(max(x + sigma * e, -1.0), 1.0) for x, e in zip(action[b].tolist(), eps)]
            q = a_critics(agent.qf, obs[b : b + 1], torch.tensor([c], dtype=obs.dtype)).flatten().tolist()
            mean = statistics.fmean(q)
            found.append((mean + omega * statistics.pstdev(q), mean, c))
        _, mean, best = max(found, key=lambda x: x[0])  # the first of equals
        chosen.append(best)
        optimism.append(mean - statistics.fmean(x[1] for x in found))
    return torch.tensor(chosen, dtype=obs.dtype), a_tensor(optimism)


CASES = [(1, 0.2, 0.0), (20, 0.2, 0.0), (20, 0.2, 1.0), (20, 0.7, -0.5), (5, 0.0, 0.0)]


@pytest.mark.parametrize("n, sigma, omega", CASES)
def test_optimistic_action_against_a_loop(n, sigma, omega):
    agent = a_agent()
    obs, action = torch.randn(3, 7).double(), torch.rand(3, 3).double() * 2 - 1
    found = o3f.optimistic_action(obs, action, agent.q_values, n, sigma, omega, a_draws(5))
    by_loop = a_optimistic(agent, obs, action, n, sigma, omega, a_draws(5))
    assert torch.allclose(found[0], by_loop[0], rtol=0, atol=1e-12)
    assert torch.allclose(found[1], by_loop[1], rtol=0, atol=1e-9)


def test_optimistic_action_ties_signs_and_the_std():
    noise = 0.1 * torch.randn(1, 50, 2, generator=a_draws(0))[0]
    zeros = torch.zeros(1, 2)

    def pick(q, omega=0.0):
        return o3f.optimistic_action(zeros, zeros, q, 50, 0.1, omega, a_draws(0))[0][0]

    def disagree(obs, a):  # mean 0 everywhere, disagreement grows with a_0
        return torch.tensor([[-1.0], [1.0]]) * a[:, 0].exp()

    def bet(obs, a):  # where a_0 > 0 the critics say ±1: std 1 if it divides by m, else √2
        return torch.where(a[:, 0] > 0, torch.tensor([[1.0], [-1.0]]), torch.tensor(1.2))

    assert torch.allclose(pick(lambda obs, a: torch.ones(5, len(a))), noise[0])  # the first
    assert torch.allclose(pick(disagree, 1.0), noise[noise[:, 0].argmax()])
    assert torch.allclose(pick(disagree, -1.0), noise[noise[:, 0].argmin()])
    assert pick(bet, 1.0)[0] <= 0


@pytest.mark.parametrize("proposal", ["sample", "mean"])
def test_ways_to_explore(proposal):
    agent, obs = a_agent(dtype=torch.float32), torch.randn(1, 7)
    a_disturb(agent.qf_target, size=1.0)  # slow critics that differ: they play no part
    draw = a_draws(9)
    start = agent.policy(obs, proposal == "sample", draw)
    state = draw.get_state()

    def act(explore):
        args = o3f.preset("Pendulum-v1", "iql", explore=explore, proposal=proposal, sigma=0.3)
        return o3f.explore_action(agent, obs, args, a_draws(9))

    assert torch.equal(act("policy")[0], start)
    noisy = start + 0.3 * torch.randn(1, 3, generator=draw)
    assert torch.allclose(act("noise")[0], noisy.clamp(-1, 1))
    assert act("policy")[1] == act("noise")[1] == 0
    best, gain = a_optimistic(agent, obs, start, 100, 0.3, 0.0, draw.set_state(state))
    action, optimism = act("o3f")
    assert torch.allclose(action, best)
    assert optimism.item() == pytest.approx(gain.item(), rel=1e-3)


# ---- replay buffer -------------------------------------------------------------------------------
def a_buffer(rows, online):
    """A buffer whose row i has reward i and observations (2i, 2i + 1)."""
    obs = np.arange(2 * rows).reshape(rows, 2)
    data = a_data(rows, 2, 1, rewards=np.arange(rows), observations=obs)
    return o3f.ReplayBuffer(data, online, torch.device("cpu"))


def test_buffer_keeps_the_dataset_appends_and_refuses_what_is_not_finite():
    buffer = a_buffer(4, online=3)
    before = buffer.rows[:4].clone()
    for reward, x in ((math.nan, 0.0), (0.0, math.inf)):
        with pytest.raises(o3f.UserError, match="NaN or inf"):
            buffer.add(np.zeros(2), np.zeros(1), reward, np.array([0.0, x]), False)
    for i in range(3):
        buffer.add(np.full(2, 100.0 + i), np.array([0.5]), 10.0 + i, np.full(2, 200.0 + i), i == 1)
    assert torch.equal(buffer.rows[:4], before)
    assert buffer.rows[5].tolist() == [101, 101, 0.5, 11, 201, 201, 1]
    assert buffer.rows[:, 3].tolist() == [0, 1, 2, 3, 10, 11, 12]


def test_sampling_is_uniform_over_all_rows_and_keeps_them_whole():
    buffer = a_buffer(6, online=10)
    for i in (6, 7):
        buffer.add(np.array([2.0 * i, 2.0 * i + 1]), np.zeros(1), i, np.zeros(2), False)
    (batch,) = buffer.sample(80_000)
    counts = np.bincount(batch.rewards.long().numpy())
    assert len(counts) == 8  # nothing of the space that is still empty
    assert np.abs(counts - 10_000).max() < 5 * math.sqrt(10_000)
    assert torch.equal(batch.observations[:, 1], 2 * batch.rewards + 1)
    batches = buffer.sample(200, batches=20)
    assert len({tuple(batch.rewards.tolist()) for batch in batches}) == 20


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_offline_ratio_is_a_count(ratio):
    buffer = a_buffer(6, online=10)
    for i in (100, 101):
        buffer.add(np.zeros(2), np.zeros(1), i, np.zeros(2), False)
    expected = (set(range(6)) if ratio > 0 else set()) | ({100, 101} if ratio < 1 else set())
    for batch in buffer.sample(200, 3, ratio):
        assert (batch.rewards < 50).sum() == round(200 * ratio)
        assert set(batch.rewards.tolist()) == expected


# ---- a small environment, and a whole run in it --------------------------------------------------
class ALine(gym.Env):
    """obs (step, episode), reward = step; every second episode truly ends at its third step."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))

    def __init__(self, low=-1.0, high=1.0):
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high), (1,))
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.episode = 0, self.episode + 1
        return np.array([0, self.episode], np.float32), {}

    def step(self, action):
        self.t, self.action = self.t + 1, action
        obs = np.array([self.t, self.episode], np.float32)
        return obs, float(self.t), self.episode % 2 == 1 and self.t == 3, False, {}


gym.register("O3FLine-v0", ALine, max_episode_steps=5)
gym.register("O3FEndless-v0", ALine)
gym.register("O3FPendulum-v0", gym.spec("Pendulum-v1").entry_point, max_episode_steps=10)


def a_write(path, **columns):
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            if column is not None:
                file[name] = column
    return path


def a_load(env_id, path, base="iql", **flags):
    """load_dataset's transitions and rule."""
    args = o3f.preset(env_id, base, dataset=str(path), **flags)
    return o3f.load_dataset(args, o3f.get_task(env_id), o3f.make_env(env_id), None)


def test_online_rows_follow_each_other_and_a_time_limit_is_not_a_true_end(tmp_path, monkeypatch):
    """Step 5 is the limit: termination 0 is stored, and the successor is not the next start."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    flags = dict(hidden_dim=8, batch_size=8, num_candidates=4, dataset_size=100, eval_episodes=1)
    flags |= dict(offline_steps=3, online_steps=20, checkpoint_minutes=0.0, dataset="random")
    flags |= dict(run_dir=str(tmp_path / "run"), reward_transform="return_range")
    o3f.main(o3f.preset("O3FLine-v0", "iql", **flags))
    with h5py.File(next(tmp_path.glob("*.hdf5"))) as file:
        starts = np.flatnonzero(file["observations"][:, 0] == 0)
        returns = [part.sum() for part in np.split(file["rewards"][:], starts)[1:]]
    scale = 1000 / (max(returns) - min(returns))
    rows = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["rows"].tolist()
    assert len(rows) == 19  # the last checkpoint is of step 19, an episode's end
    for (t, episode, _, reward, *successor, end), following in zip(rows, [*rows[1:], None]):
        assert successor == [t + 1, episode]
        assert end == (episode % 2 == 1 and t == 2)
        assert reward == pytest.approx(scale * (t + 1))  # transformed once
        if following:
            assert following[:2] == ([0, episode + 1] if end or t == 4 else successor)


# ---- data ----------------------------------------------------------------------------------------
def a_rows_one_by_one(raw, horizon):
    """d4rl's loop, but that a true end is kept at a limit and in the last row; counts from an end."""
    kept, count, n = [], 0, len(raw["rewards"])
    for t in range(n):
        count += 1
        limit = raw["timeouts"][t] if "timeouts" in raw else count % horizon == 0
        if raw["terminals"][t] or (not limit and t < n - 1):
            kept.append(t)
        if raw["terminals"][t]:
            count = 0
    return kept


@pytest.mark.parametrize("with_timeouts", [True, False])
@pytest.mark.parametrize("with_terminals", [True, False])
def test_transitions_against_a_row_by_row_reference(with_timeouts, with_terminals):
    rng = np.random.default_rng(0)
    for _ in range(100):
        n, horizon = rng.integers(2, 60), int(rng.integers(2, 12))
        raw = {name: rng.normal(size=(n, 3)) for name in ("observations", "actions")}
        raw |= {"rewards": rng.normal(size=n), "terminals": (rng.random(n) < 0.15) & with_terminals}
        if with_timeouts:
            raw["timeouts"] = rng.random(n) < 0.15
        kept = np.array(a_rows_one_by_one(raw, horizon), int)
        original = copy.deepcopy(raw)
        o3f.mark_ends(raw, horizon, demonstrations=False)
        data = o3f.to_transitions(raw)
        for name in ("observations", "actions", "rewards"):
            assert np.array_equal(data[name], original[name][kept])
        ends, successors = original["terminals"][kept], np.minimum(kept + 1, n - 1)
        expected = original["observations"][successors][~ends]  # what follows an end plays no part
        assert np.array_equal(data["next_observations"][~ends], expected)
        assert np.array_equal(data["terminations"], ends)


A_DONE = {"microwave": ([22], -0.75), "light switch": ([17, 18], [-0.69, -0.05])}
A_DONE |= {"bottom burner": ([11, 12], [-0.88, -0.01]), "hinge cabinet": ([20, 21], [0.0, 1.45])}
A_DONE |= {"kettle": (list(range(23, 30)), [-0.23, 0.75, 1.62, 0.99, 0, 0, -0.06])}
A_DONE |= {"slide cabinet": ([19], 0.37)}


def a_place(qpos, *names):
    for name in names:
        index, goal = A_DONE[name]
        qpos[..., index] = goal


@functools.cache
def a_pose():
    return np.array(o3f.make_env("kitchen-mixed-v0").unwrapped.pose, float)


def a_kitchen_file(path, **changes):
    """Three demonstrations of 40 rows; row 10 on has the kettle, row 20 on the microwave too."""
    rng = np.random.default_rng(0)
    obs = np.tile(np.append(a_pose(), np.zeros(30)), (120, 1))
    obs[:, :30] += 0.01 * rng.normal(size=(120, 30))
    obs[:, 30:] = o3f.make_env("kitchen-mixed-v0").unwrapped.goal
    for start in (0, 40, 80):
        a_place(obs[start + 10 : start + 40], "kettle")
        a_place(obs[start + 20 : start + 40], "microwave")
    columns = dict(observations=obs, actions=rng.uniform(-0.9, 0.9, (120, 9)))
    columns["rewards"] = np.tile(np.repeat([0.0, 1.0, 2.0], [10, 10, 20]), 3)
    columns["terminals"] = np.tile(np.arange(40) == 39, 3)
    return a_write(path, **(columns | changes))


@pytest.mark.parametrize("timeouts", [None, np.zeros(120, bool)])
def test_kitchen_rewards_consistent_and_stock(tmp_path, timeouts):
    path = a_kitchen_file(tmp_path / "k.hdf5", timeouts=timeouts)
    start, done = np.append(a_pose(), np.zeros(30)), np.zeros(60)
    a_place(done, "kettle", "microwave", "light switch", "bottom burner")
    data, rule = a_load("kitchen-mixed-v0", path)
    # 39 of 40: a demonstration's last row has no successor, and is no true end.
    by_hand = np.tile(np.repeat([-4.0, -3.0, -2.0], [10, 10, 19]), 3)
    assert np.array_equal(data["rewards"], by_hand)
    assert data["terminations"].sum() == 0
    # Online, whatever the environment pays: satisfied(s) − 4 at s; the end is all four at s'.
    assert rule(start, 1.0, done, False) == (-4.0, True)
    assert rule(done, 0.0, start, True) == (0.0, False)
    data = a_load("kitchen-mixed-v0", path, reward_transform="max")[0]
    assert np.array_equal(data["rewards"], by_hand / 4)  # the sign stays

    data, rule = a_load("kitchen-mixed-v0", path, kitchen_rewards="stock")
    assert data["rewards"].max() == 2.0
    assert data["terminations"].sum() == 3
    assert rule(start, 1.0, done, False) == (1.0, False)
    with pytest.raises(o3f.UserError, match="kitchen-partial-v0: it is of another kitchen"):
        a_load("kitchen-partial-v0", path)


TRANSFORMS = [("none", 1.0, 0.0), ("minus_one", 1.0, -1.0), ("x100", 100.0, 0.0), ("max", 1 / 3, 0.0)]
TRANSFORMS += [("return_range", 1000 / 3, 0.0)]  # returns are 6, 3 and 5


@pytest.mark.parametrize("transform, scale, shift", TRANSFORMS)
def test_reward_transforms_of_file_and_online_rewards(tmp_path, transform, scale, shift):
    rewards, terminals = np.array([[1.0, 2, 3, 3, 0, 2, 3, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0, 1]])
    columns = dict(observations=np.zeros((9, 2)), actions=np.ones((9, 1)), timeouts=np.zeros(9))
    path = a_write(tmp_path / "x.hdf5", rewards=rewards, terminals=terminals, **columns)
    data, rule = a_load("O3FLine-v0", path, reward_transform=transform)
    assert data["rewards"].tolist() == pytest.approx((scale * rewards + shift).tolist())
    assert rule(np.zeros(2), 7.0, np.zeros(2), True) == (pytest.approx(scale * 7 + shift), True)
    assert set(data["actions"].ravel()) == {np.float32(1 - 1e-5)}  # as in IQL's code
    for base, action in (("awac", 1 - 1e-5), ("lapo", 1.0), ("so2", 1.0)):
        assert set(a_load("O3FLine-v0", path, base)[0]["actions"].ravel()) == {np.float32(action)}


def a_columns(rows=40, **changes):
    rng = np.random.default_rng(0)
    columns = dict(observations=rng.normal(size=(rows, 2)), actions=rng.uniform(-1, 1, (rows, 1)))
    columns["rewards"] = rng.normal(size=rows)
    return columns | dict(terminals=np.zeros(rows), timeouts=np.zeros(rows)) | changes


BAD_COLUMNS = {
    "object 'rewards' doesn't exist": a_columns(rewards=None),
    r"observations has shape \(40, 3\), needs \(40, 2\)": a_columns(observations=np.zeros((40, 3))),
    r"rewards has shape \(40, 1\), needs \(40,\)": a_columns(rewards=np.zeros((40, 1))),
    r"rewards has shape \(39,\), needs \(40,\)": a_columns(rewards=np.zeros(39)),
    "could not convert string": a_columns(rewards=np.array([b"x"] * 40)),
    "x.hdf5: no row has a successor": a_columns(rows=1),
    "observations needs finite numbers, row 7": a_columns(
        observations=np.where(np.eye(40, 2, -7), np.nan, 0.0)
    ),
    "rewards needs finite numbers, row 3": a_columns(rewards=np.where(np.arange(40) == 3, -np.inf, 0.0)),
    "actions reach 1.049.*, expected within ±1": a_columns(actions=np.where(np.eye(40, 1, -5), -1.05, 0.0)),
    "each is a time limit": a_columns(timeouts=np.ones(40)),
}


@pytest.mark.parametrize("message", BAD_COLUMNS)
def test_wrong_files_are_refused_by_what_is_wrong(tmp_path, message):
    path = a_write(tmp_path / "x.hdf5", **BAD_COLUMNS[message])
    with pytest.raises(o3f.UserError, match=message):
        a_load("O3FLine-v0", path)


@pytest.mark.filterwarnings("ignore:overflow")
def test_damaged_files_load_or_are_refused_with_a_line(tmp_path):
    """120 files with flipped bits or a cut end: no other exception, nothing wrong let through."""
    rng, path, env = np.random.default_rng(0), tmp_path / "x.hdf5", o3f.make_env("O3FLine-v0")
    good, refused = a_write(path, **a_columns()).read_bytes(), 0
    for i in range(120):
        content = bytearray(good)
        for position in rng.integers(len(content), size=rng.integers(1, 30)):
            content[position] ^= 1 << rng.integers(8)
        path.write_bytes(content if i % 3 else good[: rng.integers(len(good))])
        try:
            raw = o3f.read_hdf5(path)
            o3f.check_columns(raw, env)
        except (o3f.UserError, ValueError):  # load_dataset gives the latter a file's name
            refused += 1
            continue
        assert raw["observations"].shape == (len(raw["rewards"]), 2)
        assert np.isfinite(raw["observations"]).all() and np.abs(raw["actions"]).max() <= 1 + 1e-6
    assert 60 < refused < 120


def a_replay(env, raw, rows, fastest=10.0):
    """Largest error of observation or reward where rows of a file are stepped anew."""
    env.reset(seed=0)
    errors, size = [], env.model.nq + env.model.nv
    for t in rows:
        # An observation is (qpos, qvel), of the robots without x; no reward of theirs depends on x.
        obs = raw["observations"][t]
        qpos, qvel = np.split(np.pad(obs, (size - len(obs), 0)), [env.model.nq])
        # Hopper and Walker2d hide what is faster than 10: such a state cannot be restored.
        if not raw["timeouts"][t] and np.abs(qvel).max() < fastest:
            env.set_state(qpos, qvel)
            obs, reward, *_ = env.step(raw["actions"][t])
            errors.append(abs(reward - raw["rewards"][t]))
            if not raw["terminals"][t]:
                errors.append(np.abs(obs - raw["observations"][t + 1]).max())
    assert len(errors) > len(rows)
    return max(errors)


def test_collected_data_is_uniform_and_cached_under_its_own_name(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    args = o3f.preset("hopper-random-v2", "iql", dataset_size=3000)
    path = o3f.find_file(args)
    assert path.name == "hopper-random-v2.collected-uniform-3000.hdf5"
    assert list(tmp_path.iterdir()) == [path]  # no part of a file left behind
    raw = {name: column.astype(float) for name, column in o3f.read_hdf5(path).items()}
    assert np.abs(raw["actions"].mean(0)).max() < 5 * math.sqrt(1 / 3 / 3000)
    assert np.allclose(raw["actions"].var(0), 1 / 3, atol=0.03)
    assert raw["terminals"].sum() > 50 and raw["timeouts"].sum() == 0  # random hoppers fall
    env = o3f.make_env("hopper-random-v2").unwrapped
    assert a_replay(env, raw, range(0, 2900, 31)) < 1e-2
    written = path.stat().st_mtime_ns
    assert o3f.find_file(args) == path and path.stat().st_mtime_ns == written  # not a second time
    official = tmp_path / "hopper_random-v2.hdf5"
    official.write_bytes(b"")
    assert o3f.find_file(args) == official  # D4RL's own comes first
    replay = tmp_path / "walker2d_medium_replay-v2.hdf5"  # as d4rl's infos.py names it
    replay.write_bytes(b"")
    without("d4rl", monkeypatch)  # not needed for it
    assert o3f.find_file(o3f.preset("walker2d-medium-replay-v2", "iql")) == replay


@a_needs_shared
@pytest.mark.parametrize("robot", ["halfcheetah", "hopper", "walker2d"])
def test_robots_pay_what_the_files_say(robot):
    env = o3f.make_env(f"{robot}-medium-v2").unwrapped
    with h5py.File(SHARED / f"data/{robot}-medium-standin.hdf5") as file:
        raw = {name: file[name][:5000].astype(np.float64) for name in file}
    fastest = math.inf if robot == "halfcheetah" else 10.0
    assert a_replay(env, raw, range(0, 4900, 47), fastest) < 1e-2


@a_needs_shared
@pytest.mark.skipif(
    mujoco.__version__ < "4", reason="the file is of MuJoCo 4: contacts differ by 0.08 on 3.17"
)
def test_antmaze_replays_and_pays_what_a_file_says():
    with h5py.File(SHARED / "data/antmaze-umaze-diverse-standin.hdf5") as file:
        raw = {name: file[name][:].astype(np.float64) for name in file if name != "metadata"}
        env = o3f.make_env("antmaze-umaze-diverse-v1").unwrapped
        env.goal = np.array(file.attrs["goal"])
    paid = np.flatnonzero(raw["rewards"])[::20].tolist()
    assert len(paid) > 5
    assert a_replay(env, raw, [*range(0, len(raw["rewards"]) - 1, 997), *paid]) < 1e-5


@a_needs_shared
@pytest.mark.parametrize("name", ["mixed-subset-63", "partial-subset-63", "complete-19"])
def test_kitchens_pay_what_the_files_say(name):
    """A file's rewards are D4RL's own count of satisfied sub-tasks, row by row."""
    env_id, path = f"kitchen-{name.partition('-')[0]}-v0", SHARED / f"data/kitchen-{name}.hdf5"
    with h5py.File(path) as file:
        rewards, terminals = file["rewards"][:], file["terminals"][:].astype(bool)
    assert np.array_equal(a_load(env_id, path)[0]["rewards"], rewards[~terminals] - 4)
    stock = a_load(env_id, path, kitchen_rewards="stock")[0]["rewards"]
    assert np.array_equal(stock, rewards)  # the last row is called terminal


# ---- tasks and environments ----------------------------------------------------------------------
SCORES = [("halfcheetah-medium-v2", 12135.0, 100.0), ("hopper-random-v2", -20.272305, 0.0)]
SCORES += [("walker2d-medium-v2", 2000.0, 43.531131), ("antmaze-umaze-v2", 1.0, 100.0)]
SCORES += [("kitchen-mixed-v0", 3.0, 75.0), ("Pendulum-v1", -123.0, -123.0)]


def test_scores():
    for env_id, value, score in SCORES:
        assert o3f.get_task(env_id).score(value) == pytest.approx(score)


@pytest.mark.parametrize("low, high", [(-1, 2), (-3, 1), (0, 1), (-2, 2), (-1, 1)])
def test_actions_of_other_environments_are_rescaled(low, high):
    env = o3f.make_env("O3FLine-v0", low=low, high=high)
    assert (env.action_space.low, env.action_space.high) == (-1, 1)
    env.reset(seed=0)
    for action, expected in ((-1, low), (0, (low + high) / 2), (1, high)):
        env.step(np.array([action], np.float32))
        assert env.unwrapped.action == pytest.approx(expected)


def test_every_episode_ends():
    for env_id, limit in (("O3FEndless-v0", 1000), ("O3FLine-v0", 5)):
        env = o3f.make_env(env_id)
        env.reset(seed=0)
        truncated = [env.step(np.zeros(1, np.float32))[3] for _ in range(limit)]
        assert truncated == [False] * (limit - 1) + [True]


def test_an_environment_of_another_module(tmp_path, monkeypatch):
    line = f"import gymnasium, {__name__}\n"
    line += f"gymnasium.register('Outside-v0', {__name__}.ALine, max_episode_steps=7)\n"
    (tmp_path / "a_outside.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    args = o3f.preset("a_outside:Outside-v0", "iql", dataset="random", dataset_size=20)
    path = o3f.find_file(args)
    assert path.name == "a_outside-Outside-v0.collected-uniform-20.hdf5"
    with pytest.raises(o3f.UserError, match="cannot make it: No module named 'no_such_module'"):
        o3f.make_env("no_such_module:Line-v0")
    with pytest.raises(o3f.UserError, match="give each a finite low"):
        o3f.make_env("O3FLine-v0", low=-np.inf)


@a_needs_shared
@pytest.mark.parametrize("episode", [0, 1])  # the actions of episode 0 exceed ±1
def test_kitchen_reproduces_the_reference_episodes(episode):
    reference = np.load(SHARED / "reference/kitchen_mixed_rollouts.npz")
    expected, actions = reference[f"ep{episode}_obs"], reference[f"ep{episode}_act"]
    env = o3f.make_env("kitchen-mixed-v0", noise_ratio=0.0).unwrapped  # in float64
    assert np.abs(env.reset(seed=0)[0] - expected[0]).max() < 1e-9
    for t in range(10):
        assert np.abs(env.step(actions[t])[0] - expected[t + 1]).max() < 2e-3


def test_kitchen_pays_each_sub_task_once_and_ends_when_all_are_done():
    env = o3f.make_env("kitchen-mixed-v0", noise_ratio=0.0)
    env.reset(seed=0)

    def move(*names):
        a_place(env.unwrapped.data.qpos, *names)
        _, reward, terminated, _, info = env.step(np.zeros(9))
        return reward, terminated, info["completed"].tolist()  # microwave, kettle, burner, light

    assert move() == (0, False, [False] * 4)
    assert move("microwave") == (1, False, [True, False, False, False])
    assert move()[0] == 0  # still open: not paid again
    env.unwrapped.data.qpos[22] = 0.0
    assert move() == (0, False, [True, False, False, False])
    assert move("microwave")[0] == 0  # open again: not paid again
    assert move("hinge cabinet")[0] == 0  # no target of mixed
    assert move("light switch", "bottom burner") == (2, False, [True, False, True, True])
    assert move("kettle") == (1, True, [True] * 4)
    env.reset()
    assert move("microwave")[0] == 1  # a new episode pays anew


@pytest.mark.parametrize("kitchen", ["mixed", "partial", "complete"])
def test_kitchen_goal_vector_and_horizon(kitchen):
    goal = np.zeros(30)
    fourth = "bottom burner" if kitchen == "mixed" else "slide cabinet"
    a_place(goal, "microwave", "kettle", "light switch", fourth)
    env = o3f.make_env(f"kitchen-{kitchen}-v0")
    assert np.allclose(env.reset(seed=0)[0][30:], goal)
    ends = [env.step(np.zeros(9))[2:4] for _ in range(280)]
    assert ends == [(False, False)] * 279 + [(False, True)]


def test_kitchen_noise_is_uniform_with_a_tenth_of_the_amplitudes():
    env, start = o3f.make_env("kitchen-mixed-v0").unwrapped, a_pose().copy()
    start[26:] /= np.linalg.norm(start[26:])
    draws = np.array([env.reset(seed=i)[0][:30] - start for i in range(400)])
    sizes = [0.1, 0.005, 0.0005, 0.005, 0.1, 0.005, 0.1, 0.005]
    amplitude = 0.1 * np.repeat(sizes, [9, 2, 6, 3, 3, 3, 3, 1])
    assert (np.abs(draws) <= amplitude + 1e-12).all()
    assert np.allclose(draws.std(0), amplitude / math.sqrt(3), rtol=0.15)


def test_kitchen_steers_from_the_joints_as_seen_and_clips():
    env = o3f.make_env("kitchen-mixed-v0").unwrapped
    low = [-2.9, -1.8, -2.9, -3.1, -2.9, 0, -2.9, 0, 0]
    high = [2.9, 1.8, 2.9, 0, 2.9, 3.8, 2.9, 0.04, 0.04]
    for action, moved in ((3.0, 0.16), (-0.5, -0.08)):  # 3 is as good as 1
        obs, _ = env.reset(seed=0)
        env.step(np.full(9, action))
        assert np.allclose(env.data.ctrl, np.clip(obs[:9] + moved, low, high))


@pytest.mark.parametrize("env_id", ["kitchen-mixed-v0", "antmaze-umaze-v2"])
def test_own_environments_pass_gymnasiums_checker(env_id):
    """Episodes depend on the seed of reset alone, among others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = o3f.make_env(env_id).unwrapped
        check_env(env, skip_render_check=True)
    assert isinstance(env, o3f.MujocoEnv)  # whose hook takes our model, not one from a file
    assert env.model.nu == env.action_space.shape[0] in (8, 9)


# ---- ant maze ------------------------------------------------------------------------------------
def a_d4rls_maze(name):
    """d4rl's map, read as data: {(x, y) of a cell: 1 wall, 0 free, "r" start, "g" goal}."""
    source = ast.parse((o3f.d4rl_dir() / "locomotion/maze_env.py").read_text())
    name = {"umaze": "U_MAZE_TEST", "medium": "BIG_MAZE_TEST", "large": "HARDEST_MAZE_TEST"}[name]
    for node in source.body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            rows = eval(ast.unparse(node.value), {"R": "r", "G": "g"})
    i0, j0 = next((i, row.index("r")) for i, row in enumerate(rows) if "r" in row)
    return {(4 * (j - j0), 4 * (i - i0)): mark for i, row in enumerate(rows) for j, mark in enumerate(row)}


@pytest.mark.parametrize("name", ["umaze-v2", "medium-play-v2", "large-diverse-v2"])
def test_antmaze_geometry_is_d4rls(name):
    env, cells = o3f.make_env(f"antmaze-{name}"), a_d4rls_maze(name.split("-")[0])
    assert env.get_wrapper_attr("_max_episode_steps") == (700 if "umaze" in name else 1000)
    env, model = env.unwrapped, env.unwrapped.model
    walls = model.geom_type == mujoco.mjtGeom.mjGEOM_BOX
    by_hand = sorted((x, y, 1) for (x, y), mark in cells.items() if mark == 1)
    assert sorted(map(tuple, model.geom_pos[walls].tolist())) == by_hand
    assert (model.geom_size[walls] == [2, 2, 1]).all()
    assert (model.nq, model.nv, model.nu) == (15, 14, 8)
    assert (model.opt.timestep, model.opt.integrator) == (0.02, mujoco.mjtIntegrator.mjINT_RK4)
    corner = np.array(next(cell for cell in cells if cells[cell] == "g"))
    for seed in range(20):
        env.reset(seed=seed)
        assert (corner <= env.goal).all() and (env.goal <= corner + 1.5).all()
        assert np.allclose(env.data.site("goal").xpos[:2], env.goal)  # what is drawn is what counts


def test_an_ant_cannot_leave_the_maze():
    """From every free cell, 300 steps of a push of twice its weight towards each wall."""
    env, cells = o3f.make_env("antmaze-umaze-v2").unwrapped, a_d4rls_maze("umaze")
    torso, weight = env.model.body("torso").id, env.model.body_subtreemass[0] * 9.81
    pushes = itertools.product((cell for cell in cells if cells[cell] != 1), (0, 1), (-1, 1))
    pushes = [(cell, sign * np.eye(2)[axis]) for cell, axis, sign in pushes]
    pushes = [(cell, push) for cell, push in pushes if cells[tuple(cell + 4 * push)] == 1]
    assert len(pushes) == 16
    for cell, push in pushes:
        env.reset(seed=0)
        env.set_state(np.array([*cell, *env.model.qpos0[2:]]), np.zeros(14))
        for _ in range(300):
            env.data.xfrc_applied[torso, :2] = 2 * weight * push
            env.step(np.zeros(8))
        x, y, z = env.data.qpos[:3]
        assert 1.0 < (x - cell[0], y - cell[1]) @ push < 1.8  # the wall is at 2, the torso's radius 0.25
        assert 0 < z < 2 and cells[4 * round(x / 4), 4 * round(y / 4)] != 1


def test_antmaze_starts_and_goals_drawn_once_in_v1_and_per_reset_in_v2():
    def draw(version, seeds):
        env, goals, starts = o3f.make_env(f"antmaze-umaze-diverse-v{version}").unwrapped, [], []
        for seed in seeds:
            starts.append(env.reset(seed=seed)[0])
            goals.append(env.goal.copy())
        return np.array(goals), np.array(starts)

    assert len(np.unique(draw(1, range(50))[0], axis=0)) == 1
    assert len(np.unique([draw(1, [seed, 9])[0][1] for seed in range(3)], axis=0)) == 3
    goals, starts = draw(2, range(2000))
    jitter, mean, variance = goals - [0.0, 8.0], 0.75, 1 / 12 + 1 / 48  # U(0, 1) + U(0, 0.5)
    assert np.abs(jitter.mean(0) - mean).max() < 5 * math.sqrt(variance / 2000)
    assert np.abs(jitter.var(0) - variance).max() < 0.01
    assert 0 <= jitter.min() and jitter.max() <= 1.5
    assert 0.099 < np.abs(starts[:, :3] - [0, 0, 0.75]).max() <= 0.1
    assert starts[:, :3].std(0) == pytest.approx(0.2 / math.sqrt(12), rel=0.1)
    assert starts[:, 15:].std(0) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("distance, paid", [(0.0, 1), (0.4999, 1), (0.5, 1), (0.5001, 0), (3.0, 0)])
def test_antmaze_pays_and_ends_within_half_a_metre(monkeypatch, distance, paid):
    env = o3f.make_env("antmaze-umaze-v2").unwrapped
    env.reset(seed=0)
    monkeypatch.setattr(o3f.mujoco, "mj_step", lambda *args: None)  # the world stands still
    env.goal = np.array([1.0, 2.0])
    env.data.qpos[:7] = [1.0 + distance, 2.0, 0.75, 0, 1, 0, 0]  # on its back: no end of its own
    _, reward, terminated, truncated, _ = env.step(np.array([-1, -0.5, 0, 0.25, 0.5, 1, 2, -3]))
    assert (reward, terminated, truncated) == (paid, bool(paid), False)
    assert env.data.ctrl.tolist() == [-30, -15, 0, 7.5, 15, 30, 30, -30]


# ---- evaluation ----------------------------------------------------------------------------------
class AScript(gym.Env):
    """Shows these observations, pays these rewards; ends truly with the last of them."""

    def __init__(self, observations, rewards):
        self.observations, self.rewards, self.actions = observations, rewards, []

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return self.observations[0], {}

    def step(self, action):
        self.actions.append(action)
        self.t += 1
        over = self.t == len(self.rewards)
        return self.observations[self.t], self.rewards[self.t - 1], over, False, {}


def a_evaluate(env_id, agent, envs, rule=(1.0, 0.0, ()), seed=3, **flags):
    args = o3f.preset(env_id, "iql", **flags)
    return o3f.evaluate(agent, o3f.RewardRule(*rule), o3f.get_task(env_id), seed, args, envs)


def a_kendall(x, y):
    """SO2's τ of any ten in a row, as a loop over their 45 pairs."""
    pairs = list(itertools.combinations(range(10), 2))
    windows = [(x[k : k + 10], y[k : k + 10]) for k in range(len(x) - 9)]
    return [sum(np.sign((a[i] - a[j]) * (b[i] - b[j])) for i, j in pairs) / 45 for a, b in windows]


def test_kendall_tau_of_known_orders_and_against_all_pairs():
    up, rng = np.arange(10.0), np.random.default_rng(0)
    for x, tau in ((up**3, 1.0), (-np.exp(up), -1.0), (np.ones(10), 0.0)):
        assert o3f.kendall_tau(x, up).tolist() == o3f.kendall_tau(up, x).tolist() == [tau]
    for n in (0, 9, 10, 57):
        for x, y in (rng.normal(size=(2, n)), rng.integers(0, 4, (2, n))):  # the latter have ties
            assert o3f.kendall_tau(x, y).tolist() == pytest.approx(a_kendall(x, y))


def test_kendall_tau_in_evaluation_leaves_out_what_a_time_limit_cut():
    """γ 0.9: log 0.05/log 0.9, so 28 steps; none at a true end, not even at one in the last."""
    agent, rng, gamma = a_agent(sizes=(3, 1), dtype=torch.float32), np.random.default_rng(0), 0.9
    envs, taus = [], []
    for length, limit in ((12, 50), (13, 13), (60, 45), (50, 20)):
        script = AScript(np.float32(rng.normal(size=(length + 1, 3))), rng.normal(size=length))
        envs.append(gym.wrappers.TimeLimit(script, limit))
    values = a_evaluate("Pendulum-v1", agent, envs, gamma=gamma, eval_action="explore")
    for env, kept in zip((env.unwrapped for env in envs), (12, 13, 45 - 28, 0)):
        obs, actions = map(torch.tensor, (env.observations[: env.t], np.array(env.actions)))
        q = a_critics(agent.qf, obs, actions).mean(0).tolist()  # at what was executed
        to_go = [env.rewards[t : env.t] @ gamma ** np.arange(env.t - t) for t in range(env.t)]
        taus += a_kendall(q[:kept], to_go[:kept])
    assert values["eval/kendall_tau"] == pytest.approx(np.mean(taus))


def test_evaluation_side_by_side_is_one_after_the_other():
    agent, limits, gamma = a_agent(sizes=(3, 1), dtype=torch.float32), (12, 5, 30), 0.9
    envs = [gym.wrappers.TimeLimit(gym.make("Pendulum-v1").unwrapped, limit) for limit in limits]
    values, again = (a_evaluate("Pendulum-v1", agent, envs, (2.0, -1.0, ()), gamma=gamma) for _ in "12")
    returns, discounted, q_start = [], [], []
    for i, limit in enumerate(limits):
        env, rewards = gym.make("Pendulum-v1").unwrapped, []
        obs, _ = env.reset(seed=3 + i)
        for t in range(limit):
            x = torch.tensor(obs[None])
            action = torch.tanh(a_net(agent.actor.net, x))
            if t == 0:
                q_start.append(a_critics(agent.qf, x, action).mean().item())
            obs, reward, *_ = env.step(action[0].detach().numpy())
            rewards.append(reward)
        returns.append(sum(rewards))
        discounted.append(sum(gamma**t * (2 * r - 1) for t, r in enumerate(rewards)))
    by_hand = {"return": np.mean(returns), "score": np.mean(returns), "score_std": np.std(returns)}
    by_hand |= {"discounted_return": np.mean(discounted), "q_start": np.mean(q_start)}
    by_hand["length"] = np.mean(limits)
    by_hand["kendall_tau"] = 0.0  # all are too short: see above
    assert values == again  # the same seeds always
    assert values == pytest.approx({f"eval/{name}": x for name, x in by_hand.items()}, rel=1e-4)


def test_kitchen_evaluation_success_and_rewards_at_the_state_before():
    """The microwave is open from the second observation on: the second step pays for it."""
    obs = np.tile(np.append(a_pose(), np.zeros(30)), (4, 1))
    a_place(obs[1:], "microwave")
    agent = a_agent(sizes=(60, 9), dtype=torch.float32)
    paid = [1.0, 1, 2], [1.0, 0, 2], [0.0, 0, 0], [4.0, 0, 0]
    envs = [AScript(np.float32(obs), rewards) for rewards in paid]
    rule = 1.0, 0.0, o3f.TASKS["kitchen-mixed-v0"].targets
    values = a_evaluate("kitchen-mixed-v0", agent, envs, rule, gamma=0.5)
    assert values["eval/discounted_return"] == pytest.approx(-4 - 0.5 * 3 - 0.25 * 3)
    assert values["eval/success"] == 0.5
    assert values["eval/score"] == pytest.approx(statistics.fmean([100, 75, 0, 100]))
    for env_id, success in (("antmaze-umaze-v2", 0.75), ("hopper-medium-v2", None)):
        assert a_evaluate(env_id, agent, envs).get("eval/success") == success


# ---- flags, precision, compilation, saved agents -------------------------------------------------
IQLS = dict(batch_size=256, learning_rate=3e-4, gamma=0.99, tau=0.005, utd=1, num_critics=5)
IQLS |= dict(num_candidates=100, omega=0.0, explore="o3f", hidden_dim=256, exp_adv_max=100.0)
IQLS |= dict(sigma=0.2, expectile=0.7, beta=3.0, actor_dropout=0.0, proposal="sample")
LAPOS = dict(batch_size=512, learning_rate=2e-4, gamma=0.99, tau=0.005, utd=20, num_critics=5)
LAPOS |= dict(subset_size=2, doubleq_min=1.0, value_clamp="discounted", proposal="mean")
LAPOS |= dict(max_latent=2.0, latent_noise=0.1, kl_weight=1.0, good_weight=0.9, latent_dim=None)
IQLS_KITCHEN = dict(sigma=0.05, beta=0.5, actor_dropout=0.1, proposal="mean")
IQLS_ANT = dict(sigma=0.05, expectile=0.9, beta=10.0, reward_transform="minus_one")
LAPOS_ANT = dict(sigma=0.05, doubleq_min=0.7, value_clamp="once", reward_transform="x100")
SO2S = dict(target_noise=0.3, online_alpha=0.2, utd=10, layer_norm=False, standardise=False)
PAPERS = [
    # Ours, as measured: the README has the numbers.
    ("halfcheetah-medium-v2", "iql", IQLS | dict(reward_transform="max", layer_norm=True)),
    ("kitchen-mixed-v0", "iql", IQLS | IQLS_KITCHEN | dict(reward_transform="none", sigma=0.01)),
    ("antmaze-large-diverse-v1", "iql", IQLS | IQLS_ANT),
    ("hopper-medium-v2", "lapo", LAPOS | dict(sigma=0.2, reward_transform="max", layer_norm=False)),
    ("kitchen-mixed-v0", "lapo", LAPOS | dict(sigma=0.05, reward_transform="max")),
    ("antmaze-large-diverse-v1", "lapo", LAPOS | LAPOS_ANT),
    ("kitchen-mixed-v0", "awac", IQLS_KITCHEN | dict(beta=1.0, actor_dropout=0.0)),
    ("antmaze-umaze-v2", "awac", dict(beta=1.0, sigma=0.05, reward_transform="minus_one")),
    ("Pendulum-v1", "awac", dict(beta=1.0, normalise_adv=True, reward_transform="max")),
    ("hopper-medium-v2", "so2", SO2S | dict(reward_transform="none", batch_size=256)),
]


@pytest.mark.parametrize("env_id, base, papers", PAPERS)
def test_presets_are_the_papers_and_given_flags_win(env_id, base, papers):
    args = o3f.preset(env_id, base)
    assert {name: getattr(args, name) for name in papers} == papers
    o3f.prepare(args)
    assert o3f.preset(env_id, base, sigma=0.3).sigma == 0.3


@pytest.mark.parametrize("base", ["iql", "lapo", "awac", "so2"])
def test_every_flag_is_documented_and_read(base, capsys):
    with pytest.raises(SystemExit):
        o3f.parse(["--base", base, "--help"])
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    source = Path(o3f.__file__).read_text()
    for field in dataclasses.fields(o3f.BASES[base].Flags):
        flag = field.name.replace("_", "-")
        kind = r"(?:, --no-\S+|[A-Z]+|\[STR.*?\]\]|\{\S+\}(?:\|[A-Z]+)?)"
        (words,) = re.findall(rf"--{flag} ?{kind} (.*?) \(default: ", text)
        assert len(words) > 15 and not words.startswith("--"), (flag, words)
        assert re.search(rf"\bargs\.{field.name}\b", source), flag
    foreign = {"iql": "good-weight", "lapo": "beta", "awac": "expectile", "so2": "utd-ratio"}[base]
    with pytest.raises(SystemExit) as stopped:
        o3f.parse(["--base", base, f"--{foreign}", "1"])
    assert stopped.value.code == 2


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
@pytest.mark.parametrize("base", ["iql", "lapo"])
def test_compiled_updates_are_the_eager_ones(base):
    found = []
    for compiled in (False, True):
        args = o3f.preset("Pendulum-v1", base, compile=compiled, hidden_dim=16, batch_size=32)
        torch.manual_seed(0)
        agent = o3f.make_agent(args, a_data(), None, torch.device("cpu"))
        buffer = o3f.ReplayBuffer(a_data(), 1, torch.device("cpu"))
        for utd in [1] * 10 + [3] * 10:
            metrics = agent.update(buffer.sample(args.batch_size, utd))
        found.append(agent.state_dict() | metrics)
    eager, compiled = found
    assert eager.keys() == compiled.keys()
    for name in eager:
        assert torch.allclose(eager[name], compiled[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("base", ["iql", "lapo", "awac", "so2"])
def test_a_loaded_agent_acts_as_the_saved_one_and_needs_no_data(base, tmp_path):
    agent = a_agent(base, dtype=torch.float32)
    batch = o3f.Batch(*(x.float() for x in a_batch()))
    agent.update([batch] * 3)
    o3f.save(tmp_path / "agent.pt", agent, o3f.RewardRule(1.0, 0.0, ()), 0)
    loaded = o3f.load_agent(tmp_path / "agent.pt")
    obs, actions = batch.observations, batch.actions
    assert torch.equal(agent.q_values(obs, actions), loaded.q_values(obs, actions))
    for sample in (False, True):
        one, other = (x.policy(obs, sample, a_draws(1)) for x in (agent, loaded))
        assert torch.equal(one, other)


HERE = Path(__file__).resolve().parent
TINY = (
    "--hidden-dim 8 --num-critics 2 --batch-size 8 --utd 2 --offline-steps 25 --online-steps 430 "
    "--log-every 7 --eval-every 100 --eval-episodes 2 "
)
PENDULUM = "--env-id Pendulum-v1 --dataset random --dataset-size 300 " + TINY
SHORT = PENDULUM + "--online-steps 5 --eval-episodes 1 "
EVERY = "--checkpoint-minutes 0 "


# ==== helpers =====================================================================================
@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty working folder, in which datasets are cached too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D4RL_DATASET_DIR", "data")
    return tmp_path


def cli(line: str) -> int:
    return o3f.cli(line.split())


def refused(line: str, *words: str, capsys) -> None:
    """One clear line on stderr, beside a bar of what had begun; exit code 2."""
    capsys.readouterr()
    assert cli(line) == 2
    errors = capsys.readouterr().err.splitlines()
    errors = [x for x in errors if x.strip() and not re.match("(offline|online|collecting.*): ", x)]
    assert len(errors) == 1 and errors[0].startswith("error: "), errors
    for word in words:
        assert word in errors[0]


def read_table(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_json(path) -> dict:
    return json.loads(Path(path).read_text())


def read_saved(path) -> dict:
    return torch.load(path, weights_only=True)


def flat(saved) -> dict:
    """Nested dicts and lists -> {path of keys: leaf}."""
    if not isinstance(saved, (dict, list)):
        return {"": saved}
    items = saved.items() if isinstance(saved, dict) else enumerate(saved)
    return {f"{key}/{path}": leaf for key, x in items for path, leaf in flat(x).items()}


def assert_same_run(a: str, b: str) -> None:
    """To the last bit: tables, evaluations, networks, optimiser."""
    one, two = ({path.name: path.read_bytes() for path in Path(x).glob("*.csv")} for x in (a, b))
    assert one == two and len(one) >= 2
    one, two = (read_saved(Path(x, "agent_final.pt")) for x in (a, b))
    assert one["step"] == two["step"] and one["rule"] == two["rule"]
    one, two = (flat([x["agent"], x["optimizer"]]) for x in (one, two))
    assert one.keys() == two.keys() and len(one) > 30
    for name, value in one.items():
        equal = torch.equal if isinstance(value, torch.Tensor) else lambda x, y: x == y
        assert equal(value, two[name]), name


def stop_in_update(monkeypatch, update: int) -> None:
    """Ctrl-C during the n-th update of the next run; an online step is one."""
    calls, sample = [], o3f.ReplayBuffer.sample

    def spy(*args, **kwargs):
        calls.append(1)
        if len(calls) == update:
            raise KeyboardInterrupt
        return sample(*args, **kwargs)

    monkeypatch.setattr(o3f.ReplayBuffer, "sample", spy)


def without(package: str, monkeypatch) -> None:
    find = o3f.importlib.util.find_spec
    absent = lambda name: None if name == package else find(name)  # noqa: E731
    monkeypatch.setattr(o3f.importlib.util, "find_spec", absent)


def kill_when(line: str, table: str, step: int) -> None:
    """SIGKILL a process of its own as soon as a row of this step, or a later one, is written."""
    command = [sys.executable, str(HERE / "o3f.py"), *line.split()]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    path, deadline = Path(table), time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        lines = path.read_text().splitlines()[1:] if path.exists() else []
        if lines and int(lines[-1].split(",")[0]) >= step:
            break
        time.sleep(0.003)
    process.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err


# ==== whole runs ==================================================================================
@pytest.mark.parametrize("base", ["iql", "lapo"])
def test_a_run_and_its_files(base, home):
    assert cli(PENDULUM + f"--base {base} --run-dir a") == 0
    files = {path.name for path in Path("a").iterdir() if not path.name.startswith(("events", "."))}
    tables = {"metrics.csv", "evaluations.csv", "episodes.csv", "config.json"}
    assert files == tables | {"agent_offline.pt", "agent_final.pt", "checkpoint.pt"}
    assert list(Path("a").glob("events.out.tfevents*"))
    # 430 is no multiple of 7: the last row is written all the same.
    steps = [int(row["step"]) for row in read_table("a/metrics.csv")]
    assert steps == [step for step in range(-24, 431) if step % 7 == 0 or step == 430]
    rows = read_table("a/evaluations.csv")
    assert [int(row["step"]) for row in rows] == [0, 100, 200, 300, 400, 430]
    assert "eval/score_std" in rows[0] and "eval/success" not in rows[0]
    episodes = [(int(row["step"]), int(row["length"])) for row in read_table("a/episodes.csv")]
    assert episodes == [(200, 200), (400, 200)]
    config = read_json("a/config.json")
    assert (config["base"], config["utd"], config["hidden_dim"]) == (base, 2, 8)
    assert config["versions"]["torch"] == torch.__version__
    assert [read_saved(f"a/agent_{name}.pt")["step"] for name in ("offline", "final")] == [0, 430]


def test_a_kitchen_run(home):
    o3f.collect_random("kitchen-mixed-v0", 60, Path("k.hdf5"))
    flags = TINY + "--online-steps 3 --eval-episodes 1"
    assert cli(f"--env-id kitchen-mixed-v0 --dataset k.hdf5 --run-dir a {flags}") == 0
    rows = read_table("a/evaluations.csv")
    assert [int(row["step"]) for row in rows] == [0, 3]
    assert {float(row["eval/success"]) for row in rows} <= {0.0, 1.0}
    assert {float(row["eval/length"]) for row in rows} == {280.0}
    config = read_json("a/config.json")
    assert (config["sigma"], config["beta"], config["proposal"]) == (0.01, 0.5, "mean")
    saved = read_saved("a/agent_final.pt")
    assert saved["sizes"] == (60, 9) and saved["rule"] == (1.0, 0.0)


def test_rows_of_metrics_are_means_over_their_steps(home):
    flags = "--online-steps 10 --explore policy --run-dir"
    for every in (1, 7):
        assert cli(SHORT + f"--log-every {every} {flags} {every}") == 0
    one = {int(row["step"]): float(row["losses/qf"]) for row in read_table("1/metrics.csv")}
    start = -24
    for row in read_table("7/metrics.csv"):
        last = int(row["step"])
        mean = np.mean([one[step] for step in range(start, last + 1)])
        assert float(row["losses/qf"]) == pytest.approx(mean, rel=1e-4)
        start = last + 1
    assert last == 10


def test_seeds_and_independent_streams(home):
    flags = SHORT + "--online-steps 210 "
    variants = {
        "first": "",
        "again": "",
        "other": "--seed 1",
        "often": "--eval-every 30 --eval-episodes 2",
        "optimistic": "--eval-action explore",
    }
    for name, more in variants.items():
        assert cli(flags + f"--run-dir {name} {more}") == 0
    assert_same_run("first", "again")
    for table in ("metrics.csv", "episodes.csv"):
        first, _, other, *same = (Path(name, table).read_bytes() for name in variants)
        assert first != other and same == [first, first]
    first, optimistic = (read_table(f"{x}/evaluations.csv")[-1] for x in ("first", "optimistic"))
    assert first["eval/score"] != optimistic["eval/score"]


def test_offline_ratio_1_never_learns_from_online_steps(home):
    learned = []
    for flags in ("1 --explore o3f", "1 --explore policy", "0.5 --explore o3f", "0.5 --explore policy"):
        folder = f"run{len(learned)}"
        assert cli(SHORT + f"--online-steps 100 --run-dir {folder} --offline-ratio {flags}") == 0
        learned.append([row["losses/qf"] for row in read_table(f"{folder}/metrics.csv")])
    assert learned[0] == learned[1] and learned[2] != learned[3]


@pytest.mark.parametrize("base, flag", [("iql", "expectile"), ("iql", "beta"), ("awac", "beta")])
@pytest.mark.parametrize("anneal", ["step", "linear"])
def test_kappa_and_beta_switch_or_move_online(base, flag, anneal, home, monkeypatch):
    loss = {"expectile": "expectile_loss", "beta": "advantage_weights"}[flag]
    seen, function = [], getattr(o3f, loss)

    def spy(u, value, *rest):
        seen.append(float(value))  # a tensor where it moves
        return function(u, value, *rest)

    monkeypatch.setattr(o3f, loss, spy)
    flags = f"--base {base} --utd 1 --{flag} 0.7 --online-{flag} 0.9 --anneal {anneal} --run-dir a"
    assert cli(SHORT + flags) == 0
    online = {"step": [0.9] * 5, "linear": [0.74, 0.78, 0.82, 0.86, 0.9]}[anneal]
    assert seen == pytest.approx([0.7] * 25 + online)


def test_from_python_and_in_a_thread(home):
    args = o3f.preset("Pendulum-v1", "iql", dataset="random", dataset_size=300, offline_steps=2,
                      online_steps=2, hidden_dim=8, eval_episodes=1, run_dir="main")  # fmt: skip
    assert set(o3f.main(args)["scores"]) == {0, 2}
    results = []
    args = o3f.replace(args, run_dir="thread")
    thread = threading.Thread(target=lambda: results.append(o3f.main(args)))
    thread.start()
    thread.join()
    assert results[0]["folder"] == Path("thread")
    assert Path("main/metrics.csv").read_bytes() == Path("thread/metrics.csv").read_bytes()
    with pytest.raises(o3f.UserError, match="explore 'foo': give one of o3f, noise, policy"):
        o3f.main(o3f.preset("Pendulum-v1", "iql", explore="foo"))


# ==== killed, stopped, resumed ====================================================================
@pytest.mark.parametrize("base", ["iql", "lapo"])
def test_a_killed_run_resumes_exactly(base, home):
    flags = PENDULUM + f"--base {base} --offline-steps 80 --online-steps 450 "
    assert cli(flags + "--run-dir whole") == 0
    kill_when(flags + EVERY + "--run-dir killed", "killed/metrics.csv", -56)
    assert -57 <= read_saved("killed/checkpoint.pt")["step"] < 0
    kill_when("--resume killed", "killed/metrics.csv", 230)
    assert read_saved("killed/checkpoint.pt")["step"] in (200, 400)
    assert not Path("killed/agent_final.pt").exists()
    assert cli("--resume killed") == 0
    assert_same_run("whole", "killed")


def test_a_run_killed_in_its_first_minute_goes_on(home, monkeypatch):
    """Its first checkpoint is that of the start; before it, the same command begins anew."""
    assert cli(SHORT + "--run-dir whole") == 0
    with monkeypatch.context() as patch:
        stop_in_update(patch, 10)
        assert cli(SHORT + "--run-dir a") == 130
    assert read_saved("a/checkpoint.pt")["step"] == -25
    assert cli("--resume a") == 0
    assert_same_run("whole", "a")
    Path("b").mkdir()
    for name in (".lock", "config.json", "checkpoint.pt.part"):
        Path("b", name).write_text("")
    assert cli(SHORT + "--run-dir b") == 0
    assert_same_run("whole", "b")


def test_a_loaded_run_can_be_resumed_from_its_start(home, monkeypatch, capsys):
    assert cli(SHORT + "--run-dir pretrained") == 0
    load = "--load pretrained/agent_offline.pt --online-steps 300 --run-dir "
    assert cli(load + "whole") == 0
    with monkeypatch.context() as patch:
        stop_in_update(patch, 7)
        assert cli(load + "a") == 130
    assert "stopped at step 6; to go on" in capsys.readouterr().out
    assert cli("--resume a") == 0
    assert_same_run("whole", "a")


def test_ctrl_c_online_prints_a_command_that_goes_on(home, monkeypatch, capsys):
    assert cli(PENDULUM + "--run-dir whole") == 0
    monkeypatch.setattr(sys, "argv", [str(HERE / "o3f.py")])
    with monkeypatch.context() as patch:
        stop_in_update(patch, 25 + 230)
        assert o3f.cli([*(PENDULUM + EVERY).split(), "--run-dir", "it's a"]) == 130
    *_, lost, command = capsys.readouterr().out.splitlines()
    assert lost == "stopped at step 229; to go on from the last checkpoint:"
    assert shlex.split(command)[2:] == ["--resume", "it's a"]
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run("whole", "it's a")


def test_ctrl_c_while_saving_harms_no_checkpoint(home, monkeypatch):
    assert cli(SHORT + "--run-dir whole") == 0
    save, calls = torch.save, []

    def interrupted(state, path):
        calls.append(state["step"])
        if len(calls) == 6:
            path.write_bytes(b"half of it")
            raise KeyboardInterrupt
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        assert cli(SHORT + EVERY + "--run-dir a") == 130
    assert calls[-1] == -20 and read_saved("a/checkpoint.pt")["step"] == -21
    assert cli("--resume a") == 0
    assert_same_run("whole", "a")


@pytest.mark.parametrize("flags", ["--base awac --online-beta 9 --anneal linear", "--base so2"])
def test_stopped_before_and_after_the_switch_a_run_resumes_exactly(flags, home, monkeypatch):
    line = PENDULUM.replace("Pendulum-v1", "O3FPendulum-v0") + f"--online-steps 30 {flags} "
    assert cli(line + "--run-dir whole") == 0
    for update, start in ((10, line + EVERY + "--run-dir a"), (15 + 17, "--resume a")):
        with monkeypatch.context() as patch:
            stop_in_update(patch, update)
            assert cli(start) == 130
    assert read_saved("a/checkpoint.pt")["step"] == 10
    assert cli("--resume a") == 0
    assert_same_run("whole", "a")


def test_an_ant_mazes_goal_stays_in_a_resumed_run(home, monkeypatch):
    """v1 draws it once per environment: of that for training, and of two for evaluation."""
    limit, step, goals = gym.wrappers.TimeLimit, o3f.AntMazeEnv.step, set()

    def spy(self, action):
        goals.add(tuple(self.goal))
        return step(self, action)

    monkeypatch.setattr(gym.wrappers, "TimeLimit", lambda env, steps: limit(env, 20))
    o3f.collect_random("antmaze-umaze-v1", 60, Path("ant.hdf5"))
    monkeypatch.setattr(o3f.AntMazeEnv, "step", spy)
    flags = f"--env-id antmaze-umaze-v1 --dataset ant.hdf5 {TINY} --online-steps 50 "
    assert cli(flags + "--run-dir whole") == 0
    first = set(goals)
    assert len(first) == 3
    with monkeypatch.context() as patch:
        stop_in_update(patch, 25 + 30)
        assert cli(flags + EVERY + "--run-dir a") == 130
    assert read_saved("a/checkpoint.pt")["step"] == 20
    goals.clear()
    assert cli("--resume a") == 0
    assert goals == first
    assert_same_run("whole", "a")
    assert {row["eval/success"] for row in read_table("a/evaluations.csv")} == {"0.0"}


def test_resume_refuses_in_one_line(home, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_in_update(patch, 10)
        assert cli(SHORT + "--run-dir a") == 130
    saved = Path("a/checkpoint.pt").read_bytes()
    refused("--resume nowhere", "nowhere", "run's folder", "No such file", capsys=capsys)
    refused("--resume a --sigma 0.1", "the run's own flags", capsys=capsys)
    for damaged in (saved[: len(saved) // 2], b"hello", b""):
        Path("a/checkpoint.pt").write_bytes(damaged)
        refused("--resume a", "checkpoint.pt: no agent", capsys=capsys)
    Path("a/checkpoint.pt").write_bytes(saved)
    whole = read_saved("a/checkpoint.pt")
    torch.save(whole | {"args": whole["args"] | {"precision": "float32"}}, "a/checkpoint.pt")
    refused("--resume a", "of this o3f.py", "precision", capsys=capsys)
    on_gpu = [torch.zeros(16, dtype=torch.uint8), whole["streams"][1]]  # as long as CUDA's
    torch.save(whole | {"streams": on_gpu}, "a/checkpoint.pt")
    refused("--resume a --dataset random", "not on cpu, where the run was not", capsys=capsys)
    Path("a/checkpoint.pt").write_bytes(saved)
    with filelock.FileLock("a/.lock"):
        refused("--resume a", "another process is writing there", capsys=capsys)
    assert Path("a/checkpoint.pt").read_bytes() == saved
    assert cli("--resume a") == 0


def test_run_dir_is_new_or_empty_and_nobody_elses(home, capsys):
    Path("used").mkdir()
    Path("used/notes.txt").write_text("mine")
    refused(SHORT + "--run-dir used", "used: not empty", capsys=capsys)
    Path("file").write_text("")
    refused(SHORT + "--run-dir file", "file", capsys=capsys)
    Path("locked").mkdir()
    with filelock.FileLock("locked/.lock"):
        refused(SHORT + "--run-dir locked", "another process is writing there", capsys=capsys)
    assert [path.name for path in Path("used").iterdir() if path.name != ".lock"] == ["notes.txt"]
    Path("empty").mkdir()
    assert cli(SHORT + "--run-dir empty") == 0


# ==== loaded agents ===============================================================================
def test_load_brings_task_base_and_sizes(home, capsys, monkeypatch):
    sizes = "--base lapo --hidden-dim 9 --num-critics 3 --latent-dim 5 --learning-rate 0.01"
    assert cli(f"{SHORT} {sizes} --gamma 0.9 --run-dir a") == 0
    args = o3f.parse(["--load", "a/agent_offline.pt"])
    brought = args.env_id, args.base, args.hidden_dim, args.num_critics, args.latent_dim, args.gamma
    assert brought == ("Pendulum-v1", "lapo", 9, 3, 5, 0.9)
    # The same objective, data and seed; but its own folder.
    others = args.batch_size, args.utd, args.learning_rate, args.dataset, args.run_dir
    assert others == (8, 2, 0.01, "random", "")
    load = "--load a/agent_offline.pt --online-steps 3 --eval-episodes 1 "
    assert cli(load + "--learning-rate 0.005 --run-dir b") == 0
    rates = [read_saved(f"{x}/agent_final.pt")["optimizer"]["param_groups"][0]["lr"] for x in "ab"]
    assert rates == [0.01, 0.005]
    assert [row["step"] for row in read_table("b/metrics.csv")] == ["3"]  # no offline phase
    # The same agent, evaluated where the other run switched: the same first row.
    rows = [read_table(f"{x}/evaluations.csv")[0] for x in "ab"]
    assert rows[0] == rows[1] and rows[0]["step"] == "0"
    assert read_json("b/config.json")["pretraining"]["learning_rate"] == 0.01
    # A contradiction is refused before any data is read or collected.
    monkeypatch.setattr(o3f, "load_dataset", lambda *_: pytest.fail("data was read"))
    monkeypatch.setattr(o3f, "collect_random", lambda *_: pytest.fail("data was collected"))
    contradictions = {
        "--env-id hopper-random-v2": "the saved agent has env_id Pendulum-v1, this run hopper",
        "--gamma 0.99": "the saved agent has gamma 0.9, this run 0.99",
        "--reward-transform none": "the saved agent has reward_transform max, this run none",
    }
    for flag, words in contradictions.items():
        refused(load + flag, words, capsys=capsys)
    with pytest.raises(o3f.UserError, match="the saved agent has base lapo, this run iql"):
        o3f.main(o3f.preset("Pendulum-v1", "iql", load="a/agent_offline.pt"))
    assert not Path("runs").exists()


def test_load_refuses_what_does_not_fit(home, capsys):
    assert cli(SHORT + "--run-dir a") == 0
    load = SHORT + "--load {} --run-dir b"

    class Evil:
        def __reduce__(self):
            return os.mkdir, ("ran",)

    torch.save({"version": 3, "args": Evil()}, "evil.pt")
    Path("garbage.pt").write_bytes(b"\x00garbage" * 100)
    torch.save([1, 2, 3], "list.pt")
    for name in ("missing.pt", "a", "garbage.pt", "list.pt", "evil.pt"):
        refused(load.format(name), f"{name}: no agent", capsys=capsys)
    assert not Path("ran").exists()  # a stranger's file runs no code
    refused(load.format("a/agent_final.pt --num-critics 3"), "does not fit", capsys=capsys)
    saved = read_saved("a/agent_final.pt")
    saved["agent"]["vf.0.bias"] = torch.zeros(3)
    torch.save(saved, "weights.pt")
    refused(load.format("weights.pt"), "does not fit", capsys=capsys)
    assert not Path("b").exists()


# ==== what goes wrong in a run ====================================================================
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(home, monkeypatch, capsys):
    save, refused_at = torch.save, []

    def full_disk(state, path):  # torch hides the OSError
        if ("rows" in state) == checkpoints and state["step"] > -20:
            path.write_bytes(b"some bytes")
            refused_at.append(state["step"])
            raise RuntimeError("unexpected pos 64 vs 0: No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full_disk)
    checkpoints = True
    assert cli(SHORT + EVERY + "--run-dir a") == 0
    assert refused_at == list(range(-19, 1))
    out = capsys.readouterr().out
    assert "warning: no checkpoint at step -19" in out and out.count("No space left") == 20
    assert read_saved("a/checkpoint.pt")["step"] == -20
    assert Path("a/agent_final.pt").exists()
    checkpoints = False  # but an agent's file is what the run was for
    refused(SHORT + "--run-dir b", "No space left", capsys=capsys)


NAN = {  # the update or step of the NaN: message, last good checkpoint
    # An update of step -14, due for a row of metrics, and of -13, due for a checkpoint alone.
    ("loss", 11): (" is nan by step -14", -15),
    ("loss", 12): ("NaN in the agent by step -13", -14),
    ("observation", 230): ("the environment gave NaN or inf", 200),
    ("reward", 230): ("the environment gave NaN or inf", 200),
}


@pytest.mark.parametrize("what, when", NAN)
def test_not_a_number_stops_the_run(what, when, home, monkeypatch, capsys):
    calls, training = [], gym.wrappers.RecordEpisodeStatistics  # evaluation is not wrapped so
    loss, step = o3f.expectile_loss, training.step

    def broken_loss(u, expectile):
        calls.append(1)
        return loss(u, expectile) * (np.nan if len(calls) == when else 1.0)

    def broken_step(self, action):
        calls.append(1)
        result = list(step(self, action))
        if len(calls) == when:
            result[["observation", "reward"].index(what)] *= np.nan
        return tuple(result)

    if what == "loss":
        monkeypatch.setattr(o3f, "expectile_loss", broken_loss)
    else:
        monkeypatch.setattr(training, "step", broken_step)
    words, last_good = NAN[what, when]
    refused(PENDULUM + EVERY + "--run-dir a", words, capsys=capsys)
    saved = read_saved("a/checkpoint.pt")
    tensors = [leaf for leaf in flat(saved).values() if isinstance(leaf, torch.Tensor)]
    assert saved["step"] == last_good and all(torch.isfinite(x).all() for x in tensors)
    assert not Path("a/agent_final.pt").exists()


# ==== flags =======================================================================================
BAD_FLAGS = {
    "--env-id kitchen-mixd-v0": "try kitchen-mixed-v0",
    "--env-id CartPole-v1 --dataset random": "Discrete(2)",
    "--env-id Pendulum-v1": "--dataset random",
    "--num-candidates 0": "--num-candidates 0: give a number from 1 to",
    "--gamma 1.5": "gamma 1.5: give a number from 0 to 1",
    "--sigma -1": "sigma -1.0: give a number from 0",
    "--sigma nan": "sigma nan",
    "--omega nan": "omega nan",
    "--omega inf": "omega inf",
    "--env-id halfcheetah-full-replay-v0": "try halfcheetah-full-replay-v",
    "--offline-ratio 1.5": "--offline-ratio 1.5: give a number from 0 to 1",
    "--dataset nofile": "nofile",
    "--dataset .": "no whole HDF5 file",
    "--env-id antmaze-umaze-v0": "try antmaze-umaze-v",
    "--device cuda": "use auto",
    "--plot": "empty",
    "--plot nothing": "nothing: no run with an evaluation",
    "--video a.avi": "--video a.avi: give a file that ends in .gif",
    "--dataset minari:o/p-v0": "name its environment with --env-id",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_get_one_line(flags, home, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(o3f, "collect_random", lambda *_: pytest.fail("a run has started"))
    refused(flags, BAD_FLAGS[flags], capsys=capsys)
    assert not list(home.iterdir())


def test_a_buffer_that_does_not_fit():
    data = {name: np.zeros((3, 1), np.float32) for name in o3f.Batch._fields}
    with pytest.raises(MemoryError, match=r"shape \(1000000000000003, 5\)"):  # cli shows it in a line
        o3f.ReplayBuffer(data, 10**15, torch.device("cpu"))


def test_missing_d4rl_names_the_command(home, monkeypatch, capsys):
    without("d4rl", monkeypatch)
    for env_id in ("antmaze-umaze-v2", "hopper-medium-v2"):
        refused(f"--env-id {env_id}", "pip install --no-deps d4rl==1.1", capsys=capsys)


# ==== plots =======================================================================================
def write_run(folder, scores: dict, **flags) -> None:
    path = Path(folder)
    path.mkdir(parents=True)
    config = asdict(o3f.IQLArgs(run_dir=folder, **flags)) | {"pretraining": {"explore": "o3f"}}
    (path / "config.json").write_text(json.dumps(config))
    lines = [f"{step},{score}" for step, score in scores.items()]
    (path / "evaluations.csv").write_text("\n".join(["step,eval/score", *lines, ""]))


def test_plot_has_a_panel_per_task_and_a_curve_per_configuration(home, capsys, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    keep = lambda figure, path: figures.append(figure) or save(figure, path)  # noqa: E731
    monkeypatch.setattr(Figure, "savefig", keep)
    write_run("runs/b", {-50: 0.0, 0: 10.0, 100: 30.0}, seed=1, resume="runs/b")
    write_run("runs/a", {-50: 0.0, 0: 20.0, 100: 50.0}, seed=0, log_every=3)
    write_run("runs/c", {0: 5.0, 50: 6.0, 100: 7.0}, explore="noise", beta=1.0)
    write_run("runs/d", {0: 5.0}, explore="policy")  # evaluated once
    write_run("more/e", {0: -5.0, 9: -6.0}, env_id="Pendulum-v1")
    Path("runs/linked").symlink_to(Path("more").resolve())
    for name, start in (("plot.png", b"\x89PNG"), ("p.svg", b"<?xml"), ("p.pdf", b"%PDF")):
        assert cli(f"--plot runs --plot-to {name}") == 0
        assert Path(name).read_bytes().startswith(start)
    panels = {axes.get_ylabel(): axes for axes in figures[0].axes}
    assert set(panels) == {"halfcheetah-random-v2: score", "Pendulum-v1: return"}
    curves = {
        line.get_label(): line.get_xydata().tolist() for line in panels["halfcheetah-random-v2: score"].lines
    }
    assert curves["o3f, beta 3.0 (seed 0, 1)"] == [[-50, 0], [0, 15], [100, 40]]
    assert curves["noise, beta 1.0 (seed 0)"] == [[0, 5], [50, 6], [100, 7]]
    assert len([label for label in curves if label[0] != "_"]) == 2
    assert panels["Pendulum-v1: return"].lines[0].get_label() == "o3f (seed 0)"
    write_run("again", {0: 1.0, 100: 2.0}, seed=1)  # newer
    assert cli("--plot runs again") == 0
    assert "again instead of an older run of seed 1" in capsys.readouterr().out


def test_plot_refuses_in_one_line(home, capsys):
    Path("empty").mkdir()
    refused("--plot empty", "empty: no run with an evaluation", capsys=capsys)
    write_run("early", {0: 1.0})
    refused("--plot early", "no run there has two evaluations yet", capsys=capsys)
    write_run("runs/a", {0: 1.0, 5: 2.0}, seed=3)
    refused("--plot runs --plot-to a.xyz", "a.xyz: cannot be drawn", capsys=capsys)
    refused("--plot runs --plot-to no/such/a.png", "cannot be drawn", capsys=capsys)
    write_run("apart", {1: 1.0, 6: 2.0}, seed=4)
    refused("--plot runs apart", "share no step", capsys=capsys)
    Path("runs/a/config.json").write_text("{")
    refused("--plot runs", "not of a whole run", capsys=capsys)


# ==== downloads ===================================================================================
TASK = "halfcheetah-medium-v2"
MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main/"


@pytest.fixture
def server(home, monkeypatch):
    """d4rl's table points to a server of our own, /main/; so does the mirror's address, /mirror/.

    Returns a dict to fill, {path: (body, Content-Length)}, and the list of what was asked for.
    """
    served, asked = {}, []

    class Files(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path not in served:
                return self.send_error(404)
            body, length = served[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{listener.server_port}"
    Path("d4rl/locomotion").mkdir(parents=True)
    Path("d4rl/infos.py").write_text(f"DATASET_URLS = {{'{TASK}': '{url}/main/cheetah.hdf5'}}\n")
    entry = "register(id='antmaze-umaze-v{0}', kwargs={{'dataset_url': '{1}/main/ant{0}.hdf5'}})\n"
    text = "".join(entry.format(version, url) for version in (0, 1))
    Path("d4rl/locomotion/__init__.py").write_text(text)
    retrieve = pooch.retrieve

    def redirected(source, *args, **kwargs):
        return retrieve(source.replace(MIRROR, f"{url}/mirror/"), *args, **kwargs)

    monkeypatch.setattr(pooch, "retrieve", redirected)
    monkeypatch.setattr(o3f, "d4rl_dir", lambda: Path("d4rl"))
    yield served, asked
    listener.shutdown()
    listener.server_close()


ANSWERS = {
    "whole": lambda body: (body, len(body)),
    "error page": lambda body: (b"<html>moved</html>", 18),  # that says 200
    "cut": lambda body: (body[:-500], len(body)),  # the connection breaks off
    "half": lambda body: (body[: len(body) // 2], len(body) // 2),
}


@pytest.mark.parametrize("main", ANSWERS)
@pytest.mark.parametrize("mirror", ["whole", "error page"])
def test_a_download_is_whole_or_not_there(main, mirror, server, home, monkeypatch):
    served, asked = server
    o3f.collect_random(TASK, 20, Path("c.hdf5"))
    body = Path("c.hdf5").read_bytes()
    served["/main/cheetah.hdf5"] = ANSWERS[main](body)
    served["/mirror/cheetah.hdf5"] = ANSWERS[mirror](body)
    files = []
    if "whole" in (main, mirror):
        files = ["cheetah.hdf5"]
        for _ in range(2):  # the second time from the cache
            path = o3f.download(TASK, Path("data"))
            assert path == Path("data/cheetah.hdf5") and path.read_bytes() == body
    else:
        with pytest.raises(o3f.UserError, match="cheetah.hdf5 cannot be downloaded, use --dataset FILE"):
            o3f.download(TASK, Path("data"))
    assert asked == ["/main/cheetah.hdf5", "/mirror/cheetah.hdf5"][: 1 + (main != "whole")]
    assert [path.name for path in Path("data").iterdir()] == files


def test_no_network_names_every_source(server, monkeypatch, capsys):
    def unreachable(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", unreachable)
    words = "/main/cheetah.hdf5", MIRROR + "cheetah.hdf5", "Network is unreachable"
    refused(f"--env-id {TASK} --run-dir a", *words, capsys=capsys)
    assert not Path("a").exists()


def test_version_1_of_an_ant_maze_has_its_url_from_d4rls_registration(server):
    _, asked = server
    with pytest.raises(o3f.UserError, match="ant1.hdf5 cannot be downloaded"):
        o3f.download("antmaze-umaze-v1", Path("data"))
    assert asked == ["/main/ant1.hdf5", "/mirror/ant1.hdf5"]


# ==== output ======================================================================================
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_terminals_that_know_no_greek(encoding, home, monkeypatch):
    for name in ("stdout", "stderr"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
        monkeypatch.setattr(sys, name, stream)
    o3f.collect_random("kitchen-mixed-v0", 60, Path("k.hdf5"))
    flags = TINY + "--online-steps 1 --eval-episodes 1 --run-dir a"
    assert cli("--env-id kitchen-mixed-v0 --dataset k.hdf5 " + flags) == 0
    assert cli("--env-id Ω") == 2
    with pytest.raises(SystemExit) as stopped:
        cli("--help")
    assert stopped.value.code == 0
    sys.stdout.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in (sys.stdout, sys.stderr))
    assert "sub-tasks ? 4" in out.replace("−", "?") and "error: --env-id ?" in err


def test_without_a_terminal_no_flood_but_the_time_left(home, capsys):
    assert cli(PENDULUM + "--offline-steps 120 --run-dir a") == 0
    looks = re.split(r"[\r\n]+", capsys.readouterr().err)
    assert any(re.search(r"offline: .*\d+/120 \[[\d:]+<[\d:]+,.*it/s", look) for look in looks)
    assert len(looks) < 40  # a look at the start and the end, one a minute, and after what is said


def test_import_has_no_side_effects(home):
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import o3f"
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(home.iterdir())


def test_requirements_are_those_in_the_programs_head():
    head = re.match(r"# /// script\n(.*?)# ///\n", (HERE / "o3f.py").read_text(), re.DOTALL)[1]
    block = re.search(r"# dependencies = \[(.*?)\n# \]", head, re.DOTALL)[1]
    lines = (HERE / "requirements.txt").read_text().splitlines()
    lines = {line for line in lines if line and not line.startswith("#")}
    tests = {line for line in lines if line.startswith(("pytest", "minari", "pandas"))}
    in_head = re.findall(r'"(.+?)"', block)
    assert len(in_head) == len(set(in_head)) > 9
    assert set(in_head) - lines == {"d4rl==1.1"} and lines - set(in_head) == tests


def test_resume_after_a_kill_between_opening_and_writing_a_table(home):
    assert cli(SHORT + "--run-dir a") == 0
    Path("a/episodes.csv").write_text("")
    assert cli("--resume a") == 0


def test_the_lock_after_a_failed_start(home):
    assert cli(SHORT + "--run-dir a") == 0
    saved = read_saved("a/agent_final.pt")
    saved["agent"]["qf.net.0.bias"] *= np.nan
    torch.save(saved, "nan.pt")
    assert cli(SHORT + "--load nan.pt --run-dir b") == 2
    with filelock.FileLock("b/.lock", timeout=0):
        pass


# ---- Minari's datasets, films, dashboards, notebooks ---------------------------------------------
def a_minari(root, name, env_spec, action_space, observation_space, episodes):
    """Minari's format on disk, as its package 0.5 writes it (that needs jax)."""
    from minari.serialization import serialize_space

    folder = root / name / "data"
    folder.mkdir(parents=True)
    with h5py.File(folder / "main_data.hdf5", "w") as file:
        for i, episode in enumerate(episodes):
            group = file.create_group(f"episode_{i}")
            group.attrs.update(id=i, total_steps=len(episode["rewards"]))
            group.create_group("infos")
            for key, values in episode.items():
                if isinstance(values, dict):
                    values = {f"{key}/{part}": x for part, x in values.items()}
                else:
                    values = {key: values}
                for path, x in values.items():
                    group[path] = x
    about = dict(total_episodes=len(episodes), data_format="hdf5", jpeg_encoding=True)
    about |= dict(total_steps=sum(len(episode["rewards"]) for episode in episodes))
    about |= dict(observation_space=serialize_space(observation_space), dataset_id=name)
    about |= dict(action_space=serialize_space(action_space), minari_version="0.5.3")
    if env_spec:
        about["env_spec"] = env_spec.to_json()
    (folder / "metadata.json").write_text(json.dumps(about))


def a_episode(rng, steps, obs, action_dim, terminated, low=-1.0, high=1.0):
    ends = np.arange(steps) == steps - 1
    actions = rng.uniform(low, high, (steps, action_dim)).astype(np.float32)
    episode = dict(observations=obs, actions=actions, rewards=rng.normal(size=steps))
    return episode | dict(terminations=ends & terminated, truncations=ends & ~terminated)


def test_a_flat_minari_dataset_trains(home, monkeypatch, capsys):
    minari = pytest.importorskip("minari", reason="minari is not installed")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(home / "minari"))
    rng, episodes = np.random.default_rng(3), []
    for steps, terminated in ((30, np.False_), (20, np.True_)):
        obs = rng.normal(size=(steps + 1, 3)).astype(np.float32)
        episodes.append(a_episode(rng, steps, obs, 1, terminated, -2.0, 2.0))
    box = gym.spaces.Box(-8, 8, (3,), np.float32)
    spec = gym.spec("Pendulum-v1")
    a_minari(home / "minari", "o/p-v0", spec, gym.spaces.Box(-2, 2, (1,), np.float32), box, episodes)
    assert minari.load_dataset("o/p-v0").total_steps == 50
    flags = "--dataset minari:o/p-v0 --offline-steps 5 --online-steps 5 --eval-episodes 1"
    assert cli(f"{flags} --env-id Pendulum-v1 --reward-transform none --run-dir a") == 0
    assert "data: minari:o/p-v0, 50 rows" in capsys.readouterr().out
    data, _ = a_load("Pendulum-v1", "minari:o/p-v0", reward_transform="none")
    # By hand: a true end keeps its row, a time limit does not (its next row is another episode's).
    want = [(0, t) for t in range(29)] + [(1, t) for t in range(20)]
    assert len(data["rewards"]) == len(want)
    for row, (i, t) in enumerate(want):
        episode = episodes[i]
        assert np.allclose(data["observations"][row], episode["observations"][t])
        if t < 19:  # after the true end nothing is asked about
            assert np.allclose(data["next_observations"][row], episode["observations"][t + 1])
        assert np.allclose(data["actions"][row], episode["actions"][t] / 2, atol=1e-4)
        assert np.isclose(data["rewards"][row], episode["rewards"][t])
    # Another environment by name, of another shape: refused.
    capsys.readouterr()
    assert cli(f"{flags} --env-id Hopper-v4 --run-dir b") == 2
    assert "observations has shape (50, 3), needs (50, 11)" in capsys.readouterr().err


@pytest.mark.parametrize("kitchen_rewards", ["consistent", "stock"])
def test_minaris_kitchen_becomes_d4rls_columns(home, monkeypatch, capsys, kitchen_rewards):
    pytest.importorskip("minari", reason="minari is not installed")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(home / "minari"))
    rng, episodes = np.random.default_rng(4), []
    env = o3f.make_env("kitchen-mixed-v0")
    start = env.reset(seed=0)[0][:30]
    for steps in (12, 15):
        state = rng.normal(size=(steps + 1, 59))
        objects = np.tile(start[9:30], (steps + 1, 1))
        objects[5:, 22 - 9] = -0.75  # the microwave is open from step 5 on
        state[:, 18:39] = objects
        desired = dict(observation=state, desired_goal=np.zeros((steps + 1, 1)))
        episodes.append(a_episode(rng, steps, desired, 9, np.False_))
    box = gym.spaces.Box(-np.inf, np.inf, (59,), np.float64)
    goal = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    spaces = gym.spaces.Dict(observation=box, desired_goal=goal)
    spec = gym.envs.registration.EnvSpec("FrankaKitchen-v1", "gymnasium_robotics:KitchenEnv")
    actions = gym.spaces.Box(-1, 1, (9,), np.float64)
    a_minari(home / "minari", "D4RL/kitchen/mixed-v2", spec, actions, spaces, episodes)
    flags = "--dataset minari:D4RL/kitchen/mixed-v2 --offline-steps 3 --online-steps 0 "
    flags += f"--eval-episodes 1 --kitchen-rewards {kitchen_rewards} --run-dir a"
    assert cli(f"--env-id kitchen-mixed-v0 {flags}") == 0
    name, rewards = "minari:D4RL/kitchen/mixed-v2", dict(kitchen_rewards=kitchen_rewards)
    data, _ = a_load("kitchen-mixed-v0", name, **rewards)
    row = 0
    for episode in episodes:
        state = episode["observations"]["observation"]
        for t in range(len(state) - 2):  # the last row of each was a time limit
            columns = [*range(9), *range(18, 39)]
            assert np.allclose(data["observations"][row, :30], state[t, columns])
            assert np.allclose(data["observations"][row, 30:], env.unwrapped.goal)
            satisfied = float(t >= 5)
            want = satisfied - 4 if kitchen_rewards == "consistent" else satisfied
            assert data["rewards"][row] == want
            row += 1
    assert row == len(data["rewards"])


def test_minari_datasets_that_cannot_be_used(home, monkeypatch, capsys):
    pytest.importorskip("minari", reason="minari is not installed")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(home / "minari"))
    rng = np.random.default_rng(5)
    episodes = [a_episode(rng, 9, rng.normal(size=(10, 3)), 1, np.False_)]
    box, spec = gym.spaces.Box(-8, 8, (3,), np.float32), gym.spec("Pendulum-v1")
    narrow, endless = (gym.spaces.Box(-x, x, (1,), np.float32) for x in (2, np.inf))
    a_minari(home / "minari", "o/homeless-v0", None, narrow, box, episodes)
    a_minari(home / "minari", "o/endless-v0", spec, endless, box, episodes)
    discrete = gym.spaces.Discrete(3)
    a_minari(home / "minari", "o/discrete-v0", spec, discrete, box, episodes)
    for name, words in (
        ("discrete", "Discrete"),
        ("endless", "its actions are in Box"),
        ("missing", "an ID it knows"),
    ):
        flags = f"--env-id Pendulum-v1 --dataset minari:o/{name}-v0"
        refused(flags, words, capsys=capsys)
    assert {path.name for path in home.iterdir()} <= {"minari"}


def test_without_minari_the_way_to_it_is_named(home, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "minari", None)
    assert cli("--env-id Pendulum-v1 --dataset minari:o/p-v0") == 2
    assert 'pip install "minari[hdf5,hf]"' in capsys.readouterr().err
    assert not list(home.iterdir())


def test_video_shows_both_episodes_side_by_side(home):
    library = next(filter(ctypes.util.find_library, ("EGL", "OSMesa")), None)
    if library is None:
        pytest.skip("nothing here draws without a screen")
    import imageio.v3 as imageio

    # With one candidate and no spread the optimistic action is the policy's: two equal films.
    flags = "--env-id Hopper-v4 --dataset random --dataset-size 300 --offline-steps 3 "
    flags += "--online-steps 0 --eval-episodes 1 --num-candidates 1 --sigma 0 --video films/a.gif"
    environment = os.environ | dict(MUJOCO_GL=library.lower())
    command = [sys.executable, str(HERE / "o3f.py"), *flags.split(), "--run-dir", "a"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (row,) = read_table("a/evaluations.csv")
    frames = imageio.imread("films/a.gif")
    assert len(frames) == math.ceil((1 + int(float(row["eval/length"]))) / 4)  # every fourth
    half = frames.shape[2] // 2
    left, right = frames[:, :, :half].astype(float), frames[:, :, half:].astype(float)
    assert np.abs(left - right).mean() < 4  # a gif's colours
    assert np.abs(left[0] - left[-1]).mean() > 1  # and it moves


def test_a_film_is_an_evaluation_of_the_policy_beside_one_of_explores_action(home):
    """Each picture is as bright as the action was high, its blue as the seed of the episode."""
    import imageio.v3 as imageio

    class Painter(ALine):
        metadata = {"render_modes": ["rgb_array"]}

        def __init__(self, render_mode=None):
            super().__init__()
            self.render_mode, self.action = render_mode, np.zeros(1)

        def reset(self, *, seed=None, options=None):
            self.seen = seed
            return super().reset(seed=seed)

        def step(self, action):
            obs, reward, _, _, info = super().step(action)
            # The optimistic action, near 1, ends it at step 6, the policy's at the limit of 12.
            return obs, reward, action[0] > 0.5 and self.t == 6, False, info

        def render(self):
            red = int(100 + 100 * self.action[0])
            return np.full((48, 64, 3), [red, 20 * self.t, 20 * self.seen], np.uint8)

    class Agent:
        obs_mean = torch.zeros(2)

        def policy(self, obs, sample, generator=None):
            return torch.zeros(len(obs), 1)

        def q_values(self, obs, actions):
            return actions.T.expand(5, -1)

    gym.register("O3FPainter-v0", Painter, max_episode_steps=12)
    args = o3f.preset("O3FPainter-v0", "iql", video="a.gif", sigma=1.0)
    task, rule = o3f.get_task("O3FPainter-v0"), o3f.RewardRule(1.0, 0.0, ())
    o3f.film(functools.partial(o3f.evaluate, Agent(), rule, task, 7), args)
    pictures = imageio.imread("a.gif")[:, 5]  # every fourth of 13
    left, right = pictures[:, 5], pictures[:, -5]
    near = dict(abs=8)  # a gif's colours
    assert left[:, 0] == pytest.approx(np.full(4, 100), **near)
    assert left[:, 1] == pytest.approx(20 * np.array([0, 4, 8, 12]), **near)
    assert right[1:, 0] == pytest.approx(np.full(3, 200), **near)
    assert right[:, 1] == pytest.approx([0, 80, 80, 80], **near)  # waits, finished
    assert pictures[..., 2] == pytest.approx(np.full(pictures.shape[:2], 140), **near)


def test_tensorboards_groups(home):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert cli(PENDULUM + "--run-dir a") == 0
    board = EventAccumulator("a")
    board.Reload()
    tags = board.Tags()["scalars"]
    assert {tag.split("/")[0] for tag in tags} == {"eval", "o3f", "train"}
    assert {"eval/score", "o3f/optimism", "train/score", "train/losses/qf"} <= set(tags)


def test_the_readmes_notebook_runs(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "o3f", o3f)
    (cells,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(cells.splitlines()) <= 12
    names = {}
    exec(cells, names)
    assert names["action"].shape == (1, 1) and names["optimism"].shape == (1,)
    assert set(names["run"]["scores"]) == {0, 100}


# ==== environments, files and flags of strangers ==================================================
class AStranger(gym.Env):
    """Counts in an array that it goes on using, after a reset to whole numbers; pays PAYS·x."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    PAYS = 1.0

    def __init__(self, box=gym.spaces.Box(-1.57, 1.57, (1,), np.float32), space=None):
        self.action_space, self.x = box, np.zeros(2)
        self.observation_space = space or self.observation_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x[:] = 0
        return np.zeros(2, int), {}

    def step(self, action):
        assert self.action_space.contains(np.float32(action))
        self.x += 0.5
        return self.x, self.PAYS * self.x[0], False, False, {"episode": "its own"}


gym.register("O3FStranger-v0", AStranger, max_episode_steps=6)
STRANGER = "--env-id O3FStranger-v0 --dataset random --dataset-size 60 --hidden-dim 8 --batch-size 8 "
STRANGER += "--num-candidates 4 --offline-steps 3 --online-steps 12 --eval-episodes 1 "


def a_columns_of(n=60, **changes):
    """n rows of six steps each, in which row t is observed as (t, t)."""
    obs = np.repeat(np.arange(n, dtype=np.float32)[:, None], 2, 1)
    columns = dict(observations=obs, actions=np.zeros((n, 1)), rewards=np.arange(n) / n)
    columns |= dict(terminals=np.zeros(n), timeouts=np.arange(n) % 6 == 5)
    return columns | changes


def test_observations_are_copied_and_float32_everywhere(home, capsys):
    assert cli(STRANGER + "--run-dir run --checkpoint-minutes 0") == 0
    with h5py.File(next(Path("data").glob("*.hdf5"))) as file:
        assert file["observations"][:13, 0].tolist() == [*np.arange(6) / 2, *np.arange(6) / 2, 0]
    rows = torch.load("run/checkpoint.pt", weights_only=True)["rows"]
    assert torch.equal(rows[:6, 0], torch.arange(6) / 2)  # s
    assert torch.equal(rows[:6, 4], torch.arange(1, 7) / 2)  # s'
    assert [int(row["length"]) for row in read_table("run/episodes.csv")] == [6, 6]
    agent = o3f.load_agent("run/agent_final.pt")
    seen, policy = [], agent.policy
    agent.policy = lambda obs, *rest: seen.append(obs.clone()) or policy(obs, *rest)
    args = o3f.preset("O3FStranger-v0", "iql", eval_episodes=1)
    rule = o3f.RewardRule(1.0, 0.0, ())
    o3f.evaluate(agent, rule, o3f.get_task(args.env_id), 0, args, [o3f.make_env(args.env_id)])
    assert [float(obs[0, 0]) for obs in seen] == [0, 0.5, 1, 1.5, 2, 2.5]
    assert seen[0].dtype == torch.float32


def test_actions_of_odd_bounds_stay_within_the_environments_own(home):
    env = o3f.make_env("O3FStranger-v0")
    env.reset()
    for action in (-1.0, 1.0):  # 1.57 in float64 would be exceeded: AStranger asserts
        env.step(np.array([action], np.float32))


BOXES = {
    "real numbers": gym.spaces.Box(-2, 2, (1,), np.int64),
    "larger high": gym.spaces.Box(np.float32([-1, 0]), np.float32([1, 0])),
    "finite high": gym.spaces.Box(-np.inf, np.inf, (1,)),
    "noise could be added": gym.spaces.Discrete(3),
}


@pytest.mark.parametrize("words", BOXES)
def test_actions_that_cannot_be_are_refused(words, home, capsys):
    gym.register("O3FOdd-v0", lambda: AStranger(BOXES[words]))
    refused("--env-id O3FOdd-v0 --dataset random", "O3FOdd-v0", words.split()[-1], capsys=capsys)
    gym.registry.pop("O3FOdd-v0")


def test_dict_observations_are_told_of_flatten_observation(home, capsys):
    space = gym.spaces.Dict(a=gym.spaces.Box(-1, 1, (2,)))
    gym.register("O3FOdd-v0", lambda: AStranger(space=space))
    refused("--env-id O3FOdd-v0 --dataset random", "FlattenObservation", capsys=capsys)
    gym.registry.pop("O3FOdd-v0")


def test_true_ends_win_over_time_limits_and_in_the_last_row(home, capsys):
    goals = np.isin(np.arange(60), (5, 29, 59))
    ends = dict(terminals=goals.astype(float), timeouts=np.arange(60) % 6 == 5)
    data, _ = a_load("O3FStranger-v0", a_write("a.hdf5", **a_columns_of(**ends)))
    assert "3 true ends" in capsys.readouterr().out
    at = data["observations"][data["terminations"] == 1]
    assert at[:, 0].tolist() == [5, 29, 59]
    assert data["rewards"].max() == 1  # the last row's own is the largest
    assert len(data["rewards"]) == 60 - 10 + 3


def test_truncations_and_next_observations_are_used(home):
    columns = a_columns_of()
    columns["truncations"] = columns.pop("timeouts")
    order = np.random.default_rng(0).permutation(60)  # a ring buffer's, say
    shuffled = {name: x[order] for name, x in columns.items()}
    shuffled["next_observations"] = shuffled["observations"] + 1
    data, _ = a_load("O3FStranger-v0", a_write("a.hdf5", **shuffled))
    assert np.array_equal(data["next_observations"], data["observations"] + 1)
    data, _ = a_load("O3FStranger-v0", a_write("b.hdf5", **columns))
    assert np.array_equal(data["next_observations"], data["observations"] + 1)
    assert len(data["rewards"]) == 50


def test_episodes_longer_than_the_limit_are_told(home, capsys):
    a_load("O3FStranger-v0", a_write("a.hdf5", **a_columns_of(timeouts=np.zeros(60))))
    assert "60 rows, the limit is 6" in capsys.readouterr().out
    a_load("O3FStranger-v0", a_write("b.hdf5", **a_columns_of()))
    assert "limit is" not in capsys.readouterr().out


ENDS = [[0, 1, np.nan], [-1, 0, 1], [0, 0, 0.5], np.array([b"False", b"True", b"True"])]


@pytest.mark.parametrize("name", ["terminals", "timeouts", "truncations"])
@pytest.mark.parametrize("ends", ENDS)
def test_ends_are_0_or_1(name, ends, home, capsys):
    column = np.zeros(3, np.asarray(ends).dtype)
    column[:] = ends
    columns = a_columns_of(3, timeouts=None) | {name: column}
    path = a_write("a.hdf5", **columns)
    refused(STRANGER + f"--dataset {path}", "0 or 1", "row", capsys=capsys)


def test_a_box_narrower_than_the_files_unit_is_told(home, capsys):
    gym.register("O3FOdd-v0", lambda: AStranger(gym.spaces.Box(-0.4, 0.4, (1,))), max_episode_steps=6)
    a_load("O3FOdd-v0", a_write("a.hdf5", **a_columns_of(actions=np.full((60, 1), 0.3))))
    assert "own Box(-0.4, 0.4" in capsys.readouterr().out
    a_load("O3FOdd-v0", a_write("b.hdf5", **a_columns_of(actions=np.full((60, 1), 0.9))))
    assert "Box" not in capsys.readouterr().out
    gym.registry.pop("O3FOdd-v0")


def test_collected_data_of_a_changed_environment_is_collected_anew(home, monkeypatch, capsys):
    path = Path("a.hdf5")
    o3f.collect_random("O3FStranger-v0", 40, path)
    before = path.read_bytes()
    o3f.collect_random("O3FStranger-v0", 40, path)
    assert path.read_bytes() == before and "anew" not in capsys.readouterr().out
    monkeypatch.setattr(AStranger, "PAYS", 2.0)
    o3f.collect_random("O3FStranger-v0", 40, path)
    assert "collected anew" in capsys.readouterr().out
    with h5py.File(path) as file:
        assert file["rewards"][1] == 2.0


def test_numpys_flags_become_plain_or_are_refused_by_name(home):
    flags = dict(sigma=np.linspace(0, 1, 3)[1], base=np.str_("iql"), run_dir=Path("run"))
    flags |= dict(dataset="random", dataset_size=60.0, offline_steps=np.int64(2), online_steps=2)
    flags |= dict(hidden_dim=8, batch_size=8, eval_episodes=1, num_candidates=2, layer_norm=np.True_)
    args = o3f.IQLArgs("O3FStranger-v0", **flags)
    o3f.main(args)
    saved = o3f.load_saved("run/agent_final.pt")["args"]
    assert type(saved.sigma) is float and type(saved.dataset_size) is int and saved.layer_norm is True
    for name, value in (("sigma", "0.2"), ("utd", 1.5), ("layer_norm", "no"), ("explore", "best")):
        with pytest.raises(o3f.UserError, match=name.replace("_", "-")):
            o3f.prepare(o3f.preset("O3FStranger-v0", "iql", **{name: value}))


@pytest.mark.parametrize("flag", ["--resume=", "--load=", "--plot"])
def test_a_flag_that_is_given_and_empty_is_refused(flag, home, capsys):
    refused(flag, "empty", capsys=capsys)


def test_tables_shorter_than_their_checkpoint_says(home, capsys):
    assert cli(STRANGER + "--run-dir run --checkpoint-minutes 0 --log-every 1 --online-steps 13") == 0
    text = Path("run/metrics.csv").read_text()
    Path("run/metrics.csv").write_text(text[:-500])  # half a line at its end
    Path("run/episodes.csv").unlink()
    os.unlink("run/agent_final.pt")
    assert cli("--resume run") == 0
    assert Path("run/metrics.csv").read_text() == text
    assert len(read_table("run/episodes.csv")) == 2


def test_a_metric_that_is_not_always_there_is_named(home, monkeypatch, capsys):
    step = o3f.IQL.step

    def more(self, batch):
        return step(self, batch) | ({"mine": torch.ones(())} if self.online else {})

    monkeypatch.setattr(o3f.IQL, "step", more)
    refused(STRANGER + "--run-dir a", "mine", "metrics", capsys=capsys)
    monkeypatch.setattr(o3f.IQL, "step", lambda *x: step(*x) | {"mine": 2.5})  # a Python number
    assert cli(STRANGER + "--run-dir b --log-every 1") == 0
    assert {row["mine"] for row in read_table("b/metrics.csv")} == {"2.5"}


@pytest.mark.parametrize("rewards, scale", [((-10, 1e-4), 0.1), ((-1, 0), 1), ((-4, 2), 0.5)])
def test_reward_transform_max_of_rewards_far_below_zero(rewards, scale):
    assert o3f.scale_and_shift("max", np.array(rewards), None) == (pytest.approx(scale), 0.0)


@pytest.mark.parametrize("change", ["stride 0", "small", "amsgrad"])
def test_adams_state_of_a_strangers_file_cannot_corrupt_memory(change, home):
    assert cli(STRANGER + "--run-dir run") == 0
    saved = torch.load("run/agent_final.pt", weights_only=True)
    state, group = saved["optimizer"]["state"][0], saved["optimizer"]["param_groups"][0]
    shape = state["exp_avg"].shape
    state["exp_avg"] = {"stride 0": torch.ones(1).expand(shape), "small": torch.ones(1)}.get(
        change, state["exp_avg"]
    )
    group["amsgrad"] = change == "amsgrad"
    torch.save(saved, "odd.pt")
    agent = o3f.load_agent("odd.pt")
    (group,) = agent.optimizer.param_groups
    first = agent.optimizer.state[group["params"][0]]
    assert first["exp_avg"].is_contiguous() and first["exp_avg"].shape == shape
    assert not group["amsgrad"]


ODD_RUNS = ["--batch-size 1 --normalise-adv", "--offline-ratio 0 --normalise-adv"]


@pytest.mark.parametrize("flags", ODD_RUNS)
def test_advantages_without_spread_are_no_divergence(flags, home):
    assert cli(STRANGER + flags) == 0


def test_out_of_memory_is_a_line_and_a_fault_a_traceback(home, monkeypatch, capsys):
    refused(STRANGER + "--hidden-dim 100000000", "memory", capsys=capsys)

    def broken(*args):
        raise RuntimeError("a fault")

    monkeypatch.setattr(o3f.IQL, "step", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        cli(STRANGER)


def test_resume_from_elsewhere_with_moved_data_and_when_finished(home, monkeypatch, capsys):
    path = a_write("a.hdf5", **a_columns_of())
    assert cli(STRANGER + f"--dataset {path} --run-dir run") == 0
    Path("other").mkdir()
    monkeypatch.chdir("other")
    assert cli("--resume ../run") == 0
    Path("../a.hdf5").rename("moved.hdf5")
    refused("--resume ../run", "a.hdf5", capsys=capsys)
    assert cli("--resume ../run --dataset moved.hdf5") == 0
    a_write("moved.hdf5", **a_columns_of(rewards=np.ones(60)))
    refused("--resume ../run --dataset moved.hdf5", "dataset has changed", capsys=capsys)


def test_a_notebooks_stdout_and_a_film_that_cannot_be_drawn(home, monkeypatch, capsys):
    class Plain:
        def write(self, text):
            return len(text)

        def flush(self):
            pass

    refused(STRANGER + "--video a.gif", "render_mode", capsys=capsys)
    monkeypatch.setattr(sys, "stdout", Plain())
    assert cli(STRANGER) == 0


def test_a_mistyped_task_gets_the_nearest_name(home, capsys):
    refused("--env-id halfchetah-medium-v2", "halfcheetah-medium-v2", capsys=capsys)
    refused("--env-id hopper-medium-v0", "hopper-medium-v2", capsys=capsys)


@pytest.mark.parametrize("rows", [0, 1])
def test_files_of_no_row_and_of_one(rows, home, capsys):
    path = a_write("a.hdf5", **a_columns_of(rows))
    refused(STRANGER + f"--dataset {path}", "row", capsys=capsys)


# ---- holes that mutants of the program found -----------------------------------------------------
def test_offline_one_batch_per_update_whatever_utd_is(home, monkeypatch):
    sizes, update = [], o3f.IQL.update
    monkeypatch.setattr(o3f.IQL, "update", lambda self, x: sizes.append(len(x)) or update(self, x))
    assert cli(STRANGER + "--utd 3") == 0
    assert sizes == [1] * 3 + [3] * 12


def test_exploration_has_a_seed_of_its_own(home, monkeypatch):
    generators = []
    explore = o3f.explore_action

    def spy(agent, obs, args, generator=None):
        generators.append(generator.initial_seed())
        return explore(agent, obs, args, generator)

    monkeypatch.setattr(o3f, "explore_action", spy)
    assert cli(STRANGER + "--seed 3") == 0
    assert 3 not in generators and torch.initial_seed() == 3
    assert len(set(generators)) == 2  # exploration's and evaluation's


def test_a_loaded_agent_keeps_its_reward_rule(home):
    columns = a_columns_of()
    assert cli(STRANGER + f"--dataset {a_write('a.hdf5', **columns)} --run-dir run") == 0
    columns["rewards"] *= 50
    path = a_write("b.hdf5", **columns)
    assert cli(f"--load run/agent_offline.pt --dataset {path} --run-dir more") == 0
    one, two = (torch.load(f"{x}/agent_final.pt", weights_only=True) for x in ("run", "more"))
    assert one["rule"] == two["rule"]


def test_weights_that_are_no_numbers_are_not_saved(home, monkeypatch, capsys):
    assert cli(STRANGER + "--run-dir run") == 0
    step = o3f.IQL.step

    def poison(self, batch):
        metrics = step(self, batch)
        with torch.no_grad():
            self.qf_target.net[0].bias.fill_(math.nan)  # of a slow copy: no metric shows it yet
        return metrics

    monkeypatch.setattr(o3f.IQL, "step", poison)
    refused(STRANGER + "--run-dir a --offline-steps 1 --checkpoint-minutes 0", "NaN", capsys=capsys)
    saved = torch.load("a/checkpoint.pt", weights_only=True)["agent"]
    assert all(x.isfinite().all() for x in saved.values())


def test_uniform_rows_come_out_the_same_and_a_small_std_stays():
    one, two = (o3f.uniform_rows("Pendulum-v1", range(30)) for _ in "ab")
    assert all(np.array_equal(x, y) for x, y in zip(one, two))
    x = np.random.default_rng(0).normal(size=(1000, 2)).astype(np.float32) * [0.009, 0.011]
    mean, std = torch.zeros(2), torch.ones(2)
    o3f.set_statistics(x / x.std(0) * np.array([0.009, 0.011]), mean, std, least=0.01)
    assert std[0] == 1 and std[1].item() == pytest.approx(0.011, rel=1e-3)


# ==== recorded updates: CUDA graphs on a GPU, elsewhere a tape in their place =====================
a_needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
QUICK = "--env-id O3FPendulum-v0 --dataset random --dataset-size 300 --eval-every 9 --omega 1 "
QUICK += "--hidden-dim 8 --num-critics 2 --batch-size 8 --offline-steps 15 --online-steps 25 "
QUICK += "--eval-episodes 1 --log-every 7 "
CASES = dict(iql="--online-expectile 0.9", awac="--online-beta 2", lapo="--utd 1", so2="--utd 1")
CASES |= {x: CASES[x] + " --anneal linear --actor-dropout 0.1" for x in ("iql", "awac")}


class Tape(TorchDispatchMode):
    """As a CUDA graph: all operations, on the same memory again; Python's numbers are frozen."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def a_recorded(fn, device, *generators):
    """`recorded` with a tape. While it writes that, fn does run: the fourth call is no replay."""

    def calls():
        for _ in range(3):
            yield fn()
        with Tape() as tape:
            result = fn()
        while True:
            yield result
            tape.replay()

    return calls().__next__


def a_same_runs(*runs):
    """The tables of two runs, their last weights and Adam's state, to the last bit."""
    one, two = ({x.name: x.read_bytes() for x in Path(run).glob("*.csv")} for run in runs)
    assert one == two and len(one) == 3
    one, two = (torch.load(Path(run, "agent_final.pt")) | dict(args=0) for run in runs)
    torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=a_needs_gpu)])
@pytest.mark.parametrize("more", ["", "--utd 2 --offline-ratio 0.5"])
@pytest.mark.parametrize("base", CASES)
def test_recorded_runs_are_the_eager_ones_and_resume_exactly(base, more, device, home, monkeypatch):
    """Bit by bit on a GPU too: the same kernels in the same order, at the same Philox offsets."""
    if device == "cpu":
        monkeypatch.setattr(o3f, "recorded", a_recorded)
    line = f"{QUICK}--base {base} {CASES[base]} {more} --device {device} --run-dir "
    assert cli(line + "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(o3f, "recorded", lambda fn, *_: fn)
        assert cli(line + "eager") == 0
    a_same_runs("whole", "eager")
    record, start = o3f.Run.record, line + "a --checkpoint-minutes 0"
    for stop, saved in ((-5, -5), (18, 10)):  # both in replays; online it saves between episodes

        def stopped(self, step, *rest):
            record(self, step, *rest)
            if step == stop:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(o3f.Run, "record", stopped)
            assert cli(start) == 130
        assert torch.load("a/checkpoint.pt")["step"] == saved
        start = "--resume a"
    assert cli(start) == 0
    a_same_runs("whole", "a")


@pytest.mark.parametrize("base", CASES)
def test_what_is_recorded_meets_no_other_device_and_reads_nothing_back(base, monkeypatch):
    """`meta` for a GPU: its tensors have no values to read; one of the CPU would be on the tape."""
    descend = lambda self, loss, weights: loss.backward(inputs=list(weights))  # noqa: E731
    monkeypatch.setattr(o3f.Base, "descend", descend)  # Adam knows no meta
    args, meta = o3f.parse(f"{QUICK}--base {base} {CASES[base]}".split()), torch.device("meta")
    agent = o3f.BASES[base](args, 7, 3).to(meta)
    agent.see_dataset(a_data())
    buffer, tape = o3f.ReplayBuffer(a_data(), 1, meta), Tape()
    for agent.online, ratio in ((False, None), (True, 0.5)):
        with tape:
            agent.update(buffer.sample(16, 2, ratio))
            o3f.explore_action(agent, torch.zeros(1, 7, device=meta), args)
    found = [x.device.type for x in tree_leaves(tape.calls) if isinstance(x, torch.Tensor)]
    assert set(found) == {"meta"} and len(found) > 1000


@a_needs_gpu
@pytest.mark.parametrize("one, other", [("cpu", "cuda"), ("cuda", "cpu")])
def test_an_agent_goes_on_on_the_other_device(one, other, home):
    assert cli(f"{QUICK}--device {one} --run-dir a") == 0
    assert cli(f"--load a/agent_final.pt --device {other} --run-dir b") == 0
    x, y = (o3f.load_agent("a/agent_final.pt", device) for device in (one, other))
    x, y = ([x.state_dict(), x.optimizer.state_dict()["state"]] for x in (x, y))
    torch.testing.assert_close(x, y, rtol=0, atol=0, check_device=False)


def test_a_gpus_checkpoint_is_refused_where_there_is_none(home, monkeypatch, capsys):
    assert cli(f"{QUICK}--run-dir a") == 0  # on a GPU if there is one; else it will only say so
    saved = torch.load("a/checkpoint.pt")
    saved["streams"][0] = torch.zeros(16, dtype=torch.uint8)  # as long as CUDA's
    torch.save(saved, "a/checkpoint.pt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    capsys.readouterr()
    assert cli("--resume a") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --resume: not on cpu, where the run was not")
