"""Tests of o3f.py against closed forms in float64, brute-force loops and D4RL's own kitchen: minutes on two cores."""

import ast
import contextlib
import copy
import csv
import dataclasses
import hashlib
import http.server
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import gymnasium as gym
import h5py
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import o3f

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"  # real data, where there is some beside the checkout; no test needs it
torch.set_num_threads(1)


def make_args(env_id="kitchen-mixed-v0", **flags):
    args = o3f.Args(env_id=env_id, **flags)
    return o3f.resolve(args, o3f.get_task(env_id).family)


def make_agent(obs_dim=7, act_dim=3, seed=0, dtype=torch.float64, data=None, **flags):
    torch.manual_seed(seed)
    flags = {"hidden_dim": 16, "base": "iql", **flags}
    if flags["base"] == "iql":
        flags = {"actor_dropout": 0.0, **flags}
    data = data or make_data(50, obs_dim, act_dim)
    agent = o3f.AGENTS[flags["base"]](data, make_args(**flags)).to(dtype)
    agent.optimizer = o3f.make_optimizer(agent)
    return agent


def make_data(rows, obs_dim=7, act_dim=3, seed=2):
    """A dataset with means and scales of its own; its last observation feature is constant."""
    rng = np.random.default_rng(seed)
    obs = rng.normal(0.7, 3.0, (rows, obs_dim))
    obs[:, -1] = 0.3
    data = {"observations": obs, "actions": rng.uniform(-0.2, 0.9, (rows, act_dim)), "rewards": rng.normal(size=rows),
            "next_observations": rng.normal(size=(rows, obs_dim)), "terminations": np.zeros(rows)}
    return {name: x.astype(np.float32) for name, x in data.items()}


def make_batch(size=32, obs_dim=7, act_dim=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return o3f.Batch(draw(size, obs_dim), draw(size, act_dim).clamp(-0.9, 0.9), draw(size), draw(size, obs_dim),
                     (torch.rand(size, generator=g) < 0.3).double())


def mlp_by_hand(x, weights, biases):
    """ReLU network by plain matrix products; weights (in, out)."""
    for i, (w, b) in enumerate(zip(weights, biases)):
        x = x @ w + b
        if i < len(weights) - 1:
            x = x.clamp(min=0.0)
    return x


def critic_by_hand(agent, j, obs, actions, target=False):
    layers = [m for m in (agent.qf_target if target else agent.qf).net if hasattr(m, "weight")]
    return mlp_by_hand(torch.cat([obs, actions], 1), [m.weight[j] for m in layers],
                       [m.bias[j, 0] for m in layers]).squeeze(1)


def linear_by_hand(net, x):
    layers = [m for m in net if hasattr(m, "weight")]
    return mlp_by_hand(x, [m.weight.T for m in layers], [m.bias for m in layers])


# ==== losses ================================================================================================
@pytest.mark.parametrize("kappa", [0.5, 0.7, 0.9])
def test_expectile_loss_and_its_gradient(kappa):
    u = torch.tensor([-2.0, -0.5, 0.25, 3.0], dtype=torch.float64, requires_grad=True)
    by_hand = [(1 - kappa if x < 0 else kappa) * x * x for x in u.tolist()]
    loss = o3f.expectile_loss(u, kappa)
    assert loss.item() == pytest.approx(sum(by_hand) / 4, rel=1e-12)
    loss.backward()
    slopes = [2 * (1 - kappa if x < 0 else kappa) * x / 4 for x in u.tolist()]
    assert u.grad.tolist() == pytest.approx(slopes, rel=1e-12)


def test_expectile_loss_is_least_at_the_expectile():
    # The κ-expectile of a two-point variable {0, 1} with equal odds is κ: 0.5·κ·(1−v) = 0.5·(1−κ)·v.
    q = torch.tensor([0.0, 1.0], dtype=torch.float64)
    grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
    losses = torch.stack([o3f.expectile_loss(q - v, 0.8) for v in grid])
    assert grid[losses.argmin()].item() == pytest.approx(0.8, abs=1e-3)


def test_td_target_stops_at_true_ends_only():
    y = o3f.td_target(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([10.0, 10.0]), 0.9)
    assert y.tolist() == pytest.approx([1 + 0.9 * 10, 1.0])


def test_ensemble_mse_gives_each_critic_the_gradient_it_has_alone():
    q = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    y = torch.randn(8, dtype=torch.float64)
    o3f.ensemble_mse(q, y).backward()
    for j in range(5):
        for b in range(8):
            assert q.grad[j, b].item() == pytest.approx(2 * (q[j, b] - y[b]).item() / 8, rel=1e-12)


def test_advantage_weights():
    adv = torch.tensor([-1.0, 0.0, 2.0, 1000.0], dtype=torch.float64)
    expected = [math.exp(-3), 1.0, math.exp(6) if math.exp(6) < 100 else 100.0, 100.0]
    assert o3f.advantage_weights(adv, 3.0, 100.0).tolist() == pytest.approx(expected)
    assert o3f.advantage_weights(adv, 0.0, 100.0).tolist() == [1.0] * 4


def test_polyak():
    a, b = torch.nn.Linear(3, 2).double(), torch.nn.Linear(3, 2).double()
    before = [(p.tolist(), q.tolist()) for p, q in zip(a.parameters(), b.parameters())]
    o3f.polyak_(a, b, 0.005)
    for p, (old, new) in zip(a.parameters(), before):
        expected = 0.995 * np.array(old) + 0.005 * np.array(new)
        assert np.allclose(p.detach().numpy(), expected, rtol=0, atol=1e-15)


# ==== networks ==============================================================================================
def test_batched_critics_are_five_separate_mlps():
    torch.manual_seed(0)
    critics = o3f.Critics(7, 3, 5, [16, 16]).double()
    layers = [m for m in critics.net if hasattr(m, "weight")]
    for layer in layers:  # biases start at 0: give them values, or the test would not see them
        layer.bias.data.normal_()
    separate = []
    for j in range(5):
        net = torch.nn.Sequential(torch.nn.Linear(10, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.ReLU(),
                                  torch.nn.Linear(16, 1)).double()
        for mine, theirs in zip(layers, net[::2]):
            theirs.weight.data = mine.weight[j].T.detach().clone()
            theirs.bias.data = mine.bias[j, 0].detach().clone()
        separate.append(net)
    obs, actions, y = torch.randn(9, 7).double(), torch.randn(9, 3).double(), torch.randn(9).double()
    q = critics(obs, actions)
    assert q.shape == (5, 9)
    o3f.ensemble_mse(q, y).backward()
    for j, net in enumerate(separate):
        alone = net(torch.cat([obs, actions], 1)).squeeze(1)
        assert torch.allclose(q[j], alone, rtol=0, atol=1e-12)
        ((alone - y) ** 2).mean().backward()
        for mine, theirs in zip(layers, net[::2]):
            assert torch.allclose(mine.weight.grad[j].T, theirs.weight.grad, rtol=0, atol=1e-12)
            assert torch.allclose(mine.bias.grad[j, 0], theirs.bias.grad, rtol=0, atol=1e-12)


def test_init_is_orthogonal_with_gain_root_two_and_members_differ():
    agent = make_agent(dtype=torch.float32)
    for net in (agent.vf, agent.actor.net, agent.qf.net):
        for layer in (m for m in net if hasattr(m, "weight")):
            assert layer.bias.abs().max() == 0
            for w in layer.weight.detach().view(-1, *layer.weight.shape[-2:]):
                gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
                assert torch.allclose(gram, 2 * torch.eye(len(gram)), atol=1e-5)
    first = agent.qf.net[0].weight
    assert all(not torch.equal(first[0], first[j]) for j in range(1, 5))
    assert all(torch.equal(p, q) for p, q in zip(agent.qf.parameters(), agent.qf_target.parameters()))


def test_lapo_init_is_pytorchs_default():
    """U(±1/√in) for weights and biases, three hidden layers in every network, members that differ."""
    agent = make_agent(base="lapo", hidden_dim=64, dtype=torch.float32)
    for net in (agent.vf, agent.qf.net, agent.encoder, agent.decoder, agent.actor):
        layers = [m for m in net if hasattr(m, "weight")]
        assert len(layers) == 4
        for layer in layers:
            fan_in = layer.weight.shape[1 if layer.weight.dim() == 2 else -2]
            for x in (layer.weight, layer.bias):
                assert x.abs().max() <= fan_in**-0.5
            if layer.weight.numel() > 1000:
                assert layer.weight.abs().max() > 0.95 * fan_in**-0.5
                assert layer.weight.std().item() == pytest.approx(fan_in**-0.5 / math.sqrt(3), rel=0.1)
                assert layer.bias.std().item() == pytest.approx(fan_in**-0.5 / math.sqrt(3), rel=0.35)
    first = agent.qf.net[0].weight
    assert all(not torch.equal(first[0], first[j]) for j in range(1, 5))


# ==== IQL ===================================================================================================
def adam_first_step(grad, lr):
    """Adam's first step in closed form: m̂ = g, v̂ = g², so −lr·g/(|g| + 1e-8)."""
    return -lr * grad / (grad.abs() + 1e-8)


def test_iql_update_against_the_formulas():
    """One whole update, in order: V on old targets; actor and critics on the new V; Polyak on the new critics."""
    kappa, beta, gamma, tau, lr = 0.7, 0.5, 0.99, 0.005, 3e-4
    agent, batch = make_agent(), make_batch()
    with torch.no_grad():  # make target and online critics differ, and log-stds too
        for p in agent.qf_target.parameters():
            p.add_(0.05 * torch.randn_like(p))
        agent.actor.log_std.copy_(torch.tensor([-0.3, 0.1, 0.4]))
    old = copy.deepcopy(agent)
    s, a, r, s2, d = batch

    # V, Eq. 5
    target_q = torch.stack([critic_by_hand(old, j, s, a, target=True) for j in range(5)]).min(0).values.detach()
    u = target_q - linear_by_hand(old.vf, s).squeeze(1)
    vf_loss = torch.where(u < 0, (1 - kappa) * u * u, kappa * u * u).mean()
    v_params = list(old.vf.parameters())
    new_v = [p + adam_first_step(g, lr) for p, g in zip(v_params, torch.autograd.grad(vf_loss, v_params))]

    # the new V at s and s'
    value = lambda x: mlp_by_hand(x, [w.T for w in new_v[::2]], new_v[1::2]).squeeze(1).detach()  # noqa: E731
    adv = target_q - value(s)
    weight = torch.tensor([min(math.exp(beta * x), 100.0) for x in adv.tolist()]).double()
    mean, std = torch.tanh(linear_by_hand(old.actor.net, s)), old.actor.log_std.exp()
    log_prob = (-((a - mean) ** 2) / (2 * std**2) - torch.log(std * math.sqrt(2 * math.pi))).sum(1)
    actor_loss = -(weight * log_prob).mean()
    pi_params = list(old.actor.parameters())
    new_pi = [p + adam_first_step(g, lr) for p, g in zip(pi_params, torch.autograd.grad(actor_loss, pi_params))]
    y = r + gamma * (1 - d) * value(s2)
    q_losses = [((critic_by_hand(old, j, s, a) - y) ** 2).mean() for j in range(5)]
    q_params = list(old.qf.parameters())
    new_q = [p + adam_first_step(g, lr) for p, g in zip(q_params, torch.autograd.grad(sum(q_losses), q_params))]
    new_target = [(1 - tau) * t + tau * q for t, q in zip(old.qf_target.parameters(), new_q)]

    values = dict(zip(agent.METRICS, agent.update(batch).tolist()))
    for module, expected in ((agent.vf, new_v), (agent.actor, new_pi), (agent.qf, new_q), (agent.qf_target, new_target)):
        for p, q in zip(module.parameters(), expected):
            assert torch.allclose(p, q, rtol=0, atol=1e-10)
    assert values["losses/vf"] == pytest.approx(vf_loss.item())
    assert values["losses/actor"] == pytest.approx(actor_loss.item())
    assert values["losses/qf"] == pytest.approx(sum(q_losses).item() / 5)
    assert values["adv"] == pytest.approx(adv.mean().item())
    q_by_hand = torch.stack([critic_by_hand(old, j, s, a) for j in range(5)])
    assert values["q_mean"] == pytest.approx(q_by_hand.mean().item())
    assert values["q_std"] == pytest.approx(q_by_hand.std(0, correction=0).mean().item())


# ==== LAPO ==================================================================================================
def test_kl_against_pytorchs_and_the_mix_against_sorting():
    mean, log_var = torch.randn(9, 4).double(), torch.randn(9, 4).double()
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (0.5 * log_var).exp()), normal(0.0, 1.0)).sum(1)
    assert torch.allclose(o3f.kl_to_standard_normal(mean, log_var), expected)
    q = torch.randn(3, 8).double()
    for lam in (1.0, 0.7, 0.0):
        ordered = [sorted(column) for column in q.T.tolist()]
        assert o3f.mixed_q(q, lam).tolist() == pytest.approx([lam * c[0] + (1 - lam) * c[-1] for c in ordered])


def test_critics_asked_one_by_one_say_the_same():
    agent, batch = make_agent(base="lapo"), make_batch()
    members = torch.tensor([3, 0])
    some = agent.qf(batch.observations, batch.actions, members)
    for row, j in zip(some, members):
        assert torch.allclose(row, critic_by_hand(agent, j, batch.observations, batch.actions))


def lapo_data(agent):
    """Mean and std of the agent's dataset in float64, worked out column by column."""
    data = make_data(50)
    stats = []
    for x in (data["observations"].astype(np.float64), data["actions"].astype(np.float64)):
        mean = [sum(column) / len(column) for column in x.T]
        std = [math.sqrt(sum((v - m) ** 2 for v in column) / len(column)) for column, m in zip(x.T, mean)]
        stats += [torch.tensor(mean), torch.tensor([s + 1e-6 if s > 1e-6 else 1.0 for s in std])]
    return [x.double() for x in stats]


@pytest.mark.parametrize("lam, clamp", [(1.0, "none"), (0.7, "discounted"), (0.7, "once")])
def test_lapo_update_against_the_formulas(lam, clamp):
    """One whole update: critics and V, CVAE, latent policy, each from its own loss alone; then Polyak."""
    gamma, tau, lr, m = 0.99, 0.005, 2e-4, 5
    agent = make_agent(base="lapo", doubleq_min=lam, value_clamp=clamp)
    batch = make_batch()
    with torch.no_grad():  # slow copies that differ; value targets on both sides of 0, past the narrow limits
        for net in (agent.qf_target, agent.decoder_target, agent.actor_target):
            for p in net.parameters():
                p.add_(0.3 * torch.randn_like(p))
        agent.qf_target.net[-1].weight.mul_(30.0)
    old = copy.deepcopy(agent)
    obs_mean, obs_std, act_mean, act_std = lapo_data(agent)
    assert obs_std[-1] == 1.0  # the constant feature
    s, s2 = ((x - obs_mean) / obs_std for x in (batch.observations, batch.next_observations))
    a, r, d = (batch.actions - act_mean) / act_std, batch.rewards, batch.terminations

    torch.manual_seed(11)
    members = sorted(range(m), key=torch.rand(m).tolist().__getitem__)[-2:]
    latent_noise, cvae_noise = (torch.randn(32, 6, dtype=torch.float64) for _ in range(2))

    cat = lambda *x: torch.cat(x, 1)  # noqa: E731
    value = lambda net, x: linear_by_hand(net, x).squeeze(1)  # noqa: E731
    mix = lambda o, b: torch.stack([  # noqa: E731
        lam * min(x) + (1 - lam) * max(x)
        for x in zip(*(critic_by_hand(old, j, o, b, target=True) for j in members))])
    # 1. critics and V
    z = 2 * torch.tanh(linear_by_hand(old.actor_target, s)) + (0.1 * latent_noise).clamp(-0.2, 0.2)
    v_target = mix(s, linear_by_hand(old.decoder_target, cat(s, z))).detach()
    everything = np.concatenate([make_data(50)["rewards"], r.numpy()])
    limits = [scale * x for scale in [{"discounted": 100.0, "once": 1.0, "none": math.inf}[clamp]]
              for x in (min(0.0, everything.min()), max(0.0, everything.max()))]
    if clamp == "once":
        assert v_target.min() < limits[0] or v_target.max() > limits[1]  # so that the clamp is put to work
    v_target = v_target.clamp(*limits)
    y = r + gamma * (1 - d) * value(old.vf, s2).detach()
    vf_loss = ((value(old.vf, s) - v_target) ** 2).mean()
    qf_losses = [((critic_by_hand(old, j, s, a) - y) ** 2).mean() for j in range(m)]

    def stepped(net, loss):
        params = list(net.parameters())
        return [p + adam_first_step(g, lr) for p, g in zip(params, torch.autograd.grad(loss, params, retain_graph=True))]

    new = {"qf": stepped(old.qf, sum(qf_losses)), "vf": stepped(old.vf, vf_loss)}
    # 2. CVAE, with the new V and the slow critics of before
    new_v = mlp_by_hand(s, [w.T for w in new["vf"][::2]], new["vf"][1::2]).squeeze(1).detach()
    next_z = 2 * torch.tanh(linear_by_hand(old.actor_target, s2))
    adv = r + gamma * (1 - d) * mix(s2, linear_by_hand(old.decoder_target, cat(s2, next_z))) - new_v
    assert (adv > 0).any() and (adv < 0).any()
    weight = torch.tensor([0.9 if x > 0 else 0.1 for x in adv.tolist()]).double()
    mu, log_var = linear_by_hand(old.encoder, cat(s, a)).split(6, 1)
    decoded = linear_by_hand(old.decoder, cat(s, mu + torch.exp(log_var / 2) * cvae_noise))
    kl = -0.5 * (1 + log_var - mu**2 - log_var.exp()).sum(1)
    cvae_loss = (weight * (((decoded - a) ** 2).sum(1) + kl)).mean()
    new |= {"encoder": stepped(old.encoder, cvae_loss), "decoder": stepped(old.decoder, cvae_loss)}
    # 3. latent policy, against the new critics' mean, through the slow decoder
    own_z = 2 * torch.tanh(linear_by_hand(old.actor, s))
    action = linear_by_hand(old.decoder_target, cat(s, own_z))
    q_new = [mlp_by_hand(cat(s, action), [w[j] for w in new["qf"][::2]], [b[j, 0] for b in new["qf"][1::2]])
             for j in range(m)]
    actor_loss = -torch.stack(q_new).mean()
    new["actor"] = stepped(old.actor, actor_loss)

    torch.manual_seed(11)
    values = dict(zip(agent.METRICS, agent.update(batch).tolist()))
    for name, expected in new.items():
        for p, q in zip(getattr(agent, name).parameters(), expected):
            assert torch.allclose(p, q, rtol=0, atol=1e-8), name
    for name in ("qf", "decoder", "actor"):
        slow = (getattr(agent, f"{name}_target"), getattr(old, f"{name}_target"))
        for p, before, q in zip(slow[0].parameters(), slow[1].parameters(), new[name]):
            assert torch.allclose(p, (1 - tau) * before + tau * q, rtol=0, atol=1e-8), name
    expected = {"losses/qf": sum(qf_losses) / m, "losses/vf": vf_loss, "losses/cvae": cvae_loss,
                "losses/actor": actor_loss, "adv": adv.mean(), "kl": kl.mean()}
    assert {name: values[name] for name in expected} == pytest.approx({k: v.item() for k, v in expected.items()})


def test_lapo_subset_is_drawn_anew_and_evenly():
    """Only one target critic is low: how often it decides says how often it is among the two of five."""
    agent, batch = make_agent(base="lapo", value_clamp="none"), make_batch(4)
    with torch.no_grad():
        for net in (agent.qf_target, agent.vf):
            for p in net.parameters():
                p.zero_()
        agent.qf_target.net[-1].bias[3] = -100.0
    seen, state = [], copy.deepcopy(agent.state_dict())
    for _ in range(400):
        agent.load_state_dict(state)
        seen.append(agent.update(batch)[1].item() > 5000)  # V's loss: 100² or 0
    assert abs(np.mean(seen) - 2 / 5) < 4 * math.sqrt(0.4 * 0.6 / 400)


def test_lapo_value_limits_start_with_the_dataset_and_widen_with_what_is_seen():
    data = make_data(50) | {"rewards": np.linspace(-4.0, -1.0, 50, dtype=np.float32)}
    limits = lambda agent: agent.v_limits.tolist()  # noqa: E731
    discounted, once = (make_agent(base="lapo", data=data, value_clamp=x) for x in ("discounted", "once"))
    assert limits(discounted) == pytest.approx([-400.0, 0.0])  # 0 is what follows an end, whatever the data says
    assert limits(once) == [-4.0, 0.0]
    batch = make_batch()
    for agent in (discounted, once):
        agent.update(batch._replace(rewards=torch.full((32,), -2.0).double()))
    assert limits(discounted) == pytest.approx([-400.0, 0.0]) and limits(once) == [-4.0, 0.0]
    for agent in (discounted, once):
        agent.update(batch._replace(rewards=torch.linspace(-5.0, 3.0, 32).double()))
    assert limits(discounted) == pytest.approx([-500.0, 300.0]) and limits(once) == [-5.0, 3.0]


def test_lapo_speaks_environment_units():
    agent = make_agent(base="lapo")
    obs_mean, obs_std, act_mean, act_std = lapo_data(agent)
    raw = make_batch()
    s, a = (raw.observations - obs_mean) / obs_std, (raw.actions - act_mean) / act_std
    z = 2 * torch.tanh(linear_by_hand(agent.actor, s))
    decoded = linear_by_hand(agent.decoder, torch.cat([s, z], 1))
    assert torch.allclose(agent.policy(raw.observations, False), (decoded * act_std + act_mean).clamp(-1, 1), atol=1e-6)
    for target in (False, True):
        q = torch.stack([critic_by_hand(agent, j, s, a, target) for j in range(5)])
        assert torch.allclose(agent.q_values(raw.observations, raw.actions, target), q, atol=1e-6)
    with torch.no_grad():
        agent.decoder[-1].bias.fill_(50.0)  # the decoder is linear: what is executed stays in the box
    assert torch.equal(agent.policy(raw.observations, False), torch.ones(32, 3).double())
    # A sample moves z by 0.1·ε, cut at 0.2, and nothing else; the mean is deterministic.
    agent, g = make_agent(base="lapo"), torch.Generator()
    noise = torch.randn(32, 6, generator=g.manual_seed(4), dtype=torch.float64)
    assert (noise.abs() > 2).any()
    decoded = linear_by_hand(agent.decoder, torch.cat([s, z + (0.1 * noise).clamp(-0.2, 0.2)], 1))
    sample = agent.policy(raw.observations, True, g.manual_seed(4))
    assert torch.allclose(sample, (decoded * act_std + act_mean).clamp(-1, 1), atol=1e-6)


def test_lapo_updates_critics_per_batch_and_policy_once():
    """Three batches: three critic steps with Polyak after each, one step and one Polyak for CVAE and policy."""
    agent, tau = make_agent(base="lapo"), 0.005
    batches = [make_batch(seed=i) for i in range(3)]
    slow, policy = ([p.clone() for p in net.parameters()] for net in (agent.qf_target, agent.actor_target))
    for i in range(3):  # critics after 1, 2, 3 batches; the policy's update comes after all of them
        partial = copy.deepcopy(agent)
        partial.optimizer = o3f.make_optimizer(partial)
        torch.manual_seed(7)
        partial.update(*batches[: i + 1])
        slow = [(1 - tau) * t + tau * q for t, q in zip(slow, partial.qf.parameters())]
    for p, q in zip(partial.qf_target.parameters(), slow):
        assert torch.allclose(p, q, rtol=0, atol=1e-12)
    for p, before, new in zip(partial.actor_target.parameters(), policy, partial.actor.parameters()):
        assert torch.allclose(p, (1 - tau) * before + tau * new, rtol=0, atol=1e-12)
    steps = lambda *nets: {int(partial.optimizer.state[p]["step"]) for x in nets for p in x.parameters()}  # noqa: E731
    assert steps(partial.qf, partial.vf) == {3} and steps(partial.encoder, partial.decoder, partial.actor) == {1}


# ==== acting ================================================================================================
def test_dropout_acts_in_updates_and_never_elsewhere():
    batch, losses = make_batch(), []
    for rate in (0.0, 0.5):
        agent = make_agent(actor_dropout=rate)
        torch.manual_seed(3)
        losses.append(agent.update(batch)[2].item())
        actions = [agent.policy(batch.observations, sample=False) for _ in range(2)]
        assert torch.equal(*actions)
    assert losses[0] != losses[1]


def test_policy_samples_are_the_clipped_gaussian():
    agent = make_agent()
    with torch.no_grad():
        agent.actor.log_std.fill_(math.log(0.1))
        for p in agent.actor.net.parameters():
            p.mul_(0.1)
    obs = torch.randn(1, 7).double().expand(20_000, 7)
    mean = agent.policy(obs[:1], sample=False)
    draws = agent.policy(obs, sample=True, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(mean, torch.tanh(linear_by_hand(agent.actor.net, obs[:1])))
    assert torch.allclose(draws.mean(0), mean[0], atol=5 * 0.1 / math.sqrt(20_000))
    assert torch.allclose(draws.std(0), torch.full((3,), 0.1).double(), rtol=0.03)
    with torch.no_grad():
        agent.actor.log_std.copy_(torch.tensor([5.0, -9.0, 0.5]))
        assert agent.actor(obs[:1])[1].tolist() == [2.0, -5.0, 0.5]
        agent.actor.log_std.fill_(5.0)  # and the samples are clipped to the box
    draws = agent.policy(obs, sample=True, generator=torch.Generator().manual_seed(0))
    assert draws.abs().max() == 1.0


# ==== new in O3F ============================================================================================
def optimistic_by_loop(agent, obs, action, n, sigma, omega, clip, seed, target=False):
    """Algorithm 1 and Eq. 2 as a Python loop over observations, candidates and critics."""
    noise = torch.randn(len(obs), n, action.shape[1], dtype=action.dtype, generator=torch.Generator().manual_seed(seed))
    chosen, optimism = [], []
    for b in range(len(obs)):
        best, best_score, best_mean, means = None, -math.inf, None, []
        for i in range(n):
            c = [action[b, k].item() + sigma * noise[b, i, k].item() for k in range(action.shape[1])]
            c = [min(max(x, -1.0), 1.0) for x in c] if clip else c
            c_tensor = torch.tensor([c], dtype=action.dtype)
            qs = [critic_by_hand(agent, j, obs[b : b + 1], c_tensor, target).item() for j in range(5)]
            means.append(sum(qs) / 5)
            score = means[-1] + omega * statistics.pstdev(qs)
            if score > best_score:
                best, best_score, best_mean = c, score, means[-1]
        chosen.append(best)
        optimism.append(best_mean - sum(means) / n)
    return torch.tensor(chosen, dtype=action.dtype), torch.tensor(optimism, dtype=action.dtype)


@pytest.mark.parametrize("n, sigma, omega, clip", [(1, 0.2, 0.0, True), (20, 0.2, 0.0, True), (20, 0.2, 1.0, True),
                                                   (20, 0.7, -0.5, False), (20, 0.7, 1.0, True), (5, 0.0, 0.0, True)])
def test_optimistic_action_against_a_loop(n, sigma, omega, clip):
    agent = make_agent()
    obs, action = torch.randn(3, 7).double(), torch.rand(3, 3).double() * 2 - 1
    chosen, optimism = o3f.optimistic_action(obs, action, agent.q_values, n, sigma, omega, clip,
                                             torch.Generator().manual_seed(5))
    by_loop = optimistic_by_loop(agent, obs, action, n, sigma, omega, clip, 5)
    assert torch.allclose(chosen, by_loop[0], rtol=0, atol=1e-12)
    assert torch.allclose(optimism, by_loop[1], rtol=0, atol=1e-9)


def test_optimistic_action_ties_and_signs():
    obs, action = torch.zeros(1, 2), torch.zeros(1, 2)
    noise = torch.randn(1, 50, 2, generator=torch.Generator().manual_seed(0))
    pick = lambda q, omega=0.0: o3f.optimistic_action(  # noqa: E731
        obs, action, q, 50, 0.1, omega, True, torch.Generator().manual_seed(0))[0]
    assert torch.allclose(pick(lambda o, a: torch.ones(5, len(a))), 0.1 * noise[:, 0])  # ties: the first candidate
    assert torch.allclose(pick(lambda o, a: a[:, 0].expand(5, -1)), 0.1 * noise[:, noise[0, :, 0].argmax()])
    # Equal means, disagreement growing with a_0: only ω ≠ 0 sees it.
    spread = lambda o, a: torch.tensor([[-1.0], [1.0]]) * a[:, 0].exp()  # noqa: E731
    assert torch.allclose(pick(spread, 1.0), 0.1 * noise[:, noise[0, :, 0].argmax()])
    assert torch.allclose(pick(spread, -1.0), 0.1 * noise[:, noise[0, :, 0].argmin()])
    # The std divides by m: where a_0 > 0 the two critics say ±1 (std 1, with m − 1 it would be √2), elsewhere both
    # say 1.2, which is then the better bet.
    q = lambda o, a: torch.where(a[:, 0] > 0, torch.tensor([[1.0], [-1.0]]), torch.tensor(1.2))  # noqa: E731
    assert pick(q, 1.0)[0, 0] <= 0


def test_explore_action_variants():
    agent = make_agent(dtype=torch.float32)
    with torch.no_grad():
        for p in agent.qf_target.parameters():
            p.add_(torch.randn_like(p))
    obs = torch.randn(1, 7)
    act = lambda **flags: o3f.explore_action(  # noqa: E731
        agent, obs, make_args(sigma=0.3, **flags), torch.Generator().manual_seed(9))
    g = torch.Generator().manual_seed(9)
    sample = agent.policy(obs, True, g)
    noise = torch.randn(1, 3, generator=g)
    assert torch.equal(act(explore="policy", proposal="sample")[0], sample)
    assert torch.equal(act(explore="policy", proposal="mean")[0], agent.policy(obs, False))
    assert torch.allclose(act(explore="noise", proposal="sample")[0], (sample + 0.3 * noise).clamp(-1, 1))
    for proposal, centre in (("sample", sample), ("mean", agent.policy(obs, False))):
        for rank in ("online", "target"):
            g = torch.Generator().manual_seed(9)
            if proposal == "sample":
                agent.policy(obs, True, g)
            candidates = (centre + 0.3 * torch.randn(1, 100, 3, generator=g)).clamp(-1, 1)[0]
            q = torch.stack([critic_by_hand(agent, j, obs.expand(100, 7), candidates, rank == "target") for j in range(5)])
            chosen, optimism = act(explore="o3f", proposal=proposal, rank_critics=rank)
            assert torch.allclose(chosen[0], candidates[q.mean(0).argmax()])
            assert optimism.item() == pytest.approx((q.mean(0).max() - q.mean()).item(), rel=1e-3) and optimism > 0
    assert act(explore="noise")[1].item() == 0.0


# ==== replay buffer =========================================================================================
def buffer_data(n, obs_dim=2, act_dim=1):
    return {"observations": np.arange(n * obs_dim, dtype=np.float32).reshape(n, obs_dim),
            "actions": np.zeros((n, act_dim), np.float32), "rewards": np.arange(n, dtype=np.float32),
            "next_observations": np.zeros((n, obs_dim), np.float32), "terminations": np.zeros(n, np.float32)}


def test_buffer_keeps_the_dataset_and_wraps_over_online_rows():
    buffer = o3f.ReplayBuffer(buffer_data(4), 7, torch.device("cpu"))
    for i in range(5):  # rows 4, 5, 6, then again 4, 5
        buffer.add(np.full(2, 100.0 + i), np.array([0.5]), 10.0 + i, np.full(2, 200.0 + i), i % 2 == 1)
        assert buffer.size == min(4 + i + 1, 7)
    rewards = buffer.rows[:, 3].tolist()
    assert rewards == [0, 1, 2, 3, 13, 14, 12]
    assert buffer.rows[4].tolist() == [103, 103, 0.5, 13, 203, 203, 1]
    assert buffer.rows[:4, :2].tolist() == buffer_data(4)["observations"].tolist()


def test_sampling_is_uniform_over_all_rows_and_offline_ratio_is_a_count():
    buffer = o3f.ReplayBuffer(buffer_data(6), 10, torch.device("cpu"))
    torch.manual_seed(0)
    assert set(buffer.sample(500, 0.25)[0].rewards.tolist()) == {0, 1, 2, 3, 4, 5}  # nothing online yet
    for i in range(2):
        buffer.add(np.zeros(2), np.zeros(1), 100.0 + i, np.zeros(2), False)
    counts = np.bincount(np.searchsorted([0, 1, 2, 3, 4, 5, 100, 101], buffer.sample(80_000)[0].rewards.numpy()))
    assert len(counts) == 8 and np.abs(counts - 10_000).max() < 5 * math.sqrt(10_000)
    for ratio in (0.0, 0.25, 1.0):
        (batch,) = buffer.sample(200, ratio)
        assert (batch.rewards < 50).sum().item() == round(200 * ratio)
    (batch,) = buffer.sample(8)
    assert [x.shape for x in batch] == [(8, 2), (8, 1), (8,), (8, 2), (8,)]
    batches = buffer.sample(200, 0.25, batches=20)  # of one gather, yet every one a draw of its own
    assert len(batches) == 20 and [x.shape for x in batches[7]] == [(200, 2), (200, 1), (200,), (200, 2), (200,)]
    assert all((batch.rewards < 50).sum().item() == 50 for batch in batches)
    assert len({tuple(batch.rewards.tolist()) for batch in batches}) == 20
    assert all((batch.observations[:, 0] == 2 * batch.rewards).sum() == 50 for batch in batches)  # rows stay whole


# ==== data ==================================================================================================
def rows_one_by_one(raw, horizon):
    """d4rl's rule, a row at a time: a limit drops the row and restarts the count, a terminal restarts it at 1."""
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
    rng = np.random.default_rng(0)
    for _ in range(100):
        n, horizon = rng.integers(2, 60), rng.integers(2, 12)
        raw = {"observations": rng.normal(size=(n, 3)).astype(np.float32), "rewards": rng.normal(size=n),
               "actions": rng.normal(size=(n, 2)), "terminals": (rng.random(n) < 0.15) & with_terminals}
        if with_timeouts:
            raw["timeouts"] = rng.random(n) < 0.15
        kept = rows_one_by_one(raw, horizon)
        data = o3f.to_transitions({"timeouts": o3f.mark_time_limits(raw["terminals"], int(horizon)), **raw})
        assert np.array_equal(data["observations"], raw["observations"][kept])
        assert np.array_equal(data["next_observations"], raw["observations"][[t + 1 for t in kept]])
        assert np.array_equal(data["actions"], raw["actions"][kept])
        assert np.array_equal(data["rewards"], raw["rewards"][kept])
        assert np.array_equal(data["terminations"], raw["terminals"][kept])


def write_hdf5(path, **columns):
    with h5py.File(path, "w") as f:
        for name, value in columns.items():
            f[name] = value
    return str(path)


def small_kitchen_file(path, episodes=3, length=40, **extra):
    """Random motion around the start pose; in every episode the kettle and then the microwave get done."""
    rng = np.random.default_rng(0)
    n = episodes * length
    goal = o3f.make_env("kitchen-mixed-v0").unwrapped.goal
    obs = np.tile(np.concatenate([o3f.KitchenEnv.INIT_QPOS, goal]), (n, 1))
    obs[:, :30] += 0.01 * rng.normal(size=(n, 30))
    for e in range(episodes):
        rows = slice(e * length, (e + 1) * length)
        obs[rows][10:, 23:30] = [-0.23, 0.75, 1.62, 0.99, 0, 0, -0.06]
        obs[rows][20:, 22] = -0.75
    rewards = np.tile(np.repeat([0.0, 1.0, 2.0], [10, 10, length - 20]), episodes)
    terminals = np.zeros(n)
    terminals[length - 1 :: length] = 1
    columns = {"observations": obs, "actions": rng.uniform(-0.9, 0.9, (n, 9)), "rewards": rewards,
               "terminals": terminals, **extra}
    return write_hdf5(path, **columns)


@pytest.mark.parametrize("with_timeouts", [False, True])
def test_kitchen_rewards_consistent_and_stock(tmp_path, with_timeouts, capsys):
    extra = {"timeouts": np.zeros(120, bool)} if with_timeouts else {}
    path = small_kitchen_file(tmp_path / "k.hdf5", **extra)
    env = o3f.make_env("kitchen-mixed-v0")
    task = o3f.get_task("kitchen-mixed-v0")
    data, rule, facts = o3f.load_dataset(make_args(dataset=path), task, env)
    expected = np.repeat([-4.0, -3.0, -2.0], [10, 10, 19])  # 39 of 40: the last row of a demonstration has no successor
    assert np.array_equal(data["rewards"], np.tile(expected, 3)) and data["terminations"].sum() == 0
    assert facts["episodes"] == 3 and facts["rows"] == 120 and facts["dropped"] == 3
    assert "NOT the same, as in D4RL's files" in capsys.readouterr().out
    # The rule at work online: satisfied(s) − 4 whatever the environment pays; an end only where all four are.
    done = np.zeros(60)
    for index, goal in (o3f.KITCHEN_GOALS[name] for name in task.targets):
        done[index] = goal
    start = np.concatenate([o3f.KitchenEnv.INIT_QPOS, np.zeros(30)])
    assert rule(start, 1.0, done, False) == (-4.0, True) and rule(done, 0.0, start, True) == (0.0, False)

    data, rule, _ = o3f.load_dataset(make_args(dataset=path, kitchen_rewards="stock"), task, env)
    assert data["rewards"].max() == 2.0 and data["terminations"].sum() == 2  # the third is the last row
    assert rule(start, 1.0, done, False) == (1.0, False)


def test_reward_transform_is_the_datasets_offline_and_online(tmp_path, monkeypatch):
    """The range of episode returns scales the file's rewards once, and every online reward by the same number."""
    path = tmp_path / "p.hdf5"
    o3f.collect_random("Pendulum-v1", 1000, path)
    with h5py.File(path) as f:
        rewards = f["rewards"][:].astype(np.float64)
    returns = [rewards[i : i + 200].sum() for i in range(0, 1000, 200)]
    scale = 1000 / (max(returns) - min(returns))
    raw_rewards, added = [], []
    step, add = gym.wrappers.RescaleAction.step, o3f.ReplayBuffer.add

    def spy_step(self, action):
        result = step(self, action)
        raw_rewards.append(result[1])
        return result

    def spy_add(self, obs, action, reward, next_obs, end):
        if not added:
            file_rows = self.rows[: self.num_offline, 4]
            assert np.allclose(file_rows, scale * rewards.reshape(5, 200)[:, :199].ravel(), rtol=1e-4)
        added.append((reward, raw_rewards[-1]))
        return add(self, obs, action, reward, next_obs, end)

    monkeypatch.setattr(gym.wrappers.RescaleAction, "step", spy_step)
    monkeypatch.setattr(o3f.ReplayBuffer, "add", spy_add)
    run("--env-id", "Pendulum-v1", "--dataset", path, "--offline-steps", 2, "--online-steps", 30, "--eval-episodes", 1,
        "--run-dir", tmp_path / "run")
    assert len(added) == 30
    assert all(mine == pytest.approx(scale * theirs, rel=1e-4) for mine, theirs in added)


def test_minus_one_transform_and_clipped_actions(tmp_path):
    path = small_kitchen_file(tmp_path / "k.hdf5", actions=np.ones((120, 9)))
    args = make_args(dataset=path, kitchen_rewards="stock", reward_transform="minus_one")
    data, rule, _ = o3f.load_dataset(args, o3f.get_task("kitchen-mixed-v0"), o3f.make_env("kitchen-mixed-v0"))
    assert np.array_equal(data["actions"], np.full((119, 9), np.float32(1 - 1e-5)))  # as in IQL's code
    assert set(data["rewards"]) == {-1.0, 0.0, 1.0} and rule(np.zeros(60), 1.0, np.zeros(60), False)[0] == 0.0


@pytest.mark.parametrize("kitchen_rewards", ["consistent", "stock"])
def test_lapos_rewards_keep_their_sign_where_none_is_positive(tmp_path, kitchen_rewards):
    path = small_kitchen_file(tmp_path / "k.hdf5")
    args = make_args(dataset=path, base="lapo", kitchen_rewards=kitchen_rewards)
    data, rule, _ = o3f.load_dataset(args, o3f.get_task("kitchen-mixed-v0"), o3f.make_env("kitchen-mixed-v0"))
    seen = sorted(set(data["rewards"].tolist()))
    with h5py.File(path) as f:
        raw = f["rewards"][:]
    if kitchen_rewards == "stock":
        assert seen == pytest.approx(sorted(set((raw / raw.max()).tolist())))
    else:
        assert seen == pytest.approx(sorted(set(((raw - 4) / np.abs(raw - 4).max()).tolist()))) and max(seen) < 0


def test_reward_x100(tmp_path):
    path = small_kitchen_file(tmp_path / "k.hdf5")
    args = make_args(dataset=path, base="lapo", kitchen_rewards="stock", reward_transform="x100")
    data, rule, _ = o3f.load_dataset(args, o3f.get_task("kitchen-mixed-v0"), o3f.make_env("kitchen-mixed-v0"))
    assert data["rewards"].max() >= 100 and rule(np.zeros(60), 1.0, np.zeros(60), False)[0] == 100.0


def test_collected_data_is_uniform_and_cached_under_its_own_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    args = make_args("hopper-random-v2", dataset_size=3000)
    path = o3f.find_dataset(args)
    assert path.name == "hopper-random-v2.collected-uniform-3000.hdf5" and "not D4RL's own" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no .part left behind
    raw = o3f.load_hdf5(path, 11, 3)
    assert np.abs(raw["actions"].mean(0)).max() < 5 * math.sqrt(1 / 3 / 3000)
    assert np.allclose(raw["actions"].var(0), 1 / 3, atol=0.03)
    assert raw["terminals"].sum() > 50 and raw["timeouts"].sum() == 0  # random hoppers fall
    # Each kept row's successor is what the environment does from it: put it back into the state and step.
    env = o3f.make_env("hopper-random-v2").unwrapped
    env.reset(seed=0)
    data = o3f.to_transitions(raw)
    for t in range(0, 2500, 97):
        if data["terminations"][t] or np.abs(data["observations"][t, 5:]).max() >= 10:
            continue
        env.set_state(np.append(0.0, data["observations"][t, :5]), data["observations"][t, 5:])
        obs, reward, *_ = env.step(data["actions"][t])
        assert np.allclose(obs, data["next_observations"][t], atol=1e-2) and reward == pytest.approx(data["rewards"][t], abs=1e-2)
    # The check at start sees whether the rewards are this environment's.
    task, ends = o3f.get_task("hopper-random-v2"), raw["terminals"] | raw["timeouts"]
    assert "rewards: the same: " in o3f.reward_check(raw, ends, task, env)
    assert "NOT the same" in o3f.reward_check({**raw, "rewards": raw["rewards"] + 0.5}, ends, task, env)
    # HalfCheetah hides no velocity: rows of which every one is too fast for a Hopper are replayed as well.
    env = o3f.make_env("halfcheetah-random-v2")
    rng, rows, obs = np.random.default_rng(0), [], env.reset(seed=0)[0]
    while len(rows) < 30:
        action = rng.uniform(-1, 1, 6).astype(np.float32)
        row = (obs, action, *(step := env.step(action))[1:2])
        if np.abs(obs[8:]).max() >= 10:
            rows.append(row)
        obs = step[0]
    raw = dict(zip(("observations", "actions", "rewards"), map(np.array, zip(*rows))))
    line = o3f.reward_check(raw, np.zeros(30, bool), o3f.get_task("halfcheetah-random-v2"), env)
    assert "rewards: the same: 200 rows replayed" in line
    official = tmp_path / "hopper_random-v2.hdf5"
    official.write_bytes(b"")
    assert o3f.find_dataset(args) == official  # D4RL's own file, where there is one, comes first


def test_damaged_files_load_right_or_give_one_line(tmp_path):
    """500 files with flipped bits, cut ends, wrong types and shapes, missing keys, NaN, absurd sizes."""
    rng = np.random.default_rng(0)
    columns = {"observations": rng.normal(size=(40, 3)), "actions": rng.uniform(-1, 1, (40, 1)),
               "rewards": rng.normal(size=40), "terminals": np.zeros(40), "timeouts": np.zeros(40)}
    good = Path(write_hdf5(tmp_path / "good.hdf5", **columns)).read_bytes()
    kinds = (np.int8, "S3", np.complex64, np.float16, np.uint8)
    refused, path = 0, tmp_path / "bad.hdf5"
    for i in range(500):
        name = list(columns)[rng.integers(5)]
        if i % 5 < 3:
            content = bytearray(good)
            for _ in range(rng.integers(1, 30)):
                content[rng.integers(len(content))] ^= 1 << rng.integers(8)
            path.write_bytes(content if i % 5 < 2 else good[: rng.integers(len(good))])
        else:
            changed = {key: x.copy() for key, x in columns.items()}
            mutation = rng.integers(5)
            if mutation == 0:
                changed[name] = changed[name].astype(kinds[rng.integers(5)])
            elif mutation == 1:
                changed[name].flat[rng.integers(40)] = rng.choice([np.nan, np.inf, -np.inf, 1e30])
            elif mutation == 2:
                changed[name] = changed[name][: rng.integers(40)]
            elif mutation == 3:
                del changed[name]
            write_hdf5(path, **changed)
            if mutation == 4:
                with h5py.File(path, "a") as f:
                    del f[name]
                    f.create_dataset(name, (3 * 10**8, *columns[name].shape[1:]), np.float32, chunks=True)
                    if rng.random() < 0.5:  # all of them, so that shapes agree
                        for key in columns:
                            if key in f:
                                del f[key]
                            f.create_dataset(key, (3 * 10**8, *columns[key].shape[1:]), np.float32, chunks=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        try:
            raw = o3f.load_hdf5(path, 3, 1)
            assert raw["observations"].shape == (len(raw["rewards"]), 3) and raw["observations"].dtype == np.float32
            assert np.isfinite(raw["observations"]).all() and np.abs(raw["actions"]).max() <= 1 + 1e-6
        except o3f.UserError as e:
            refused += 1
            assert len(str(e)) > 20
        assert time.perf_counter() - start < 10
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 200_000 * (1024 if sys.platform == "darwin" else 1)  # 200 MB: in kB, on a Mac in bytes
    assert 200 < refused < 500


class Files(http.server.BaseHTTPRequestHandler):
    """A server with ranges; it can cut every first answer short."""

    content, cut, ranges = b"", False, []

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.ranges.append(start)
        if start >= len(self.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        body = self.content[start:]
        self.wfile.write(body[: len(body) // 2] if Files.cut and not start else body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def file_server(content, cut=False):
    Files.content, Files.cut, Files.ranges = content, cut, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def test_download_resumes_checks_and_names_every_source(tmp_path, monkeypatch):
    content = np.random.default_rng(0).bytes(300_000)
    with file_server(content, cut=True) as url:
        # First try: broken off half-way, the half is kept. The second source is asked for the rest at once.
        path = o3f.download([url + "a.hdf5", url + "mirror/a.hdf5"], tmp_path / "a.hdf5", hashlib.sha256(content).hexdigest())
        assert path.read_bytes() == content and Files.ranges == [0, 150_000]
        assert [p.name for p in tmp_path.iterdir()] == ["a.hdf5"]
        with pytest.raises(o3f.UserError, match=r"broke off after 150000 of 300000.*Ways on: --dataset FILE"):
            o3f.download([url + "b.hdf5"], tmp_path / "b.hdf5")
        assert (tmp_path / "b.hdf5.part").stat().st_size == 150_000 and not (tmp_path / "b.hdf5").exists()
    with file_server(content) as url:
        for had in (content, content + b"more"):  # killed before the renaming, or left over from another file
            (tmp_path / "e.hdf5.part").write_bytes(had)
            assert o3f.download([url + "e.hdf5"], tmp_path / "e.hdf5").read_bytes() == content
            (tmp_path / "e.hdf5").unlink()
        with pytest.raises(o3f.UserError, match="sha256 is not the known one.*Ways on: --dataset FILE"):
            o3f.download([url + "c.hdf5"], tmp_path / "c.hdf5", "0" * 64)
    assert not list(tmp_path.glob("c.hdf5*"))
    with pytest.raises(o3f.UserError, match=r"no source for d\.hdf5.*http://127\.0\.0\.1:1/x.*http://127\.0\.0\.1:1/y"):
        o3f.download(["http://127.0.0.1:1/x", "http://127.0.0.1:1/y"], tmp_path / "d.hdf5")


def test_two_downloads_at_once_fetch_once(tmp_path):
    content = np.random.default_rng(0).bytes(3_000_000)
    with file_server(content) as url:
        paths = []
        threads = [threading.Thread(target=lambda: paths.append(o3f.download([url + "a"], tmp_path / "a.hdf5")))
                   for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert paths == [tmp_path / "a.hdf5"] * 4 and paths[0].read_bytes() == content
    assert Files.ranges == [0] and [p.name for p in tmp_path.iterdir()] == ["a.hdf5"]


# ==== tasks and environments ================================================================================
def test_scores():
    assert o3f.get_task("halfcheetah-medium-v2").score(12135.0) == pytest.approx(100)
    assert o3f.get_task("hopper-random-v2").score(-20.272305) == pytest.approx(0)
    assert o3f.get_task("walker2d-medium-v2").score(2000.0) == pytest.approx(100 * (2000 - 1.629008) / (4592.3 - 1.629008))
    assert o3f.get_task("kitchen-mixed-v0").score(3.0) == 75.0
    assert o3f.get_task("Pendulum-v1").score(-123.0) == -123.0


def test_other_environments_are_rescaled_to_the_unit_box():
    env = o3f.make_env("Pendulum-v1")
    assert env.action_space.low == -1 and env.action_space.high == 1
    plain = gym.make("Pendulum-v1")
    assert np.array_equal(env.reset(seed=3)[0], plain.reset(seed=3)[0])
    assert np.allclose(env.step(np.array([0.5], np.float32))[0], plain.step(np.array([1.0], np.float32))[0])


# Two steps of D4RL's own kitchen under MuJoCo 2.3.7 with the observation noise off, robot joints and kettle.
REFERENCE_ACTIONS = [
    [0.0327972554, 0.1413351737, -0.943051547, -0.6569566875, 0.3705539634, 0.6677937253, -0.3860675607, 0.7872261594,
     0.4430877235],
    [-0.6201220916, 0.1084551822, -0.2957360919, -0.6362151947, 0.5712035237, 0.9309664448, -0.5352926764,
     -0.8328771327, 0.2070968446],
    [0.4579855146, -0.447522343, 0.3706126576, 0.0357349484, -0.9030309251, -0.7242615249, -0.6260651477, 0.9886358023,
     0.0413307934]]
REFERENCE_RESET = [
    1.48388023e-01, -1.76848573, 1.84390296, -2.4768576, 2.60252026e-01, 7.12533105e-01, 1.59515394, 4.79267505e-02,
    3.71350919e-02, -2.66279850e-04, -5.18043486e-05, 3.1287722e-05, -4.51199853e-05, -3.90842156e-06, -4.22629655e-05,
    6.28065475e-05, 4.04984708e-05, 4.62730939e-04, -2.26906415e-04, -4.65501369e-04, -6.44129196e-03, -1.77048263e-03,
    1.08009684e-03, -2.6939744e-01, 3.50383255e-01, 1.61944683, 9.9997015939e-01, 4.0388390472e-03, -6.5800474318e-03,
    -2.6662117157e-04]
REFERENCE_THIRD = [
    1.3462171886e-01, -1.7650847416, 1.8251162615, -2.569050553, 2.6791034609e-01, 7.9350526266e-01, 1.4416326215,
    2.6714624323e-02, 3.9250328342e-02, -1.9906067055e-04, -9.8466080758e-07, 2.5457973194e-05, 3.0594356851e-07,
    2.1512113977e-05, 2.7895152662e-07, 2.9798248652e-05, 3.2659674331e-07, 4.1941372161e-05, 6.5391890769e-06,
    -1.9064544223e-05, -6.4412919600e-03, -4.8220958008e-05, 3.4997880453e-05, -2.6943918032e-01, 3.5037016808e-01,
    1.6193535566, 9.9999995538e-01, -1.0181968086e-06, 6.3024984965e-05, -2.9200040871e-04]


def test_kitchen_reproduces_d4rls_own():
    env = o3f.make_env("kitchen-mixed-v0", noise_ratio=0.0)
    obs, _ = env.reset(seed=0)
    assert np.abs(obs[:30] - REFERENCE_RESET).max() < 1e-9
    for action in REFERENCE_ACTIONS:
        obs, *_ = env.step(np.array(action))
    assert np.abs(obs[:30] - REFERENCE_THIRD).max() < 2e-3
    assert np.array_equal(obs[:30], env.unwrapped.data.qpos)


@pytest.mark.skipif(not (SHARED / "reference").is_dir(), reason="the reference episodes are not beside the checkout")
@pytest.mark.parametrize("episode", [0, 1])  # the actions of episode 0 exceed ±1
def test_kitchen_reproduces_the_reference_episodes(episode):
    reference = np.load(SHARED / "reference/kitchen_mixed_rollouts.npz")
    env = o3f.make_env("kitchen-mixed-v0", noise_ratio=0.0)
    obs, _ = env.reset(seed=0)
    assert np.abs(obs - reference[f"ep{episode}_obs"][0]).max() < 1e-9
    for t in range(10):
        obs, *_ = env.step(reference[f"ep{episode}_act"][t])
        assert np.abs(obs - reference[f"ep{episode}_obs"][t + 1]).max() < 2e-3


def put(env, **joints):
    """Set kitchen objects to their goals, or to zero, and observe by an idle step."""
    for name, done in joints.items():
        index, goal = o3f.KITCHEN_GOALS[name.replace("_", " ")]
        env.unwrapped.data.qpos[index] = goal if done else o3f.KitchenEnv.INIT_QPOS[index]
    return env.step(np.zeros(9, np.float32))


def test_kitchen_pays_each_sub_task_once_and_ends_when_all_are_done():
    env = o3f.make_env("kitchen-mixed-v0", noise_ratio=0.0)
    obs, _ = env.reset(seed=0)
    assert put(env)[1] == 0.0
    obs, reward, terminated, _, info = put(env, microwave=True)
    assert (reward, terminated, info["completed"]) == (1.0, False, ["microwave"])
    assert o3f.kitchen_done(obs, env.unwrapped.targets).sum() == 1
    assert put(env)[1] == 0.0  # still open: not paid again
    obs, reward, *_ = put(env, microwave=False)
    assert reward == 0.0 and o3f.kitchen_done(obs, env.unwrapped.targets).sum() == 0
    assert put(env, microwave=True)[1] == 0.0  # open again: not paid again
    assert put(env, hinge_cabinet=True, top_burner=True)[1] == 0.0  # not targets of mixed
    obs, reward, terminated, *_ = put(env, light_switch=True, bottom_burner=True)
    assert (reward, terminated) == (2.0, False)
    obs, reward, terminated, *_ = put(env, kettle=True)
    assert (reward, terminated) == (1.0, True)
    env.reset()
    assert put(env, microwave=True)[1] == 1.0  # a new episode pays anew


def test_kitchen_goal_vector_and_horizon():
    targets = {"kitchen-mixed-v0": {11: -0.88, 12: -0.01, 17: -0.69, 18: -0.05, 22: -0.75},
               "kitchen-partial-v0": {17: -0.69, 18: -0.05, 19: 0.37, 22: -0.75}}
    targets["kitchen-complete-v0"] = targets["kitchen-partial-v0"]
    kettle = dict(zip(range(23, 30), (-0.23, 0.75, 1.62, 0.99, 0, 0, -0.06)))
    for env_id, entries in targets.items():
        goal = np.zeros(30)
        for i, value in {**entries, **kettle}.items():
            goal[i] = value
        env = o3f.make_env(env_id)
        assert np.allclose(env.reset(seed=0)[0][30:], goal) and env.spec is None
    for t in range(280):
        *_, terminated, truncated, _ = env.step(np.zeros(9))
        assert truncated == (t == 279) and not terminated


def test_kitchen_noise_is_uniform_with_a_tenth_of_the_amplitudes_and_seeded_by_reset_only():
    env = o3f.make_env("kitchen-mixed-v0")
    start = o3f.KitchenEnv.INIT_QPOS.copy()
    start[26:] /= np.linalg.norm(start[26:])
    draws = np.array([env.reset(seed=i)[0][:30] - start for i in range(400)])
    amplitude = np.array([0.1] * 9 + [0.005] * 2 + [0.0005] * 6 + [0.005] * 3 + [0.1] * 3 + [0.005] * 3 + [0.1] * 3 + [0.005])
    assert (np.abs(draws) <= 0.1 * amplitude + 1e-12).all()
    assert np.allclose(draws.std(0), 0.1 * amplitude / math.sqrt(3), rtol=0.15)
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 9))
    np.random.seed(1)
    first = [env.reset(seed=7)[0], *(env.step(a)[0] for a in actions)]
    np.random.seed(2)  # the global generator plays no part
    again = [env.reset(seed=7)[0], *(env.step(a)[0] for a in actions)]
    assert np.array_equal(first, again) and not np.array_equal(first[0], env.reset(seed=8)[0])


def test_kitchen_control_uses_the_seen_joints_and_clips():
    env = o3f.make_env("kitchen-mixed-v0").unwrapped
    obs, _ = env.reset(seed=0)
    env.step(np.full(9, 3.0))  # as good as 1
    low, high = [-2.9, -1.8, -2.9, -3.1, -2.9, 0, -2.9, 0, 0], [2.9, 1.8, 2.9, 0, 2.9, 3.8, 2.9, 0.04, 0.04]
    assert np.allclose(env.data.ctrl, np.clip(obs[:9] + 0.16, low, high))
    obs, _ = env.reset(seed=1)
    env.step(np.full(9, -0.5))
    assert np.allclose(env.data.ctrl, np.clip(obs[:9] - 0.08, low, high))


def test_kitchen_passes_gymnasiums_checker():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(o3f.make_env("kitchen-mixed-v0").unwrapped, skip_render_check=True)


@pytest.mark.parametrize("env_id", ["kitchen-mixed-v0", "antmaze-large-play-v2"])
def test_own_environments_render(env_id):
    code = f"import o3f; e = o3f.make_env('{env_id}', render_mode='rgb_array'); e.reset(seed=0); x = e.render(); " \
           "assert x.shape == (480, 640, 3) and x.dtype == 'uint8' and x.std() > 20; e.close()"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, env={"MUJOCO_GL": "egl", **os.environ},
                          capture_output=True, text=True)
    if done.returncode and "AssertionError" not in done.stderr:
        pytest.skip("no OpenGL on this machine: " + done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr


# ==== ant maze ==============================================================================================
def d4rl_mazes():
    """d4rl's maps, read as data: 1 wall, 0 free, r start, g goal."""
    source = ast.parse((o3f.d4rl_dir() / "locomotion/maze_env.py").read_text())
    values = {node.targets[0].id: node.value for node in source.body if isinstance(node, ast.Assign)}
    entry = lambda x: x.value if isinstance(x, ast.Constant) else x.id.lower()  # noqa: E731
    names = {"umaze": "U_MAZE_TEST", "medium": "BIG_MAZE_TEST", "large": "HARDEST_MAZE_TEST"}
    return {maze: [[entry(x) for x in row.elts] for row in values[name].elts] for maze, name in names.items()}


@pytest.mark.parametrize("env_id", ["antmaze-umaze-v2", "antmaze-medium-play-v2", "antmaze-large-diverse-v2"])
def test_antmaze_geometry_is_d4rls(env_id):
    env = o3f.make_env(env_id).unwrapped
    cells = {(i, j): mark for i, row in enumerate(d4rl_mazes()[env_id.split("-")[1]]) for j, mark in enumerate(row)}
    (i0, j0), (gi, gj) = ([cell for cell, mark in cells.items() if mark == m][0] for m in "rg")
    expected = sorted(((j - j0) * 4.0, (i - i0) * 4.0, 1.0) for (i, j), mark in cells.items() if mark == 1)
    boxes = [k for k in range(env.model.ngeom) if env.model.geom_type[k] == mujoco.mjtGeom.mjGEOM_BOX]
    assert sorted(map(tuple, env.model.geom_pos[boxes].tolist())) == expected
    assert (env.model.geom_size[boxes] == [2, 2, 1]).all()
    assert (env.model.geom_contype[boxes] == 1).all() and (env.model.geom_conaffinity[boxes] == 1).all()
    for seed in range(20):
        env.reset(seed=seed)
        assert np.allclose(env.data.site("goal").xpos[:2], env.goal)  # what is drawn is what counts
        assert (env.goal >= [(gj - j0) * 4, (gi - i0) * 4]).all()
        assert (env.goal <= [(gj - j0) * 4 + 1.5, (gi - i0) * 4 + 1.5]).all()
    assert (env.model.nq, env.model.nv, env.model.nu) == (15, 14, 8)
    assert (env.model.opt.timestep, env.model.opt.integrator) == (0.02, mujoco.mjtIntegrator.mjINT_RK4)
    assert o3f.make_env(env_id)._max_episode_steps == (700 if "umaze" in env_id else 1000)


def test_ant_cannot_leave_the_maze():
    """From every free cell of the umaze, 300 steps of a push of twice its weight towards each wall."""
    env = o3f.make_env("antmaze-umaze-v2").unwrapped
    maze = d4rl_mazes()["umaze"]
    torso, weight = env.model.body("torso").id, env.model.body_subtreemass[0] * 9.81
    pushes = 0
    for i, j in ((i, j) for i in range(5) for j in range(5) if maze[i][j] != 1):
        for di, dj in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            if maze[i + di][j + dj] != 1:
                continue
            env.reset(seed=0)
            env.goal = np.array([99.0, 99.0])
            start = env.model.qpos0.copy()
            start[:2] = 4.0 * (j - 1), 4.0 * (i - 1)
            env.put(start, np.zeros(14))
            for _ in range(300):
                env.data.xfrc_applied[torso, :2] = 2 * weight * dj, 2 * weight * di
                env.step(np.zeros(8))
            x, y = env.data.qpos[:2]
            moved = (x - start[0]) * dj + (y - start[1]) * di
            assert 1.0 < moved < 2.0 - 0.2, (i, j, di, dj, moved)  # at the wall's face, the torso's radius is 0.25
            cell = maze[round(y / 4 + 1)][round(x / 4 + 1)]
            assert cell != 1 and 0 < env.data.qpos[2] < 2
            pushes += 1
    assert pushes == 16


def test_antmaze_goals_per_object_and_per_reset():
    fixed, fresh = (o3f.make_env(f"antmaze-umaze-diverse-v{v}").unwrapped for v in (1, 2))
    for env in (fixed, fresh):
        env.reset(seed=0)
    draws = {env: [] for env in (fixed, fresh)}
    for _ in range(2000):
        for env in draws:
            env.reset()
            draws[env].append(env.goal.copy())
    assert len(np.unique(draws[fixed], axis=0)) == 1 and len(np.unique(draws[fresh], axis=0)) == 2000
    jitter = np.array(draws[fresh]) - [0.0, 8.0]  # U(0, 1) + U(0, 0.5): mean 0.75, variance 1/12 + 1/48
    assert np.abs(jitter.mean(0) - 0.75).max() < 5 * math.sqrt(0.1042 / 2000)
    assert np.abs(jitter.var(0) - 0.1042).max() < 0.01 and 0 <= jitter.min() and jitter.max() <= 1.5
    assert abs(np.corrcoef(jitter.T)[0, 1]) < 0.1
    others = [o3f.make_env("antmaze-umaze-diverse-v0").unwrapped for _ in range(3)]
    goals = [(env.reset(seed=i), tuple(env.goal))[1] for i, env in enumerate(others)]
    assert len(set(goals)) == 3
    old = np.array(fixed.goal)
    fixed.reset(seed=7)
    assert np.array_equal(fixed.goal, old)


def test_antmaze_reset_reward_actions_and_layout(monkeypatch):
    env = o3f.make_env("antmaze-umaze-v2")
    ant, starts = env.unwrapped, []
    for seed in range(300):
        obs, _ = env.reset(seed=seed)
        assert np.array_equal(obs, np.concatenate([ant.data.qpos[:15], ant.data.qvel[:14]])) and obs.shape == (29,)
        assert np.linalg.norm(obs[3:7]) == pytest.approx(1.0)  # z is 2, the free joint's quaternion 3..6
        starts.append(obs)
    starts = np.array(starts)
    centre = np.array([0, 0, 0.75])
    assert np.abs(starts[:, :3] - centre).max() <= 0.1 and np.abs(starts[:, :3] - centre).max() > 0.099
    assert starts[:, :3].std(0) == pytest.approx(0.2 / math.sqrt(12), rel=0.15)
    assert np.abs(starts[:, 7:15]).max() <= 0.1 and starts[:, 15:].std(0) == pytest.approx(0.1, rel=0.2)
    monkeypatch.setattr(o3f.mujoco, "mj_step", lambda *args: None)  # the world stands still
    for distance, paid in ((0.0, True), (0.4999, True), (0.5, True), (0.5001, False), (3.0, False)):
        ant.goal = np.array([1.0, 2.0])
        ant.data.qpos[:2] = [1.0 + distance, 2.0]
        _, reward, terminated, truncated, _ = ant.step(np.zeros(8))
        assert (reward, terminated, truncated) == (float(paid), paid, False)
    ant.data.qpos[3:7] = [0, 1, 0, 0]  # on its back
    assert ant.step(np.zeros(8))[2] is False
    ant.step(np.array([-1, -0.5, 0, 0.25, 0.5, 1, 2, -3]))
    assert ant.data.ctrl.tolist() == [-30, -15, 0, 7.5, 15, 30, 30, -30]


def test_antmaze_is_deterministic_under_a_seed_and_leaves_global_draws_alone():
    def episode(env, seed):
        rng, rows = np.random.default_rng(0), [env.reset(seed=seed)[0]]
        for _ in range(30):
            rows.append(env.step(rng.uniform(-1, 1, 8))[0])
        return np.array(rows), env.unwrapped.goal.copy()

    before = np.random.get_state()[1].copy()
    env = o3f.make_env("antmaze-medium-diverse-v2")
    first, again, other = episode(env, 3), episode(o3f.make_env("antmaze-medium-diverse-v2"), 3), episode(env, 4)
    assert all(np.array_equal(x, y) for x, y in zip(first, again))
    assert all(np.array_equal(x, y) for x, y in zip(first, episode(env, 3)))
    assert not np.array_equal(first[0], other[0]) and not np.array_equal(first[1], other[1])
    assert np.array_equal(before, np.random.get_state()[1])


def test_antmaze_passes_gymnasiums_checker():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(o3f.make_env("antmaze-umaze-v2").unwrapped, skip_render_check=True)


def replay(env, obs, actions, starts, steps):
    """Largest difference after `steps` steps from the states that rows `starts` of a file describe."""
    worst = 0.0
    for t in starts:
        env.put(obs[t, :15], obs[t, 15:])
        for k in range(steps):
            last = env.step(actions[t + k])[0]
        worst = max(worst, np.abs(last - obs[t + steps]).max())
    return worst


def test_antmaze_replays_a_file_that_it_wrote(tmp_path):
    """The observation is the whole state: any row of the file, stepped by its action, gives the next row."""
    o3f.collect_random("antmaze-umaze-v2", 900, tmp_path / "a.hdf5")
    raw = o3f.load_hdf5(tmp_path / "a.hdf5", 29, 8)
    obs, ends = raw["observations"].astype(np.float64), raw["timeouts"] | raw["terminals"]
    assert np.flatnonzero(ends).tolist() == [699]
    env = o3f.make_env("antmaze-umaze-v2").unwrapped
    env.reset(seed=0)
    assert replay(env, obs, raw["actions"], [*range(0, 699), *range(700, 890)], 1) < 1e-4  # float32 in the file
    env.put(obs[0, :15], obs[0, 15:])  # open loop; contacts amplify the rounding
    assert np.abs(env.data.qpos - obs[0, :15]).max() < 1e-6
    assert replay(env, obs, raw["actions"], range(0, 600, 60), 30) < 0.05


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the real data is not beside the checkout")
def test_antmaze_replays_the_standin():
    with h5py.File(SHARED / "data/antmaze-umaze-diverse-standin.hdf5") as f:
        obs, actions, timeouts = (f[name][:] for name in ("observations", "actions", "timeouts"))
    starts = [t for t in range(0, len(obs) - 11, 997) if not timeouts[t : t + 11].any()]
    env = o3f.make_env("antmaze-umaze-diverse-v2").unwrapped
    env.reset(seed=0)
    assert replay(env, obs.astype(np.float64), actions, starts, 1) < 1e-5
    assert replay(env, obs.astype(np.float64), actions, starts, 10) < 1e-4


def small_antmaze_file(path, rows=400, **extra):
    """Four straight walks of 100 rows; the second and fourth end in the goal's place, (0.7, 8.5)."""
    rng = np.random.default_rng(0)
    obs = 0.01 * rng.normal(size=(rows, 29))
    for k in range(4):
        walk = slice(100 * k, 100 * (k + 1))
        start, end = ((8.0, 0.0), (8.0, 8.0)) if k % 2 == 0 else ((8.0, 8.0), (0.7, 8.5))
        obs[walk, :2] += np.linspace(start, end, 100)
    rewards = np.append(np.linalg.norm(obs[1:, :2] - [0.7, 8.5], axis=1) < 0.5, False).astype(float)
    timeouts = np.zeros(rows)
    timeouts[[99, 199, 299, 399]] = 1
    columns = {"observations": obs, "actions": rng.uniform(-1, 1, (rows, 8)), "rewards": rewards, "terminals": rewards,
               "timeouts": timeouts, **extra}
    return write_hdf5(path, **columns)


def test_antmaze_data_and_its_teleports(tmp_path, capsys):
    path = small_antmaze_file(tmp_path / "a.hdf5")
    with h5py.File(path) as f:
        obs, rewards, timeouts = (f[name][:] for name in ("observations", "rewards", "timeouts"))

    def load(env_id, file, **flags):
        task = o3f.get_task(env_id)
        return o3f.load_dataset(make_args(env_id, dataset=str(file), **flags), task, o3f.make_env(env_id))[0]

    data = load("antmaze-umaze-diverse-v2", path)
    out = capsys.readouterr().out
    assert f"the same: {rewards.sum():.0f} rows pay" in out and "warning" not in out
    keep = np.flatnonzero(timeouts[:-1] == 0)
    assert np.array_equal(data["observations"], obs[keep].astype(np.float32))
    assert np.array_equal(data["rewards"], rewards[keep].astype(np.float32) - 1)  # IQL: r − 1
    assert np.array_equal(data["terminations"], rewards[keep].astype(np.float32))
    data = load("antmaze-umaze-diverse-v2", path, base="lapo")
    assert set(data["rewards"]) == {0.0, 100.0}  # LAPO: 100·r
    # Time-outs that come 30 rows late: rows 199 and 299 jump 8 m to another episode's start, row 99 does not move.
    late = small_antmaze_file(tmp_path / "late.hdf5", timeouts=np.roll(timeouts, 30))
    data = load("antmaze-umaze-diverse-v0", late)
    out = capsys.readouterr().out
    far = np.linalg.norm(np.diff(obs[:, :2], axis=0), axis=1) > 4
    assert far.sum() == 1 or far.sum() == 2
    assert f"warning: {far.sum()} teleports" in out and "prefer v2" in out
    gone = np.roll(timeouts, 30)[:-1].astype(bool) | far
    assert np.array_equal(data["observations"], obs[:-1][~gone].astype(np.float32))
    # Without the key, every 700th row of an episode is a time limit.
    bare = write_hdf5(tmp_path / "bare.hdf5", observations=np.zeros((1500, 29)), actions=np.zeros((1500, 8)),
                      rewards=np.zeros(1500), terminals=np.zeros(1500))
    assert len(load("antmaze-umaze-v2", bare)["rewards"]) == 1499 - 2
    far_goal = np.zeros((1500, 29))
    far_goal[:, 0] = 3.0
    write_hdf5(tmp_path / "far.hdf5", observations=far_goal, actions=np.zeros((1500, 8)), rewards=np.ones(1500),
               terminals=np.zeros(1500))
    capsys.readouterr()
    load("antmaze-umaze-v2", tmp_path / "far.hdf5")
    assert "NOT the same, is this the right file?" in capsys.readouterr().out


def test_antmaze_files_of_all_versions(tmp_path, monkeypatch):
    """d4rl's table for v0 and v2; the names of v1, which it lacks, as d4rl registers them."""
    urls = []
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    monkeypatch.setattr(o3f, "download", lambda sources, path, digest: urls.append(sources[0]))
    registered = (o3f.d4rl_dir() / "locomotion/__init__.py").read_text()
    for ant in o3f.ANTS:
        for v in (0, 1, 2):
            o3f.find_dataset(make_args(f"antmaze-{ant}-v{v}"))
            assert urls[-1] in registered
    assert len(set(urls)) == 18
    for env_id in o3f.TASKS:  # and every other task has an address
        if not env_id.startswith("antmaze") and not env_id.endswith("-random-v2"):
            o3f.find_dataset(make_args(env_id))
            assert env_id[:6] in urls[-1] and urls[-1].endswith(".hdf5")
            assert "kitchen" in env_id or env_id.endswith("-v0") or env_id.replace("-", "_") in urls[-1].replace("-", "_"), urls[-1]


@pytest.mark.parametrize("base", ["iql", "lapo"])
def test_antmaze_run_end_to_end(base, tmp_path, monkeypatch):
    path = small_antmaze_file(tmp_path / "a.hdf5")
    env_id = "antmaze-umaze-diverse-v2"
    short = dataclasses.replace(o3f.TASKS[env_id], horizon=40)
    monkeypatch.setitem(o3f.TASKS, env_id, short)
    run("--env-id", env_id, "--base", base, "--dataset", path, "--offline-steps", 20, "--online-steps", 100, "--log-every",
        20, "--eval-every", 50, "--eval-episodes", 2, "--hidden-dim", 32, "--utd", 2, "--batch-size", 64,
        "--run-dir", tmp_path / "run")
    _, episodes, summary = check_run(tmp_path / "run", 20, 100, 20, 50, short)
    assert [int(row["length"]) for row in episodes] == [40, 40] and summary["success_final"] == 0.0
    assert summary["args"]["sigma"] == 0.05


def test_success_is_a_score_of_100():
    class Goal(gym.Env):  # pays 1 and ends at its third step, or never
        observation_space, action_space = gym.spaces.Box(-1, 1, (29,)), gym.spaces.Box(-1, 1, (8,))

        def __init__(self, wins):
            self.wins = wins

        def reset(self, *, seed=None, options=None):
            self.t = 0
            return np.zeros(29, np.float32), {}

        def step(self, action):
            self.t += 1
            won = self.wins and self.t == 3
            return np.zeros(29, np.float32), float(won), won, self.t == 5, {}

    agent, task = make_agent(29, 8, dtype=torch.float32), o3f.get_task("antmaze-umaze-v2")
    rule, args = o3f.RewardRule(1.0, -1.0, ()), make_args("antmaze-umaze-v2")
    values = o3f.evaluate(agent, [Goal(True), Goal(False), Goal(True), Goal(True)], rule, task, args, seed=0)
    assert (values["eval/success"], values["eval/score"], values["eval/length"]) == (0.75, 75.0, 14 / 4)


# ==== evaluation ============================================================================================
def test_evaluation_side_by_side_is_one_after_the_other():
    agent = make_agent(60, 9, dtype=torch.float32)
    task, args = o3f.get_task("kitchen-mixed-v0"), make_args()
    rule = o3f.RewardRule(1.0, 0.0, task.targets)
    envs = [gym.wrappers.TimeLimit(o3f.make_env("kitchen-mixed-v0").unwrapped, limit) for limit in (5, 12, 30)]
    values = o3f.evaluate(agent, envs, rule, task, args, seed=11)
    lengths, discounted, start_q = [], [], []
    for i, limit in enumerate((5, 12, 30)):
        env = o3f.make_env("kitchen-mixed-v0")
        obs, total = env.reset(seed=11 + i)[0], 0.0
        for t in range(limit):
            x = torch.tensor(obs[None], dtype=torch.float32)
            action = agent.policy(x, sample=False)
            if t == 0:
                start_q.append(agent.q_values(x, action).mean().item())
            total += 0.99**t * (o3f.kitchen_done(obs, task.targets).sum() - 4)
            obs = env.step(action[0].numpy())[0]
        discounted.append(total)
        lengths.append(limit)
    assert values["eval/length"] == np.mean(lengths)
    assert values["eval/discounted_return"] == pytest.approx(np.mean(discounted), rel=1e-5)
    assert values["eval/q_start"] == pytest.approx(np.mean(start_q), rel=1e-4)
    assert values == o3f.evaluate(agent, envs, rule, task, args, seed=11)  # the same seeds every time


def test_evaluation_keeps_each_environment_to_its_own_observations():
    agent = make_agent(3, 1, dtype=torch.float32)  # the pendulum's rewards depend on state and action
    limits, rule = (12, 5, 30), o3f.RewardRule(1.0, 0.0, ())
    envs = [gym.wrappers.TimeLimit(gym.make("Pendulum-v1").unwrapped, limit) for limit in limits]
    values = o3f.evaluate(agent, envs, rule, o3f.get_task("Pendulum-v1"), make_args("Pendulum-v1"), seed=3)
    returns = []
    for i, limit in enumerate(limits):
        env = gym.make("Pendulum-v1").unwrapped
        obs, total = env.reset(seed=3 + i)[0], 0.0
        for _ in range(limit):
            obs, reward, *_ = env.step(agent.policy(torch.tensor(obs[None]), sample=False)[0].numpy())
            total += reward
        returns.append(total)
    assert values["eval/return"] == pytest.approx(np.mean(returns), rel=1e-5)
    assert values["eval/score_std"] == pytest.approx(np.std(returns), rel=1e-4)


# ==== flags =================================================================================================
def test_presets_are_the_papers_and_flags_override_them():
    kitchen, cheetah = make_args("kitchen-mixed-v0"), make_args("halfcheetah-medium-v2")
    assert (kitchen.sigma, kitchen.expectile, kitchen.beta, kitchen.actor_dropout) == (0.05, 0.7, 0.5, 0.1)
    assert (cheetah.sigma, cheetah.expectile, cheetah.beta, cheetah.actor_dropout) == (0.2, 0.7, 3.0, 0.0)
    assert (kitchen.reward_transform, cheetah.reward_transform) == ("none", "return_range")
    for args, proposal in ((kitchen, "mean"), (cheetah, "sample"), (make_args("Pendulum-v1"), "sample")):
        assert (args.num_candidates, args.num_critics, args.omega, args.explore) == (100, 5, 0.0, "o3f")
        assert (args.batch_size, args.learning_rate, args.gamma, args.tau, args.utd) == (256, 3e-4, 0.99, 0.005, 1)
        assert (args.proposal, args.rank_critics, args.clip_candidates) == (proposal, "online", True)
    for name in ("kitchen-mixed-v0", "halfcheetah-medium-v2", "Pendulum-v1"):
        args = make_args(name, base="lapo")
        assert (args.batch_size, args.learning_rate, args.gamma, args.tau, args.utd) == (512, 2e-4, 0.99, 0.005, 20)
        assert (args.num_critics, args.subset_size, args.doubleq_min, args.proposal) == (5, 2, 1.0, "mean")
        assert (args.reward_transform, args.value_clamp, args.sigma) == ("max", "discounted", 0.05 if "kitchen" in name else 0.2)
    ant = make_args("antmaze-large-diverse-v1")
    assert (ant.sigma, ant.expectile, ant.beta, ant.actor_dropout, ant.reward_transform) == (0.05, 0.9, 10, 0, "minus_one")
    ant = make_args("antmaze-large-diverse-v1", base="lapo")
    assert (ant.sigma, ant.doubleq_min, ant.value_clamp, ant.reward_transform, ant.utd) == (0.05, 0.7, "once", "x100", 20)
    args = make_args("kitchen-mixed-v0", sigma=0.0, beta=7.0, actor_dropout=0.0, batch_size=3)
    assert (args.sigma, args.beta, args.actor_dropout, args.batch_size) == (0.0, 7.0, 0.0, 3)


def test_every_flag_is_documented_and_read():
    source = ast.parse((HERE / "o3f.py").read_text())
    body = next(node for node in source.body if getattr(node, "name", "") == "Args").body
    documented = {field.target.id for field, doc in zip(body, body[1:]) if isinstance(field, ast.AnnAssign)
                  and isinstance(doc, ast.Expr) and len(doc.value.value) > 20}
    read = {node.attr for node in ast.walk(source) if isinstance(node, ast.Attribute)
            and ast.unparse(node.value) in ("args", "self.args")}
    flags = {field.name for field in dataclasses.fields(o3f.Args)}
    assert flags == documented and flags <= read


def run(*argv):
    code = o3f.cli([str(x) for x in argv])
    assert code == 0
    return code


BAD_FLAGS = [
    (["--env-id", "kitchen-mixd-v0"], "did you mean kitchen-mixed-v0"),
    (["--env-id", "CartPole-v1", "--dataset", "random"], "needs a flat Box"),
    (["--env-id", "Pendulum-v1"], "--dataset random"),
    (["--sigma", "-1"], "--sigma -1.0: give a number from 0 to 1e+09"),
    (["--sigma", "nan"], "--sigma nan"),
    (["--num-candidates", "0"], "--num-candidates 0: give a number from 1 to 1e+09"),
    (["--expectile", "1.5"], "--expectile 1.5"),
    (["--kl-weight", "2"], "--kl-weight: no part of --base iql"),
    (["--base", "lapo", "--exp-adv-max", "2"], "--exp-adv-max: no part of --base lapo"),
    (["--base", "lapo", "--online-expectile", "0.85"], "--online-expectile: no part of --base lapo"),
    (["--cuda-graph", "--compile"], "--cuda-graph: needs --device cuda"),
    (["--cuda-graph", "--device", "cpu"], "--cuda-graph: needs --device cuda"),
    (["--base", "lapo", "--subset-size", "6"], "--subset-size 6: more than --num-critics 5"),
    (["--offline-ratio", "1.5"], "--offline-ratio 1.5"),
    (["--dataset", "nowhere.hdf5"], "nowhere.hdf5: no such file"),
    (["--run-dir", "{file}/x", "--dataset", "{good}"], "is the path right (--run-dir"),
    (["--run-dir", "{used}", "--dataset", "{good}"], "not empty"),
    (["--load", "{file}", "--dataset", "{good}"], "no whole file of this program"),
    (["--load", "missing.pt", "--dataset", "{good}"], "no whole file of this program"),
    (["--batch-size", "100000", "--dataset", "{good}"], "more than the dataset's"),
    (["--buffer-size", "10", "--dataset", "{good}"], "more than the dataset's"),
    (["--dataset", "{file}"], "not a whole HDF5 file"),
    (["--dataset", "{cut}"], "not a whole HDF5 file"),
    (["--dataset", "{no_rewards}"], "needs observations, actions, rewards, terminals"),
    (["--dataset", "{narrow}"], '"observations": shape (320, 11)'),
    (["--dataset", "{short}"], '"rewards": shape (319,)'),
    (["--dataset", "{words}"], "this task needs numbers"),
    (["--dataset", "{nan}"], "observations has NaN or inf in 2 rows, the first is row 7"),
    (["--dataset", "{big}"], "actions reach 2"),
    (["--track", "--dataset", "{good}"], "pip install wandb"),
    (["--env-id", "kitchen-partial-v0", "--dataset", "{good}"], "goals of another kitchen"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    good = small_kitchen_file(folder / "good.hdf5", episodes=8)
    with h5py.File(good) as f:
        columns = {name: f[name][:] for name in f}
    change = lambda name, key, value: write_hdf5(folder / name, **{**columns, key: value})  # noqa: E731
    nan, big = columns["observations"].copy(), columns["actions"].copy()
    nan[[7, 9], 3], big[5, 5] = np.nan, 2.0
    (folder / "cut.hdf5").write_bytes(Path(good).read_bytes()[:20_000])
    (folder / "file.txt").write_text("hello")
    (folder / "used").mkdir()
    (folder / "used/metrics.csv").write_text("")
    return {"good": good, "file": folder / "file.txt", "cut": folder / "cut.hdf5", "used": folder / "used",
            "no_rewards": write_hdf5(folder / "a.hdf5", **{k: v for k, v in columns.items() if k != "rewards"}),
            "narrow": change("b.hdf5", "observations", np.zeros((320, 11))), "nan": change("d.hdf5", "observations", nan),
            "short": change("c.hdf5", "rewards", np.zeros(319)), "big": change("e.hdf5", "actions", big),
            "words": change("f.hdf5", "rewards", np.array([b"x"] * 320))}


@pytest.mark.parametrize("flags, message", BAD_FLAGS, ids=[" ".join(flags) for flags, _ in BAD_FLAGS])
def test_bad_input_gets_one_line_and_exit_code_2(flags, message, files, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--env-id", "kitchen-mixed-v0"] if "--env-id" not in flags else []
    assert o3f.cli(argv + [flag.format(**files) for flag in flags]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert not list(tmp_path.iterdir())  # nothing half-written


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_asked_for_and_absent(capsys):
    assert o3f.cli(["--device", "cuda"]) == 2 and "--device cuda" in capsys.readouterr().err


def test_unknown_flag_exits_with_2():
    with pytest.raises(SystemExit) as error:
        o3f.cli(["--sgima", "1"])
    assert error.value.code == 2


def test_missing_d4rl_names_the_command(monkeypatch, capsys):
    find = o3f.importlib.util.find_spec
    monkeypatch.setattr(o3f.importlib.util, "find_spec", lambda name: None if name == "d4rl" else find(name))
    assert o3f.cli(["--env-id", "kitchen-partial-v0"]) == 2
    assert "pip install --no-deps d4rl==1.1" in capsys.readouterr().err


# ==== whole runs ============================================================================================
def read_csv(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def check_run(folder, offline_steps, online_steps, log_every, eval_every, task):
    """The outputs exist, and their numbers add up."""
    names = {p.name for p in folder.iterdir()}
    assert {"config.json", "metrics.csv", "episodes.csv", "summary.json", "curve.png"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    metrics, episodes = read_csv(folder / "metrics.csv"), read_csv(folder / "episodes.csv")
    summary = json.loads((folder / "summary.json").read_text())
    evals = [row for row in metrics if row["eval/score"]]
    logs = [row for row in metrics if row["losses/vf"]]
    steps = [s for s in range(1 - offline_steps, 1) if s % eval_every == 0 or s == 0]
    steps += [s for s in range(1, online_steps + 1) if s % eval_every == 0 or s == online_steps]
    assert [int(row["step"]) for row in evals] == steps
    assert [int(row["step"]) for row in logs] == [s for s in range(1 - offline_steps, online_steps + 1) if s % log_every == 0]
    scores = {int(row["step"]): float(row["eval/score"]) for row in evals}
    assert summary["score_offline"] == scores[0] and summary["score_final"] == scores[online_steps]
    assert summary["score_best"] == max(scores.values())
    for row in evals:
        assert float(row["eval/score"]) == pytest.approx(task.score(float(row["eval/return"])))
    agent = o3f.AGENTS[summary["args"]["base"]]
    assert all(math.isfinite(float(row[name])) for row in logs for name in agent.METRICS)
    assert all((row["o3f/optimism"] != "") == (row["phase"] == "online") for row in logs)
    ends = np.cumsum([int(row["length"]) for row in episodes])
    assert ends.tolist() == [int(row["step"]) for row in episodes]
    assert all(float(row["score"]) == pytest.approx(task.score(float(row["return"])), abs=1e-3) for row in episodes)
    assert summary["status"] == "finished" and summary["last_step"] == online_steps
    assert summary["offline_updates_per_s"] > 0 and summary["online_steps_per_s"] > 0
    assert len(summary["dataset"]["sha256"]) == 64 and summary["versions"]["torch"] == torch.__version__
    return metrics, episodes, summary


@pytest.fixture(scope="module")
def kitchen_run(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "kitchen"
    run("--env-id", "kitchen-mixed-v0", "--dataset", files["good"], "--offline-steps", 60, "--online-steps", 300,
        "--log-every", 20, "--eval-every", 150, "--eval-episodes", 2, "--hidden-dim", 32, "--run-dir", folder)
    return folder


def test_kitchen_run_end_to_end(kitchen_run, files):
    task = o3f.get_task("kitchen-mixed-v0")
    metrics, episodes, summary = check_run(kitchen_run, 60, 300, 20, 150, task)
    assert len(episodes) == 1 and int(episodes[0]["length"]) == 280
    assert summary["dataset"]["sha256"] == hashlib.sha256(Path(files["good"]).read_bytes()).hexdigest()
    config = json.loads((kitchen_run / "config.json").read_text())
    assert config["sigma"] == 0.05 and config["base"] == "iql"
    assert {p.name for p in kitchen_run.glob("*.pt")} == {"agent_offline.pt", "agent_final.pt", "checkpoint.pt"}
    optimism = [float(row["o3f/optimism"]) for row in metrics if row["o3f/optimism"]]
    assert len(optimism) == 15 and min(optimism) > 0  # the best of 100 is above their average


@pytest.mark.parametrize("base", ["iql", "lapo"])
def test_locomotion_run_end_to_end_and_load(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    common = ["--env-id", "hopper-random-v2", "--dataset-size", 3000, "--log-every", 50, "--eval-every", 100,
              "--eval-episodes", 3, "--hidden-dim", 32, "--base", base]
    run(*common, "--offline-steps", 150, "--online-steps", 250, "--run-dir", tmp_path / "a")
    out = capsys.readouterr().out
    assert "the same: " in out and "3,000 rows" in out
    metrics, episodes, _ = check_run(tmp_path / "a", 150, 250, 50, 100, o3f.get_task("hopper-random-v2"))
    assert len(episodes) > 2
    if base == "lapo":  # offline every update does all parts, online the critics alone learn 20 times a step
        saved = torch.load(tmp_path / "a/agent_final.pt", weights_only=True)
        steps = [int(state["step"]) for state in saved["optimizer"]["state"].values()]
        assert sorted(set(steps)) == [400, 150 + 20 * 250]
        critics = sum(name.startswith(("qf.", "vf.")) for name in saved["agent"])
        assert steps.count(150 + 20 * 250) == critics  # V and the critics, nothing else

    # From the saved agent: no offline phase, the same offline score, and then the very same online phase.
    run(*common, "--online-steps", 100, "--load", tmp_path / "a/agent_offline.pt", "--run-dir", tmp_path / "b")
    loaded = read_csv(tmp_path / "b/metrics.csv")
    zero = lambda rows: [row for row in rows if row["step"] == "0" and row["eval/score"]]  # noqa: E731
    assert zero(loaded) == zero(metrics) and min(int(row["step"]) for row in loaded) == 0
    # A variant may differ in whatever does not shape the networks; task, base, rewards and sizes must match.
    run(*common, "--online-steps", 5, "--load", tmp_path / "a/agent_final.pt", "--tau", 0.01, "--explore", "noise",
        "--run-dir", tmp_path / "c")
    assert not read_csv(tmp_path / "c/metrics.csv")[0]["o3f/optimism"]
    for flags, words in ((["--num-critics", 3], "num_critics 5, this run has 3"), (["--env-id", "walker2d-random-v2"], "env_id")):
        capsys.readouterr()
        assert o3f.cli([str(x) for x in [*common, "--load", tmp_path / "a/agent_offline.pt", *flags]]) == 2
        assert words in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("base", ["iql", "lapo"])
def test_saved_agent_acts_identically_and_learns_on_identically(base, tmp_path):
    agent, batch = make_agent(base=base, dtype=torch.float32), o3f.Batch(*(x.float() for x in make_batch()))
    for _ in range(3):
        agent.update(batch)
    rule = o3f.RewardRule(2.0, -1.0, ())
    o3f.write_whole(tmp_path / "x.pt", o3f.agent_state(agent, rule, 0))
    # Another start, and for LAPO another dataset with other statistics: what is saved takes the place of all of it.
    other = make_agent(base=base, dtype=torch.float32, seed=5, data=make_data(30, seed=8))
    with pytest.raises(o3f.UserError, match="reward scale 2.0, this run has 1.0"):  # its critics know another reward
        o3f.put_agent(o3f.load_saved([tmp_path / "x.pt"], "--load"), other, o3f.RewardRule(1.0, 0.0, ()), "--load")
    o3f.put_agent(o3f.load_saved([tmp_path / "x.pt"], "--load"), other, rule, "--load")
    assert torch.equal(agent.policy(batch.observations, False), other.policy(batch.observations, False))
    assert torch.equal(*(x.q_values(batch.observations, batch.actions) for x in (agent, other)))
    for _ in range(2):  # Adam's moments came along, and LAPO's value limits
        metrics = []
        for x in (agent, other):
            torch.manual_seed(3)
            metrics.append(x.update(batch))
        assert torch.equal(*metrics)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def run_metrics(tmp_path, name, dataset, *flags):
    run("--env-id", "Pendulum-v1", "--dataset", dataset, "--offline-steps", 20, "--online-steps", 60, "--log-every", 10,
        "--eval-episodes", 2, "--hidden-dim", 16, "--run-dir", tmp_path / name, *flags)
    return [row for row in read_csv(tmp_path / name / "metrics.csv") if row["losses/vf"]]


def test_seeds_and_independent_streams(tmp_path):
    data = tmp_path / "p.hdf5"
    o3f.collect_random("Pendulum-v1", 500, data)
    first = run_metrics(tmp_path, "a", data)
    assert first == run_metrics(tmp_path, "b", data)  # one seed, one result, to the last digit
    assert first != run_metrics(tmp_path, "c", data, "--seed", 1)
    assert first == run_metrics(tmp_path, "d", data, "--eval-every", 7)  # evaluating more changes nothing
    # Exploration draws from a stream of its own: at σ = 0 the number of candidates changes no action, and no batch.
    one, ten = (run_metrics(tmp_path, f"n{n}", data, "--proposal", "mean", "--sigma", 0, "--num-candidates", n)
                for n in (1, 10))
    assert [row["losses/qf"] for row in one] == [row["losses/qf"] for row in ten]


def test_open_choices_run(tmp_path):
    data = tmp_path / "p.hdf5"
    o3f.collect_random("Pendulum-v1", 500, data)
    first = run_metrics(tmp_path, "a", data)
    variants = (["--reset-optimizer"], ["--rank-critics", "target"], ["--proposal", "mean"], ["--no-clip-candidates"],
                ["--utd", 2], ["--overlap"], ["--offline-ratio", 0.5], ["--omega", 1], ["--buffer-size", 510])
    for i, flags in enumerate(variants):
        rows = run_metrics(tmp_path, f"v{i}", data, *flags)
        assert len(rows) == len(first) and rows != first, flags
    run_metrics(tmp_path, "last", data, "--eval-action", "optimistic", "--no-save")
    score = lambda name: json.loads((tmp_path / name / "summary.json").read_text())["score_final"]  # noqa: E731
    assert score("last") != score("a") and not list((tmp_path / "last").glob("agent*.pt"))


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_finishes_the_files(tmp_path):
    o3f.collect_random("Pendulum-v1", 500, tmp_path / "p.hdf5")
    command = [sys.executable, HERE / "o3f.py", "--env-id", "Pendulum-v1", "--dataset", tmp_path / "p.hdf5",
               "--offline-steps", 20, "--online-steps", 1_000_000, "--log-every", 10, "--eval-episodes", 1,
               "--hidden-dim", 16, "--run-dir", tmp_path / "run"]
    process = subprocess.Popen([str(x) for x in command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while time.time() < deadline and ",online" not in (
            (tmp_path / "run/metrics.csv").read_text() if (tmp_path / "run/metrics.csv").exists() else ""):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["last_step"] > 0
    assert {"curve.png", "agent_final.pt"} <= {p.name for p in (tmp_path / "run").iterdir()}


# ==== experiments ===========================================================================================
def write_run(folder, seed, scores, **flags):
    folder.mkdir()
    config = dataclasses.asdict(o3f.Args(seed=seed, run_dir=str(folder), **flags))
    (folder / "config.json").write_text(json.dumps(config))
    lines = ["step,phase,eval/score,eval/score_std,q_mean", "-50,offline,,,3.0"]
    lines += [f"{step},online,{score},1.5," for step, score in scores.items()]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def test_plot_groups_runs_and_prints_their_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", 0, {-100: 1.0, 0: 10.0, 100: 30.0, 300: 50.0}, explore="o3f")
    write_run(tmp_path / "b", 1, {-100: 3.0, 0: 20.0, 100: 20.0, 300: 90.0}, explore="o3f", save=False)
    write_run(tmp_path / "c", 0, {0: 10.0, 100: 12.0, 300: 8.0}, explore="noise")
    assert o3f.cli(["--plot", "b", "a", "c"]) == 0  # seeds in order, whatever the order of folders
    lines = capsys.readouterr().out.splitlines()
    # Areas by the trapezoid rule over 300 steps, e.g. the first: (100·(10 + 30)/2 + 200·(30 + 50)/2)/300 = 33.3.
    assert ("| explore o3f | 0, 1 | 15.0 (10.0, 20.0) | 70.0 (50.0, 90.0) | 70.0 (50.0, 90.0) | 38.3 (33.3, 43.3)"
            " | 10 |") in lines
    assert "| explore noise | 0 | 10.0 | 8.0 | 12.0 | 10.3 | 10 |" in lines
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    # A flag names the curves that depart from the majority in it, and no others.
    write_run(tmp_path / "e", 0, {0: 1.0, 300: 2.0}, explore="noise", sigma=0.5)
    assert o3f.cli(["--plot", "a", "c", "e"]) == 0
    names = [line.split(" | ")[0][2:] for line in capsys.readouterr().out.splitlines()[:5]]
    assert names[0] == "runs (else sigma None)" and names[2:] == ["explore o3f", "explore noise", "explore noise, sigma 0.5"]
    (tmp_path / "d").mkdir()
    assert o3f.cli(["--plot", "a", "d"]) == 2
    assert "--plot d: no run with an evaluation" in capsys.readouterr().err
    (tmp_path / "a/config.json").write_text("{}")
    assert o3f.cli(["--plot", "a"]) == 2 and "--plot a: no run" in capsys.readouterr().err


def test_expectile_switch_and_anneal(tmp_path, monkeypatch):
    data = tmp_path / "p.hdf5"
    o3f.collect_random("Pendulum-v1", 300, data)
    seen, loss = [], o3f.expectile_loss
    monkeypatch.setattr(o3f, "expectile_loss", lambda u, kappa: (seen.append(kappa), loss(u, kappa))[1])
    for anneal, expected in (("step", [0.85] * 10), ("linear", np.linspace(0.7, 0.85, 11)[1:])):
        seen.clear()
        run("--env-id", "Pendulum-v1", "--dataset", data, "--offline-steps", 5, "--online-steps", 10, "--eval-episodes", 1,
            "--online-expectile", 0.85, "--anneal", anneal, "--hidden-dim", 8, "--run-dir", tmp_path / anneal)
        assert seen == pytest.approx([0.7] * 5 + list(expected))


# ==== speed =================================================================================================
def fifty_updates(base, device="cpu", **flags):
    """An agent after 50 calls of its learner, and the metrics of the last."""
    args = make_args("kitchen-mixed-v0", base=base, hidden_dim=16, batch_size=32, utd=3, **flags)
    torch.manual_seed(0)
    agent = o3f.AGENTS[base](make_data(60), args).to(device)
    agent.optimizer = o3f.make_optimizer(agent)
    buffer = o3f.ReplayBuffer(make_data(60), 80, torch.device(device))
    torch.manual_seed(1)
    for i in range(50):
        if i % 25 == 0:  # offline, and again at the switch
            learn = o3f.make_learner(agent, buffer, args, 0.5 if i else None, 3 if i else 1)
        if i >= 25 and i < 40:
            buffer.add(np.full(7, i), np.zeros(3), 1.0, np.ones(7), False)
        metrics = learn()
    return {name: x.cpu() for name, x in agent.state_dict().items()}, metrics.cpu()


def close(one, two):
    assert torch.allclose(one[1], two[1], rtol=1e-3, atol=1e-4)
    assert all(torch.allclose(one[0][name], two[0][name], rtol=1e-3, atol=1e-5) for name in one[0])


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
@pytest.mark.parametrize("base", ["iql", "lapo"])
def test_compiled_updates_are_the_eager_ones(base):
    close(fifty_updates(base), fifty_updates(base, compile=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("base", ["iql", "lapo"])
def test_captured_updates_are_the_eager_ones(base):
    close(fifty_updates(base, "cuda"), fifty_updates(base, "cuda", cuda_graph=True))


def test_a_million_rows_fit():
    """halfcheetah's 1M rows and 1M online ones: under 1 GiB, converted in seconds."""
    n = 1_000_000
    raw = {"observations": np.zeros((n, 17), np.float32), "actions": np.zeros((n, 6), np.float32),
           "rewards": np.zeros(n, np.float32), "terminals": np.zeros(n, bool)}
    raw["timeouts"] = o3f.mark_time_limits(raw["terminals"], 1000)
    start = time.perf_counter()
    data = o3f.to_transitions(raw)
    data = data | {"terminations": data["terminations"].astype(np.float32)}
    buffer = o3f.ReplayBuffer(data, 2 * n, torch.device("cpu"))
    assert time.perf_counter() - start < 30
    assert buffer.size == n - 1000 and buffer.rows.nbytes < 2**30 / 2


# ==== killed and resumed ====================================================================================
def pendulum_command(base, data, folder):
    return [str(x) for x in (
        "--env-id", "Pendulum-v1", "--base", base, "--dataset", data, "--offline-steps", 150, "--online-steps", 650,
        "--log-every", 7, "--eval-every", 50, "--eval-episodes", 2, "--hidden-dim", 16, "--batch-size", 32, "--utd", 2,
        "--checkpoint-every", 40, "--run-dir", folder)]


def same_run(a, b):
    for name in ("metrics.csv", "episodes.csv"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    one, two = (torch.load(x / "agent_final.pt", weights_only=True) for x in (a, b))
    assert one["step"] == two["step"] and one["agent"].keys() == two["agent"].keys()
    assert all(torch.equal(one["agent"][name], two["agent"][name]) for name in one["agent"])
    assert str(one["optimizer"]) == str(two["optimizer"])
    scores = [json.loads((x / "summary.json").read_text()) for x in (a, b)]
    for name in ("score_offline", "score_final", "score_best", "success_final", "status", "last_step"):
        assert scores[0][name] == scores[1][name]


def start_and_kill(command, folder, rows, signum=signal.SIGKILL):
    """Start a real process and send the signal once its metrics.csv has this many rows."""
    process = subprocess.Popen([sys.executable, str(HERE / "o3f.py"), *command], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    deadline, metrics = time.time() + 240, folder / "metrics.csv"
    while time.time() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") > rows:
            break
        time.sleep(0.005)
    process.send_signal(signum)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("base", ["iql", "lapo"])
def test_a_killed_run_resumes_exactly(base, tmp_path):
    """SIGKILL at three points, offline, online and again after a resumption: the same bytes, the same parameters."""
    data = tmp_path / "p.hdf5"
    o3f.collect_random("Pendulum-v1", 500, data)
    run(*pendulum_command(base, data, tmp_path / "whole"))
    rng = np.random.default_rng(0 if base == "iql" else 1)
    total = (tmp_path / "whole/metrics.csv").read_bytes().count(b"\n")
    offline, early, late = (int(rng.integers(low, high)) for low, high in
                            ((8, 20), (total // 3, total // 2), (total // 2 + 5, total - 10)))
    folder = tmp_path / "killed"
    code, _, err = start_and_kill(pendulum_command(base, data, folder), folder, offline)
    assert code == -signal.SIGKILL, err
    for rows in (early, late):
        code, _, err = start_and_kill(["--resume", str(folder)], folder, rows)
        assert code == -signal.SIGKILL, err
    assert not (folder / "summary.json").exists()
    run("--resume", folder)
    same_run(tmp_path / "whole", folder)


def test_resume_from_each_phase_and_what_it_refuses(tmp_path, capsys, monkeypatch):
    data = tmp_path / "p.hdf5"
    o3f.collect_random("Pendulum-v1", 500, data)
    command = pendulum_command("iql", data, tmp_path / "whole")
    stopped, write = [], o3f.write_whole

    def spy(path, state, keep=None):  # a copy of every checkpoint of one whole run
        write(path, state, keep)
        if path.name == "checkpoint.pt":
            stopped.append(path.read_bytes())

    monkeypatch.setattr(o3f, "write_whole", spy)
    run(*command)
    monkeypatch.undo()
    steps = [torch.load(io.BytesIO(x), weights_only=True)["step"] for x in stopped]
    # Offline every 40 updates, at the switch, online at episodes' ends.
    assert steps == [-110, -70, -30, 0, 200, 400, 600]
    for k in (0, 3, 4):
        folder = tmp_path / f"from{k}"
        folder.mkdir()
        (folder / "checkpoint.pt").write_bytes(stopped[k])
        run("--resume", folder)
        same_run(tmp_path / "whole", folder)

    def refused(folder, *words):
        capsys.readouterr()
        assert o3f.cli(["--resume", str(folder)]) == 2
        err = capsys.readouterr().err.strip().splitlines()
        assert len(err) == 1 and all(word in err[0] for word in words), err

    refused(tmp_path / "nowhere", "no whole file")
    folder = tmp_path / "cut"  # cut short: the one before takes its place, and says so
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(stopped[5][: len(stopped[5]) // 2])
    refused(folder, "checkpoint.pt is no whole file")
    (folder / "checkpoint_previous.pt").write_bytes(stopped[4])
    capsys.readouterr()
    run("--resume", folder)
    assert "going on from checkpoint_previous.pt, step 200" in capsys.readouterr().out
    same_run(tmp_path / "whole", folder)

    old = torch.load(io.BytesIO(stopped[0]), weights_only=True) | {"version": 0}
    (tmp_path / "old").mkdir()
    torch.save(old, tmp_path / "old/checkpoint.pt")
    refused(tmp_path / "old", "of version 0, not 2")
    assert o3f.cli(["--resume", str(folder), "--sigma", "0.1"]) == 2
    assert "drop the others" in capsys.readouterr().err
    content = data.read_bytes()
    with h5py.File(data, "a") as f:
        f["rewards"][3] += 1.0
    refused(folder, "sha256", "put back the file")
    data.unlink()
    refused(folder, "no such file")
    data.write_bytes(content)

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    (tmp_path / "evil").mkdir()
    torch.save({"version": 2, "args": Evil()}, tmp_path / "evil/checkpoint.pt")
    refused(tmp_path / "evil", "no whole file")
    assert not (tmp_path / "ran").exists()  # a stranger's file runs no code


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_one(tmp_path, monkeypatch, capsys):
    data = tmp_path / "p.hdf5"
    o3f.collect_random("Pendulum-v1", 500, data)
    saves, save = [], torch.save

    def full_disk(state, file):
        saves.append(state["step"])
        if len(saves) == 2:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full_disk)
    folder = tmp_path / "run"
    run(*pendulum_command("iql", data, folder)[:-2], "--run-dir", folder, "--no-save", "--online-steps", 0)
    assert saves == [-110, -70, -30, 0] and "no checkpoint at step -70" in capsys.readouterr().out
    monkeypatch.undo()
    names = sorted(p.name for p in folder.glob("*.pt*"))
    assert names == ["checkpoint.pt", "checkpoint_previous.pt"]
    assert [torch.load(folder / name, weights_only=True)["step"] for name in names] == [0, -30]
    saves.clear()  # where the switch is due anyway, it is saved once, and the one before stays
    monkeypatch.setattr(torch, "save", lambda state, file: saves.append(state["step"]))
    command = pendulum_command("iql", data, tmp_path / "due")
    command[command.index("--offline-steps") + 1] = "80"
    command[command.index("--online-steps") + 1] = "0"
    run(*command, "--no-save")
    assert saves == [-40, 0]


@pytest.mark.parametrize("where", ["loss", "observation"])
def test_not_a_number_stops_the_run(where, tmp_path, monkeypatch, capsys):
    data = tmp_path / "p.hdf5"
    o3f.collect_random("Pendulum-v1", 500, data)
    calls = []
    if where == "loss":
        update = o3f.IQL.update

        def broken(self, *batches):
            calls.append(1)
            return update(self, *batches) * (math.nan if len(calls) > 100 else 1.0)

        monkeypatch.setattr(o3f.IQL, "update", broken)
    else:
        step = gym.wrappers.RescaleAction.step

        def broken(self, action):
            calls.append(1)
            obs, *rest = step(self, action)
            return (obs * np.nan if len(calls) > 2 * 200 + 500 else obs, *rest)  # evaluated at 0

        monkeypatch.setattr(gym.wrappers.RescaleAction, "step", broken)
    capsys.readouterr()
    eval_every = 10_000 if where == "observation" else 50
    assert o3f.cli([*pendulum_command("iql", data, tmp_path / "run"), "--eval-every", str(eval_every)]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    words = {"loss": "losses/vf is nan by step -49", "observation": "NaN or inf at step 501"}[where]
    assert len(err) == 1 and "--load" in err[0] and words in err[0]
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert saved["step"] == {"loss": -70, "observation": 400}[where]
    assert all(torch.isfinite(x).all() for x in saved["agent"].values())


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_twice_stops_at_once_and_harms_no_checkpoint(tmp_path):
    data, folder = tmp_path / "p.hdf5", tmp_path / "run"
    o3f.collect_random("Pendulum-v1", 500, data)
    command = pendulum_command("iql", data, folder)
    command[command.index("--eval-episodes") + 1] = "400"  # the first one has to wait for an evaluation
    process = subprocess.Popen([sys.executable, str(HERE / "o3f.py"), *command], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while time.time() < deadline and not (folder / "checkpoint.pt").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert o3f.load_saved([folder / "checkpoint.pt"], "")["step"] < 0


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_sigterm_finishes_the_files_and_the_run_goes_on_later(tmp_path):
    data = tmp_path / "p.hdf5"
    o3f.collect_random("Pendulum-v1", 500, data)
    run(*pendulum_command("iql", data, tmp_path / "whole"))
    folder = tmp_path / "run"
    code, _, err = start_and_kill(pendulum_command("iql", data, folder), folder, 60, signal.SIGTERM)
    assert code == 130 and "Traceback" not in err and f"--resume {folder}" in err
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    run("--resume", folder)
    same_run(tmp_path / "whole", folder)


def test_the_readme_asks_a_finished_run(tmp_path, capsys):
    """README's lines on how right the critics were run as they stand, on a run of our own."""
    data = tmp_path / "p.hdf5"
    o3f.collect_random("Pendulum-v1", 500, data)
    run(*pendulum_command("lapo", data, tmp_path / "run"))
    (block,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    capsys.readouterr()
    names = {}
    exec(block.replace("RUN", str(tmp_path / "run")), names)
    out = capsys.readouterr().out
    assert "correlation" in out and "distance to the nearest state" in out
    # Its discounted returns, one by one: three episodes of 200 steps and a rest that is bootstrapped too.
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    r, s2 = names["r"].double().numpy(), names["s2"]
    last = names["agent"].q_values(s2, names["agent"].policy(s2, False)).mean(0).numpy()
    assert len(r) == saved["step"] and names["ends"] == {199, 399, 599}
    for t in (0, 150, 199, 200, 599):
        end = t // 200 * 200 + 199
        G = sum(0.99 ** (k - t) * r[k] for k in range(t, end + 1)) + 0.99 ** (end + 1 - t) * last[end]
        assert names["G"][t].item() == pytest.approx(G, rel=1e-4)
