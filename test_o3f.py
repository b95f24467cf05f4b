"""Tests of o3f.py: closed forms in float64, brute-force loops, D4RL's files and episodes, whole runs."""

import ast
import copy
import csv
import dataclasses
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import re
import resource
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
    data = {
        "observations": obs,
        "actions": rng.uniform(-0.2, 0.9, (rows, act_dim)),
        "rewards": rng.normal(size=rows),
        "next_observations": rng.normal(size=(rows, obs_dim)),
        "terminations": np.zeros(rows),
    }
    return {name: x.astype(np.float32) for name, x in (data | changes).items()}


def a_draws(seed):
    return torch.Generator().manual_seed(seed)


def a_tensor(values, **kwargs):
    return torch.tensor(values, dtype=torch.float64, **kwargs)


def a_agent(base="iql", sizes=(7, 3), dtype=torch.float64, data=None, **flags):
    args = o3f.preset("Pendulum-v1", base, **(dict(hidden_dim=16) | flags))
    agent = o3f.BASES[base](args, *sizes).to(dtype)
    agent.see_dataset(data or a_data(50, *sizes))
    return agent


def a_batch(size=32, seed=1):
    draw = a_draws(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    ends = (torch.rand(size, generator=draw) < 0.3).double()
    actions = normal(size, 3).clamp(-0.9, 0.9)
    return o3f.Batch(normal(size, 7), actions, normal(size), normal(size, 7), ends)


def a_layers(net):
    return [layer for layer in net if hasattr(layer, "weight")]


def a_mlp(x, weights, biases):
    """A ReLU network by matrix products; weights (in, out)."""
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        x = x @ weight + bias
        if i < len(weights) - 1:
            x = x.clamp(min=0.0)
    return x


def a_net(net, *x):
    layers = a_layers(net)
    weights = [layer.weight.T for layer in layers]
    return a_mlp(torch.cat(x, 1), weights, [layer.bias for layer in layers])


def a_critic(critics, j, obs, actions):
    layers = a_layers(critics.net)
    weights = [layer.weight[j] for layer in layers]
    biases = [layer.bias[j, 0] for layer in layers]
    return a_mlp(torch.cat([obs, actions], 1), weights, biases).squeeze(1)


def a_adam_step(params, loss, lr):
    """The weights after Adam's first step: its moments are g and g², so -lr·g/(|g| + 1e-8)."""
    params = list(params)
    grads = torch.autograd.grad(loss, params, retain_graph=True)
    return [p - lr * g / (g.abs() + 1e-8) for p, g in zip(params, grads)]


def a_same(module, expected, atol=1e-10):
    for weight, by_hand in zip(module.parameters(), expected, strict=True):
        assert torch.allclose(weight, by_hand, rtol=0, atol=atol)


# ---- losses --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kappa", [0.5, 0.7, 0.9])
def test_expectile_loss_and_its_gradient(kappa):
    u = a_tensor([-2.0, -0.5, 0.25, 3.0], requires_grad=True)
    weights = [1 - kappa, 1 - kappa, kappa, kappa]
    loss = o3f.expectile_loss(u, kappa)
    loss.backward()
    assert loss.item() == pytest.approx(sum(w * x * x for w, x in zip(weights, u.tolist())) / 4)
    assert u.grad.tolist() == pytest.approx([2 * w * x / 4 for w, x in zip(weights, u.tolist())])


def test_td_target_stops_at_true_ends_only():
    rewards, ends, next_v = torch.tensor([[1.0, 1.0], [0.0, 1.0], [10.0, 10.0]])
    assert o3f.td_target(rewards, ends, next_v, 0.9).tolist() == pytest.approx([10.0, 1.0])


def test_ensemble_mse_gives_each_critic_the_gradient_it_has_alone():
    q = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    y = torch.randn(8, dtype=torch.float64)
    o3f.ensemble_mse(q, y).backward()
    for j in range(5):
        alone = [2 * (q[j, b].item() - y[b].item()) / 8 for b in range(8)]
        assert q.grad[j].tolist() == pytest.approx(alone)


def test_advantage_weights():
    adv = a_tensor([-1.0, 0.0, 1.0, 1000.0])
    expected = [math.exp(-3), 1.0, math.exp(3), 100.0]
    assert o3f.advantage_weights(adv, 3.0, 100.0).tolist() == pytest.approx(expected)
    assert o3f.advantage_weights(adv, 0.0, 100.0).tolist() == [1.0] * 4


def test_kl_against_pytorchs():
    mean, log_var = torch.randn(2, 9, 4).double()
    normal = torch.distributions.Normal
    mine, standard = normal(mean, (0.5 * log_var).exp()), normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(mine, standard).sum(1)
    assert torch.allclose(o3f.kl_to_standard_normal(mean, log_var), expected)


@pytest.mark.parametrize("lam", [1.0, 0.7, 0.0])
def test_mixed_q_against_sorting(lam):
    q = torch.randn(3, 8).double()
    columns = [sorted(column) for column in q.T.tolist()]
    expected = [lam * column[0] + (1 - lam) * column[-1] for column in columns]
    assert o3f.mixed_q(q, lam).tolist() == pytest.approx(expected)


def test_polyak():
    slow, fast = torch.nn.Linear(3, 2).double(), torch.nn.Linear(3, 2).double()
    pairs = zip(slow.parameters(), fast.parameters())
    expected = [0.995 * np.array(a.tolist()) + 0.005 * np.array(b.tolist()) for a, b in pairs]
    o3f.polyak_(slow, fast, 0.005)
    a_same(slow, map(torch.tensor, expected), atol=1e-15)


# ---- networks ------------------------------------------------------------------------------------
def test_batched_critics_are_separate_mlps():
    """Values and gradients of every member, against a network of nn.Linear that stands alone."""
    critics = o3f.Critics(7, 3, 5, [16, 16]).double()
    obs, actions, y = (torch.randn(9, n).double() for n in (7, 3, 1))
    y = y.squeeze(1)
    q = critics(obs, actions)
    assert q.shape == (5, 9)
    o3f.ensemble_mse(q, y).backward()
    for j in range(5):
        sizes, layers = [(10, 16), (16, 16), (16, 1)], a_layers(critics.net)
        alone = [torch.nn.Linear(*size).double() for size in sizes]
        for mine, theirs in zip(layers, alone, strict=True):
            theirs.weight.data = mine.weight[j].T.detach().clone()
            theirs.bias.data = mine.bias[j, 0].detach().clone()
        x = torch.cat([obs, actions], 1)
        x = alone[2](torch.relu(alone[1](torch.relu(alone[0](x))))).squeeze(1)
        assert torch.allclose(q[j], x, rtol=0, atol=1e-12)
        ((x - y) ** 2).mean().backward()
        for mine, theirs in zip(layers, alone):
            assert torch.allclose(mine.weight.grad[j].T, theirs.weight.grad, rtol=0, atol=1e-12)
            assert torch.allclose(mine.bias.grad[j, 0], theirs.bias.grad, rtol=0, atol=1e-12)


def test_asking_some_critics_is_picking_them():
    agent, batch = a_agent("lapo"), a_batch()
    some = agent.qf.ask(batch.observations, batch.actions, torch.tensor([3, 0]))
    for row, j in zip(some, (3, 0), strict=True):
        assert torch.allclose(row, a_critic(agent.qf, j, batch.observations, batch.actions))


def test_iql_starts_orthogonal_with_gain_root_two_and_members_that_differ():
    agent = a_agent(dtype=torch.float32)
    for net in (agent.vf, agent.actor.net, agent.qf.net):
        for layer in a_layers(net):
            assert layer.bias.abs().max() == 0
            for w in layer.weight.detach().view(-1, *layer.weight.shape[-2:]):
                gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
                assert torch.allclose(gram, 2 * torch.eye(len(gram)), atol=1e-5)
    first = agent.qf.net[0].weight
    assert len({tuple(w.flatten().tolist()) for w in first}) == 5
    a_same(agent.qf_target, agent.qf.parameters(), atol=0)


def test_lapo_starts_as_pytorch_does():
    """Weights and biases are U(±1/√in), std 1/√(3·in); three hidden layers; members that differ."""
    agent = a_agent("lapo", hidden_dim=64, dtype=torch.float32)
    for net in (agent.vf, agent.qf.net, agent.encoder, agent.decoder, agent.actor):
        assert len(a_layers(net)) == 4
        for layer in a_layers(net):
            bound = layer.weight.shape[1] ** -0.5  # (out, in) or (m, in, out): in, both times
            for x in (layer.weight, layer.bias):
                assert x.abs().max() <= bound
            if layer.weight.numel() > 1000:
                assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
                assert layer.bias.std().item() == pytest.approx(bound / 3**0.5, rel=0.35)
    assert len({tuple(w.flatten().tolist()) for w in agent.qf.net[0].weight}) == 5


# ---- IQL -----------------------------------------------------------------------------------------
def test_iql_update_against_the_formulas():
    """In order: V on the slow critics; actor and critics on the new V; then the slow copies."""
    kappa, beta, limit, gamma, tau, lr = 0.7, 0.5, 0.4, 0.97, 0.01, 3e-4
    agent = a_agent(beta=beta, exp_adv_max=limit, gamma=gamma, tau=tau)
    s, a, r, s2, d = batch = a_batch()
    with torch.no_grad():  # slow copies and standard deviations that differ
        for weight in agent.qf_target.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
        agent.actor.log_std.copy_(torch.tensor([-0.3, 0.1, 0.4]))
    old = copy.deepcopy(agent)

    target_q = torch.stack([a_critic(old.qf_target, j, s, a) for j in range(5)]).min(0).values
    u = target_q - a_net(old.vf, s).squeeze(1)
    vf_loss = torch.where(u < 0, (1 - kappa) * u * u, kappa * u * u).mean()
    new_v = a_adam_step(old.vf.parameters(), vf_loss, lr)

    def value(x):
        return a_mlp(x, [w.T for w in new_v[::2]], new_v[1::2]).squeeze(1).detach()

    adv = target_q - value(s)
    weight = a_tensor([min(math.exp(beta * x), limit) for x in adv.tolist()])
    assert (weight == limit).any() and (weight < limit).any()
    mean, std = torch.tanh(a_net(old.actor.net, s)), old.actor.log_std.exp()
    log_prob = -((a - mean) ** 2) / (2 * std**2) - torch.log(std * math.sqrt(2 * math.pi))
    actor_loss = -(weight * log_prob.sum(1)).mean()
    y = r + gamma * (1 - d) * value(s2)
    q = torch.stack([a_critic(old.qf, j, s, a) for j in range(5)])
    qf_loss = sum(((q[j] - y) ** 2).mean() for j in range(5))
    new_q = a_adam_step(old.qf.parameters(), qf_loss, lr)

    metrics = agent.update([batch])
    a_same(agent.vf, new_v)
    a_same(agent.actor, a_adam_step(old.actor.parameters(), actor_loss, lr))
    a_same(agent.qf, new_q)
    pairs = zip(old.qf_target.parameters(), new_q)
    a_same(agent.qf_target, [(1 - tau) * slow + tau * new for slow, new in pairs])
    expected = {
        "losses/vf": vf_loss,
        "losses/qf": qf_loss / 5,
        "losses/actor": actor_loss,
        "q_mean": q.mean(),
        "q_std": q.std(0, correction=0).mean(),
        "v_mean": value(s).mean(),
        "adv_weight": weight.mean(),
        "policy_std": std.mean(),
    }
    assert metrics.keys() == expected.keys()
    for name, by_hand in expected.items():
        assert metrics[name].item() == pytest.approx(by_hand.item()), name


def test_dropout_acts_in_updates_and_nowhere_else():
    batch, losses = a_batch(), []
    for rate in (0.0, 0.5):
        torch.manual_seed(0)
        agent = a_agent(actor_dropout=rate)
        losses.append(agent.update([batch])["losses/actor"].item())
        mean = torch.tanh(a_net(agent.actor.net, batch.observations))
        assert torch.allclose(agent.policy(batch.observations, sample=False), mean)
    assert losses[0] != losses[1]


def test_policy_samples_are_the_clipped_gaussian():
    agent, n = a_agent(), 20_000
    with torch.no_grad():
        agent.actor.log_std.fill_(math.log(0.1))
        for weight in agent.actor.net.parameters():
            weight.mul_(0.1)
    obs = torch.randn(1, 7).double().expand(n, 7)
    mean = torch.tanh(a_net(agent.actor.net, obs[:1]))[0]
    draws = agent.policy(obs, sample=True, generator=a_draws(0))
    assert torch.allclose(draws.mean(0), mean, atol=5 * 0.1 / math.sqrt(n))
    assert torch.allclose(draws.std(0), torch.full((3,), 0.1).double(), rtol=0.03)
    with torch.no_grad():
        agent.actor.log_std.copy_(torch.tensor([5.0, -9.0, 0.5]))
    assert agent.actor(obs[:1])[1].tolist() == [2.0, -5.0, 0.5]
    assert agent.policy(obs, sample=True).abs().max() == 1.0


# ---- LAPO ----------------------------------------------------------------------------------------
def a_statistics():
    """Mean and std of a_data's observations and actions, column by column."""
    data, found = a_data(), []
    for x in (data["observations"].tolist(), data["actions"].tolist()):
        mean = [statistics.fmean(column) for column in zip(*x)]
        std = [statistics.pstdev(column) for column in zip(*x)]
        found.append(a_tensor(mean))
        found.append(a_tensor([s + 1e-6 if s > 1e-6 else 1.0 for s in std]))
    return found


@pytest.mark.parametrize("lam, clamp", [(1.0, "none"), (0.7, "discounted"), (0.7, "once")])
def test_lapo_update_against_the_formulas(lam, clamp):
    """Critics and V, CVAE, latent policy, each from its own loss alone; then the slow copies."""
    gamma, tau, lr, m = 0.99, 0.005, 2e-4, 5
    agent = a_agent("lapo", doubleq_min=lam, value_clamp=clamp)
    batch = a_batch()
    with torch.no_grad():  # slow copies that differ; slow values beyond the limits of "once"
        for net in (agent.qf_target, agent.decoder_target, agent.actor_target):
            for weight in net.parameters():
                weight.add_(0.3 * torch.randn_like(weight))
        agent.qf_target.net[-1].weight.mul_(30.0)
    old = copy.deepcopy(agent)
    obs_mean, obs_std, act_mean, act_std = a_statistics()
    assert obs_std[-1] == 1.0  # the constant feature
    s, s2 = ((x - obs_mean) / obs_std for x in (batch.observations, batch.next_observations))
    a, r, d = (batch.actions - act_mean) / act_std, batch.rewards, batch.terminations
    torch.manual_seed(11)
    members = torch.randperm(m)[:2].tolist()
    latent_noise = torch.randn(32, 6).double()
    cvae_noise = torch.randn(32, 6, dtype=torch.float64)

    def mix(obs, actions):
        columns = zip(*(a_critic(old.qf_target, j, obs, actions) for j in members))
        return torch.stack([lam * min(x) + (1 - lam) * max(x) for x in columns]).detach()

    # 1. critics and V
    z = 2 * torch.tanh(a_net(old.actor_target, s)) + (0.1 * latent_noise).clamp(-0.2, 0.2)
    v_target = mix(s, a_net(old.decoder_target, s, z))
    scale = {"discounted": 100.0, "once": 1.0, "none": math.inf}[clamp]
    rewards = [0.0, *a_data()["rewards"].tolist(), *r.tolist()]
    low, high = scale * min(rewards), scale * max(rewards)
    assert clamp != "once" or v_target.min() < low or v_target.max() > high
    v_target = v_target.clamp(low, high)
    y = r + gamma * (1 - d) * a_net(old.vf, s2).squeeze(1).detach()
    vf_loss = ((a_net(old.vf, s).squeeze(1) - v_target) ** 2).mean()
    qf_loss = sum(((a_critic(old.qf, j, s, a) - y) ** 2).mean() for j in range(m))
    new_q = a_adam_step(old.qf.parameters(), qf_loss, lr)
    new_v = a_adam_step(old.vf.parameters(), vf_loss, lr)
    # 2. CVAE, with the new V and the slow critics of before
    v = a_mlp(s, [w.T for w in new_v[::2]], new_v[1::2]).squeeze(1).detach()
    next_z = 2 * torch.tanh(a_net(old.actor_target, s2))
    adv = r + gamma * (1 - d) * mix(s2, a_net(old.decoder_target, s2, next_z)) - v
    assert (adv > 0).any() and (adv < 0).any()
    weight = a_tensor([0.9 if x > 0 else 0.1 for x in adv.tolist()])
    mu, log_var = a_net(old.encoder, s, a).split(6, 1)
    decoded = a_net(old.decoder, s, mu + torch.exp(log_var / 2) * cvae_noise)
    kl = -0.5 * (1 + log_var - mu**2 - log_var.exp()).sum(1)
    cvae_loss = (weight * (((decoded - a) ** 2).sum(1) + kl)).mean()
    # 3. latent policy: the mean of the new critics, through the slow decoder
    action = a_net(old.decoder_target, s, 2 * torch.tanh(a_net(old.actor, s)))
    actor_loss = 0.0
    for j in range(m):
        weights, biases = [w[j] for w in new_q[::2]], [b[j, 0] for b in new_q[1::2]]
        actor_loss -= a_mlp(torch.cat([s, action], 1), weights, biases).mean() / m

    new = {"qf": new_q, "vf": new_v}
    new["encoder"] = a_adam_step(old.encoder.parameters(), cvae_loss, lr)
    new["decoder"] = a_adam_step(old.decoder.parameters(), cvae_loss, lr)
    new["actor"] = a_adam_step(old.actor.parameters(), actor_loss, lr)
    torch.manual_seed(11)
    metrics = agent.update([batch])
    for name, expected in new.items():
        a_same(getattr(agent, name), expected, atol=1e-8)
    for name in ("qf", "decoder", "actor"):
        pairs = zip(getattr(old, f"{name}_target").parameters(), new[name])
        expected = [(1 - tau) * slow + tau * fast for slow, fast in pairs]
        a_same(getattr(agent, f"{name}_target"), expected, atol=1e-8)
    expected = {
        "losses/qf": qf_loss / m,
        "losses/vf": vf_loss,
        "losses/cvae": cvae_loss,
        "losses/actor": actor_loss,
        "adv": adv.mean(),
        "kl": kl.mean(),
    }
    for name, by_hand in expected.items():
        assert metrics[name].item() == pytest.approx(by_hand.item()), name


def test_lapo_subset_is_drawn_anew_and_evenly():
    """Slow critics say 1, 2, 4, 8, 16 and V says 0: V's loss tells which two were asked."""
    flags = dict(doubleq_min=0.5, value_clamp="none", learning_rate=0.0, tau=0.0)
    agent, batch, n = a_agent("lapo", **flags), a_batch(4), 600
    with torch.no_grad():
        for net in (agent.qf_target, agent.vf):
            for weight in net.parameters():
                weight.zero_()
        agent.qf_target.net[-1].bias[:, 0, 0] = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
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
    for smallest, largest in ((-2.0, -2.0), (-5.0, 3.0)):
        assert agent.v_min.item() == pytest.approx(scale * low)
        assert agent.v_max.item() == pytest.approx(scale * high)
        rewards = torch.linspace(smallest, largest, 32).double()
        agent.update([batch._replace(rewards=rewards)])
        low, high = min(low, smallest), max(high, largest)
    assert agent.v_min.item() == pytest.approx(scale * -5.0)
    assert agent.v_max.item() == pytest.approx(scale * 3.0)


def test_lapo_speaks_environment_units():
    agent, raw = a_agent("lapo"), a_batch()
    obs_mean, obs_std, act_mean, act_std = a_statistics()
    s, a = (raw.observations - obs_mean) / obs_std, (raw.actions - act_mean) / act_std
    q = torch.stack([a_critic(agent.qf, j, s, a) for j in range(5)])
    assert torch.allclose(agent.q_values(raw.observations, raw.actions), q, rtol=0, atol=1e-10)
    z = 2 * torch.tanh(a_net(agent.actor, s))
    action = (a_net(agent.decoder, s, z) * act_std + act_mean).clamp(-1, 1)
    assert torch.allclose(agent.policy(raw.observations, False), action, rtol=0, atol=1e-10)
    # A sample moves z by 0.1·ε, cut at 0.2, and nothing else.
    noise = torch.randn(32, 6, generator=a_draws(4)).double()
    assert (noise.abs() > 2).any()
    z = z + (0.1 * noise).clamp(-0.2, 0.2)
    action = (a_net(agent.decoder, s, z) * act_std + act_mean).clamp(-1, 1)
    sample = agent.policy(raw.observations, True, a_draws(4))
    assert torch.allclose(sample, action, atol=1e-6)
    with torch.no_grad():
        agent.decoder[-1].bias.fill_(50.0)  # the decoder knows no box, what is executed does
    assert torch.equal(agent.policy(raw.observations, False), torch.ones(32, 3).double())


def test_lapo_updates_critics_per_batch_and_policy_once():
    """Three batches: three steps of Q and V, each with its slow copy, one of CVAE and policy."""
    agent, tau = a_agent("lapo"), 0.005
    batches = [a_batch(seed=i) for i in range(3)]
    slow_q = [weight.clone() for weight in agent.qf_target.parameters()]
    for i in (1, 2, 3):  # how the critics were after 1, 2, 3 batches
        partial = copy.deepcopy(agent)
        torch.manual_seed(7)
        partial.update(batches[:i])
        pairs = zip(slow_q, partial.qf.parameters())
        slow_q = [(1 - tau) * slow + tau * fast for slow, fast in pairs]
    a_same(partial.qf_target, slow_q)
    pairs = zip(agent.actor_target.parameters(), partial.actor.parameters())
    a_same(partial.actor_target, [(1 - tau) * slow + tau * fast for slow, fast in pairs])
    parts = [(partial.qf, 3), (partial.vf, 3), (partial.actor, 1), (partial.decoder, 1)]
    for net, steps in [*parts, (partial.encoder, 1)]:
        for weight in net.parameters():
            assert partial.optimizer.state[weight]["step"] == steps


# ---- the optimistic action -----------------------------------------------------------------------
def a_optimistic(agent, obs, action, n, sigma, omega, seed):
    """Algorithm 1 and Eq. 2 as a loop over observations, candidates, critics."""
    draw = a_draws(seed)
    noise = torch.randn(len(obs), n, 3, dtype=torch.float64, generator=draw).tolist()
    chosen, optimism = [], []
    for b in range(len(obs)):
        best, best_score, best_mean, means = None, -math.inf, None, []
        for i in range(n):
            c = [x + sigma * e for x, e in zip(action[b].tolist(), noise[b][i])]
            c = [min(max(x, -1.0), 1.0) for x in c]
            one = a_tensor([c])
            q = [a_critic(agent.qf, j, obs[b : b + 1], one).item() for j in range(5)]
            means.append(statistics.fmean(q))
            score = means[-1] + omega * statistics.pstdev(q)
            if score > best_score:
                best, best_score, best_mean = c, score, means[-1]
        chosen.append(best)
        optimism.append(best_mean - statistics.fmean(means))
    return a_tensor(chosen), a_tensor(optimism)


CASES = [(1, 0.2, 0.0), (20, 0.2, 0.0), (20, 0.2, 1.0), (20, 0.7, -0.5), (5, 0.0, 0.0)]


@pytest.mark.parametrize("n, sigma, omega", CASES)
def test_optimistic_action_against_a_loop(n, sigma, omega):
    agent = a_agent()
    obs, action = torch.randn(3, 7).double(), torch.rand(3, 3).double() * 2 - 1
    draw = a_draws(5)
    found = o3f.optimistic_action(obs, action, agent.q_values, n, sigma, omega, draw)
    by_loop = a_optimistic(agent, obs, action, n, sigma, omega, 5)
    assert torch.allclose(found[0], by_loop[0], rtol=0, atol=1e-12)
    assert torch.allclose(found[1], by_loop[1], rtol=0, atol=1e-9)


def a_best(agent, obs, start, sigma, draw):
    """Of 100 candidates around start the one of the highest mean Q, and its optimism."""
    noise = torch.randn(1, 100, 3, dtype=start.dtype, generator=draw)
    candidates = (start + sigma * noise).clamp(-1, 1)[0]
    q = [a_critic(agent.qf, j, obs.expand(100, 7), candidates) for j in range(5)]
    q = torch.stack(q).mean(0)
    return candidates[q.argmax()], (q.max() - q.mean()).item()


def test_optimistic_action_ties_signs_and_the_std():
    noise = 0.1 * torch.randn(1, 50, 2, generator=a_draws(0))[0]

    def pick(q, omega=0.0):
        draw = a_draws(0)
        zeros = torch.zeros(1, 2)
        return o3f.optimistic_action(zeros, zeros, q, 50, 0.1, omega, draw)[0][0]

    def disagree(obs, a):  # mean 0 everywhere, disagreement grows with a_0
        return torch.tensor([[-1.0], [1.0]]) * a[:, 0].exp()

    def bet(obs, a):  # where a_0 > 0 the critics say ±1: std 1 if it divides by m, else √2
        return torch.where(a[:, 0] > 0, torch.tensor([[1.0], [-1.0]]), torch.tensor(1.2))

    assert torch.allclose(pick(lambda obs, a: torch.ones(5, len(a))), noise[0])  # the first
    assert torch.allclose(pick(lambda obs, a: a[:, 0].expand(5, -1)), noise[noise[:, 0].argmax()])
    assert torch.allclose(pick(disagree, 1.0), noise[noise[:, 0].argmax()])
    assert torch.allclose(pick(disagree, -1.0), noise[noise[:, 0].argmin()])
    assert pick(bet, 1.0)[0] <= 0


@pytest.mark.parametrize("proposal", ["sample", "mean"])
def test_ways_to_explore(proposal):
    agent, obs = a_agent(dtype=torch.float32), torch.randn(1, 7)
    with torch.no_grad():  # slow critics that differ: they play no part
        for weight in agent.qf_target.parameters():
            weight.add_(torch.randn_like(weight))
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
    draw.set_state(state)
    best, gain = a_best(agent, obs, start, 0.3, draw)
    action, optimism = act("o3f")
    assert torch.allclose(action[0], best)
    assert optimism.item() == pytest.approx(gain, rel=1e-3)


def test_an_unknown_way_to_explore_is_refused():
    with pytest.raises(o3f.UserError, match="--explore nosie: choose one of o3f, noise, policy"):
        o3f.check(o3f.preset("Pendulum-v1", "iql", explore="nosie"))


# ---- replay buffer -------------------------------------------------------------------------------
def a_buffer(rows, online):
    """A buffer whose row i has reward i and observations (2i, 2i + 1)."""
    obs = np.arange(2 * rows).reshape(rows, 2)
    data = a_data(rows, 2, 1, rewards=np.arange(rows), observations=obs)
    return o3f.ReplayBuffer(data, online, torch.device("cpu"))


def test_buffer_keeps_the_dataset_and_appends():
    buffer = a_buffer(4, online=3)
    before = buffer.rows[:4].clone()
    assert before[:, 3].tolist() == [0, 1, 2, 3]
    for i in range(3):
        buffer.add(np.full(2, 100.0 + i), np.array([0.5]), 10.0 + i, np.full(2, 200.0 + i), i == 1)
    assert torch.equal(buffer.rows[:4], before)
    assert buffer.rows[5].tolist() == [101, 101, 0.5, 11, 201, 201, 1]
    assert buffer.rows[:, 3].tolist() == [0, 1, 2, 3, 10, 11, 12]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_refused(bad):
    buffer, obs = a_buffer(4, online=3), np.zeros(2)
    with pytest.raises(o3f.UserError, match="NaN or inf"):
        buffer.add(obs, np.zeros(1), 0.0, np.array([0.0, bad]), False)
    with pytest.raises(o3f.UserError, match="NaN or inf"):
        buffer.add(obs, np.zeros(1), bad, obs, False)
    assert buffer.size == 4


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
    shapes = [tuple(x.shape) for x in batches[7]]
    assert shapes == [(200, 2), (200, 1), (200,), (200, 2), (200,)]


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_offline_ratio_is_a_count(ratio):
    buffer = a_buffer(6, online=10)
    (batch,) = buffer.sample(500, offline_ratio=ratio)  # nothing online yet
    assert set(batch.rewards.tolist()) == {0, 1, 2, 3, 4, 5}
    for i in (100, 101):
        buffer.add(np.zeros(2), np.zeros(1), i, np.zeros(2), False)
    for batch in buffer.sample(200, 3, ratio):
        assert (batch.rewards < 50).sum() == round(200 * ratio)
        expected = set(range(6)) if ratio > 0 else set()
        expected |= {100, 101} if ratio < 1 else set()
        assert set(batch.rewards.tolist()) == expected


# ---- a small environment, and a whole run in it --------------------------------------------------
class ALine(gym.Env):
    """obs (step, episode), reward = step; every second episode truly ends at its third step."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))

    def __init__(self, low=-1.0, high=1.0):
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high), (1,))
        self.episode = -1

    def look(self):
        return np.array([self.t, self.episode], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.episode = 0, self.episode + 1
        return self.look(), {}

    def step(self, action):
        self.t, self.action = self.t + 1, action
        return self.look(), float(self.t), self.episode % 2 == 1 and self.t == 3, False, {}


gym.register("O3FLine-v0", ALine, max_episode_steps=5)
gym.register("O3FEndless-v0", ALine)


def a_write(path, **columns):
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            if column is not None:
                file[name] = column
    return path


def a_load(env_id, path, base="iql", **flags):
    """load_dataset's transitions, rule and facts."""
    args = o3f.preset(env_id, base, dataset=str(path), **flags)
    return o3f.load_dataset(args, o3f.get_task(env_id), o3f.make_env(env_id))


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """The online rows of a run of 20 steps, and the scale of its rewards by hand."""
    folder = tmp_path_factory.mktemp("line")
    sizes = dict(hidden_dim=8, batch_size=8, num_candidates=4, dataset_size=100, eval_episodes=1)
    flags = dict(offline_steps=3, online_steps=20, checkpoint_minutes=0.0, dataset="random")
    args = o3f.preset("O3FLine-v0", "iql", run_dir=str(folder / "run"), **sizes, **flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D4RL_DATASET_DIR", str(folder))
        o3f.main(args)
    with h5py.File(next(folder.glob("*.hdf5"))) as file:
        starts = np.flatnonzero(file["observations"][:, 0] == 0)
        returns = [part.sum() for part in np.split(file["rewards"][:], starts)[1:]]
    saved = torch.load(folder / "run/checkpoint.pt", weights_only=True)
    return saved["rows"].tolist(), 1000 / (max(returns) - min(returns))


def test_a_time_limit_is_not_a_true_end(a_run):
    """Step 5 is the limit: termination 0 is stored, and the successor is not the next start."""
    rows, _ = a_run
    limits = 0
    for t, episode, _, _, next_t, next_episode, end in rows:
        assert (next_t, next_episode) == (t + 1, episode)
        assert end == (episode % 2 == 1 and next_t == 3)
        limits += next_t == 5
    assert (len(rows), limits) == (19, 2)  # the last checkpoint is of step 19, an episode's end


def test_online_rows_follow_each_other_with_rewards_transformed_once(a_run):
    rows, scale = a_run
    assert [row[3] for row in rows] == pytest.approx([scale * (row[0] + 1) for row in rows])
    for row, following in itertools.pairwise(rows):
        over = row[6] or row[4] == 5
        assert following[:2] == ([0, row[1] + 1] if over else row[4:6])


# ---- data ----------------------------------------------------------------------------------------
def a_rows_one_by_one(raw, horizon):
    """d4rl's loop: a limit drops its row and starts to count at 0, a terminal starts at 1."""
    kept, count = [], 0
    for t in range(len(raw["rewards"]) - 1):
        limit = raw["timeouts"][t] if "timeouts" in raw else count == horizon - 1
        if limit:
            count = 0
            continue
        if raw["terminals"][t]:
            count = 0
        kept.append(t)
        count += 1
    return kept


@pytest.mark.parametrize("with_timeouts", [True, False])
@pytest.mark.parametrize("with_terminals", [True, False])
def test_transitions_against_a_row_by_row_reference(with_timeouts, with_terminals):
    rng, args = np.random.default_rng(0), o3f.preset("O3FLine-v0", "iql")
    for _ in range(100):
        n, horizon = rng.integers(2, 60), int(rng.integers(2, 12))
        raw = {name: rng.normal(size=(n, 3)) for name in ("observations", "actions")}
        raw |= {"rewards": rng.normal(size=n), "terminals": (rng.random(n) < 0.15) & with_terminals}
        if with_timeouts:
            raw["timeouts"] = rng.random(n) < 0.15
        kept = a_rows_one_by_one(raw, horizon)
        original = dict(raw)
        env = gym.wrappers.TimeLimit(ALine(), horizon)
        o3f.mark_ends(args, o3f.get_task("O3FLine-v0"), env, raw)
        data = o3f.to_transitions(raw)
        for name in ("observations", "actions", "rewards"):
            assert np.array_equal(data[name], original[name][kept])
        following = [t + 1 for t in kept]
        assert np.array_equal(data["next_observations"], original["observations"][following])
        assert np.array_equal(data["terminations"], original["terminals"][kept])


def a_kitchen_file(path, **changes):
    """Three demonstrations of 40 rows; row 10 on has the kettle, row 20 on the microwave too."""
    rng = np.random.default_rng(0)
    obs = np.tile(np.append(o3f.KitchenEnv.INIT_QPOS, np.zeros(30)), (120, 1))
    obs[:, :30] += 0.01 * rng.normal(size=(120, 30))
    obs[:, 30:] = o3f.make_env("kitchen-mixed-v0").unwrapped.goal
    for start in (0, 40, 80):
        obs[start + 10 : start + 40, 23:30] = [-0.23, 0.75, 1.62, 0.99, 0, 0, -0.06]
        obs[start + 20 : start + 40, 22] = -0.75
    columns = dict(observations=obs, actions=rng.uniform(-0.9, 0.9, (120, 9)))
    columns["rewards"] = np.tile(np.repeat([0.0, 1.0, 2.0], [10, 10, 20]), 3)
    columns["terminals"] = np.tile(np.arange(40) == 39, 3)
    return a_write(path, **(columns | changes))


@pytest.mark.parametrize("timeouts", [None, np.zeros(120, bool)])
def test_kitchen_rewards_consistent_and_stock(tmp_path, timeouts, capsys):
    path = a_kitchen_file(tmp_path / "k.hdf5", timeouts=timeouts)
    start = np.append(o3f.KitchenEnv.INIT_QPOS, np.zeros(30))
    done = np.zeros(60)
    done[[11, 12, 17, 18, 22]] = [-0.88, -0.01, -0.69, -0.05, -0.75]
    done[23:30] = [-0.23, 0.75, 1.62, 0.99, 0, 0, -0.06]

    data, rule, _ = a_load("kitchen-mixed-v0", path)
    # 39 of 40: a demonstration's last row has no successor, and is no true end.
    by_hand = np.tile(np.repeat([-4.0, -3.0, -2.0], [10, 10, 19]), 3)
    assert np.array_equal(data["rewards"], by_hand)
    assert data["terminations"].sum() == 0
    assert re.search("every row, 150 in all.* each once, 6$", capsys.readouterr().out.strip())
    # Online, whatever the environment pays: satisfied(s) − 4 at s; the end is all four at s'.
    assert rule(start, 1.0, done, False) == (-4.0, True)
    assert rule(done, 0.0, start, True) == (0.0, False)

    data, rule, _ = a_load("kitchen-mixed-v0", path, kitchen_rewards="stock")
    assert data["rewards"].max() == 2.0
    assert data["terminations"].sum() == 2  # the third is the last row
    assert rule(start, 1.0, done, False) == (1.0, False)


TRANSFORMS = [
    ("none", 1.0, 0.0),
    ("return_range", 1000 / 3, 0.0),  # returns are 6, 3 and 5
    ("max", 1 / 3, 0.0),
    ("minus_one", 1.0, -1.0),
    ("x100", 100.0, 0.0),
]


@pytest.mark.parametrize("transform, scale, shift", TRANSFORMS)
def test_reward_transforms_of_file_and_online_rewards(tmp_path, transform, scale, shift):
    rewards = np.array([1.0, 2, 3, 3, 0, 2, 3, 0, 0])
    terminals = np.array([0, 0, 1, 1, 0, 0, 0, 0, 1])
    columns = dict(observations=np.zeros((9, 2)), actions=np.ones((9, 1)), timeouts=np.zeros(9))
    path = a_write(tmp_path / "x.hdf5", rewards=rewards, terminals=terminals, **columns)
    data, rule, _ = a_load("O3FLine-v0", path, reward_transform=transform)
    assert data["rewards"].tolist() == pytest.approx((scale * rewards[:-1] + shift).tolist())
    assert rule(np.zeros(2), 7.0, np.zeros(2), True) == (pytest.approx(scale * 7 + shift), True)
    assert set(data["actions"].ravel()) == {np.float32(1 - 1e-5)}  # as in IQL's code
    assert set(a_load("O3FLine-v0", path, "lapo")[0]["actions"].ravel()) == {1.0}


@pytest.mark.parametrize("kitchen_rewards", ["consistent", "stock"])
def test_max_keeps_the_sign_where_no_reward_is_positive(tmp_path, kitchen_rewards):
    path = a_kitchen_file(tmp_path / "k.hdf5")
    data = a_load("kitchen-mixed-v0", path, "lapo", kitchen_rewards=kitchen_rewards)[0]
    expected = [0.0, 0.5, 1.0] if kitchen_rewards == "stock" else [-1.0, -0.75, -0.5]
    assert sorted(set(data["rewards"].tolist())) == expected


def test_a_file_of_another_kitchen_is_refused(tmp_path):
    path = a_kitchen_file(tmp_path / "k.hdf5")
    with pytest.raises(o3f.UserError, match="another kitchen than kitchen-partial-v0"):
        a_load("kitchen-partial-v0", path)


def a_columns(rows=40, **changes):
    rng = np.random.default_rng(0)
    columns = dict(observations=rng.normal(size=(rows, 2)), actions=rng.uniform(-1, 1, (rows, 1)))
    columns["rewards"] = rng.normal(size=rows)
    return columns | dict(terminals=np.zeros(rows), timeouts=np.zeros(rows)) | changes


def a_spoilt(shape, row, value):
    column = np.zeros(shape)
    column[row] = value
    return column


BAD_COLUMNS = [
    (a_columns(rewards=None), r"also needs \{'rewards'\}"),
    (a_columns(observations=np.zeros((40, 3))), r"observations is .*needs rows of \(2,\)"),
    (a_columns(rewards=np.zeros((40, 1))), r"rewards is .*needs rows of \(\)"),
    (a_columns(rewards=np.zeros(39)), "rewards is "),
    (a_columns(rewards=np.array([b"x"] * 40)), "rewards is "),
    (a_columns(actions=np.zeros((40, 1), complex)), "actions is "),
    (a_columns(rows=1), r"\(1,.*needs rows of"),
    (a_columns(observations=a_spoilt((40, 2), [7, 9], np.nan)), "in observations, row 7"),
    (a_columns(rewards=a_spoilt(40, 3, -np.inf)), "in rewards, row 3"),
    (a_columns(actions=a_spoilt((40, 1), 5, -1.05)), "actions reach 1.05, expected within ±1"),
    (a_columns(timeouts=np.ones(40)), "every row is a time limit"),
]


@pytest.mark.parametrize("columns, message", BAD_COLUMNS, ids=[x[1] for x in BAD_COLUMNS])
def test_wrong_files_are_refused_by_what_is_wrong(tmp_path, columns, message):
    path = a_write(tmp_path / "x.hdf5", **columns)
    with pytest.raises(o3f.UserError, match=message):
        a_load("O3FLine-v0", path)


@pytest.mark.parametrize("where", ["link", "virtual", "external"])
def test_data_outside_of_the_file_is_refused(tmp_path, where):
    """The hash of the file would not cover it."""
    other = a_write(tmp_path / "other.hdf5", **a_columns())
    path = a_write(tmp_path / "x.hdf5", **a_columns(rewards=None))
    (tmp_path / "raw").write_bytes(bytes(160))
    with h5py.File(path, "a") as file:
        if where == "link":
            file["rewards"] = h5py.ExternalLink(other, "rewards")
        if where == "virtual":
            layout = h5py.VirtualLayout((40,), "f8")
            layout[:] = h5py.VirtualSource(other, "rewards", (40,))
            file.create_virtual_dataset("rewards", layout)
        if where == "external":
            file.create_dataset("rewards", (40,), "f4", external=[(tmp_path / "raw", 0, 160)])
    with pytest.raises(o3f.UserError, match="rewards lies outside of the file"):
        a_load("O3FLine-v0", path)


def test_a_size_that_the_file_cannot_hold_is_refused(tmp_path):
    """All five keys claim 300 million rows: 6 GB, none of it there."""
    path = tmp_path / "x.hdf5"
    with h5py.File(path, "w") as file:
        for name, column in a_columns().items():
            file.create_dataset(name, (3 * 10**8, *column.shape[1:]), np.float32, chunks=True)
    with pytest.raises(o3f.UserError, match="claims 300,000,000 rows, too many for its size"):
        a_load("O3FLine-v0", path)


@pytest.mark.filterwarnings("ignore:overflow")
def test_damaged_files_load_or_are_refused_with_a_line(tmp_path):
    """120 files with flipped bits or a cut end: no other exception, nothing wrong let through."""
    rng, path, env = np.random.default_rng(0), tmp_path / "x.hdf5", o3f.make_env("O3FLine-v0")
    good, refused = a_write(path, **a_columns()).read_bytes(), 0
    for i in range(120):
        content = bytearray(good)
        for _ in range(rng.integers(1, 30)):
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(content if i % 3 else good[: rng.integers(len(good))])
        try:
            raw = o3f.load_hdf5(path, env)
            assert raw["observations"].shape == (len(raw["rewards"]), 2)
            assert np.isfinite(raw["observations"]).all()
            assert np.abs(raw["actions"]).max() <= 1 + 1e-6
        except o3f.UserError as error:
            refused += 1
            assert "x.hdf5" in str(error)
    assert 60 < refused < 120


def a_replay(env, raw, rows):
    """Largest errors of (observation, reward) where rows of a locomotion file are stepped anew."""
    env.reset(seed=0)
    errors = []
    for t in rows:
        # An observation is (qpos without x, qvel); no reward depends on x.
        qpos, qvel = np.split(np.append(0.0, raw["observations"][t]), [env.model.nq])
        # Hopper and Walker2d hide what is faster than 10: such a state cannot be restored.
        if env.spec.id == "HalfCheetah-v4" or np.abs(qvel).max() < 10:
            env.set_state(qpos, qvel)
            obs, reward, *_ = env.step(raw["actions"][t])
            off = np.abs(obs - raw["observations"][t + 1]).max()
            errors.append([off, abs(reward - raw["rewards"][t])])
    assert len(errors) > 0.5 * len(rows)
    return np.max(errors, 0)


def test_collected_data_is_uniform_and_cached_under_its_own_name(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    args = o3f.preset("hopper-random-v2", "iql", dataset_size=3000)
    env = o3f.make_env("hopper-random-v2")
    path = o3f.find_dataset(args, env)
    assert path.name == "hopper-random-v2.collected-uniform-3000.hdf5"
    assert list(tmp_path.iterdir()) == [path]  # no part of a file left behind
    raw = o3f.load_hdf5(path, env)
    ends = raw["terminals"] | raw["timeouts"]
    assert np.abs(raw["actions"].mean(0)).max() < 5 * math.sqrt(1 / 3 / 3000)
    assert np.allclose(raw["actions"].var(0), 1 / 3, atol=0.03)
    assert raw["terminals"].sum() > 50 and raw["timeouts"].sum() == 0  # random hoppers fall
    rows = [t for t in range(0, 2900, 31) if not ends[t]]
    assert a_replay(env.unwrapped, raw, rows).max() < 1e-2
    monkeypatch.setattr(o3f, "collect_random", None)  # not a second time
    assert o3f.find_dataset(args, env) == path
    official = tmp_path / "hopper_random-v2.hdf5"
    official.write_bytes(b"")
    assert o3f.find_dataset(args, env) == official  # D4RL's own comes first


@a_needs_shared
@pytest.mark.parametrize("robot", ["halfcheetah", "hopper", "walker2d"])
def test_robots_pay_what_the_files_say(robot):
    env = o3f.make_env(f"{robot}-medium-v2").unwrapped
    with h5py.File(SHARED / f"data/{robot}-medium-standin.hdf5") as file:
        raw = {name: file[name][:5000].astype(np.float64) for name in file}
    ends = (raw["terminals"] + raw["timeouts"]) > 0
    rows = [t for t in range(0, 4900, 47) if not ends[t]]
    assert a_replay(env, raw, rows).max() < 1e-2


@a_needs_shared
@pytest.mark.parametrize("name", ["mixed-subset-63", "partial-subset-63", "complete-19"])
def test_kitchens_pay_what_the_files_say(name):
    """A file's rewards are D4RL's own count of satisfied sub-tasks, row by row."""
    env_id = f"kitchen-{name.partition('-')[0]}-v0"
    data, _, _ = a_load(env_id, SHARED / f"data/kitchen-{name}.hdf5")
    stock, _, _ = a_load(env_id, SHARED / f"data/kitchen-{name}.hdf5", kitchen_rewards="stock")
    with h5py.File(SHARED / f"data/kitchen-{name}.hdf5") as file:
        rewards, terminals = file["rewards"][:], file["terminals"][:].astype(bool)
    assert np.array_equal(data["rewards"], rewards[~terminals] - 4)
    assert np.array_equal(stock["rewards"], rewards[:-1])


# ---- tasks and environments ----------------------------------------------------------------------
SCORES = [
    ("halfcheetah-medium-v2", 12135.0, 100.0),
    ("hopper-random-v2", -20.272305, 0.0),
    ("walker2d-medium-v2", 2000.0, 100 * (2000 - 1.629008) / (4592.3 - 1.629008)),
    ("kitchen-mixed-v0", 3.0, 75.0),
    ("antmaze-umaze-v2", 1.0, 100.0),
    ("Pendulum-v1", -123.0, -123.0),
]


@pytest.mark.parametrize("env_id, value, score", SCORES)
def test_scores(env_id, value, score):
    assert o3f.get_task(env_id).score(value) == pytest.approx(score)


def test_an_unknown_task_is_refused():
    with pytest.raises(o3f.UserError, match="--env-id kitchen-mixd-v0: no such task"):
        o3f.get_task("kitchen-mixd-v0")


@pytest.mark.parametrize("low, high", [(-1, 2), (-3, 1), (0, 1), (-2, 2), (-1, 1)])
def test_actions_of_other_environments_are_rescaled(low, high):
    env = o3f.make_env("O3FLine-v0", low=low, high=high)
    assert (env.action_space.low, env.action_space.high) == (-1, 1)
    env.reset(seed=0)
    for action, expected in ((-1, low), (0, (low + high) / 2), (1, high)):
        env.step(np.array([action], np.float32))
        assert env.unwrapped.action == pytest.approx(expected)


def test_environments_that_do_not_fit_are_refused():
    with pytest.raises(o3f.UserError, match="CartPole-v1: needs flat, for actions bounded, boxes"):
        o3f.make_env("CartPole-v1")
    with pytest.raises(o3f.UserError, match="needs flat, for actions bounded, boxes"):
        o3f.make_env("O3FLine-v0", low=-np.inf)
    with pytest.raises(o3f.UserError, match="gymnasium cannot make it"):
        o3f.make_env("no_such_module:Line-v0")


@pytest.mark.parametrize("env_id, limit", [("O3FEndless-v0", 1000), ("O3FLine-v0", 5)])
def test_every_episode_ends(env_id, limit):
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
    env = o3f.make_env(args.env_id)
    assert isinstance(env.unwrapped, ALine)
    path = o3f.find_dataset(args, env)
    assert path.name == "a_outside-Outside-v0.collected-uniform-20.hdf5"
    assert len(o3f.load_hdf5(path, env)["rewards"]) == 20


# Three actions in D4RL's own kitchen under MuJoCo 2.3.7, noise off, and the joints that came of it.
D4RLS_ACTIONS = [
    [0.0328, 0.1413, -0.9431, -0.657, 0.3706, 0.6678, -0.3861, 0.7872, 0.4431],
    [-0.6201, 0.1085, -0.2957, -0.6362, 0.5712, 0.931, -0.5353, -0.8329, 0.2071],
    [0.458, -0.4475, 0.3706, 0.0357, -0.903, -0.7242, -0.6261, 0.9886, 0.0413],
]
D4RLS_JOINTS = [0.1346, -1.7651, 1.8251, -2.5691, 0.2679, 0.7935, 1.4416, 0.0267, 0.0393]
D4RLS_JOINTS += [-0.0002, *[0.0] * 10, -0.0064, 0.0, 0.0]
D4RLS_JOINTS += [-0.2694, 0.3504, 1.6194, 1.0, 0.0, 0.0001, -0.0003]


def test_kitchen_reproduces_d4rls_own():
    env = o3f.make_env("kitchen-mixed-v0", noise_ratio=0.0)
    env.reset(seed=0)
    for action in D4RLS_ACTIONS:
        obs, *_ = env.step(np.array(action))
    assert np.abs(obs[:30] - D4RLS_JOINTS).max() < 2e-3


@a_needs_shared
@pytest.mark.parametrize("episode", [0, 1])  # the actions of episode 0 exceed ±1
def test_kitchen_reproduces_the_reference_episodes(episode):
    reference = np.load(SHARED / "reference/kitchen_mixed_rollouts.npz")
    expected, actions = reference[f"ep{episode}_obs"], reference[f"ep{episode}_act"]
    env = o3f.make_env("kitchen-mixed-v0", noise_ratio=0.0)
    obs, _ = env.reset(seed=0)
    assert np.abs(obs - expected[0]).max() < 1e-9
    for t in range(10):
        obs, *_ = env.step(actions[t])
        assert np.abs(obs - expected[t + 1]).max() < 2e-3


A_DONE = {"microwave": ([22], -0.75), "light switch": ([17, 18], [-0.69, -0.05])}
A_DONE |= {"bottom burner": ([11, 12], [-0.88, -0.01]), "hinge cabinet": ([20, 21], [0.0, 1.45])}
A_DONE["kettle"] = (list(range(23, 30)), [-0.23, 0.75, 1.62, 0.99, 0, 0, -0.06])


def test_kitchen_pays_each_sub_task_once_and_ends_when_all_are_done():
    env = o3f.make_env("kitchen-mixed-v0", noise_ratio=0.0)
    env.reset(seed=0)

    def move(*names, back=False):
        for name in names:
            index, goal = A_DONE[name]
            start = o3f.KitchenEnv.INIT_QPOS[index]
            env.unwrapped.data.qpos[index] = start if back else goal
        _, reward, terminated, truncated, info = env.step(np.zeros(9))
        assert not truncated
        return reward, terminated, info["completed"].tolist()  # microwave, kettle, burner, light

    assert move() == (0, False, [False] * 4)
    assert move("microwave") == (1, False, [True, False, False, False])
    assert move()[0] == 0  # still open: not paid again
    assert move("microwave", back=True) == (0, False, [True, False, False, False])
    assert move("microwave")[0] == 0  # open again: not paid again
    assert move("hinge cabinet")[0] == 0  # no target of mixed
    assert move("light switch", "bottom burner") == (2, False, [True, False, True, True])
    assert move("kettle") == (1, True, [True] * 4)
    env.reset()
    assert move("microwave")[0] == 1  # a new episode pays anew


SWITCH = {17: -0.69, 18: -0.05, 22: -0.75}
SLIDE = SWITCH | {19: 0.37}
KITCHENS = {"mixed": SWITCH | {11: -0.88, 12: -0.01}, "partial": SLIDE, "complete": SLIDE}


@pytest.mark.parametrize("kitchen", KITCHENS)
def test_kitchen_goal_vector_and_horizon(kitchen):
    goal = np.zeros(30)
    goal[23:30] = [-0.23, 0.75, 1.62, 0.99, 0, 0, -0.06]
    for i, value in KITCHENS[kitchen].items():
        goal[i] = value
    env = o3f.make_env(f"kitchen-{kitchen}-v0")
    assert np.allclose(env.reset(seed=0)[0][30:], goal)
    ends = [env.step(np.zeros(9))[2:4] for _ in range(280)]
    assert ends == [(False, False)] * 279 + [(False, True)]


def test_kitchen_noise_is_uniform_with_a_tenth_of_the_amplitudes():
    env, start = o3f.make_env("kitchen-mixed-v0"), o3f.KitchenEnv.INIT_QPOS.copy()
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


@pytest.mark.parametrize("env_id", ["kitchen-mixed-v0", "antmaze-medium-diverse-v2"])
def test_episodes_depend_on_the_seed_of_reset_alone(env_id):
    def episode(env, seed):
        np.random.seed(seed + 1)  # the global generator plays no part
        actions = np.random.default_rng(0).uniform(-1, 1, (20, *env.action_space.shape))
        rows = [env.reset(seed=seed)[0], *(env.step(action)[0] for action in actions)]
        return np.array(rows), env.unwrapped.goal.copy()

    env, another = o3f.make_env(env_id), o3f.make_env(env_id)
    first, other = episode(env, 3), episode(env, 4)
    for again in (episode(env, 3), episode(another, 3)):
        assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("env_id", ["kitchen-mixed-v0", "antmaze-umaze-v2"])
def test_own_environments_pass_gymnasiums_checker(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(o3f.make_env(env_id).unwrapped, skip_render_check=True)


@pytest.mark.parametrize("env_id", ["kitchen-mixed-v0", "antmaze-large-play-v2"])
def test_own_environments_render(env_id):
    code = f"import o3f; env = o3f.make_env('{env_id}', render_mode='rgb_array')\n"
    code += "env.reset(seed=0); x = env.render()\n"
    code += "assert x.shape == (480, 640, 3) and x.dtype == 'uint8' and x.std() > 20"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(o3f.__file__).parent,
        env={"MUJOCO_GL": "egl", **os.environ},
        capture_output=True,
        text=True,
    )
    if done.returncode and "AssertionError" not in done.stderr:
        pytest.skip(f"no OpenGL on this machine: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


# ---- ant maze ------------------------------------------------------------------------------------
def a_d4rls_maze(name):
    """d4rl's map, read as data: {(row, column): 1 wall, 0 free, "r" start, "g" goal}."""
    source = ast.parse((o3f.d4rl_dir() / "locomotion/maze_env.py").read_text())
    name = {"umaze": "U_MAZE_TEST", "medium": "BIG_MAZE_TEST", "large": "HARDEST_MAZE_TEST"}[name]
    for node in source.body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            rows = eval(ast.unparse(node.value), {"R": "r", "G": "g"})
    return {(i, j): mark for i, row in enumerate(rows) for j, mark in enumerate(row)}


def a_cell(cells, mark):
    return next(cell for cell in cells if cells[cell] == mark)


@pytest.mark.parametrize("name", ["umaze-v2", "medium-play-v2", "large-diverse-v2"])
def test_antmaze_geometry_is_d4rls(name):
    env, cells = o3f.make_env(f"antmaze-{name}"), a_d4rls_maze(name.split("-")[0])
    assert env.get_wrapper_attr("_max_episode_steps") == (700 if "umaze" in name else 1000)
    env, model = env.unwrapped, env.unwrapped.model
    i0, j0 = a_cell(cells, "r")
    walls = [((j - j0) * 4.0, (i - i0) * 4.0, 1.0) for (i, j), mark in cells.items() if mark == 1]
    boxes = model.geom_type == mujoco.mjtGeom.mjGEOM_BOX
    assert sorted(map(tuple, model.geom_pos[boxes].tolist())) == sorted(walls)
    assert (model.geom_size[boxes] == [2, 2, 1]).all()
    assert (model.nq, model.nv, model.nu) == (15, 14, 8)
    assert (model.opt.timestep, model.opt.integrator) == (0.02, mujoco.mjtIntegrator.mjINT_RK4)
    corner = 4.0 * (np.array(a_cell(cells, "g")) - (i0, j0))[::-1]
    for seed in range(20):
        env.reset(seed=seed)
        assert (corner <= env.goal).all() and (env.goal <= corner + 1.5).all()
        assert np.allclose(env.data.site("goal").xpos[:2], env.goal)  # what is drawn is what counts


def test_an_ant_cannot_leave_the_maze():
    """From every free cell, 300 steps of a push of twice its weight towards each wall."""
    env, cells = o3f.make_env("antmaze-umaze-v2").unwrapped, a_d4rls_maze("umaze")
    torso, weight = env.model.body("torso").id, env.model.body_subtreemass[0] * 9.81
    pushes = 0
    for i, j in (cell for cell in cells if cells[cell] != 1):
        for di, dj in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            if cells[i + di, j + dj] != 1:
                continue
            env.reset(seed=0)
            start = env.model.qpos0.copy()
            start[:2] = 4.0 * (j - 1), 4.0 * (i - 1)
            env.put(start, np.zeros(14))
            for _ in range(300):
                env.data.xfrc_applied[torso, :2] = 2 * weight * dj, 2 * weight * di
                env.step(np.zeros(8))
            x, y, z = env.data.qpos[:3]
            moved = (x - start[0]) * dj + (y - start[1]) * di
            assert 1.0 < moved < 1.8  # the wall is at 2, the torso's radius is 0.25
            assert 0 < z < 2 and cells[round(y / 4 + 1), round(x / 4 + 1)] != 1
            pushes += 1
    assert pushes == 16


def test_antmaze_goals_are_drawn_once_in_v1_and_per_reset_in_v2():
    fixed, fresh = (o3f.make_env(f"antmaze-umaze-diverse-v{v}").unwrapped for v in (1, 2))
    goals = {fixed: [], fresh: []}
    for env in goals:
        env.reset(seed=0)
        for _ in range(2000):
            env.reset()
            goals[env].append(env.goal.copy())
    assert len(np.unique(goals[fixed], axis=0)) == 1
    fixed.reset(seed=7)
    assert np.array_equal(fixed.goal, goals[fixed][0])
    jitter = np.array(goals[fresh]) - [0.0, 8.0]  # U(0, 1) + U(0, 0.5)
    mean, variance = 0.75, 1 / 12 + 1 / 48
    assert np.abs(jitter.mean(0) - mean).max() < 5 * math.sqrt(variance / 2000)
    assert np.abs(jitter.var(0) - variance).max() < 0.01
    assert 0 <= jitter.min() and jitter.max() <= 1.5
    others = [o3f.make_env("antmaze-umaze-diverse-v0").unwrapped for _ in range(3)]
    for i, env in enumerate(others):
        env.reset(seed=i)
    assert len({tuple(env.goal) for env in others}) == 3


def test_antmaze_starts():
    env, starts = o3f.make_env("antmaze-umaze-v2").unwrapped, []
    for seed in range(300):
        obs, _ = env.reset(seed=seed)
        assert np.array_equal(obs, np.append(env.data.qpos[:15], env.data.qvel[:14]))
        assert np.linalg.norm(obs[3:7]) == pytest.approx(1.0)
        starts.append(obs)
    starts = np.array(starts)
    offset = np.abs(starts[:, :3] - [0, 0, 0.75])
    assert 0.099 < offset.max() <= 0.1 and np.abs(starts[:, 7:15]).max() <= 0.1
    assert starts[:, :3].std(0) == pytest.approx(0.2 / math.sqrt(12), rel=0.15)
    assert starts[:, 15:].std(0) == pytest.approx(0.1, rel=0.2)


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


def test_an_observation_of_the_ant_is_its_whole_state():
    env, rows = o3f.make_env("antmaze-umaze-v2").unwrapped, []
    obs, _ = env.reset(seed=0)
    for action in np.random.default_rng(0).uniform(-1, 1, (100, 8)):
        next_obs, *_ = env.step(action)
        rows.append((obs, action, next_obs))
        obs = next_obs
    for obs, action, next_obs in rows:
        env.put(obs[:15], obs[15:])
        assert np.abs(env.step(action)[0] - next_obs).max() < 1e-6


@a_needs_shared
def test_antmaze_replays_and_pays_what_a_file_says():
    with h5py.File(SHARED / "data/antmaze-umaze-diverse-standin.hdf5") as file:
        raw = {name: file[name][:].astype(np.float64) for name in file if name != "metadata"}
        goal = np.array(file.attrs["goal"])
    obs, actions, over = raw["observations"], raw["actions"], raw["timeouts"] + raw["terminals"]
    env = o3f.make_env("antmaze-umaze-diverse-v2").unwrapped
    env.reset(seed=0)
    env.goal = goal
    paid = np.flatnonzero(raw["rewards"])[::20].tolist()
    assert len(paid) > 5
    for t in [*range(0, len(obs) - 1, 997), *paid]:
        if not over[t] or raw["terminals"][t]:
            env.put(obs[t, :15], obs[t, 15:])
            next_obs, reward, *_ = env.step(actions[t])
            assert reward == raw["rewards"][t]
            assert raw["terminals"][t] or np.abs(next_obs - obs[t + 1]).max() < 1e-5


def test_antmaze_rows_whose_successor_is_far_away_are_dropped(tmp_path, capsys):
    """As in d4rl's v0 files: the time-out comes 30 rows after the jump to another start."""
    obs, timeouts = np.zeros((200, 29)), np.zeros(200)
    obs[:, :2] = [8.0, 0.0]
    obs[100:, 0] = 0.0
    timeouts[130] = 1
    obs[:, 5] = np.arange(200)
    columns = dict(observations=obs, actions=np.zeros((200, 8)), timeouts=timeouts)
    path = a_write(tmp_path / "a.hdf5", rewards=np.zeros(200), terminals=np.zeros(200), **columns)
    data, _, _ = a_load("antmaze-umaze-diverse-v0", path)
    assert data["observations"][:, 5].tolist() == [t for t in range(199) if t not in (99, 130)]
    assert "warning: 1 teleports dropped" in capsys.readouterr().out


# ---- evaluation ----------------------------------------------------------------------------------
def test_evaluation_side_by_side_is_one_after_the_other():
    agent, limits, gamma = a_agent(sizes=(3, 1), dtype=torch.float32), (12, 5, 30), 0.9
    args, rule = o3f.preset("Pendulum-v1", "iql", gamma=gamma), o3f.RewardRule(2.0, -1.0, ())
    envs = [gym.wrappers.TimeLimit(gym.make("Pendulum-v1").unwrapped, limit) for limit in limits]
    task = o3f.get_task("Pendulum-v1")
    values = o3f.evaluate(agent, envs, rule, task, args, seed=3)
    returns, discounted, q_start = [], [], []
    for i, limit in enumerate(limits):
        env = gym.make("Pendulum-v1").unwrapped
        obs, _ = env.reset(seed=3 + i)
        rewards = []
        for t in range(limit):
            x = torch.tensor(obs[None])
            action = torch.tanh(a_net(agent.actor.net, x))
            if t == 0:
                q = [a_critic(agent.qf, j, x, action).item() for j in range(5)]
                q_start.append(statistics.fmean(q))
            obs, reward, *_ = env.step(action[0].detach().numpy())
            rewards.append(reward)
        returns.append(sum(rewards))
        discounted.append(sum(gamma**t * (2 * r - 1) for t, r in enumerate(rewards)))
    assert values["eval/return"] == pytest.approx(statistics.fmean(returns), rel=1e-5)
    assert values["eval/score_std"] == pytest.approx(statistics.pstdev(returns), rel=1e-4)
    assert values["eval/discounted_return"] == pytest.approx(statistics.fmean(discounted), rel=1e-5)
    assert values["eval/q_start"] == pytest.approx(statistics.fmean(q_start), rel=1e-4)
    assert values["eval/length"] == statistics.fmean(limits)
    assert "eval/success" not in values
    assert values == o3f.evaluate(agent, envs, rule, task, args, seed=3)  # the same seeds always


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


def test_kitchen_evaluation_success_and_rewards_at_the_state_before():
    """The microwave is open from the second observation on: the second step pays for it."""
    obs = np.tile(np.append(o3f.KitchenEnv.INIT_QPOS, np.zeros(30)), (4, 1))
    obs[1:, 22] = -0.75
    agent, task = a_agent(sizes=(60, 9), dtype=torch.float32), o3f.get_task("kitchen-mixed-v0")
    rule = o3f.RewardRule(1.0, 0.0, o3f.KITCHENS["kitchen-mixed-v0"])
    args = o3f.preset("kitchen-mixed-v0", "iql", gamma=0.5)
    paid = [1.0, 1, 2], [1.0, 0, 2], [0.0, 0, 0], [4.0, 0, 0]
    envs = [AScript(obs, rewards) for rewards in paid]
    values = o3f.evaluate(agent, envs, rule, task, args, seed=0)
    assert values["eval/discounted_return"] == pytest.approx(-4 - 0.5 * 3 - 0.25 * 3)
    assert values["eval/success"] == 0.5
    assert values["eval/score"] == pytest.approx(statistics.fmean([100, 75, 0, 100]))


@pytest.mark.parametrize("env_id, success", [("antmaze-umaze-v2", 0.5), ("hopper-medium-v2", None)])
def test_success_is_a_score_of_100_in_ant_mazes_and_kitchens_only(env_id, success):
    agent, args = a_agent(sizes=(2, 1), dtype=torch.float32), o3f.preset(env_id, "iql")
    envs = [AScript(np.zeros((3, 2)), rewards) for rewards in ([0.0, 1.0], [0.0, 0.0])]
    rule, task = o3f.RewardRule(1.0, 0.0, ()), o3f.get_task(env_id)
    assert o3f.evaluate(agent, envs, rule, task, args, seed=0).get("eval/success") == success


@pytest.mark.parametrize("eval_action", ["policy", "optimistic"])
def test_evaluated_action(eval_action):
    """The policy's mean, or the best of the candidates around the mean, whatever training does."""
    agent, obs = a_agent(dtype=torch.float32), torch.randn(1, 7)
    flags = dict(explore="noise", proposal="sample", eval_action=eval_action)
    args = o3f.preset("Pendulum-v1", "iql", **flags)
    env = AScript(obs.numpy().repeat(2, 0), [0.0])
    rule, task = o3f.RewardRule(1.0, 0.0, ()), o3f.get_task("Pendulum-v1")
    o3f.evaluate(agent, [env], rule, task, args, seed=7)
    expected = torch.tanh(a_net(agent.actor.net, obs))
    if eval_action == "optimistic":
        expected, _ = a_best(agent, obs, expected, 0.2, a_draws(7))
    assert np.allclose(env.actions[0], expected.detach().numpy(), atol=1e-6)


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
PAPERS = [
    ("halfcheetah-medium-v2", "iql", IQLS | dict(reward_transform="return_range")),
    ("kitchen-mixed-v0", "iql", IQLS | IQLS_KITCHEN | dict(reward_transform="none")),
    ("antmaze-large-diverse-v1", "iql", IQLS | IQLS_ANT),
    ("hopper-medium-v2", "lapo", LAPOS | dict(sigma=0.2, reward_transform="max")),
    ("kitchen-mixed-v0", "lapo", LAPOS | dict(sigma=0.05, reward_transform="max")),
    ("antmaze-large-diverse-v1", "lapo", LAPOS | LAPOS_ANT),
]


@pytest.mark.parametrize("env_id, base, papers", PAPERS)
def test_presets_are_the_papers(env_id, base, papers):
    args = o3f.preset(env_id, base)
    assert {name: getattr(args, name) for name in papers} == papers
    o3f.check(args)


def test_given_flags_win():
    given = dict(sigma=0.0, beta=7.0, actor_dropout=0.0, batch_size=3)
    args = o3f.preset("kitchen-mixed-v0", "iql", **given)
    assert {name: getattr(args, name) for name in given} == given
    args = o3f.parse(["--env-id", "kitchen-mixed-v0", "--beta", "7"])
    assert (args.beta, args.sigma, args.actor_dropout) == (7.0, 0.05, 0.1)


def test_every_flag_is_documented(capsys):
    with pytest.raises(SystemExit):
        o3f.parse(["--help"])
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for field in dataclasses.fields(o3f.Args):
        flag = field.name.replace("_", "-")
        kind = r"(?:, --no-\S+|[A-Z]+|\[STR.*?\]\]|\{\S+\}(?:\|[A-Z]+)?)"
        (words,) = re.findall(rf"--{flag} ?{kind} (.*?) \(default: ", text)
        assert len(words) > 15 and not words.startswith("--"), (flag, words)


def test_every_flag_is_read():
    read = set()
    for node in ast.walk(ast.parse(Path(o3f.__file__).read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args"):
            read.add(node.attr)
    assert {field.name for field in dataclasses.fields(o3f.Args)} <= read


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_precision_is_for_updates_only(precision):
    """Acting compares candidates that differ by less than a coarse product's error."""
    agent, seen = a_agent(dtype=torch.float32), []
    buffer, args = o3f.ReplayBuffer(a_data(), 1, torch.device("cpu")), agent.args
    agent.update = lambda batches: seen.append(torch.get_float32_matmul_precision())
    o3f.learn(agent, buffer, dataclasses.replace(args, precision=precision), utd=1)
    assert seen == [precision]
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
@pytest.mark.parametrize("base", ["iql", "lapo"])
def test_compiled_updates_are_the_eager_ones(base):
    found = []
    for compiled in (False, True):
        flags = dict(compile=compiled, hidden_dim=16, batch_size=32)
        args = o3f.preset("Pendulum-v1", base, **flags)
        torch.manual_seed(0)
        agent = o3f.make_agent(args, a_data(), None, torch.device("cpu"))
        buffer = o3f.ReplayBuffer(a_data(), 1, torch.device("cpu"))
        for utd in [1] * 10 + [3] * 10:
            metrics = o3f.learn(agent, buffer, args, utd)
        found.append((agent.state_dict(), metrics))
    for eager, compiled in zip(*found):
        assert eager.keys() == compiled.keys()
        for name in eager:
            assert torch.allclose(eager[name], compiled[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("base", ["iql", "lapo"])
def test_a_loaded_agent_acts_as_the_saved_one_and_needs_no_data(base, tmp_path):
    agent = a_agent(base, dtype=torch.float32)
    batch = o3f.Batch(*(x.float() for x in a_batch()))
    agent.update([batch] * 3)
    o3f.save(tmp_path / "agent.pt", agent, o3f.RewardRule(1.0, 0.0, ()), 0)
    loaded = o3f.load_agent(tmp_path / "agent.pt")
    obs, actions = batch.observations, batch.actions
    assert torch.equal(agent.policy(obs, False), loaded.policy(obs, False))
    assert torch.equal(agent.q_values(obs, actions), loaded.q_values(obs, actions))
    draws = [a_draws(1) for _ in range(2)]
    assert torch.equal(agent.policy(obs, True, draws[0]), loaded.policy(obs, True, draws[1]))


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
    """One clear line on stderr, exit code 2."""
    capsys.readouterr()
    assert cli(line) == 2
    errors = capsys.readouterr().err.splitlines()
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
    one, two = (read_json(Path(x, "summary.json")) for x in (a, b))
    assert one["scores"] == two["scores"] and one["last_step"] == two["last_step"]


def signal_in_update(monkeypatch, update: int, *signals) -> None:
    """Send this process signals during the n-th update of the next run; an online step is one."""
    calls, learn = [], o3f.learn

    def spy(*args, **kwargs):
        calls.append(1)
        if len(calls) == update:
            for signum in signals:
                signal.raise_signal(signum)
        return learn(*args, **kwargs)

    monkeypatch.setattr(o3f, "learn", spy)


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


def write_kitchen(path) -> None:
    """Two demonstrations of 30 steps around the start pose; the second does the kettle."""
    rng, n = np.random.default_rng(0), 60
    goal = o3f.make_env("kitchen-mixed-v0").unwrapped.goal
    obs = np.tile([*o3f.KitchenEnv.INIT_QPOS, *goal], (n, 1))
    obs[:, :30] += 0.01 * rng.normal(size=(n, 30))
    obs[45:, 23:30] = obs[45:, 53:60]
    with h5py.File(path, "w") as file:
        file["observations"] = obs.astype(np.float32)
        file["actions"] = rng.uniform(-0.9, 0.9, (n, 9)).astype(np.float32)
        file["rewards"] = np.repeat([0.0, 1.0], [45, 15])
        file["terminals"] = np.arange(n) % 30 == 29


# ==== whole runs ==================================================================================
@pytest.mark.parametrize("base", ["iql", "lapo"])
def test_a_run_and_its_files(base, home):
    assert cli(PENDULUM + f"--base {base} --run-dir a") == 0
    files = {path.name for path in Path("a").iterdir() if not path.name.startswith(("events", "."))}
    assert files == {
        "config.json", "metrics.csv", "evaluations.csv", "episodes.csv", "summary.json",
        "agent_offline.pt", "agent_final.pt", "checkpoint.pt",
    }  # fmt: skip
    assert list(Path("a").glob("events.out.tfevents*"))
    # 430 is no multiple of 7: the last row is written all the same.
    steps = [int(row["step"]) for row in read_table("a/metrics.csv")]
    assert steps == [step for step in range(-24, 431) if step % 7 == 0 or step == 430]
    rows = read_table("a/evaluations.csv")
    assert [int(row["step"]) for row in rows] == [0, 100, 200, 300, 400, 430]
    assert "eval/score_std" in rows[0] and "eval/success" not in rows[0]
    episodes = [(int(row["step"]), int(row["length"])) for row in read_table("a/episodes.csv")]
    assert episodes == [(200, 200), (400, 200)]
    summary = read_json("a/summary.json")
    assert summary["finished"] and summary["last_step"] == 430
    scores = {int(step): score for step, score in summary["scores"].items()}
    assert scores == {int(row["step"]): float(row["eval/score"]) for row in rows}
    parts = {"offline update", "online update", "act", "environment", "evaluation"}
    assert summary["seconds"].keys() == parts and min(summary["seconds"].values()) > 0
    config = read_json("a/config.json")
    assert (config["base"], config["utd"], config["hidden_dim"]) == (base, 2, 8)
    assert [read_saved(f"a/agent_{name}.pt")["step"] for name in ("offline", "final")] == [0, 430]
    # The last evaluation again, with gymnasium alone: Pendulum's actions are ±2.
    agent, env = o3f.load_agent("a/agent_final.pt"), gym.make("Pendulum-v1")
    eval_seed, returns = int(np.random.SeedSequence(0).generate_state(3)[2]), []
    for i in range(2):
        (obs, _), rewards = env.reset(seed=eval_seed + i), []
        for _ in range(200):
            action = agent.policy(torch.as_tensor(obs)[None], sample=False)[0].numpy()
            obs, reward, *_ = env.step(2 * action)
            rewards.append(reward)
        returns.append(sum(rewards))
    assert float(rows[-1]["eval/return"]) == pytest.approx(np.mean(returns), rel=1e-3)
    assert float(rows[-1]["eval/score_std"]) == pytest.approx(np.std(returns), rel=1e-2, abs=1)


def test_a_kitchen_run(home):
    write_kitchen("k.hdf5")
    flags = TINY + "--online-steps 3 --eval-episodes 1"
    assert cli(f"--env-id kitchen-mixed-v0 --dataset k.hdf5 --run-dir a {flags}") == 0
    rows = read_table("a/evaluations.csv")
    assert [int(row["step"]) for row in rows] == [0, 3]
    assert {float(row["eval/success"]) for row in rows} <= {0.0, 1.0}
    assert {float(row["eval/length"]) for row in rows} == {280.0}
    dataset = read_json("a/summary.json")["dataset"]
    assert dataset["sha256"] == hashlib.sha256(Path("k.hdf5").read_bytes()).hexdigest()
    config = read_json("a/config.json")
    assert (config["sigma"], config["beta"], config["proposal"]) == (0.05, 0.5, "mean")
    saved = read_saved("a/agent_final.pt")
    assert saved["sizes"] == (60, 9) and saved["rule"] == [1.0, 0.0]


def test_rows_of_metrics_are_means_over_their_steps(home):
    assert cli(SHORT + "--online-steps 10 --log-every 1 --run-dir one") == 0
    assert cli(SHORT + "--online-steps 10 --log-every 7 --run-dir seven") == 0
    one = {int(row.pop("step")): row for row in read_table("one/metrics.csv")}
    window = []
    for row in read_table("seven/metrics.csv"):
        last = int(row.pop("step"))
        start = window[-1] + 1 if window else -24
        window = list(range(start, last + 1))
        for name, value in row.items():
            mean = np.mean([float(one[step][name]) for step in window])
            assert float(value) == pytest.approx(mean, rel=1e-4, abs=1e-6), (last, name)
    assert window == [8, 9, 10]


def test_seeds_and_independent_streams(home):
    flags = SHORT + "--online-steps 210 "
    variants = {
        "first": "",
        "again": "",
        "other": "--seed 1",
        "often": "--eval-every 30 --eval-episodes 2",
        "optimistic": "--eval-action optimistic",
    }
    for name, more in variants.items():
        assert cli(flags + f"--run-dir {name} {more}") == 0
    assert_same_run("first", "again")
    for table in ("metrics.csv", "episodes.csv"):
        first, other, *same = (
            Path(name, table).read_bytes() for name in ("first", "other", "often", "optimistic")
        )
        assert first != other and same == [first, first]
    first, optimistic = (read_table(f"{x}/evaluations.csv")[-1] for x in ("first", "optimistic"))
    assert first["eval/score"] != optimistic["eval/score"]


def test_offline_ratio_1_never_learns_from_online_steps(home):
    learned = {}
    for ratio in ("1", "0.5"):
        for explore in ("o3f", "policy"):
            folder = f"{explore}{ratio}"
            flags = f"--online-steps 100 --offline-ratio {ratio} --explore {explore}"
            assert cli(SHORT + f"{flags} --run-dir {folder}") == 0
            learned[folder] = [row["losses/qf"] for row in read_table(f"{folder}/metrics.csv")]
    assert learned["o3f1"] == learned["policy1"]
    assert learned["o3f0.5"] != learned["policy0.5"]


@pytest.mark.parametrize("anneal", ["step", "linear"])
def test_expectile_switches_or_moves_over_the_online_phase(anneal, home, monkeypatch):
    seen, loss = [], o3f.expectile_loss

    def spy(u, expectile):
        seen.append(expectile)
        return loss(u, expectile)

    monkeypatch.setattr(o3f, "expectile_loss", spy)
    flags = f"--utd 1 --online-expectile 0.9 --anneal {anneal} --run-dir a"
    assert cli(SHORT + flags) == 0
    online = {"step": [0.9] * 5, "linear": [0.74, 0.78, 0.82, 0.86, 0.9]}[anneal]
    assert seen == pytest.approx([0.7] * 25 + online)


def test_from_python_and_in_a_thread(home):
    args = o3f.preset("Pendulum-v1", "iql", dataset="random", dataset_size=300, offline_steps=2,
                      online_steps=2, hidden_dim=8, eval_episodes=1, run_dir="main")  # fmt: skip
    assert o3f.main(args)["finished"]
    results = []
    args = o3f.replace(args, run_dir="thread")
    thread = threading.Thread(target=lambda: results.append(o3f.main(args)))
    thread.start()
    thread.join()
    assert results[0]["last_step"] == 2
    assert Path("main/metrics.csv").read_bytes() == Path("thread/metrics.csv").read_bytes()
    with pytest.raises(o3f.UserError, match="explore foo: choose one of o3f, noise, policy"):
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
    assert not Path("killed/summary.json").exists()
    assert cli("--resume killed") == 0
    assert_same_run("whole", "killed")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_offline_phase_loses_nothing(signum, home, monkeypatch, capsys):
    assert cli(SHORT + "--run-dir whole") == 0
    before = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        signal_in_update(patch, 10, signum)
        assert cli(SHORT + "--run-dir a") == 130
    assert signal.getsignal(signum) is before
    summary = read_json("a/summary.json")
    assert not summary["finished"] and summary["last_step"] == -15
    assert read_saved("a/checkpoint.pt")["step"] == -15
    assert "stopped; 0 steps after the last checkpoint are lost" in capsys.readouterr().out
    assert cli("--resume a") == 0
    assert_same_run("whole", "a")


def test_ctrl_c_online_prints_a_command_that_goes_on(home, monkeypatch, capsys):
    assert cli(PENDULUM + "--run-dir whole") == 0
    monkeypatch.setattr(sys, "argv", [str(HERE / "o3f.py")])
    with monkeypatch.context() as patch:
        signal_in_update(patch, 25 + 230, signal.SIGINT)
        assert o3f.cli([*(PENDULUM + EVERY).split(), "--run-dir", "it's a"]) == 130
    *_, lost, command = capsys.readouterr().out.splitlines()
    assert lost == "stopped; 30 steps after the last checkpoint are lost"  # the episode's, from 200
    assert shlex.split(command)[2:] == ["--resume", "it's a"]
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run("whole", "it's a")


def test_ctrl_c_twice_while_saving_harms_no_checkpoint(home, monkeypatch):
    assert cli(SHORT + "--run-dir whole") == 0
    save, calls = torch.save, []

    def interrupted(state, file):
        calls.append(state["step"])
        if len(calls) == 5:
            file.write(b"half of it")
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        assert cli(SHORT + EVERY + "--run-dir a") == 130
    assert calls[-1] == -20 and read_saved("a/checkpoint.pt")["step"] == -21
    assert not list(Path("a").glob("*.part")) and not Path("a/summary.json").exists()
    assert cli("--resume a") == 0
    assert_same_run("whole", "a")


def test_an_ant_mazes_goal_stays_in_a_resumed_run(home, monkeypatch):
    """v0 and v1 draw it once per environment: of that for training, and of two for evaluation."""
    limit, step, goals = gym.wrappers.TimeLimit, o3f.AntMazeEnv.step, set()

    def spy(self, action):
        goals.add(tuple(self.goal))
        return step(self, action)

    monkeypatch.setattr(gym.wrappers, "TimeLimit", lambda env, steps: limit(env, 20))
    o3f.collect_random("antmaze-umaze-v0", 60, Path("ant.hdf5"))
    monkeypatch.setattr(o3f.AntMazeEnv, "step", spy)
    flags = f"--env-id antmaze-umaze-v0 --dataset ant.hdf5 {TINY} --online-steps 50 "
    assert cli(flags + "--run-dir whole") == 0
    first = set(goals)
    assert len(first) == 3
    with monkeypatch.context() as patch:
        signal_in_update(patch, 25 + 30, signal.SIGINT)
        assert cli(flags + EVERY + "--run-dir a") == 130
    assert read_saved("a/checkpoint.pt")["step"] == 20
    goals.clear()
    assert cli("--resume a") == 0
    assert goals == first
    assert_same_run("whole", "a")
    assert {row["eval/success"] for row in read_table("a/evaluations.csv")} == {"0.0"}


def test_resume_refuses_in_one_line(home, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signal_in_update(patch, 10, signal.SIGINT)
        assert cli(SHORT + "--run-dir a") == 130
    saved = Path("a/checkpoint.pt").read_bytes()
    refused("--resume nowhere", "nowhere", "no such file", capsys=capsys)
    refused("--resume a/config.json", "a/config.json", "a run's folder", capsys=capsys)
    Path("early").mkdir()
    refused("--resume early", "early: no checkpoint there yet", capsys=capsys)
    refused("--resume a --sigma 0.1", "drop the others", capsys=capsys)
    for damaged in (saved[: len(saved) // 2], b"hello", b""):
        Path("a/checkpoint.pt").write_bytes(damaged)
        refused("--resume a", "checkpoint.pt is no whole file", capsys=capsys)
    Path("a/checkpoint.pt").write_bytes(saved)
    torch.save(read_saved("a/checkpoint.pt") | {"version": 1}, "a/checkpoint.pt")
    refused("--resume a", "version 1", capsys=capsys)
    Path("a/checkpoint.pt").write_bytes(saved)
    (data,) = Path("data").glob("*.hdf5")
    whole = data.read_bytes()
    with h5py.File(data, "a") as file:
        file["rewards"][3] += 1.0
    refused("--resume a", f"{data.name} has changed", capsys=capsys)
    data.write_bytes(whole)
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
    assert cli(f"{SHORT} {sizes} --run-dir a") == 0
    args = o3f.parse(["--load", "a/agent_offline.pt"])
    brought = args.env_id, args.base, args.hidden_dim, args.num_critics, args.latent_dim
    assert brought == ("Pendulum-v1", "lapo", 9, 3, 5)
    assert (args.batch_size, args.utd, args.learning_rate) == (512, 20, 2e-4)  # LAPO's again
    load = "--load a/agent_offline.pt --dataset random --dataset-size 300 --batch-size 8 --utd 1 "
    load += "--online-steps 3 --eval-episodes 1 "
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
        "--env-id hopper-random-v2": "trained with env_id Pendulum-v1, this run has hopper",
        "--base iql": "trained with base lapo, this run has iql",
        "--num-critics 2": "trained with num_critics 3, this run has 2",
        "--latent-dim 4": "trained with latent_dim 5, this run has 4",
        "--reward-transform none": "trained with reward_transform max, this run has none",
    }
    for flag, words in contradictions.items():
        refused(load + flag, words, capsys=capsys)
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
    refused(load.format("missing.pt"), "missing.pt", "no such file", capsys=capsys)
    refused(load.format("a"), "no such file", capsys=capsys)
    refused(load.format("garbage.pt"), "garbage.pt is no whole file", capsys=capsys)
    refused(load.format("list.pt"), "list.pt is no whole file", capsys=capsys)
    refused(load.format("evil.pt"), "evil.pt is no whole file", capsys=capsys)
    assert not Path("ran").exists()  # a stranger's file runs no code
    for moment in ("exp_avg", "exp_avg_sq"):
        saved = read_saved("a/agent_final.pt")
        saved["optimizer"]["state"][0][moment] = torch.zeros(1)  # Adam would write past its end
        torch.save(saved, "moments.pt")
        refused(load.format("moments.pt"), "does not fit", capsys=capsys)
    saved = read_saved("a/agent_final.pt")
    saved["agent"]["vf.0.bias"] = torch.zeros(3)
    torch.save(saved, "weights.pt")
    refused(load.format("weights.pt"), "does not fit", capsys=capsys)
    assert not Path("b").exists()


# ==== what goes wrong in a run ====================================================================
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(home, monkeypatch, capsys):
    save, refused_at = torch.save, []

    def full_disk(state, file):  # torch hides the OSError
        if "rows" in state and state["step"] > -20:
            file.write(b"some bytes")
            refused_at.append(state["step"])
            raise RuntimeError("unexpected pos 64 vs 0: No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full_disk)
    assert cli(SHORT + EVERY + "--run-dir a") == 0
    assert refused_at == list(range(-19, 1))
    out = capsys.readouterr().out
    assert "warning: no checkpoint at step -19" in out and out.count("No space left") == 20
    assert read_saved("a/checkpoint.pt")["step"] == -20
    assert not list(Path("a").glob("*.part"))
    assert read_json("a/summary.json")["finished"]


NAN = {  # the update or step of the NaN: message, last good checkpoint
    # An update of step -14, due for a row of metrics, and of -13, due for a checkpoint alone.
    ("loss", 11): ("losses/vf is nan by step -14", -15),
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
    "--env-id kitchen-mixd-v0": "no such task",
    "--env-id CartPole-v1 --dataset random": "needs flat",
    "--env-id Pendulum-v1": "--dataset random",
    "--base lapo --expectile 0.8": "expectile: no part of --base lapo",
    "--base lapo --online-expectile=0.8": "no part of --base lapo",
    "--subset-size 1": "no part of --base iql",
    "--base lapo --subset-size 6": "more than there are critics",
    "--num-candidates 0": "num_candidates 0: give a number from 1 to",
    "--num-candidates 1000000000": "lower --num-candidates",
    "--gamma 1.5": "gamma 1.5: give a number from 0 to 1",
    "--sigma -1": "sigma -1.0: give a number from 0",
    "--sigma nan": "sigma nan",
    "--offline-ratio 1.5": "offline_ratio 1.5",
    "--dataset nofile": "nofile",
    "--dataset .": "no whole HDF5 file",
    "--track": "pip install wandb",
    "--device cuda": "use auto",
    "--plot": "name the folders",
    "--plot nothing": "nothing: no run with an evaluation",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_get_one_line(flags, home, capsys, monkeypatch):
    find = o3f.importlib.util.find_spec
    absent = lambda name: None if name == "wandb" else find(name)  # noqa: E731
    monkeypatch.setattr(o3f.importlib.util, "find_spec", absent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(flags, BAD_FLAGS[flags], capsys=capsys)
    assert not list(home.iterdir())


@pytest.mark.parametrize("flags", ["--explore foo", "--sgima 1", "--seed x", "--dataset"])
def test_what_no_parser_knows_exits_with_2(flags, home, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli(flags)
    assert stopped.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err
    assert not list(home.iterdir())


def test_a_buffer_that_does_not_fit(home, capsys):
    """A billion steps of Pendulum are 36 GB; this process may have 4 GB more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**32, limits[1]))
    try:
        words = "1,000,000,298 transitions do not fit into memory: lower --online-steps"
        refused(SHORT + "--online-steps 1000000000 --run-dir a", words, capsys=capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert not Path("a").exists()


def test_missing_d4rl_names_the_command(home, monkeypatch, capsys):
    find = o3f.importlib.util.find_spec
    absent = lambda name: None if name == "d4rl" else find(name)  # noqa: E731
    monkeypatch.setattr(o3f.importlib.util, "find_spec", absent)
    for env_id in ("antmaze-umaze-v2", "hopper-medium-v2"):
        refused(f"--env-id {env_id}", "pip install --no-deps d4rl==1.1", capsys=capsys)


# ==== plots =======================================================================================
def write_run(folder, scores: dict, before=None, **flags) -> None:
    path = Path(folder)
    path.mkdir(parents=True)
    config = asdict(o3f.Args(run_dir=folder, **flags)) | {"pretraining": before or {}}
    (path / "config.json").write_text(json.dumps(config))
    lines = [f"{step},{score}" for step, score in scores.items()]
    (path / "evaluations.csv").write_text("\n".join(["step,eval/score", *lines, ""]))


def test_plot_groups_seeds_and_prints_a_table(home, capsys):
    write_run("runs/b", {-50: 0.0, 0: 10.0, 100: 30.0}, seed=1, resume="runs/b")
    write_run("runs/a", {-50: 0.0, 0: 20.0, 100: 50.0}, seed=0, log_every=3)
    write_run("runs/c", {0: 5.0, 50: 6.0, 100: 7.0}, explore="noise")
    for name, start in (("plot.png", b"\x89PNG"), ("p.svg", b"<?xml"), ("p.pdf", b"%PDF")):
        assert cli(f"--plot runs --plot-to {name}") == 0
        assert Path(name).read_bytes().startswith(start)
        lines = capsys.readouterr().out.splitlines()
        first, last = "step -50: 0.0 [0. 0.]", "step 100: 40.0 [50. 30.]"
        assert f"| explore o3f | [0, 1] | {first} | {last} |" in lines
        assert "| explore noise | [0] | step 0: 5.0 [5.] | step 100: 7.0 [7.] |" in lines
    assert cli("--plot runs/c runs/a") == 0  # and the folders of single runs
    table = capsys.readouterr().out
    assert table.index("| explore noise | [0]") < table.index("| explore o3f | [0]")
    svg = Path("p.svg").read_text()
    assert "explore o3f" in svg and "explore noise" in svg


def test_plot_tells_pretrainings_apart_but_not_their_seeds(home, capsys):
    for seed in (0, 1):
        for beta in (1.0, 3.0):
            before = asdict(o3f.Args(seed=seed, beta=beta, run_dir=f"p{seed}"))
            write_run(f"runs/{seed}-{beta}", {0: beta}, before, seed=seed, load=f"p{seed}.pt")
    assert cli("--plot runs") == 0
    lines = capsys.readouterr().out.splitlines()
    for beta in ("1.0", "3.0"):
        assert sum(f"| pretrained with beta {beta} | [0, 1] |" in line for line in lines) == 1


def test_plot_refuses_in_one_line(home, capsys):
    write_run("runs/a", {0: 1.0}, seed=3)
    write_run("twice", {0: 2.0}, seed=3)
    refused("--plot runs twice", "twice: a second run of seed 3", capsys=capsys)
    Path("empty").mkdir()
    refused("--plot runs empty", "empty: no run with an evaluation", capsys=capsys)
    refused("--plot runs --plot-to a.xyz", "a.xyz: cannot be drawn", capsys=capsys)
    refused("--plot runs --plot-to no/such/a.png", "cannot be drawn", capsys=capsys)
    Path("runs/a/config.json").write_text("{")
    refused("--plot runs", "runs/a: no run", capsys=capsys)


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
def test_a_download_is_whole_or_not_there(main, mirror, server, home):
    served, asked = server
    o3f.collect_random(TASK, 20, Path("c.hdf5"))
    env, body = o3f.make_env(TASK), Path("c.hdf5").read_bytes()
    served["/main/cheetah.hdf5"] = ANSWERS[main](body)
    served["/mirror/cheetah.hdf5"] = ANSWERS[mirror](body)
    files = []
    if "whole" in (main, mirror):
        files = ["cheetah.hdf5"]
        for _ in range(2):  # the second time from the cache
            path = o3f.download(TASK, Path("data"), env)
            assert path == Path("data/cheetah.hdf5") and path.read_bytes() == body
    else:
        with pytest.raises(o3f.UserError, match="no source for cheetah.*Ways on: --dataset FILE"):
            o3f.download(TASK, Path("data"), env)
    assert asked == ["/main/cheetah.hdf5", "/mirror/cheetah.hdf5"][: 1 + (main != "whole")]
    assert [path.name for path in Path("data").iterdir()] == files


def test_a_download_of_other_bytes_is_refused(server, home, monkeypatch):
    served, _ = server
    o3f.collect_random(TASK, 20, Path("c.hdf5"))
    body = Path("c.hdf5").read_bytes()
    served["/main/cheetah.hdf5"] = served["/mirror/cheetah.hdf5"] = body, len(body)
    monkeypatch.setitem(o3f.KNOWN_SHA256, TASK, "0" * 64)
    with pytest.raises(o3f.UserError, match="no source for cheetah.*hash"):
        o3f.download(TASK, Path("data"), o3f.make_env(TASK))
    assert not list(Path("data").iterdir())


def test_no_network_names_every_source(server, monkeypatch, capsys):
    def unreachable(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", unreachable)
    words = "/main/cheetah.hdf5", MIRROR + "cheetah.hdf5", "Network is unreachable"
    refused(f"--env-id {TASK} --run-dir a", *words, capsys=capsys)
    assert not Path("a").exists()


def test_version_1_of_an_ant_maze_has_its_url_from_d4rls_registration(server):
    _, asked = server
    with pytest.raises(o3f.UserError, match="no source for ant1.hdf5"):
        o3f.download("antmaze-umaze-v1", Path("data"), None)
    assert asked == ["/main/ant1.hdf5", "/mirror/ant1.hdf5"]


# ==== output ======================================================================================
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_terminals_that_know_no_greek(encoding, home, monkeypatch):
    for name in ("stdout", "stderr"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
        monkeypatch.setattr(sys, name, stream)
    write_kitchen("k.hdf5")
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
    out, err = capsys.readouterr()
    assert err == ""
    (offline,) = [line for line in out.splitlines() if line.startswith("offline -20: ")]
    assert re.search(r"[\d.]+ steps/s, [\d:]+ to go, then [\d:]+ online", offline)
    (online,) = [line for line in out.splitlines() if line.startswith("online 100: ")]
    assert re.search(r"[\d.]+ steps/s, [\d:]+ to go", online)


def test_a_closed_stderr_and_a_reader_that_leaves(home, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    program = f"{sys.executable} {HERE / 'o3f.py'} {SHORT}"
    done = subprocess.run(f"{program} --run-dir a 2>&-", shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and "files in a" in done.stdout
    assert read_json("a/summary.json")["finished"]
    # The reader leaves after the first line; dozens of evaluations still have theirs to say.
    script = f"({program} --run-dir b --online-steps 50 --eval-every 1; echo $? >&2) | head -1"
    done = subprocess.run(script, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("data: ") and done.stdout.count("\n") == 1
    assert done.stderr == "130\n"


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
    (tests,) = {line for line in lines if line.startswith("pytest")}
    in_head = re.findall(r'"(.+?)"', block)
    assert len(in_head) == len(set(in_head)) > 9
    assert set(in_head) - lines == {"d4rl==1.1"} and lines - set(in_head) == {tests}

def test_resume_after_a_kill_between_opening_and_writing_a_table(home):
    assert cli(SHORT + "--run-dir a") == 0
    Path("a/episodes.csv").write_text("")
    assert cli("--resume a") == 0


def test_a_full_disk_at_an_agents_file_is_one_line(home, monkeypatch, capsys):
    save = torch.save

    def full_disk(state, file):
        if "rows" not in state:
            raise RuntimeError("No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full_disk)
    refused(SHORT + "--run-dir a", "No space left", capsys=capsys)


def test_plot_of_a_run_before_its_first_evaluation(home, capsys):
    write_run("a", {})
    refused("--plot a", "a: no run with an evaluation", capsys=capsys)


def test_a_task_without_a_file_anywhere(home, capsys):
    refused("--env-id halfcheetah-full-replay-v0", "halfcheetah-full-replay-v0", capsys=capsys)


def test_an_agents_file_is_no_checkpoint(home, capsys):
    assert cli(SHORT + "--run-dir a") == 0
    Path("a/agent_final.pt").replace("a/checkpoint.pt")
    refused("--resume a", "checkpoint.pt", capsys=capsys)


@pytest.mark.parametrize("omega", ["nan", "inf"])
def test_omega(omega, home, capsys):
    refused(SHORT + f"--omega {omega}", "omega", capsys=capsys)


def test_handlers_and_lock_after_a_failed_start(home):
    assert cli(SHORT + "--run-dir a") == 0
    saved = read_saved("a/agent_final.pt")
    saved["agent"]["qf.net.0.bias"] *= np.nan
    torch.save(saved, "nan.pt")
    before = signal.getsignal(signal.SIGINT)
    assert cli(SHORT + "--load nan.pt --run-dir b") == 2
    after = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    assert after is before
    with filelock.FileLock("b/.lock", timeout=0):
        pass


def test_a_reader_that_leaves_before_buffered_output_is_flushed(home, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    program = f"{sys.executable} {HERE / 'o3f.py'} {SHORT}"
    script = f"({program} --run-dir b; echo $? >&2) | true"
    done = subprocess.run(script, shell=True, capture_output=True, text=True)
    assert done.stderr in ("0\n", "130\n")
