"""Tests of o3f.py: closed forms, brute-force loops, D4RL's files and episodes, whole runs."""

import ast
import copy
import csv
import ctypes.util
import dataclasses
import http.server
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import get_args, get_type_hints

import filelock
import gymnasium as gym
import h5py
import imageio.v3 as imageio
import mujoco
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import o3f

SHARED = Path(__file__).resolve().parent.parent / "shared"  # real data, not in the repository
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared here")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---- helpers: small agents, and their networks worked out by hand --------------------------------
def made_data(rows=50, obs_dim=7, act_dim=3, **changes):
    """A dataset with means and scales of its own; its last observation feature is constant."""
    rng = np.random.default_rng(2)
    obs = rng.normal(0.7, 3.0, (rows, obs_dim))
    obs[:, -1] = 0.3
    data = dict(observations=obs, actions=rng.uniform(-0.2, 0.9, (rows, act_dim)))
    data |= dict(rewards=rng.normal(size=rows), next_observations=rng.normal(size=(rows, obs_dim)))
    data |= dict(terminations=np.zeros(rows)) | changes
    return {name: x.astype(np.float32) for name, x in data.items()}


def stream(seed):
    return torch.Generator().manual_seed(seed)


def doubles(values, **kwargs):
    return torch.tensor(values, dtype=torch.float64, **kwargs)


def made_agent(base="iql", sizes=(7, 3), dtype=torch.float64, data=None, **flags):
    plain = dict(hidden_dim=16, layer_norm=False)
    plain |= {} if base == "lapo" else dict(standardise=False)
    plain |= dict(normalise_adv=False) if base in ("iql", "awac") else {}
    args = o3f.preset("Pendulum-v1", base, **(plain | flags))
    data = data or made_data(50, *sizes)
    agent = o3f.make_agent(args, data, None, torch.device("cpu")).to(dtype)
    agent.see_dataset(data)  # in float64's digits, if it is
    return agent


def made_batch(size=32, seed=1):
    draw = stream(seed)
    shapes = [(size, 7), (size, 3), (size,), (size, 7)]
    s, a, r, s2 = (torch.randn(x, generator=draw, dtype=torch.float64) for x in shapes)
    ends = (torch.rand(size, generator=draw) < 0.3).double()
    return o3f.Batch(s, a.clamp(-0.9, 0.9), r, s2, ends)


def mlp(net, *x, j=None, norm=False):
    """A ReLU network by matrix products; net: a module or its weights; j: which of the critics."""
    if isinstance(net, torch.nn.Module):
        net = [weight for name, weight in net.named_parameters() if name != "log_std"]
    params = list(net)
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


def q_by_hand(net, obs, actions, norm=False):
    return torch.stack([mlp(net, obs, actions, j=j, norm=norm)[:, 0] for j in range(5)])


def adam_step(net, loss, lr):
    """The weights after Adam's first step: its moments are g and g², so -lr·g/(|g| + 1e-8)."""
    params = list(net.parameters())
    grads = torch.autograd.grad(loss, params, retain_graph=True)
    return [p - lr * g / (g.abs() + 1e-8) for p, g in zip(params, grads)]


def slow_copy(net, new, tau):
    return [(1 - tau) * slow + tau * fast for slow, fast in zip(net.parameters(), new)]


def disturb(*nets, size):
    with torch.no_grad():
        for weight in itertools.chain(*(net.parameters() for net in nets)):
            weight.add_(size * torch.randn_like(weight))


def same_weights(module, expected, atol=1e-10):
    for weight, by_hand in zip(module.parameters(), expected, strict=True):
        assert torch.allclose(weight, by_hand, rtol=0, atol=atol)


def assert_metrics(metrics, expected):
    torch.testing.assert_close(metrics, expected, rtol=1e-6, atol=1e-12, check_dtype=False)


# ---- networks ------------------------------------------------------------------------------------
def test_batched_critics_are_separate_mlps():
    """Values, and the gradients that every member would have if it stood alone."""
    critics = o3f.Critics(7, 3, 5, [16, 16]).double()
    obs, actions, y = (torch.randn(9, n).double() for n in (7, 3, 1))
    q, alone = critics(obs, actions), q_by_hand(critics, obs, actions)
    assert torch.allclose(q, alone, rtol=0, atol=1e-12)
    o3f.ensemble_mse(q, y[:, 0]).backward()
    for j in range(5):
        loss = ((alone[j] - y[:, 0]) ** 2).mean()
        grads = torch.autograd.grad(loss, critics.parameters(), retain_graph=True)
        for weight, grad in zip(critics.parameters(), grads, strict=True):
            assert torch.allclose(weight.grad[j], grad[j], rtol=0, atol=1e-12)


@pytest.mark.parametrize("base, layers", [("iql", 3), ("awac", 3), ("lapo", 4), ("so2", 4)])
def test_networks_start_as_the_authors(base, layers):
    """IQL, AWAC: orthogonal, gain √2, no bias; others: U(±1/√in). No two critics are equal."""
    agent = made_agent(base, hidden_dim=64, dtype=torch.float32)
    same_weights(agent.qf_target, agent.qf.parameters(), atol=0)
    params = [x.detach() for x in agent.qf.parameters()]
    assert len(params) == 2 * layers
    for weight, bias in zip(params[::2], params[1::2]):
        assert len({tuple(w.flatten().tolist()) for w in weight}) == 5
        bound = weight.shape[1] ** -0.5
        if base in ("lapo", "so2"):
            assert 0.9 * bound < weight.abs().max() <= bound
            assert 0.5 * bound < bias.abs().max() <= bound
            continue
        assert bias.abs().max() == 0
        for w in weight:
            gram = w.T @ w if len(w) >= len(w.T) else w @ w.T
            assert torch.allclose(gram, 2 * torch.eye(len(gram)), atol=1e-4)
    if base == "awac":  # its policy starts narrow and near zero
        assert agent.log_std().tolist() == [-3.0] * 3
        assert agent.actor(torch.randn(64, 7)).abs().max() < 0.05


# ---- IQL, AWAC -----------------------------------------------------------------------------------
@pytest.mark.parametrize("base, limit", [("iql", 0.4), ("awac", 1.1)])
@pytest.mark.parametrize("ours", [False, True], ids=["paper", "ours"])
def test_iql_and_awac_against_the_formulas(base, limit, ours):
    """In order: IQL's V on the slow critics; actor and critics on the new V; the slow copies."""
    kappa, beta, gamma, tau, lr = 0.7, 0.5, 0.97, 0.01, 3e-4
    flags = dict(layer_norm=ours, standardise=ours, normalise_adv=ours)
    agent = made_agent(base, beta=beta, exp_adv_max=limit, gamma=gamma, tau=tau, **flags)
    s, a, r, s2, d = batch = made_batch()
    if ours:
        mean, std = data_statistics()[:2]
        s, s2 = (s - mean) / std, (s2 - mean) / std
    disturb(agent.qf_target, size=0.05)
    agent.actor.log_std.data.copy_(torch.tensor([-0.3, 0.1, 0.4]) + (2 if base == "awac" else 0))
    old = copy.deepcopy(agent)
    mean, std = torch.tanh(mlp(old.actor, s)), old.actor.log_std.exp()
    if base == "awac":  # as published: from e⁻³ at 0 to 1 at most
        std = torch.exp(-6 + 6 / (1 + torch.exp(-old.actor.log_std)))
    q = q_by_hand(old.qf, s, a, ours)

    if base == "iql":
        target_q = q_by_hand(old.qf_target, s, a, ours).min(0).values
        u = target_q - mlp(old.vf, s)[:, 0]
        vf_loss = torch.where(u < 0, (1 - kappa) * u * u, kappa * u * u).mean()
        new_v = adam_step(old.vf, vf_loss, lr)
        v, next_v = (mlp(new_v, x)[:, 0].detach() for x in (s, s2))
        adv = target_q - v
    else:  # V rests: in its place, the least of five critics at a sample of π, within ±1
        next_mean = torch.tanh(mlp(old.actor, s2))
        torch.manual_seed(11)
        samples = [x + std * torch.randn(32, 3) for x in (next_mean, mean)]
        assert all((x.abs() > 1).any() for x in samples)  # what is clamped
        pairs = zip((old.qf_target, old.qf), (s2, s), samples)
        next_v, v = (q_by_hand(*x, b.clamp(-1, 1), ours).amin(0).detach() for *x, b in pairs)
        adv = q.min(0).values - v
    if ours:
        adv = adv / (statistics.pstdev(adv.tolist()) + 1e-6)
    weight = doubles([min(math.exp(beta * x), limit) for x in adv.tolist()])
    assert (weight == limit).any() and (weight < limit).any()
    log_prob = -((a - mean) ** 2) / (2 * std**2) - torch.log(std * math.sqrt(2 * math.pi))
    actor_loss = -(weight * log_prob.sum(1)).mean()
    y = r + gamma * (1 - d) * next_v
    qf_loss = sum(((q[j] - y) ** 2).mean() for j in range(5))
    new_q = adam_step(old.qf, qf_loss, lr)

    torch.manual_seed(11)
    metrics = agent.update([batch])
    if base == "iql":
        same_weights(agent.vf, new_v)
    same_weights(agent.actor, adam_step(old.actor, actor_loss, lr), atol=1e-8)
    same_weights(agent.qf, new_q)
    same_weights(agent.qf_target, slow_copy(old.qf_target, new_q, tau))
    expected = {"losses/vf": vf_loss} if base == "iql" else {}
    expected |= {"losses/qf": qf_loss / 5, "losses/actor": actor_loss}
    expected |= {"q_mean": q.mean(), "q_std": q.std(0, correction=0).mean(), "v_mean": v.mean()}
    expected |= {"adv_weight": weight.mean(), "policy_std": std.mean()}
    # Of n rows, sum(w)² / sum(w²) count: all if the weights are equal, one if one is all.
    expected |= {"adv_weight_ess": weight.sum() ** 2 / (weight**2).sum() / len(weight)}
    assert_metrics(metrics, expected)


@pytest.mark.parametrize("base", ["iql", "awac"])
def test_standardised_observations(base):
    """A joint whose std is below 0.01 is centred only."""
    data = made_data()
    data["observations"][:, 0] = 5.0 + 0.005 * np.sign(data["observations"][:, 0])
    agent = made_agent(base, standardise=True, data=data)
    obs, action = (torch.tensor(data[x]).double() for x in ("observations", "actions"))
    std = obs.std(0, correction=0)
    std[[0, -1]] = 1.0  # the joint, and the constant
    by_hand = (obs - obs.mean(0)) / std
    mean, q = torch.tanh(mlp(agent.actor, by_hand)), q_by_hand(agent.qf, by_hand, action)
    assert torch.allclose(agent.policy(obs, False), mean, atol=1e-5)
    assert torch.allclose(agent.q_values(obs, action), q, atol=1e-5)


def test_policy_samples_and_dropout():
    agent, obs = made_agent(actor_dropout=0.5), torch.randn(64, 7).double()
    losses = {copy.deepcopy(agent).update([made_batch()])["losses/actor"].item() for _ in "12"}
    assert len(losses) == 2  # there it acts
    agent.update([made_batch()])
    agent.actor.log_std.data.copy_(torch.tensor([5.0, -9.0, 0.5]))
    noise = doubles([2.0, -5.0, 0.5]).exp() * torch.randn(64, 3, generator=stream(0))
    mean = torch.tanh(mlp(agent.actor, obs))
    assert torch.allclose(agent.policy(obs, True, stream(0)), (mean + noise).clamp(-1, 1))
    assert torch.allclose(agent.policy(obs, False), mean)


# ---- LAPO ----------------------------------------------------------------------------------------
def data_statistics():
    """Mean and std of made_data's observations and actions; a constant's std is 1."""
    found = []
    for name in ("observations", "actions"):
        x = torch.tensor(made_data()[name]).double()
        std = x.std(0, correction=0)
        found += [x.mean(0), torch.where(std > 1e-6, std + 1e-6, 1.0)]
    assert found[1][-1] == 1.0
    return found


@pytest.mark.parametrize("lam, clamp", [(1.0, "discounted"), (0.7, "discounted"), (0.7, "once")])
def test_lapo_update_against_the_formulas(lam, clamp):
    """Critics and V, CVAE, latent policy, each from its own loss alone; then the slow copies."""
    gamma, tau, lr = 0.99, 0.005, 2e-4
    data, batch = made_data(rewards=np.linspace(-0.5, -0.1, 50)), made_batch()
    agent = made_agent("lapo", data=data, doubleq_min=lam, value_clamp=clamp)
    batch = batch._replace(rewards=batch.rewards / 4 - 0.8)
    disturb(agent.qf_target, agent.decoder_target, agent.actor_target, size=0.3)
    agent.qf_target.net[-1].weight.data.mul_(30.0)  # values beyond the limits of "once"
    old = copy.deepcopy(agent)
    obs_mean, obs_std, act_mean, act_std = data_statistics()
    s, s2 = ((x - obs_mean) / obs_std for x in (batch.observations, batch.next_observations))
    a, r, d = (batch.actions - act_mean) / act_std, batch.rewards, batch.terminations
    torch.manual_seed(11)
    members = torch.randperm(5)[:2]
    latent_noise = torch.randn(32, 6).double()
    cvae_noise = torch.randn(32, 6, dtype=torch.float64)

    def mix(obs, actions):
        q = q_by_hand(old.qf_target, obs, actions)[members].detach()
        return lam * q.min(0).values + (1 - lam) * q.max(0).values

    # 1. critics and V
    z = 2 * torch.tanh(mlp(old.actor_target, s)) + (0.1 * latent_noise).clamp(-0.2, 0.2)
    v_target = mix(s, mlp(old.decoder_target, s, z))
    scale = {"discounted": 100.0, "once": 1.0}[clamp]
    # V's limits start with the dataset and widen; 0 is what follows an end, whatever they say.
    low, high = scale * min(-0.5, r.min().item()), 0.0
    assert clamp != "once" or v_target.min() < low < -0.5 and v_target.max() > high
    y = r + gamma * (1 - d) * mlp(old.vf, s2)[:, 0].detach()
    vf_loss = ((mlp(old.vf, s)[:, 0] - v_target.clamp(low, high)) ** 2).mean()
    qf_loss = ((q_by_hand(old.qf, s, a) - y) ** 2).mean(1).sum()
    new = {"qf": adam_step(old.qf, qf_loss, lr), "vf": adam_step(old.vf, vf_loss, lr)}
    # 2. CVAE, with the new V and the slow critics of before
    next_z = 2 * torch.tanh(mlp(old.actor_target, s2))
    next_q = mix(s2, mlp(old.decoder_target, s2, next_z))
    adv = (r + gamma * (1 - d) * next_q - mlp(new["vf"], s)[:, 0]).detach()
    assert (adv > 0).any() and (adv < 0).any()
    weight = doubles([0.9 if x > 0 else 0.1 for x in adv.tolist()])
    mu, log_var = mlp(old.encoder, s, a).split(6, 1)
    decoded = mlp(old.decoder, s, mu + torch.exp(log_var / 2) * cvae_noise)
    kl = -0.5 * (1 + log_var - mu**2 - log_var.exp()).sum(1)
    cvae_loss = (weight * (((decoded - a) ** 2).sum(1) + kl)).mean()
    # 3. latent policy: the mean of the new critics, through the slow decoder
    action = mlp(old.decoder_target, s, 2 * torch.tanh(mlp(old.actor, s)))
    actor_loss = -q_by_hand(new["qf"], s, action).mean()
    for name, loss in (("encoder", cvae_loss), ("decoder", cvae_loss), ("actor", actor_loss)):
        new[name] = adam_step(getattr(old, name), loss, lr)

    torch.manual_seed(11)
    metrics = agent.update([batch])
    for name, expected in new.items():
        same_weights(getattr(agent, name), expected, atol=1e-8)
    for name in ("qf_target", "decoder_target", "actor_target"):
        expected = slow_copy(getattr(old, name), new[name.partition("_")[0]], tau)
        same_weights(getattr(agent, name), expected, atol=1e-8)
    expected = {"losses/qf": qf_loss / 5, "losses/vf": vf_loss, "losses/cvae": cvae_loss}
    expected |= {"losses/actor": actor_loss, "adv": adv.mean(), "kl": kl.mean()}
    assert_metrics({name: metrics[name] for name in expected}, expected)


def test_lapo_subset_is_drawn_anew():
    """Slow critics say 1, 2, 4, 8, 16 and V says 0: V's loss tells which two were asked."""
    agent, batch = made_agent("lapo", doubleq_min=0.5, learning_rate=0.0, tau=0.0), made_batch(4)
    for weight in [*agent.qf_target.parameters(), *agent.vf.parameters()]:
        weight.data.zero_()
    agent.qf_target.net[-1].bias.data[:, 0, 0] = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    losses = [round(agent.update([batch])["losses/vf"].item(), 6) for _ in range(150)]
    pairs = {((2**i + 2**j) / 2) ** 2 for i in range(5) for j in range(i)}
    assert set(losses) == pairs  # one of ten


def test_lapo_speaks_environment_units():
    agent, raw = made_agent("lapo"), made_batch()
    disturb(agent.decoder, size=1.0)  # acting is through the slow decoder
    obs_mean, obs_std, act_mean, act_std = data_statistics()
    s, a = (raw.observations - obs_mean) / obs_std, (raw.actions - act_mean) / act_std
    q = q_by_hand(agent.qf, s, a)
    assert torch.allclose(agent.q_values(raw.observations, raw.actions), q, rtol=0, atol=1e-10)
    # A sample moves z by 0.1·ε, cut at 0.2, and nothing else.
    noise = torch.randn(32, 6, generator=stream(4)).double()
    assert (noise.abs() > 2).any()
    for sample, shift in ((False, 0.0), (True, (0.1 * noise).clamp(-0.2, 0.2))):
        z = 2 * torch.tanh(mlp(agent.actor, s)) + shift
        action = (mlp(agent.decoder_target, s, z) * act_std + act_mean).clamp(-1, 1)
        assert torch.allclose(agent.policy(raw.observations, sample, stream(4)), action, atol=1e-6)
    # The decoder knows no box, what is executed does.
    agent.decoder_target[-1].bias.data.fill_(50.0)
    assert torch.equal(agent.policy(raw.observations, False), torch.ones(32, 3).double())


STEPS = {"iql": dict(qf=3, vf=3, actor=3), "awac": dict(qf=3, actor=3), "so2": dict(qf=3, actor=1)}
STEPS |= {"lapo": dict(qf=3, vf=3, actor=1, decoder=1, encoder=1)}


@pytest.mark.parametrize("base", STEPS)
def test_updates_are_one_per_batch_or_in_all(base):
    """Of three batches. Each step of Q is followed by its slow copy."""
    agent, batches = made_agent(base), [made_batch(seed=i) for i in range(3)]
    slow = copy.deepcopy(agent.qf_target)
    for i in (1, 2, 3):  # how the critics were after 1, 2, 3 batches
        after = copy.deepcopy(agent)
        torch.manual_seed(7)
        after.update(batches[:i])
        o3f.polyak_(slow, after.qf, 0.005)
    same_weights(after.qf_target, slow.parameters())
    if base == "lapo":
        expected = slow_copy(agent.actor_target, after.actor.parameters(), 0.005)
        same_weights(after.actor_target, expected)
    for name, steps in STEPS[base].items():
        for weight in getattr(after, name).parameters():
            assert after.optimizer.state[weight]["step"] == steps


# ---- SO2 -----------------------------------------------------------------------------------------
def squashed_sample(actor, obs, noise):
    """A sample of tanh(N(μ, σ²)) and its log π, a density as torch.distributions knows it."""
    mean, log_std = mlp(actor, obs).split(3, 1)
    normal = torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp())
    squash = torch.distributions.TanhTransform(cache_size=1)  # knows u where tanh(u) rounds to 1
    action, pi = squash(mean + normal.stddev * noise), torch.distributions.TransformedDistribution
    return action, pi(normal, squash).log_prob(action).sum(1)


def test_so2_samples():
    agent, obs = made_agent("so2"), torch.randn(64, 7).double()
    agent.actor[-1].bias.data.copy_(torch.tensor([0.2, 2.0, -30.0, 0.3, 3.0, -9.0]))  # std < e²
    action, log_prob = agent.draw(obs, stream(4))
    by_hand = squashed_sample(agent.actor, obs, torch.randn(64, 3, generator=stream(4)))
    assert torch.allclose(action, by_hand[0]) and torch.allclose(log_prob, by_hand[1])
    assert (action[:, 2] == -1).all() and torch.isfinite(log_prob).all()
    assert torch.allclose(agent.policy(obs, True, stream(4)), action)
    assert torch.allclose(agent.policy(obs, False), torch.tanh(mlp(agent.actor, obs)[:, :3]))


@pytest.mark.parametrize("online, log_std", [(False, -2.3), (False, -2.7), (True, 0.0)])
def test_so2_update_against_the_formulas(online, log_std):
    """Critics, on one minimum, or online each on its own; actor and α, on the new critics."""
    gamma, tau, lr, alpha = 0.97, 0.01, 3e-4, 0.3 if online else 0.6
    agent = made_agent("so2", gamma=gamma, tau=tau, online_alpha=0.3, standardise=True)
    agent.log_alpha.data.fill_(math.log(0.6))
    agent.actor[-1].bias.data[3:] = log_std
    disturb(agent.qf_target, size=0.05)
    agent.online = online
    s, a, r, s2, d = batch = made_batch()
    mean, std = data_statistics()[:2]
    s, s2, old = (s - mean) / std, (s2 - mean) / std, copy.deepcopy(agent)

    torch.manual_seed(11)
    next_a, next_log_prob = squashed_sample(old.actor, s2, torch.randn(32, 3))
    if online:  # perturbed by 0.6 at most, within ±1; log π stays that of the sample
        noise = 0.3 * torch.randn(32, 3, dtype=torch.float64)
        next_a = next_a + noise.clamp(-0.6, 0.6)
        assert (noise.abs() > 0.6).any() and (next_a.abs() > 1).any()
    next_q = q_by_hand(old.qf_target, s2, next_a.clamp(-1, 1))
    next_q = next_q if online else next_q.amin(0).expand(5, 32)
    y = (r + gamma * (1 - d) * (next_q - alpha * next_log_prob)).detach()
    q = q_by_hand(old.qf, s, a)
    qf_loss = sum(((q[j] - y[j]) ** 2).mean() for j in range(5))
    new_q = adam_step(old.qf, qf_loss, lr)
    action, log_prob = squashed_sample(old.actor, s, torch.randn(32, 3))
    actor_loss = (alpha * log_prob - q_by_hand(new_q, s, action).amin(0)).mean()
    # For three actions, α grows if the entropy is below −3, as -2.7 makes it; by Adam's step, lr.
    move = 0 if online else lr if log_std < -2.5 else -lr
    assert online or 2 < log_prob.mean() < 4 and (log_prob.mean() > 3) == (move > 0)

    torch.manual_seed(11)
    metrics = agent.update([batch])
    same_weights(agent.qf, new_q, atol=1e-8)
    same_weights(agent.qf_target, slow_copy(old.qf_target, new_q, tau))
    same_weights(agent.actor, adam_step(old.actor, actor_loss, lr), atol=1e-8)
    assert agent.log_alpha.item() == pytest.approx(math.log(0.6) + move, abs=1e-9)
    expected = {"losses/qf": qf_loss / 5, "losses/actor": actor_loss, "entropy": -log_prob.mean()}
    expected |= {"q_mean": q.mean(), "q_std": q.std(0, correction=0).mean()}
    expected["alpha"] = doubles(alpha * math.exp(move))
    assert_metrics(metrics, expected)


# ---- the optimistic action -----------------------------------------------------------------------
def best_by_loop(agent, obs, action, n, sigma, omega, draw):
    """Algorithm 1 and Eq. 2 as a loop over observations, candidates, critics."""
    noise = torch.randn(len(obs), n, 3, dtype=obs.dtype, generator=draw).tolist()
    chosen, optimism = [], []
    for b in range(len(obs)):
        found = []
        for eps in noise[b]:
            c = [min(max(x + sigma * e, -1.0), 1.0) for x, e in zip(action[b].tolist(), eps)]
            tried = torch.tensor([c], dtype=obs.dtype)
            q = q_by_hand(agent.qf, obs[b : b + 1], tried)[:, 0].tolist()
            mean = statistics.fmean(q)
            found.append((mean + omega * statistics.pstdev(q), mean, c))
        _, mean, best = max(found, key=lambda x: x[0])  # the first of equals
        chosen.append(best)
        optimism.append(mean - statistics.fmean(x[1] for x in found))
    return torch.tensor(chosen, dtype=obs.dtype), doubles(optimism)


CASES = [(1, 0.2, 0.0), (20, 0.2, 0.0), (20, 0.2, 1.0), (20, 0.7, -0.5), (5, 0.0, 0.0)]


@pytest.mark.parametrize("n, sigma, omega", CASES)
def test_optimistic_action_against_a_loop(n, sigma, omega):
    agent = made_agent()
    obs, action = torch.randn(3, 7).double(), torch.rand(3, 3).double() * 2 - 1
    found = o3f.optimistic_action(obs, action, agent.q_values, n, sigma, omega, stream(5))
    by_loop = best_by_loop(agent, obs, action, n, sigma, omega, stream(5))
    assert torch.allclose(found[0], by_loop[0], rtol=0, atol=1e-12)
    assert torch.allclose(found[1], by_loop[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("proposal", ["sample", "mean"])
def test_ways_to_explore(proposal):
    agent, obs = made_agent(dtype=torch.float32), torch.randn(1, 7)
    disturb(agent.qf_target, size=1.0)  # slow critics that differ: they play no part
    draw = stream(9)
    start = agent.policy(obs, proposal == "sample", draw)
    state = draw.get_state()

    def act(explore):
        args = o3f.preset("Pendulum-v1", "iql", explore=explore, proposal=proposal, sigma=0.3)
        return o3f.explore_action(agent, obs, args, stream(9))

    assert torch.equal(act("policy")[0], start)
    noisy = start + 0.3 * torch.randn(1, 3, generator=draw)
    assert torch.allclose(act("noise")[0], noisy.clamp(-1, 1))
    assert act("policy")[1] == act("noise")[1] == 0
    best, gain = best_by_loop(agent, obs, start, 100, 0.3, 0.0, draw.set_state(state))
    action, optimism = act("o3f")
    assert torch.allclose(action, best)
    assert optimism.item() == pytest.approx(gain.item(), rel=1e-3)


# ---- replay buffer -------------------------------------------------------------------------------
def test_buffer_appends_and_samples_evenly():
    """Row i has reward i and observations (2i, 2i + 1)."""
    obs = np.arange(12).reshape(6, 2)
    data = made_data(6, 2, 1, rewards=np.arange(6), observations=obs)
    buffer = o3f.ReplayBuffer(data, 10, torch.device("cpu"))
    before = buffer.rows[:6].clone()
    for reward, x in ((math.nan, 0.0), (0.0, math.inf)):
        with pytest.raises(o3f.UserError, match="NaN or inf"):
            buffer.add(np.zeros(2), np.zeros(1), reward, np.array([0.0, x]), False)
    for i in (6, 7):
        obs, following = np.array([2.0 * i, 2.0 * i + 1]), np.full(2, 200.0 + i)
        buffer.add(obs, np.array([0.5]), i, following, i == 7)
    assert torch.equal(buffer.rows[:6], before)
    assert buffer.rows[7].tolist() == [14, 15, 0.5, 7, 207, 207, 1]
    (batch,) = buffer.sample(80_000)
    counts = np.bincount(batch.rewards.long().numpy())
    assert len(counts) == 8  # nothing of the space that is still empty
    assert np.abs(counts - 10_000).max() < 5 * math.sqrt(10_000)
    assert torch.equal(batch.observations[:, 1], 2 * batch.rewards + 1)
    batches = buffer.sample(200, batches=20)
    assert len({tuple(batch.rewards.tolist()) for batch in batches}) == 20


# ---- small environments, and what runs in them ---------------------------------------------------
class Line(gym.Env):
    """Counts in an array that it reuses, as its info, from whole numbers on; pays [PAYS·count].

    Observed is (steps / 2, episode); every second episode truly ends at its third step.
    """

    PAYS = 1.0

    def __init__(self, low=-1.57, high=1.57, box=None, space=None, render_mode=None):
        self.action_space = box or gym.spaces.Box(np.float32(low), np.float32(high), (1,))
        self.observation_space = space or gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.x, self.action, self.render_mode = np.array([0.0, -1.0]), np.zeros(1), render_mode
        self.info = {"episode": "its own"}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x[:] = 0, self.x[1] + 1
        return self.x.astype(int), {}

    def step(self, action):
        assert self.action_space.contains(np.float32(action))  # 1.57 in float64 would not be
        self.action = action
        self.x[0] += 0.5
        end = self.x[0] == 1.5 and self.x[1] % 2 == 1
        return self.x, np.array([self.PAYS * self.x[0]]), end, False, self.info


gym.register("O3FLine-v0", Line, max_episode_steps=6)
gym.register("O3FEndless-v0", Line)
gym.register("O3FNarrow-v0", Line, max_episode_steps=6, kwargs=dict(low=-0.4, high=0.4))
gym.register("O3FThrottle-v0", Line, max_episode_steps=6, kwargs=dict(low=0, high=1))
gym.register("O3FPendulum-v0", gym.spec("Pendulum-v1").entry_point, max_episode_steps=10)
ODD = {  # no actions or observations to learn with
    "Whole-v0": dict(box=gym.spaces.Box(-2, 2, (1,), np.int64)),
    "Flat-v0": dict(box=gym.spaces.Box(np.float32([-1, 0]), np.float32([1, 0]))),
    "Endless-v0": dict(low=-np.inf),
    "Discrete-v0": dict(box=gym.spaces.Discrete(3)),
    "Dict-v0": dict(space=gym.spaces.Dict(a=gym.spaces.Box(-1, 1, (2,)))),
}
for odd, kwargs in ODD.items():
    gym.register(odd, Line, kwargs=kwargs)
BOX, DISCRETE = gym.spaces.Box(-1, 1, (1,)), ODD["Discrete-v0"]
gym.register("O3FWrapped-v0", lambda: gym.wrappers.TransformAction(Line(**DISCRETE), int, BOX))

HERE = Path(__file__).resolve().parent
TINY = "--dataset random --dataset-size 60 --hidden-dim 8 --num-critics 2 --batch-size 8 "
TINY += "--num-candidates 4 --offline-steps 15 --online-steps 25 --eval-episodes 1 "
TINY += "--eval-every 9 --log-every 7 "
LINE, QUICK = "--env-id O3FLine-v0 " + TINY, "--env-id O3FPendulum-v0 " + TINY
PENDULUM = "--env-id Pendulum-v1 " + TINY
EVERY = "--checkpoint-minutes 0 "


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty working folder, in which datasets are cached too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D4RL_DATASET_DIR", "data")
    return tmp_path


def cli(line: str) -> int:
    return o3f.cli(shlex.split(line))


@pytest.fixture
def refused(capsys):
    """One clear line on stderr, beside a bar of what had begun; exit code 2."""

    def check(line: str, *words: str) -> None:
        capsys.readouterr()
        assert cli(line) == 2
        errors = capsys.readouterr().err.splitlines()
        bar = "(offline|online|collecting.*): "
        errors = [x for x in errors if x.strip() and not re.match(bar, x)]
        assert len(errors) == 1 and errors[0].startswith("error: "), errors
        for word in words:
            assert word in errors[0]

    return check


def stop(line: str, after: int, monkeypatch) -> None:
    """Ctrl-C after this step of a run; offline steps are negative."""
    record = o3f.Run.record

    def stopped(self, step, *rest):
        record(self, step, *rest)
        if step == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(o3f.Run, "record", stopped)
        assert cli(line) == 130


def read_table(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_saved(path) -> dict:
    return torch.load(path, weights_only=True)


def same_run(*runs: str) -> None:
    """The tables of two runs, their last weights and Adam's state, to the last bit."""
    one, two = ({x.name: x.read_bytes() for x in Path(run).glob("*.csv")} for run in runs)
    assert one == two and len(one) >= 2
    one, two = (read_saved(Path(run, "agent_final.pt")) | dict(args=0) for run in runs)
    assert len(one["agent"]) > 15 and len(one["optimizer"]["state"]) > 8
    torch.testing.assert_close(one, two, rtol=0, atol=0)


# ---- data ----------------------------------------------------------------------------------------
def write_hdf5(path, **columns):
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            if column is not None:
                file[name] = column
    return path


def columns_of(n=60, **changes):
    """n rows of six steps each, in which row t is observed as (t, t)."""
    obs = np.repeat(np.arange(n, dtype=np.float32)[:, None], 2, 1)
    columns = dict(observations=obs, actions=np.zeros((n, 1)), rewards=np.arange(n) / 60)
    columns |= dict(terminals=np.zeros(n), timeouts=np.arange(n) % 6 == 5)
    return columns | changes


def load(env_id, path, base="iql", **flags):
    """load_dataset's transitions and rule."""
    args = o3f.preset(env_id, base, dataset=str(path), **flags)
    return o3f.load_dataset(args, o3f.get_task(env_id), o3f.make_env(env_id), None)


def rows_one_by_one(raw, horizon):
    """d4rl's loop, but that a true end is kept at a limit and in the last row."""
    kept, count, n = [], 0, len(raw["rewards"])  # count: of steps since an end
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
def test_transitions_row_by_row(with_timeouts, with_terminals):
    rng = np.random.default_rng(0)
    for _ in range(100):
        n, horizon = rng.integers(2, 60), int(rng.integers(2, 12))
        raw = {name: rng.normal(size=(n, 3)) for name in ("observations", "actions")}
        raw |= {"rewards": rng.normal(size=n), "terminals": (rng.random(n) < 0.15) & with_terminals}
        if with_timeouts:
            raw["timeouts"] = rng.random(n) < 0.15
        kept = np.array(rows_one_by_one(raw, horizon), int)
        original = copy.deepcopy(raw)
        data = o3f.to_transitions(raw, horizon, demonstrations=False)
        for name in ("observations", "actions", "rewards"):
            assert np.array_equal(data[name], original[name][kept])
        ends, successors = original["terminals"][kept], np.minimum(kept + 1, n - 1)
        expected = original["observations"][successors][~ends]  # what follows an end plays no part
        assert np.array_equal(data["next_observations"][~ends], expected)
        assert np.array_equal(data["terminations"], ends)


def test_truncations_and_next_observations(home):
    columns = columns_of()
    columns["truncations"] = columns.pop("timeouts")
    data, _ = load("O3FLine-v0", write_hdf5("b.hdf5", **columns))
    assert np.array_equal(data["next_observations"], data["observations"] + 1)
    assert len(data["rewards"]) == 50
    order = np.random.default_rng(0).permutation(60)  # a ring buffer's, say
    shuffled = {name: x[order] for name, x in columns.items()}
    shuffled["next_observations"] = shuffled["observations"] + 1
    data, _ = load("O3FLine-v0", write_hdf5("a.hdf5", **shuffled))
    assert np.array_equal(data["next_observations"], data["observations"] + 1)


def test_what_a_file_leaves_open_is_told(home, capsys):
    """An episode beyond the limit; actions that may be in a narrow box's own units."""
    for env_id, changes, words in (
        ("O3FLine-v0", dict(timeouts=np.zeros(60)), "60 rows, the limit is 6"),
        ("O3FNarrow-v0", dict(actions=np.full((60, 1), 0.3)), "own Box(-0.4, 0.4"),
        ("O3FNarrow-v0", dict(actions=np.full((60, 1), 0.9)), ""),
        ("O3FThrottle-v0", dict(actions=np.full((60, 1), 0.9)), "own Box(0.0, 1.0"),
        ("O3FThrottle-v0", dict(actions=np.full((60, 1), -0.1)), ""),
        ("O3FWrapped-v0", {}, ""),
    ):
        load(env_id, write_hdf5("a.hdf5", **columns_of(**changes)))
        out = capsys.readouterr().out
        assert words in out
        assert words or ("limit is" not in out and "Box" not in out)


def spoilt(name, value):
    column = columns_of()[name].astype(float)
    column[3] = value
    return columns_of(**{name: column})


BAD_COLUMNS = {
    "object 'rewards' doesn't exist": columns_of(rewards=None),
    "observations has shape (60, 3), needs (60, 2)": columns_of(observations=np.zeros((60, 3))),
    "rewards has shape (59,), needs (60,)": columns_of(rewards=np.zeros(59)),
    "observations needs finite numbers, row 3": spoilt("observations", np.nan),
    "rewards needs finite numbers, row 3": spoilt("rewards", -np.inf),
    "actions reach 1.049": spoilt("actions", -1.05),
    "each is a time limit": columns_of(timeouts=np.ones(60)),
    "terminals needs 0 or 1, row 0": columns_of(terminals=np.array([b"False"] * 60)),
    "timeouts needs 0 or 1, row 0": columns_of(timeouts=None, truncations=np.full(60, 0.5)),
    "needs (0, 2) and a row at least": columns_of(0),
    "no row has a successor": columns_of(1),
}


@pytest.mark.parametrize("message", BAD_COLUMNS)
def test_wrong_files_are_refused(message, home, refused):
    write_hdf5("x.hdf5", **BAD_COLUMNS[message])
    refused(LINE + "--dataset x.hdf5", "x.hdf5: ", message)


DONE = {"microwave": ([22], -0.75), "light switch": ([17, 18], [-0.69, -0.05])}
DONE |= {"bottom burner": ([11, 12], [-0.88, -0.01])}
DONE |= {"kettle": (list(range(23, 30)), [-0.23, 0.75, 1.62, 0.99, 0, 0, -0.06])}


def place(qpos, *names):
    for name in names:
        index, goal = DONE[name]
        qpos[..., index] = goal


def kitchen_start():
    """An observation in which nothing is done, without its goal."""
    pose = np.array(o3f.make_env("kitchen-mixed-v0").unwrapped.pose, float)
    return np.append(pose, np.zeros(30))


def kitchen_columns(**changes):
    """Three demonstrations of 40 rows; row 10 on has the kettle, row 20 on the microwave too."""
    rng = np.random.default_rng(0)
    obs = np.tile(kitchen_start(), (120, 1))
    obs[:, :30] += 0.01 * rng.normal(size=(120, 30))
    obs[:, 30:] = o3f.make_env("kitchen-mixed-v0").unwrapped.goal
    for start in (0, 40, 80):
        place(obs[start + 10 : start + 40], "kettle")
        place(obs[start + 20 : start + 40], "microwave")
    columns = dict(observations=obs, actions=rng.uniform(-0.9, 0.9, (120, 9)))
    columns["rewards"] = np.tile(np.repeat([0.0, 1.0, 2.0], [10, 10, 20]), 3)
    return columns | dict(terminals=np.tile(np.arange(40) == 39, 3)) | changes


@pytest.mark.parametrize("timeouts", [None, np.zeros(120, bool)])
def test_kitchen_rewards(timeouts, home):
    path = write_hdf5("k.hdf5", **kitchen_columns(timeouts=timeouts))
    start, done = kitchen_start(), np.zeros(60)
    place(done, "kettle", "microwave", "light switch", "bottom burner")
    data, rule = load("kitchen-mixed-v0", path)
    # 39 of 40: a demonstration's last row has no successor, and is no true end.
    by_hand = np.tile(np.repeat([-4.0, -3.0, -2.0], [10, 10, 19]), 3)
    assert np.array_equal(data["rewards"], by_hand)
    assert data["terminations"].sum() == 0
    # Online, whatever the environment pays: satisfied(s) − 4 at s; the end is all four at s'.
    assert rule(start, 1.0, done, False) == (-4.0, True)
    assert rule(done, 0.0, start, True) == (0.0, False)
    data = load("kitchen-mixed-v0", path, reward_transform="max")[0]
    assert np.array_equal(data["rewards"], by_hand / 4)  # the sign stays

    data, rule = load("kitchen-mixed-v0", path, kitchen_rewards="stock")
    assert data["rewards"].max() == 2.0
    assert data["terminations"].sum() == 3
    assert rule(start, 1.0, done, False) == (1.0, False)
    with pytest.raises(o3f.UserError, match="kitchen-partial-v0: it is of another kitchen"):
        load("kitchen-partial-v0", path)


TRANSFORMS = [("none", 1.0, 0.0), ("minus_one", 1.0, -1.0), ("x100", 100.0, 0.0)]
TRANSFORMS += [("max", 1 / 3, 0.0), ("return_range", 1000 / 3, 0.0)]  # returns are 6, 3 and 5


@pytest.mark.parametrize("transform, scale, shift", TRANSFORMS)
def test_reward_transforms(transform, scale, shift, home):
    rewards, terminals = np.array([[1.0, 2, 3, 3, 0, 2, 3, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0, 1]])
    changes = dict(rewards=rewards, terminals=terminals, timeouts=np.zeros(9))
    path = write_hdf5("x.hdf5", **columns_of(9, actions=np.ones((9, 1)), **changes))
    data, rule = load("O3FEndless-v0", path, reward_transform=transform)
    assert data["rewards"].tolist() == pytest.approx((scale * rewards + shift).tolist())
    assert rule(np.zeros(2), 7.0, np.zeros(2), True) == (pytest.approx(scale * 7 + shift), True)
    for base, action in (("iql", 1 - 1e-5), ("awac", 1 - 1e-5), ("lapo", 1.0), ("so2", 1.0)):
        data = load("O3FEndless-v0", path, base)[0]  # as in IQL's code
        assert set(data["actions"].ravel()) == {np.float32(action)}


@pytest.mark.parametrize("rewards, scale", [((-10, 1e-4), 0.1), ((-1, 0), 1), ((-4, 2), 0.5)])
def test_max_of_rewards_far_below_zero(rewards, scale):
    assert o3f.scale_and_shift("max", np.array(rewards), None) == (pytest.approx(scale), 0.0)


def replay_error(env, raw, rows, fastest=10.0):
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


def test_collected_data_is_uniform(home, monkeypatch):
    args = o3f.preset("hopper-random-v2", "iql", dataset_size=3000)
    path = o3f.find_file(args)
    assert path.name == "hopper-random-v2.collected-uniform-3000.hdf5"
    assert list(Path("data").iterdir()) == [path]  # no part of a file left behind
    outside = o3f.preset("gymnasium:Pendulum-v1", "iql", dataset="random", dataset_size=20)
    assert o3f.find_file(outside).name == "gymnasium-Pendulum-v1.collected-uniform-20.hdf5"
    raw = {name: column.astype(float) for name, column in o3f.read_hdf5(path).items()}
    assert np.abs(raw["actions"].mean(0)).max() < 5 * math.sqrt(1 / 3 / 3000)
    assert np.allclose(raw["actions"].var(0), 1 / 3, atol=0.03)
    assert raw["terminals"].sum() > 50 and raw["timeouts"].sum() == 0  # random hoppers fall
    env = o3f.make_env("hopper-random-v2").unwrapped
    assert replay_error(env, raw, range(0, 2900, 31)) < 1e-2
    monkeypatch.setitem(sys.modules, "d4rl", None)  # not needed for D4RL's own files, which win
    for official in ("hopper_random-v2.hdf5", "walker2d_medium_replay-v2.hdf5"):
        path = Path("data", official)  # as d4rl's infos.py names it
        path.write_bytes(b"")
        env_id = official[:-5].replace("_", "-")
        assert o3f.find_file(o3f.preset(env_id, "iql")) == path


def test_data_of_a_changed_environment(home, monkeypatch, capsys):
    path = Path("data/O3FLine-v0.collected-uniform-40.hdf5")
    o3f.collect_random("O3FLine-v0", 40, path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    o3f.collect_random("O3FLine-v0", 40, path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before  # not a second time
    monkeypatch.setattr(Line, "PAYS", 2.0)
    o3f.collect_random("O3FLine-v0", 40, path)
    assert "collected anew" in capsys.readouterr().out
    assert o3f.read_hdf5(path)["rewards"][1] == 2.0
    o3f.collect_random("Pendulum-v1", 300, Path("b.hdf5"))
    monkeypatch.setattr(gym.spec("Pendulum-v1"), "max_episode_steps", 150)  # seen late
    o3f.collect_random("Pendulum-v1", 300, Path("b.hdf5"))
    assert o3f.read_hdf5("b.hdf5")["timeouts"].nonzero()[0].tolist() == [149, 299]
    monkeypatch.setattr(o3f, "uniform_rows", lambda *_: pytest.fail("all of it, for nothing"))
    args = o3f.preset("O3FLine-v0", "iql", dataset="random", dataset_size=40, resume="a")
    assert o3f.find_file(args) == path  # not even compared: a checkpoint has its checksum
    with pytest.raises(OSError):
        o3f.collect_random("O3FLine-v0", 40, Path("/proc/a.hdf5"))  # cannot be written


@needs_shared
@pytest.mark.parametrize("robot", ["halfcheetah", "hopper", "walker2d"])
def test_robots_pay_what_the_files_say(robot):
    env = o3f.make_env(f"{robot}-medium-v2").unwrapped
    with h5py.File(SHARED / f"data/{robot}-medium-standin.hdf5") as file:
        raw = {name: file[name][:5000].astype(np.float64) for name in file}
    fastest = math.inf if robot == "halfcheetah" else 10.0
    assert replay_error(env, raw, range(0, 4900, 47), fastest) < 1e-2


@needs_shared
@pytest.mark.skipif(mujoco.__version__ < "4", reason="contacts differ by 0.08 on 3.17")
def test_antmaze_replays_a_file():
    with h5py.File(SHARED / "data/antmaze-umaze-diverse-standin.hdf5") as file:
        raw = {name: file[name][:].astype(np.float64) for name in file if name != "metadata"}
        env = o3f.make_env("antmaze-umaze-diverse-v1").unwrapped
        env.goal = np.array(file.attrs["goal"])
    paid = np.flatnonzero(raw["rewards"])[::20].tolist()
    assert len(paid) > 5
    assert replay_error(env, raw, [*range(0, len(raw["rewards"]) - 1, 997), *paid]) < 1e-5


@needs_shared
@pytest.mark.parametrize("name", ["mixed-subset-63", "partial-subset-63", "complete-19"])
def test_kitchens_pay_what_the_files_say(name):
    """A file's rewards are D4RL's own count of satisfied sub-tasks, row by row."""
    env_id, path = f"kitchen-{name.partition('-')[0]}-v0", SHARED / f"data/kitchen-{name}.hdf5"
    with h5py.File(path) as file:
        rewards, terminals = file["rewards"][:], file["terminals"][:].astype(bool)
    assert np.array_equal(load(env_id, path)[0]["rewards"], rewards[~terminals] - 4)
    stock = load(env_id, path, kitchen_rewards="stock")[0]["rewards"]
    assert np.array_equal(stock, rewards)  # the last row is called terminal


# ---- tasks and environments ----------------------------------------------------------------------
SCORES = [("halfcheetah-medium-v2", 12135.0, 100.0), ("hopper-random-v2", -20.272305, 0.0)]
SCORES += [("walker2d-medium-v2", 2000.0, 43.531131), ("antmaze-umaze-v2", 1.0, 100.0)]
SCORES += [("kitchen-mixed-v0", 3.0, 75.0), ("Pendulum-v1", -123.0, -123.0)]


def test_scores():
    for env_id, value, score in SCORES:
        assert o3f.get_task(env_id).score(value) == pytest.approx(score)


@pytest.mark.parametrize("low, high", [(-1, 2), (0, 1), (-1.57, 1.57)])
def test_actions_are_rescaled_to_odd_bounds(low, high):
    env = o3f.make_env("O3FEndless-v0", low=low, high=high)
    assert (env.action_space.low, env.action_space.high) == (-1, 1)
    env.reset(seed=0)
    for action, expected in ((-1, low), (0.5, 0.25 * low + 0.75 * high), (1, high)):
        env.step(np.array([action], np.float32))
        assert env.unwrapped.action == pytest.approx(expected)
    truncated = [env.step(np.zeros(1, np.float32))[3] for _ in range(997)]
    assert truncated == [False] * 996 + [True]  # every episode ends


@needs_shared
@pytest.mark.parametrize("episode", [0, 1])  # the actions of episode 0 exceed ±1
def test_kitchen_against_reference_episodes(episode):
    reference = np.load(SHARED / "reference/kitchen_mixed_rollouts.npz")
    expected, actions = reference[f"ep{episode}_obs"], reference[f"ep{episode}_act"]
    env = o3f.make_env("kitchen-mixed-v0", noise_ratio=0.0).unwrapped  # in float64
    assert np.abs(env.reset(seed=0)[0] - expected[0]).max() < 1e-9
    for t in range(10):
        assert np.abs(env.step(actions[t])[0] - expected[t + 1]).max() < 2e-3


def test_kitchen_pays_each_sub_task_once():
    env = o3f.make_env("kitchen-mixed-v0", noise_ratio=0.0)
    env.reset(seed=0)

    def move(*names):
        place(env.unwrapped.data.qpos, *names)
        _, reward, terminated, _, info = env.step(np.zeros(9))
        return reward, terminated, info["completed"].tolist()  # microwave, kettle, burner, light

    assert move("microwave") == (1, False, [True, False, False, False])
    env.unwrapped.data.qpos[22] = 0.0
    assert move() == (0, False, [True, False, False, False])
    assert move("microwave")[0] == 0  # open again: not paid again
    assert move("light switch", "bottom burner") == (2, False, [True, False, True, True])
    assert move("kettle") == (1, True, [True] * 4)
    env.reset()
    assert move("microwave")[0] == 1  # a new episode pays anew


def test_kitchen_noise_and_steering():
    env, start = o3f.make_env("kitchen-mixed-v0").unwrapped, kitchen_start()[:30]
    start[26:] /= np.linalg.norm(start[26:])
    draws = np.array([env.reset(seed=i)[0][:30] - start for i in range(400)])
    sizes = [0.1, 0.005, 0.0005, 0.005, 0.1, 0.005, 0.1, 0.005]
    amplitude = 0.1 * np.repeat(sizes, [9, 2, 6, 3, 3, 3, 3, 1])
    assert (np.abs(draws) <= amplitude + 1e-12).all()
    assert np.allclose(draws.std(0), amplitude / math.sqrt(3), rtol=0.15)
    low = [-2.9, -1.8, -2.9, -3.1, -2.9, 0, -2.9, 0, 0]
    high = [2.9, 1.8, 2.9, 0, 2.9, 3.8, 2.9, 0.04, 0.04]
    for action, moved in ((3.0, 0.16), (-0.5, -0.08)):  # 3 is as good as 1
        obs, _ = env.reset(seed=0)
        env.step(np.full(9, action))
        assert np.allclose(env.data.ctrl, np.clip(obs[:9] + moved, low, high))


# ---- ant maze ------------------------------------------------------------------------------------
def d4rls_cells(name, mark):
    """(x, y) of cells of d4rl's map, which is read as data: 1 wall, 0 free, r start, g goal."""
    source = ast.parse((o3f.d4rl_dir() / "locomotion/maze_env.py").read_text())
    name = {"umaze": "U_MAZE_TEST", "medium": "BIG_MAZE_TEST", "large": "HARDEST_MAZE_TEST"}[name]
    for node in source.body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            maze = np.array(eval(ast.unparse(node.value), {"R": "r", "G": "g"}), str)
    return 4.0 * (np.argwhere(maze == mark) - np.argwhere(maze == "r"))[:, ::-1]


@pytest.mark.parametrize("name", ["umaze-v2", "medium-play-v2", "large-diverse-v2"])
def test_antmaze_geometry_is_d4rls(name):
    env, maze = o3f.make_env(f"antmaze-{name}"), name.split("-")[0]
    assert env.get_wrapper_attr("_max_episode_steps") == (700 if maze == "umaze" else 1000)
    env, model = env.unwrapped, env.unwrapped.model
    walls = model.geom_type == mujoco.mjtGeom.mjGEOM_BOX
    assert sorted(model.geom_pos[walls][:, :2].tolist()) == sorted(d4rls_cells(maze, "1").tolist())
    assert (model.geom_pos[walls][:, 2] == 1).all()
    assert (model.geom_size[walls] == [2, 2, 1]).all()
    assert (model.nq, model.nv, model.nu) == (15, 14, 8)
    assert (model.opt.timestep, model.opt.integrator) == (0.02, mujoco.mjtIntegrator.mjINT_RK4)
    corner = d4rls_cells(maze, "g")[0]
    for seed in range(20):
        env.reset(seed=seed)
        assert (corner <= env.goal).all() and (env.goal <= corner + 1.5).all()
        assert np.allclose(env.data.site("goal").xpos[:2], env.goal)  # what is drawn is what counts


def test_antmaze_starts_and_goals():
    env, goals, starts = o3f.make_env("antmaze-umaze-diverse-v2").unwrapped, [], []
    for seed in range(2000):
        starts.append(env.reset(seed=seed)[0])
        goals.append(env.goal)
    jitter, mean, variance = goals - np.array([0, 8]), 0.75, 1 / 12 + 1 / 48  # U(0, 1) + U(0, 0.5)
    assert np.abs(jitter.mean(0) - mean).max() < 5 * math.sqrt(variance / 2000)
    assert np.abs(jitter.var(0) - variance).max() < 0.01
    assert 0 <= jitter.min() and jitter.max() <= 1.5
    starts = np.array(starts)
    assert 0.099 < np.abs(starts[:, :3] - [0, 0, 0.75]).max() <= 0.1
    assert starts[:, :3].std(0) == pytest.approx(0.2 / math.sqrt(12), rel=0.1)
    assert starts[:, 15:].std(0) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("distance, paid", [(0.0, 1), (0.4999, 1), (0.5, 1), (0.5001, 0), (3.0, 0)])
def test_antmaze_pays_within_half_a_metre(monkeypatch, distance, paid):
    env = o3f.make_env("antmaze-umaze-v2").unwrapped
    env.reset(seed=0)
    monkeypatch.setattr(o3f.mujoco, "mj_step", lambda *args: None)  # the world stands still
    env.goal = np.array([1.0, 2.0])
    env.data.qpos[:7] = [1.0 + distance, 2.0, 0.75, 0, 1, 0, 0]  # on its back: no end of its own
    _, reward, terminated, truncated, _ = env.step(np.array([-1, -0.5, 0, 0.25, 0.5, 1, 2, -3]))
    assert (reward, terminated, truncated) == (paid, bool(paid), False)
    assert env.data.ctrl.tolist() == [-30, -15, 0, 7.5, 15, 30, 30, -30]


# ---- evaluation ----------------------------------------------------------------------------------
class Script(gym.Env):
    """Shows these observations, pays these rewards; ends truly with the last of them."""

    def __init__(self, observations, rewards):
        self.observations, self.rewards, self.actions = observations, rewards, []

    def reset(self, *, seed=None, options=None):
        self.t, self.seed = 0, seed
        return self.observations[0], {}

    def step(self, action):
        self.actions.append(action)
        self.t += 1
        over = self.t == len(self.rewards)
        return self.observations[self.t], self.rewards[self.t - 1], over, False, {}


def evaluated(env_id, agent, envs, rule=(1.0, 0.0, ()), seed=3, **flags):
    args = o3f.preset(env_id, "iql", **flags)
    return o3f.evaluate(agent, o3f.RewardRule(*rule), o3f.get_task(env_id), seed, args, envs)


def kendall_by_pairs(x, y):
    """SO2's τ of any ten in a row, as a loop over their 45 pairs."""
    pairs = list(itertools.combinations(range(10), 2))
    windows = [(x[k : k + 10], y[k : k + 10]) for k in range(len(x) - 9)]
    return [sum(np.sign((a[i] - a[j]) * (b[i] - b[j])) for i, j in pairs) / 45 for a, b in windows]


def test_evaluation_side_by_side():
    """τ leaves out what a limit cut: γ 0.9, log 0.05/log 0.9, so 28 steps; none at a true end."""
    agent, rng, gamma = made_agent(sizes=(3, 1), dtype=torch.float32), np.random.default_rng(0), 0.9
    envs, taus, by_hand = [], [], []
    for length, limit in ((12, 50), (13, 13), (60, 45), (50, 20)):
        script = Script(np.float32(rng.normal(size=(length + 1, 3))), rng.normal(size=length))
        envs.append(gym.wrappers.TimeLimit(script, limit))
    values = evaluated("Pendulum-v1", agent, envs, (2.0, -1.0, ()), seed=3, gamma=gamma)
    scripts = [env.unwrapped for env in envs]
    assert [env.seed for env in scripts] == [3, 4, 5, 6]
    for env, kept in zip(scripts, (12, 13, 45 - 28, 0)):
        obs, rewards = torch.tensor(env.observations[: env.t]), env.rewards[: env.t]
        actions = torch.tanh(mlp(agent.actor, obs))
        assert torch.allclose(torch.tensor(np.array(env.actions)), actions, atol=1e-6)
        q = q_by_hand(agent.qf, obs, actions).mean(0).tolist()
        trained = 2 * rewards - 1
        to_go = [trained[t:] @ gamma ** np.arange(env.t - t) for t in range(env.t)]
        taus += kendall_by_pairs(q[:kept], to_go[:kept])
        by_hand.append([rewards.sum(), rewards.sum(), env.t, q[0], to_go[0]])
    names = "eval/return eval/score eval/length eval/q_start eval/discounted_return".split()
    expected = dict(zip(names, np.mean(by_hand, 0)))
    expected["eval/score_std"] = np.std(by_hand, 0)[0]
    assert values.pop("eval/kendall_tau") == pytest.approx(np.mean(taus))
    assert values == pytest.approx(expected, rel=1e-4)


def test_kitchen_evaluation():
    """The microwave is open from the second observation on: the second step pays for it."""
    obs = np.tile(kitchen_start(), (4, 1))
    place(obs[1:], "microwave")
    agent = made_agent(sizes=(60, 9), dtype=torch.float32)
    paid = [1.0, 1, 2], [1.0, 0, 2], [0.0, 0, 0], [4.0, 0, 0]
    envs = [Script(np.float32(obs), rewards) for rewards in paid]
    rule = 1.0, 0.0, o3f.TASKS["kitchen-mixed-v0"].targets
    values = evaluated("kitchen-mixed-v0", agent, envs, rule, gamma=0.5)
    assert values["eval/discounted_return"] == pytest.approx(-4 - 0.5 * 3 - 0.25 * 3)
    assert values["eval/success"] == 0.5
    assert values["eval/score"] == pytest.approx(statistics.fmean([100, 75, 0, 100]))
    for env_id, success in (("antmaze-umaze-v2", 0.75), ("hopper-medium-v2", None)):
        assert evaluated(env_id, agent, envs).get("eval/success") == success


# ---- flags, compilation, saved agents ------------------------------------------------------------
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
PAPERS = [  # or ours, as measured: the README has the numbers
    ("halfcheetah-random-v2", "iql", IQLS | dict(offline_ratio=0.5, normalise_adv=True)),
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
def test_presets_are_the_papers(env_id, base, papers):
    args = o3f.preset(env_id, base)
    assert {name: getattr(args, name) for name in papers} == papers
    o3f.prepare(args)
    assert o3f.preset(env_id, base, sigma=0.3).sigma == 0.3


@pytest.mark.parametrize("base", o3f.BASES)
def test_help_explains_every_flag(base, capsys):
    with pytest.raises(SystemExit):
        o3f.parse(["--base", base, "--help"])
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for field in dataclasses.fields(o3f.BASES[base].Flags):
        kind = r"(?:, --no-\S+|[A-Z]+|\[STR.*?\]\]|\{\S+\}(?:\|[A-Z]+)?)"
        flag = field.name.replace("_", "-")
        (words,) = re.findall(rf"--{flag} ?{kind} (.*?) \(default: ", text)
        assert len(words) > 15 and "(default:" not in words  # that of the next flag


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_compiled_updates():
    found = []
    for compiled in (False, True):
        args = o3f.preset("Pendulum-v1", "iql", compile=compiled, hidden_dim=16, batch_size=32)
        torch.manual_seed(0)
        agent = o3f.make_agent(args, made_data(), None, torch.device("cpu"))
        buffer = o3f.ReplayBuffer(made_data(), 1, torch.device("cpu"))
        for utd in [1] * 10 + [3] * 10:
            metrics = agent.update(buffer.sample(args.batch_size, utd))
        found.append(agent.state_dict() | metrics)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("base", ["iql", "lapo", "awac", "so2"])
def test_a_loaded_agent_needs_no_data(base, tmp_path):
    """And what is wrong with Adam's state in a stranger's file corrupts no memory."""
    agent, path = made_agent(base, dtype=torch.float32), tmp_path / "agent.pt"
    batch = o3f.Batch(*(x.float() for x in made_batch()))
    agent.update([batch] * 3)
    o3f.save(path, agent, o3f.RewardRule(1.0, 0.0, ()), 0)
    saved = read_saved(path)
    (group,), adam = saved["optimizer"]["param_groups"], saved["optimizer"]["state"]
    group["amsgrad"] = True
    for i, shape in ((0, adam[0]["exp_avg"].shape), (1, (1,))):  # stride 0, and too small
        adam[i]["exp_avg"] = torch.ones(()).expand(shape)
    torch.save(saved, path)
    loaded = o3f.load_agent(path)
    assert not loaded.optimizer.param_groups[0]["amsgrad"]
    for weight, state in loaded.optimizer.state.items():
        assert state["exp_avg"].is_contiguous() and state["exp_avg"].shape == weight.shape
    obs, actions = batch.observations, batch.actions
    assert torch.equal(agent.q_values(obs, actions), loaded.q_values(obs, actions))
    for sample in (False, True):
        one, other = (x.policy(obs, sample, stream(1)) for x in (agent, loaded))
        assert torch.equal(one, other)


# ---- whole runs ----------------------------------------------------------------------------------
@pytest.mark.parametrize("base", ["iql", "lapo"])
def test_a_run_and_its_files(base, home, capsys):
    assert cli(QUICK + f"--base {base} --run-dir a") == 0
    names = "metrics.csv evaluations.csv episodes.csv config.json agent_offline.pt agent_final.pt"
    for name in [*names.split(), "checkpoint.pt"]:
        assert Path("a", name).stat().st_size > 100
    err = capsys.readouterr().err
    # 25 is no multiple of 7: the last row is written all the same, each a mean over its steps.
    rows, table = read_table("a/metrics.csv"), read_table("a/evaluations.csv")
    assert [int(row["step"]) for row in rows] == [-14, -7, 0, 7, 14, 21, 25]
    assert cli(QUICK + f"--base {base} --log-every 1 --run-dir b") == 0
    each = [float(row["losses/qf"]) for row in read_table("b/metrics.csv")]
    means = [np.mean(part) for part in np.split(each, [1, 8, 15, 22, 29, 36])]
    assert [float(row["losses/qf"]) for row in rows] == pytest.approx(means, rel=1e-4)
    assert [int(row["step"]) for row in table] == [-9, 0, 9, 18, 25]
    assert "eval/score_std" in table[0] and "eval/success" not in table[0]
    episodes = [(row["step"], row["length"]) for row in read_table("a/episodes.csv")]
    assert episodes == [("10", "10"), ("20", "10")]
    config = json.loads(Path("a/config.json").read_text())
    assert (config["base"], config["versions"]["torch"]) == (base, torch.__version__)
    board = EventAccumulator("a")
    board.Reload()
    tags = board.Tags()["scalars"]
    assert {tag.split("/")[0] for tag in tags} == {"eval", "o3f", "train"}
    assert {"eval/score", "o3f/optimism", "train/score", "train/losses/qf"} <= set(tags)
    # Without a terminal no flood, but the time left.
    looks = re.split(r"[\r\n]+", err)
    assert any(re.search(r"offline: .*\d+/15 \[[\d:]+<[\d:]+,.*it/s", look) for look in looks)
    assert len(looks) < 40


def test_a_kitchen_run_without_greek(home, monkeypatch):
    streams = {name: io.TextIOWrapper(io.BytesIO(), "ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    write_hdf5("k.hdf5", **kitchen_columns())
    flags = "--dataset k.hdf5 --online-steps 3 --eval-every 100 --run-dir a"
    assert cli(f"--env-id kitchen-mixed-v0 {TINY} {flags}") == 0
    assert cli("--env-id Ω") == 2
    with pytest.raises(SystemExit, match="0"):
        cli("--help")
    for stream in streams.values():
        stream.flush()
    out, err = (stream.buffer.getvalue().decode("ascii") for stream in streams.values())
    assert "trained on 1?r" in out and "error: --env-id ?" in err
    rows = read_table("a/evaluations.csv")
    assert [int(row["step"]) for row in rows] == [0, 3]
    assert {float(row["eval/success"]) for row in rows} <= {0.0, 1.0}
    assert {float(row["eval/length"]) for row in rows} == {280.0}
    saved = read_saved("a/agent_final.pt")
    assert saved["sizes"] == (60, 9) and saved["rule"] == (1.0, 0.0)


def test_rows_follow_each_other(home):
    """Step 6 is the limit, where s' is not the next start; what is observed is copied, float32."""
    flags = "--reward-transform return_range --online-steps 20 --run-dir a"
    assert cli(LINE + EVERY + flags) == 0
    raw = o3f.read_hdf5(next(Path("data").glob("*.hdf5")))
    starts = np.flatnonzero(raw["observations"][:, 0] == 0)
    assert starts.tolist() == [0, 6, 9, 15, 18, 24, 27, 33, 36, 42, 45, 51, 54]
    returns = [part.sum() for part in np.split(raw["rewards"], starts)[1:]]
    scale = 1000 / np.ptp(returns)
    rows = read_saved("a/checkpoint.pt")["rows"].tolist()
    assert len(rows) == 20
    for (x, episode, _, reward, *successor, end), following in zip(rows, [*rows[1:], None]):
        assert successor == [x + 0.5, episode]
        assert end == (episode % 2 == 1 and x == 1)
        assert reward == pytest.approx(scale * (x + 0.5))  # transformed once
        if following:
            assert following[:2] == ([0, episode + 1] if end or x == 2.5 else successor)
    agent, seen = o3f.load_agent("a/agent_final.pt"), []
    policy = agent.policy
    agent.policy = lambda obs, *rest: seen.append(obs.clone()) or policy(obs, *rest)
    evaluated("O3FLine-v0", agent, [o3f.make_env("O3FLine-v0")])
    assert torch.cat(seen)[:, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    assert seen[0].dtype == torch.float32


def test_seeds_and_independent_streams(home, monkeypatch):
    seeds, explore = set(), o3f.explore_action
    spy = lambda *x: seeds.add(x[3].initial_seed()) or explore(*x)  # noqa: E731
    monkeypatch.setattr(o3f, "explore_action", spy)
    often, optimistic = "--eval-every 4 --eval-episodes 2", "--eval-action explore"
    for name, more in enumerate(("", "--seed 1", often, optimistic)):
        assert cli(QUICK + f"--run-dir {name} {more}") == 0
    for table in ("metrics.csv", "episodes.csv"):
        first, other, *same = (Path(f"{x}/{table}").read_bytes() for x in range(4))
        assert first != other and same == [first, first]
    first, optimistic = (read_table(f"{x}/evaluations.csv")[-1] for x in (0, 3))
    assert first["eval/score"] != optimistic["eval/score"]
    # Two --seed, of which each explores and evaluates with others than it learns with.
    assert len(seeds) == 4 and not seeds & {0, 1} and torch.initial_seed() == 0


def test_offline_one_batch_per_update(home, monkeypatch):
    """And of no online row where --offline-ratio is 1: only the file's rewards are below 0."""
    path = write_hdf5("a.hdf5", **columns_of(rewards=np.full(60, -1.0)))
    updates, update = [], o3f.IQL.update
    monkeypatch.setattr(o3f.IQL, "update", lambda self, x: updates.append(x) or update(self, x))
    monkeypatch.setattr(time, "strftime", lambda form: form)  # both in the same second
    for ratio in (0.5, 1):
        updates.clear()
        flags = f"--dataset {path} --utd 3 --offline-ratio {ratio} --device cpu"
        assert cli(LINE + flags) == 0
        assert [len(batches) for batches in updates] == [1] * 15 + [3] * 25
        online = itertools.chain(*updates[15:])
        assert {(batch.rewards < 0).double().mean().item() for batch in online} == {ratio}
    assert len(list(Path("runs").iterdir())) == 2


SWITCHES = [("iql", "expectile", "linear"), ("iql", "beta", "step"), ("awac", "beta", "linear")]


@pytest.mark.parametrize("base, flag, anneal", SWITCHES)
def test_kappa_and_beta_online(base, flag, anneal, home, monkeypatch):
    loss = {"expectile": "expectile_loss", "beta": "advantage_weights"}[flag]
    seen, function = [], getattr(o3f, loss)

    def spy(*args):
        seen.append(float(args[-1 if flag == "expectile" else 1]))  # a tensor where it moves
        return function(*args)

    monkeypatch.setattr(o3f, loss, spy)
    flags = f"--base {base} --{flag} 0.7 --online-{flag} 0.9 --anneal {anneal} --run-dir a"
    assert cli(QUICK + "--online-steps 5 --device cpu " + flags) == 0
    online = {"step": [0.9] * 5, "linear": [0.74, 0.78, 0.82, 0.86, 0.9]}[anneal]
    assert seen == pytest.approx([0.7] * 15 + online)


def test_the_readmes_notebook_runs(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "o3f", o3f)
    (cells,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(cells, names)
    assert names["action"].shape == (1, 1) and names["optimism"].shape == (1,)
    assert set(names["run"]["scores"]) == {0, 100}
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # a notebook's has no `reconfigure`
    assert cli(LINE) == 0


# ---- killed, stopped, resumed --------------------------------------------------------------------
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
    assert process.returncode == -9, err  # SIGKILL


def test_a_killed_run_resumes_exactly(home):
    flags = PENDULUM + "--utd 2 --offline-steps 80 --online-steps 450 --eval-every 100 "
    assert cli(flags + "--run-dir whole") == 0
    kill_when(flags + EVERY + "--run-dir killed", "killed/metrics.csv", -56)
    assert -57 <= read_saved("killed/checkpoint.pt")["step"] < 0
    kill_when("--resume killed", "killed/metrics.csv", 230)
    assert read_saved("killed/checkpoint.pt")["step"] in (200, 400)
    assert not Path("killed/agent_final.pt").exists()
    assert cli("--resume killed") == 0
    same_run("whole", "killed")


def test_a_run_stopped_at_once_resumes(home, monkeypatch, capsys):
    """Its first checkpoint is that of the start; before it, the same command begins anew."""
    assert cli(QUICK + "--run-dir whole") == 0
    stop(QUICK + '--run-dir "it\'s a"', -5, monkeypatch)
    *_, lost, command = capsys.readouterr().out.splitlines()
    assert lost == "stopped at step -5, saved at -15; to go on:"
    python, _, *flags = shlex.split(command)
    assert python == "python" and flags == ["--resume", "it's a"]
    assert o3f.cli(flags) == 0
    same_run("whole", "it's a")
    Path("b").mkdir()
    for name in (".lock", "config.json", "checkpoint.pt.part"):
        Path("b", name).write_text("")
    assert cli(QUICK + "--run-dir b") == 0
    same_run("whole", "b")
    loading = "--load whole/agent_offline.pt --run-dir "
    assert cli(loading + "loaded") == 0
    stop(loading + "c", 6, monkeypatch)
    assert read_saved("c/checkpoint.pt")["step"] == 0  # where a loaded agent's run starts
    assert cli("--resume c") == 0
    same_run("loaded", "c")


def test_an_ant_mazes_goal_stays(home, monkeypatch):
    """v1 draws it once per environment: of that for training, and of that for evaluation."""
    limit, step, goals = gym.wrappers.TimeLimit, o3f.AntMazeEnv.step, set()

    def spy(self, action):
        goals.add(tuple(self.goal))
        return step(self, action)

    monkeypatch.setattr(gym.wrappers, "TimeLimit", lambda env, steps: limit(env, 20))
    o3f.collect_random("antmaze-umaze-v1", 60, Path("ant.hdf5"))
    monkeypatch.setattr(o3f.AntMazeEnv, "step", spy)
    flags = f"--env-id antmaze-umaze-v1 {TINY} --dataset ant.hdf5 {EVERY} --run-dir a"
    stop(flags, 22, monkeypatch)  # saved at 20, where an episode ends
    first = goals.copy()
    assert len(first) == 2
    goals.clear()
    assert cli("--resume a") == 0
    assert goals == first


def test_resume_refuses_in_one_line(home, monkeypatch, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    stop(QUICK + "--run-dir a", -5, monkeypatch)
    path = Path("a/checkpoint.pt")
    saved, whole = path.read_bytes(), read_saved(path)
    refused("--resume nowhere", "nowhere", "run's folder", "No such file")
    refused("--resume a --sigma 0.1", "the run's own flags")
    refused("--resume a --dataset minari:o/p-v0", "an ID it knows")
    with pytest.raises(SystemExit, match="2"):
        cli("--resume a -seed 3")
    for content in (saved[: len(saved) // 2], b""):
        path.write_bytes(content)
        refused("--resume a", "checkpoint.pt: no agent")
    foreign = {
        "argument 'precision'": whole | {"args": whole["args"] | {"precision": "float32"}},
        "or this is no checkpoint": {x: y for x, y in whole.items() if x != "checksum"},
        "not on cpu, where the run was not": whole | {"streams": [torch.zeros(16).byte()] * 3},
    }
    for words, content in foreign.items():
        torch.save(content, path)
        refused("--resume a", words)
    path.write_bytes(saved)
    with filelock.FileLock("a/.lock"):
        refused("--resume a", "another process is writing there")
    assert path.read_bytes() == saved
    assert cli("--resume a") == 0


def test_resume_from_elsewhere(home, monkeypatch, refused):
    path = write_hdf5("a.hdf5", **columns_of())
    flags = f"--online-steps 18 --dataset {path} --run-dir run"  # an episode ends there
    assert cli(LINE + EVERY + flags) == 0
    Path("other").mkdir()
    monkeypatch.chdir("other")
    assert cli("--resume ../run") == 0
    Path("../a.hdf5").rename("moved.hdf5")
    refused("--resume ../run", "a.hdf5")
    assert cli("--resume ../run --dataset moved.hdf5") == 0
    write_hdf5("moved.hdf5", **columns_of(rewards=np.ones(60)))
    refused("--resume ../run --dataset moved.hdf5", "dataset has changed")


def test_tables_cut_short(home, capsys):
    assert cli(QUICK + EVERY + "--log-every 1 --run-dir run") == 0
    text = Path("run/metrics.csv").read_text()
    Path("run/metrics.csv").write_text(text[: len(text) // 2])  # half a line at its end
    Path("run/episodes.csv").unlink()
    Path("run/mine.csv").write_text("1,2")  # not the run's own
    assert cli("--resume run") == 0
    assert Path("run/metrics.csv").read_text() == text
    assert len(read_table("run/episodes.csv")) == 2 and Path("run/mine.csv").read_text() == "1,2"


def test_run_dir_is_new_or_empty(home, refused):
    write_hdf5("used", **columns_of())
    refused(QUICK + "--run-dir used", "used")
    refused(QUICK + "--run-dir .", ".: not empty")
    Path("empty").mkdir()
    with filelock.FileLock("empty/.lock"):
        refused(QUICK + "--run-dir empty", "another process is writing there")
    assert cli(QUICK + "--run-dir empty") == 0


# ---- loaded agents -------------------------------------------------------------------------------
def test_load_brings_its_flags(home, refused, monkeypatch):
    sizes = "--base lapo --hidden-dim 9 --num-critics 3 --latent-dim 5 --learning-rate 0.01"
    assert cli(f"{QUICK} {sizes} --gamma 0.9 --run-dir a") == 0
    before = json.loads(Path("a/config.json").read_text())
    loading = "--load a/agent_offline.pt --online-steps 3 "
    write_hdf5("b.hdf5", **columns_of(observations=np.zeros((60, 3))))
    assert cli(loading + "--learning-rate 0.005 --dataset b.hdf5 --run-dir b") == 0
    after = json.loads(Path("b/config.json").read_text())
    assert after.pop("pretraining")["learning_rate"] == 0.01
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"load", "online_steps", "learning_rate", "dataset", "run_dir"}
    one, two = (read_saved(f"{x}/agent_final.pt") for x in "ab")
    assert one["rule"] == two["rule"]  # its critics are in that rule's units
    assert [x["optimizer"]["param_groups"][0]["lr"] for x in (one, two)] == [0.01, 0.005]
    assert [row["step"] for row in read_table("b/metrics.csv")] == ["3"]  # no offline phase
    # The same agent, evaluated where the other run switched: the same row.
    assert read_table("a/evaluations.csv")[1] == read_table("b/evaluations.csv")[0]
    # A contradiction is refused before any data is read or collected.
    monkeypatch.setattr(o3f, "load_dataset", lambda *_: pytest.fail("data was read"))
    contradictions = {
        "--env-id hopper-random-v2": "the saved agent has env_id O3FPendulum-v0, this run hopper",
        "--base iql": "the saved agent has base lapo, this run iql",
        "--gamma 0.99": "the saved agent has gamma 0.9, this run 0.99",
        "--reward-transform none": "the saved agent has reward_transform max, this run none",
    }
    for flag, words in contradictions.items():
        refused(loading + flag, words)


def test_load_refuses_what_does_not_fit(home, refused):
    assert cli(QUICK + "--run-dir a") == 0

    class Evil:
        def __reduce__(self):
            return os.mkdir, ("ran",)

    saved = read_saved("a/agent_final.pt")
    saved["agent"]["vf.0.bias"] = torch.zeros(3)
    for name, content in (("evil.pt", Evil()), ("list.pt", [1, 2, 3]), ("weights.pt", saved)):
        torch.save(content, name)
    no_agent, misfit = "no agent (--load) or run", "does not fit"
    rows = {"missing.pt": no_agent, "a": no_agent, "list.pt": no_agent, "evil.pt": no_agent}
    rows |= {"a/agent_final.pt --num-critics 3": misfit, "weights.pt": misfit}
    for name, words in rows.items():
        refused(f"{QUICK} --run-dir b --load {name}", words)
    assert not Path("ran").exists() and not Path("b").exists()  # a stranger's file runs no code


# ---- what goes wrong -----------------------------------------------------------------------------
def test_a_full_disk_costs_a_checkpoint(home, monkeypatch, capsys, refused):
    save = torch.save

    def full_disk(state, path):  # torch hides the OSError
        if ("rows" in state) == checkpoints and state["step"] > -10:
            path.write_bytes(b"some bytes")
            raise RuntimeError("unexpected pos 64 vs 0: No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full_disk)
    checkpoints = True
    assert cli(QUICK + EVERY + "--online-steps 5 --run-dir a") == 0
    out = capsys.readouterr().out
    assert "warning: no checkpoint at step -9" in out and out.count("No space left") == 11
    assert read_saved("a/checkpoint.pt")["step"] == -10 and Path("a/agent_final.pt").exists()
    checkpoints = False  # but an agent's file is what the run was for
    refused(QUICK + "--run-dir b", "No space left")


# By an update of step -7, due for a row of metrics, or of -5, due for a checkpoint alone.
NAN = [("metrics", -7, "losses/qf is nan"), ("metrics", -5, "NaN in the agent")]
NAN += [("weights", -5, "NaN in the agent")]


@pytest.mark.parametrize("what, when, words", NAN)
def test_not_a_number_stops_the_run(what, when, words, home, monkeypatch, refused):
    step, calls = o3f.IQL.step, []

    def poison(self, batch):
        metrics = step(self, batch)
        calls.append(1)
        if len(calls) == when + 15 and what == "metrics":
            metrics["losses/qf"] *= math.nan
        elif len(calls) == when + 15:  # of a slow copy: no metric shows it yet
            next(self.qf_target.parameters()).data.fill_(math.nan)
        return metrics

    monkeypatch.setattr(o3f.IQL, "step", poison)
    refused(QUICK + EVERY + "--device cpu --run-dir a", f"{words} by step {when}")
    saved = read_saved("a/checkpoint.pt")
    assert saved["step"] == when - 1 and all(x.isfinite().all() for x in saved["agent"].values())
    assert not Path("a/agent_final.pt").exists()


def test_a_metric_not_always_there_is_named(home, monkeypatch, refused):
    step = o3f.IQL.step

    def more(self, batch):
        return step(self, batch) | ({"mine": torch.ones(())} if self.online else {})

    monkeypatch.setattr(o3f.IQL, "step", more)
    refused(LINE + "--run-dir a", "mine", "metrics")
    undetached = torch.ones((), requires_grad=True)  # would keep every update's graph
    mine = {"mine": 2.5, "other": undetached}  # and a Python number
    monkeypatch.setattr(o3f.IQL, "step", lambda *x: step(*x) | mine)
    stop(LINE + EVERY + "--run-dir b", -5, monkeypatch)
    assert not read_saved("b/checkpoint.pt")["books"]["sums"].requires_grad
    assert cli("--resume b") == 0
    assert {row["mine"] for row in read_table("b/metrics.csv")} == {"2.5"}


@pytest.mark.parametrize("flags", ["--batch-size 1", "--offline-ratio 0"])
def test_advantages_without_spread(flags, home):
    assert cli(LINE + flags + " --normalise-adv") == 0


def test_out_of_memory_is_a_line(home, monkeypatch, refused):
    monkeypatch.setattr(o3f.IQL, "step", lambda *_: torch.empty(10**15))
    refused(LINE + "--run-dir a", "memory")
    monkeypatch.setattr(o3f.IQL, "step", lambda *_: torch.ones(2) + torch.ones(3))
    with pytest.raises(RuntimeError, match="size of tensor"):
        cli(LINE)


BAD_FLAGS = {
    "--env-id halfchetah-medium-v2": "halfcheetah-medium-v2",
    "--env-id hopper-medium-v0": "hopper-medium-v2",
    "--env-id no_such_module:Line-v0": "cannot make it: No module named 'no_such_module'",
    "--env-id Whole-v0 --dataset random": "real numbers",
    "--env-id Flat-v0 --dataset random": "a finite, larger high",
    "--env-id Endless-v0 --dataset random": "give each a finite low",
    "--env-id Discrete-v0 --dataset random": "noise could be added",
    "--env-id Dict-v0 --dataset random": "FlattenObservation",
    "--env-id Pendulum-v1": "--dataset random",
    "--sigma nan": "sigma nan",
    "--offline-ratio 1.5": "--offline-ratio 1.5: give a number from 0 to 1",
    "--dataset .": "no whole HDF5 file",
    "--device cuda": "use auto",
    "--resume=": "empty",
    "--plot": "empty",
    "--plot nothing": "nothing: no run with an evaluation",
    "--video a.avi": "--video: needs a .gif",
    "--env-id O3FLine-v0 --video a.gif": "an environment with render mode rgb_array",
    "--dataset minari:o/p-v0": "name its environment with --env-id",
    "--env-id Pendulum-v1 --dataset minari:o/p-v0": 'pip install "minari[hdf5,hf]"',
    "--env-id antmaze-umaze-v2": "pip install --no-deps d4rl==1.1",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_get_one_line(flags, home, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "d4rl", None)
    monkeypatch.setitem(sys.modules, "minari", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(o3f, "collect_random", lambda *_: pytest.fail("a run has started"))
    refused(flags, BAD_FLAGS[flags])
    assert not list(home.iterdir())


def test_flags_from_python_become_plain(home):
    Path("random").touch()  # no dataset
    flags = dict(sigma=np.linspace(0, 1, 3)[1], base=np.str_("iql"), run_dir=Path("run"))
    flags |= dict(dataset="random", dataset_size=60, offline_steps=np.int64(2), online_steps=2)
    flags |= dict(hidden_dim=8, batch_size=8, eval_episodes=1, layer_norm=np.True_)
    o3f.main(o3f.IQLArgs("O3FLine-v0", **flags))
    saved = o3f.load_saved("run/agent_final.pt")["args"]
    types = type(saved.sigma), type(saved.offline_steps), type(saved.layer_norm)
    assert types == (float, int, bool)
    wrong = {"sigma": "0.2", "utd": 1.0, "layer_norm": "no", "explore": "best", "run_dir": 3}
    for name, value in wrong.items():
        with pytest.raises(o3f.UserError, match=name.replace("_", "-")):
            o3f.prepare(o3f.preset("O3FLine-v0", "iql", **{name: value}))


# ---- plots ---------------------------------------------------------------------------------------
def write_run(folder, scores: dict, **flags) -> None:
    path = Path(folder)
    path.mkdir(parents=True)
    config = dataclasses.asdict(o3f.IQLArgs(run_dir=folder, **flags))
    config["pretraining"] = {"explore": "o3f"}
    (path / "config.json").write_text(json.dumps(config))
    lines = [f"{step},{score}" for step, score in scores.items()]
    (path / "evaluations.csv").write_text("\n".join(["step,eval/score", *lines, ""]))


def test_plot_has_a_panel_per_task(home, capsys, monkeypatch):
    figures, save = [], Figure.savefig
    keep = lambda figure, path: figures.append(figure) or save(figure, path)  # noqa: E731
    monkeypatch.setattr(Figure, "savefig", keep)
    write_run("runs/b", {-50: 0.0, 0: 10.0, 100: 30.0}, seed=1, resume="runs/b")
    write_run("runs/a", {-50: 0.0, 0: 20.0, 100: 50.0}, seed=0, log_every=3)
    write_run("runs/c", {0: 5.0, 50: 6.0, 100: 7.0}, explore="noise", beta=1.0)
    write_run("runs/d", {0: 5.0}, explore="policy")  # evaluated once
    write_run("more/e", {0: -5.0, 9: -6.0}, env_id="Gone-v1")  # no longer registered
    Path("runs/linked").symlink_to(Path("more").resolve())
    assert cli("--plot runs --plot-to p.svg") == 0
    assert Path("p.svg").read_bytes().startswith(b"<?xml")
    one, other = figures[0].axes
    assert one.get_ylabel() == "halfcheetah-random-v2: score"
    curves = {line.get_label(): line.get_xydata().tolist() for line in one.lines}
    assert curves["o3f, beta 3.0 (seed 0, 1)"] == [[-50, 0], [0, 15], [100, 40]]
    assert curves["noise, beta 1.0 (seed 0)"] == [[0, 5], [50, 6], [100, 7]]
    assert len([label for label in curves if label[0] != "_"]) == 2
    assert other.get_ylabel() == "Gone-v1: score"
    assert other.lines[0].get_label() == "o3f (seed 0)"
    write_run("again[1]", {0: 1.0, 100: 2.0}, seed=1)  # newer
    assert cli("--plot runs again[1]") == 0
    assert "again[1] instead of an older run of seed 1" in capsys.readouterr().out


def test_plot_refuses_in_one_line(home, refused):
    write_run("early", {0: 1.0})
    refused("--plot early", "no run there has two evaluations yet")
    write_run("runs/a", {0: 1.0, 5: 2.0}, seed=3)
    refused("--plot runs --plot-to a.xyz", "a.xyz: cannot be drawn")
    refused("--plot runs typo", "typo: no run")
    write_run("apart", {1: 1.0, 6: 2.0}, seed=4)
    refused("--plot runs apart", "share no step")
    Path("runs/a/config.json").write_text("{")
    refused("--plot runs", "not of a whole run")


# ---- downloads -----------------------------------------------------------------------------------
TASK = "halfcheetah-medium-v2"


@pytest.fixture
def server(home, monkeypatch):
    """d4rl's server and the mirror as /main/ and /mirror/: {path: (body, length)}, paths asked."""
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

        log_message = print  # not to stderr

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{listener.server_port}"
    Path("d4rl/locomotion").mkdir(parents=True)
    Path("d4rl/infos.py").write_text(f"DATASET_URLS = {{'{TASK}': '{url}/main/cheetah.hdf5'}}\n")
    ants = [f"id='antmaze-umaze-v{x}', dataset_url='{url}/main/ant{x}.hdf5'" for x in (0, 1)]
    Path("d4rl/locomotion/__init__.py").write_text("\n".join(ants))
    monkeypatch.setattr(o3f, "MIRROR", f"{url}/mirror")
    monkeypatch.setattr(o3f, "d4rl_dir", lambda: Path("d4rl"))
    yield served, asked
    listener.shutdown()
    listener.server_close()


PAIRS = [("whole", "whole"), ("error page", "whole"), ("cut", "whole"), ("half", "error page")]


@pytest.mark.parametrize("main, mirror", PAIRS)
def test_a_download_is_whole_or_not_there(main, mirror, server, home):
    served, asked = server
    body = write_hdf5(home / "c.hdf5", **columns_of()).read_bytes()
    answers = {"whole": (body, len(body)), "half": (body[:5000], 5000)}
    answers["error page"] = b"<html>moved</html>", 18  # that says 200
    answers["cut"] = body[:-500], len(body)  # the connection breaks off
    served |= {"/main/cheetah.hdf5": answers[main], "/mirror/cheetah.hdf5": answers[mirror]}
    args, path = o3f.preset(TASK, "iql"), Path("data/cheetah.hdf5")
    if "whole" in (main, mirror):
        for _ in range(2):  # the second time from the cache
            assert o3f.find_file(args) == path and path.read_bytes() == body
    else:
        with pytest.raises(o3f.UserError, match="cheetah.hdf5 cannot be downloaded, use --dataset"):
            o3f.find_file(args)
    assert asked == ["/main/cheetah.hdf5", "/mirror/cheetah.hdf5"][: 1 + (main != "whole")]
    assert list(Path("data").iterdir()) == [path] * ("whole" in (main, mirror))


def test_a_failed_download(server, refused):
    words = "cheetah.hdf5 cannot be downloaded", "/main/cheetah.hdf5", "/mirror/cheetah.hdf5", "404"
    refused(f"--env-id {TASK} --run-dir a", *words)
    assert not Path("a").exists()
    # Version 1 of an ant maze has its URL from d4rl's registration.
    args = o3f.preset("antmaze-umaze-v1", "iql")
    with pytest.raises(o3f.UserError, match="ant1.hdf5 cannot be downloaded"):
        o3f.find_file(args)
    assert server[1][-2:] == ["/main/ant1.hdf5", "/mirror/ant1.hdf5"]
    Path("data/ant1.hdf5").touch()  # a user's, in whatever state, stays
    assert o3f.find_file(args).is_file()


# ---- Minari's datasets ---------------------------------------------------------------------------
def write_minari(name, env_spec, action_space, observation_space, episodes):
    """Minari's format on disk, as its package 0.5 writes it (that needs jax)."""
    from minari.serialization import serialize_space

    folder = Path("minari", name, "data")
    folder.mkdir(parents=True)
    with h5py.File(folder / "main_data.hdf5", "w") as file:
        for i, episode in enumerate(episodes):
            group = file.create_group(f"episode_{i}")
            group.attrs.update(id=i, total_steps=len(episode["rewards"]))
            group.create_group("infos")
            for path, values in episode.items():
                group[path] = values
    about = dict(total_steps=sum(len(x["rewards"]) for x in episodes), data_format="hdf5")
    about |= dict(total_episodes=len(episodes), jpeg_encoding=True, env_spec=env_spec.to_json())
    about |= dict(observation_space=serialize_space(observation_space), dataset_id=name)
    about |= dict(action_space=serialize_space(action_space), minari_version="0.5.3")
    (folder / "metadata.json").write_text(json.dumps(about))


def made_episode(steps, actions, terminated, observations):
    """observations: {path in the file: values}."""
    ends = np.arange(steps) == steps - 1
    episode = dict(actions=np.float32(actions), rewards=np.arange(steps) / 10)
    episode |= dict(terminations=ends & terminated, truncations=ends & ~np.bool_(terminated))
    return episode | observations


@pytest.fixture
def minari(home, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(home / "minari"))
    return pytest.importorskip("minari", reason="minari is not installed")


def test_a_flat_minari_dataset_trains(minari, capsys, refused):
    rng, episodes = np.random.default_rng(3), []
    for steps, terminated in ((30, False), (20, True)):
        obs = dict(observations=rng.normal(size=(steps + 1, 3)).astype(np.float32))
        episodes.append(made_episode(steps, rng.uniform(-2, 2, (steps, 1)), terminated, obs))
    spec, space = gym.spec("Pendulum-v1"), gym.spaces.Box(-8, 8, (3,), np.float32)
    for name, largest in (("o/p-v0", 2), ("o/endless-v0", np.inf)):
        write_minari(name, spec, gym.spaces.Box(-largest, largest, (1,)), space, episodes)
    assert cli(PENDULUM + "--dataset minari:o/p-v0 --online-steps 5 --run-dir a") == 0
    assert "data: minari:o/p-v0, 50 rows" in capsys.readouterr().out
    data, _ = load("Pendulum-v1", "minari:o/p-v0", reward_transform="none")
    # By hand: a true end keeps its row, a time limit does not (its next row is another episode's).
    one, two = episodes
    by_hand = {x: np.concatenate([one[x][:29], two[x][:20]]) for x in ("rewards", "observations")}
    actions = np.concatenate([one["actions"][:29], two["actions"]]) / 2
    by_hand["actions"] = actions.clip(-1 + 1e-5, 1 - 1e-5)
    for name, column in by_hand.items():
        assert np.allclose(data[name], column)
    after = np.concatenate([one["observations"][1:30], two["observations"][1:20]])
    assert np.allclose(data["next_observations"][:-1], after)  # nothing is asked after the end
    refused("--env-id Hopper-v4 --dataset minari:o/p-v0", "shape (50, 3), needs (50, 11)")
    for name, words in (("endless", "its actions are in Box"), ("none", "an ID it knows")):
        refused(f"--env-id Pendulum-v1 --dataset minari:o/{name}-v0", words)


def test_minaris_kitchen_becomes_d4rls_columns(minari):
    rng, goal = np.random.default_rng(4), o3f.make_env("kitchen-mixed-v0").unwrapped.goal
    states, episodes = rng.normal(size=(2, 13, 59)), []
    states[:, :, 18:39] = kitchen_start()[9:30]
    states[:, 5:, 18 + 22 - 9] = -0.75  # the microwave is open from step 5 on
    for state in states:
        observed = {"observations/observation": state, "observations/desired_goal": state[:, :1]}
        episodes.append(made_episode(12, rng.uniform(-1, 1, (12, 9)), False, observed))
    box, one = (gym.spaces.Box(-np.inf, np.inf, (n,), np.float64) for n in (59, 1))
    space = gym.spaces.Dict(observation=box, desired_goal=one)
    spec = gym.envs.registration.EnvSpec("FrankaKitchen-v1", "gymnasium_robotics:KitchenEnv")
    actions = gym.spaces.Box(-1, 1, (9,), np.float64)
    write_minari("D4RL/kitchen/mixed-v2", spec, actions, space, episodes)
    satisfied = np.tile(np.repeat([0.0, 1.0], [5, 6]), 2)  # the last row of each was a time limit
    for kind, rewards in (("consistent", satisfied - 4), ("stock", satisfied)):
        data, _ = load("kitchen-mixed-v0", "minari:D4RL/kitchen/mixed-v2", kitchen_rewards=kind)
        assert np.array_equal(data["rewards"], rewards)
        joints = np.concatenate([states[:, :11, :9], states[:, :11, 18:39]], 2)
        assert np.allclose(data["observations"][:, :30], joints.reshape(22, 30))
        assert np.allclose(data["observations"][:, 30:], goal)


# ---- films ---------------------------------------------------------------------------------------
def test_video_of_a_robot_moves(home):
    library = next(filter(ctypes.util.find_library, ("EGL", "OSMesa")), None)
    if library is None:
        pytest.skip("nothing here draws without a screen")
    flags = "--env-id Hopper-v4 --online-steps 0 --video films/a.gif --run-dir a"
    command = [sys.executable, str(HERE / "o3f.py"), *(TINY + flags).split()]
    environment = os.environ | dict(MUJOCO_GL=library.lower())
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    frames = imageio.imread("films/a.gif").astype(float)
    assert len(frames) > 1 and np.abs(frames[0] - frames[-1]).mean() > 1


class Painter(Line):
    """A picture's red tells the action, its green the step, its blue the seed of the episode."""

    metadata = {"render_modes": ["rgb_array"]}

    def step(self, action):
        obs, reward, _, *rest = super().step(action)
        return obs, reward, abs(action[0]) == 1 and obs[0] == 3, *rest  # the limit is 12

    def render(self):
        red, blue = int(100 + 100 * self.action[0]), self.np_random_seed % 250
        return np.full((48, 64, 3), [red, 40 * self.x[0], blue], np.uint8)


gym.register("O3FPainter-v0", Painter, max_episode_steps=12, kwargs=dict(low=-1, high=1))


def test_a_film_shows_policy_and_explore(home):
    """With so much noise all actions are -1 or 1, and its episode ends at step 6."""
    flags = "--explore noise --sigma 1e6 --video films/a.gif --run-dir a"
    assert cli(f"--env-id O3FPainter-v0 {TINY} {flags}") == 0
    pictures = imageio.imread("films/a.gif")[:, 5].astype(float)  # every fourth of 13
    left, right = pictures[:, 5], pictures[:, -5]
    before = torch.tensor([[1.5, 0], [3.5, 0], [5.5, 0]])  # what was seen before each
    actions = o3f.load_agent("a/agent_final.pt").policy(before, sample=False)[:, 0]
    near = dict(abs=8)  # a gif's colours
    assert left[1:, 0] == pytest.approx((100 + 100 * actions).tolist(), **near)
    assert left[:, 1] == pytest.approx([0, 80, 160, 240], **near)
    assert np.abs(right[1:, 0] - 100) == pytest.approx([100] * 3, **near)
    assert right[:, 1] == pytest.approx([0, 80, 80, 80], **near)  # waits, finished
    assert np.ptp(pictures[..., 2]) < 16  # the same seed


# ---- recorded updates: CUDA graphs on a GPU, elsewhere a tape in their place ---------------------
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
RECORDED = {
    "iql": "--online-expectile 0.9 --anneal linear --actor-dropout 0.1 --utd 2 --offline-ratio 0.5",
    "awac": "--online-beta 2 --anneal linear --actor-dropout 0.1",
    "lapo": "--utd 2 --offline-ratio 0.5",
    "so2": "--utd 2 --omega 1",
}
RUNS = [f"--base {base} {RECORDED.get(base, '')}" for base in o3f.BASES]  # a fork's, too
EXPLORE = get_args(get_type_hints(o3f.Args)["explore"])


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


def taped(fn, device, *generators):
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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("flags", RUNS + [f"--explore {x}" for x in EXPLORE])
def test_recorded_runs_are_the_eager_ones_and_resume(flags, device, home, monkeypatch, capsys):
    """Bit by bit on a GPU too: the same kernels in the same order, at the same Philox offsets."""
    if device == "cpu":
        monkeypatch.setattr(o3f, "recorded", taped)
    line = f"{QUICK}{flags} --device {device} --run-dir "
    assert cli(line + "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(o3f, "recorded", lambda fn, *_: fn)
        assert cli(line + "eager") == 0
    same_run("whole", "eager")
    stop(line + "a " + EVERY, -5, monkeypatch)
    assert read_saved("a/checkpoint.pt")["step"] == -5
    stop("--resume a", 18, monkeypatch)  # both in replays; online it saves between episodes
    assert "stopped at step 18, saved at 10" in capsys.readouterr().out
    assert read_saved("a/checkpoint.pt")["step"] == 10
    assert cli("--resume a") == 0
    same_run("whole", "a")


@pytest.mark.parametrize("flags", RUNS)
def test_what_is_recorded_meets_no_other_device(flags, monkeypatch):
    """`meta` for a GPU (Adam knows none): no value to read; a tensor of the CPU shows on the tape."""
    monkeypatch.setattr(o3f.Base, "descend", lambda _, loss, x: loss.backward(inputs=list(x)))
    args, meta = o3f.parse(f"{QUICK}{flags}".split()), torch.device("meta")
    agent = o3f.BASES[args.base](args, 7, 3).to(meta)
    agent.see_dataset(made_data())
    buffer, tape = o3f.ReplayBuffer(made_data(), 1, meta), Tape()
    for agent.online, ratio in ((False, None), (True, 0.5)):
        with tape:
            agent.update(buffer.sample(16, 2, ratio))
            for args.explore in EXPLORE:
                o3f.explore_action(agent, torch.zeros(1, 7, device=meta), args)
    found = [x.device.type for x in tree_leaves(tape.calls) if isinstance(x, torch.Tensor)]
    assert set(found) == {"meta"} and len(found) > 1000


@needs_gpu
@pytest.mark.parametrize("one, other", [("cpu", "cuda"), ("cuda", "cpu")])
def test_an_agent_goes_on_on_the_other_device(one, other, home):
    assert cli(f"{QUICK}--device {one} --run-dir a") == 0
    assert cli(f"--load a/agent_final.pt --device {other} --run-dir b") == 0
    x, y = (o3f.load_agent("a/agent_final.pt", device) for device in (one, other))
    x, y = ([x.state_dict(), x.optimizer.state_dict()["state"]] for x in (x, y))
    torch.testing.assert_close(x, y, rtol=0, atol=0, check_device=False)
