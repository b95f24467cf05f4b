# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6,<3", "gymnasium[mujoco]>=1.0,<2", "mujoco>=3.3,<5", "numpy>=1.26,<3",
#     "tyro>=0.9,<2", "h5py>=3.11,<4", "pooch>=1.8,<2", "filelock>=3.13,<5",
#     "tqdm>=4.66,<5", "tensorboard>=2.17,<3", "matplotlib>=3.8,<4", "d4rl==1.1",
# ]
# [[tool.uv.dependency-metadata]]
# name = "d4rl"
# version = "1.1"
# requires-dist = []
# ///
"""O3F in one file: train a policy offline, then fine-tune it online by acting optimistically.

Mark, Ghadirzadeh, Chen, Finn: "Fine-Tuning Offline Policies With Optimistic Action Selection".

    offline  repeat:  π, Q₁…Q_m ← Update(π, Q, batch of D)            any offline RL algorithm
    online   repeat:  a   ~ π(·|s)
                      c_i ~ N(a, σ²I),  i = 1…N                                 # new in O3F
                      a_t = argmax_i  mean_j Q_j(s, c_i) + ω·std_j Q_j(s, c_i)  # new in O3F
                      s', r, d ← environment(a_t);  D ← D ∪ {(s, a_t, r, s', d)}
                      π, Q₁…Q_m ← Update(π, Q, batch of D)            the same Update

Trained on an offline objective, a policy stays near its data and tries nothing new online; a new
objective there can destroy what was learned. O3F changes only which action is tried.

Notation   D the data; (s, a, r, s', d) a transition, d = 1 at a true end, not a time limit
           N, σ, ω  number of candidates, their std, weight of the critics' std
           π policy, Q_j critic j of m, V state value, γ discount; Q̂, π⁻, Dec⁻ slow copies
           IQL: κ expectile (τ in its paper), β inverse temperature
           LAPO: z latent action, Dec(s, z) decoder, λ weight of the minimum over critics
           SO2: α weight of the entropy. Shapes: B rows; O, A, Z sizes of s, a (or |A|), z

Read it    1 flags, 2 networks, 3 losses, 4 the optimistic action, 5 bases, 6 buffer, both phases.
           All of the algorithm. Then 7 tasks, 8 data, 9 evaluation, 10 the run's folder.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import difflib
import functools
import glob
import importlib.util
import json
import os
import pickle
import re
import runpy
import sys
import time
import warnings
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Callable, Literal, NamedTuple, get_args, get_type_hints

import filelock
import gymnasium as gym
import h5py
import mujoco
import numpy as np
import pooch
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.envs.mujoco import MujocoEnv, ant_v5
from torch import Tensor
from tqdm import tqdm

# ==== 1. Flags ====
Share = Annotated[float, 0, 1]  # a type, the lowest and highest value that make sense
Amount = Annotated[float, 0, 1e9]
Count = Annotated[int, 1, 1e9]
Steps = Annotated[int, 0, 1e9]


@dataclass
class Args:
    """Flags of all bases. A base's own stand beside it (§5), the values for other tasks in §7."""

    env_id: str = "halfcheetah-random-v2"  # a D4RL task, or any gymnasium id (also module:Id)
    base: Literal["iql", "lapo", "awac", "so2"] = "iql"  # offline algorithm that is fine-tuned
    seed: Steps = 0  # seed of four streams: learning, exploration, environment, evaluation
    # -- data --
    dataset: str = ""  # empty: D4RL's (*-random-v2: collected); random, minari:ID or a file
    dataset_size: Count = 1_000_000  # rows to collect (D4RL 1M); more = wider data
    kitchen_rewards: Literal["consistent", "stock"] = "consistent"  # sub-tasks done - 4, or D4RL's
    # max (LAPO's; ours for most): r / largest r, or |r| if r is hardly > 0; return_range (IQL's):
    # 1000r / (best - worst return); minus_one (IQL's, ant maze): r - 1; x100 (LAPO's): 100r; none
    reward_transform: Literal["none", "return_range", "max", "minus_one", "x100"] = "max"
    # -- both phases --
    offline_steps: Steps = 1_000_000  # updates before the first step (papers 1M; SO2 3M, AWAC 50k)
    online_steps: Steps = 250_000  # environment steps of fine-tuning (ours; IQL's paper 1M)
    batch_size: Count = 256  # rows per update (IQL 256, LAPO 512); more = less noise, slower
    learning_rate: Amount = 3e-4  # step size of Adam (IQL 3e-4, LAPO 2e-4); more = faster, rougher
    gamma: Share = 0.99  # γ, discount per step (papers 0.99); more = looks further ahead
    tau: Share = 0.005  # rate of the slow copies per update (papers 0.005); more = less stable
    num_critics: Count = 5  # m, critics (paper 5); more = a lower minimum, slower
    hidden_dim: Count = 256  # units per hidden layer (papers 256); more = slower
    layer_norm: bool = True  # LayerNorm in the critics (ours; not for LAPO, SO2): see MLP
    # -- online --
    explore: Literal["o3f", "noise", "policy"] = "o3f"  # best of N; a + N(0, σ²); a itself
    num_candidates: Count = 100  # N, actions to choose from (paper 100); more = greedier
    sigma: Amount = 0.2  # candidates' std (0.2; ant maze, kitchen 0.05, IQL's 0.01); more = bolder
    omega: Annotated[float, -1e9, 1e9] = 0.0  # weight of the critics' std (paper 0); more = curious
    proposal: Literal["sample", "mean"] = "sample"  # a, the middle of candidates (Alg. 1: a sample)
    utd: Count = 1  # updates per step (IQL 1, critics of LAPO 20, of SO2 10); more = learns faster
    offline_ratio: Share | None = None  # dataset's share of a batch (paper None, uniform; ours 0.5)
    # -- evaluation --
    eval_every: Count = 10_000  # steps between evaluations; more = faster, coarser
    eval_episodes: Count = 10  # episodes per evaluation; more = less noise, slower
    eval_action: Literal["policy", "explore"] = "policy"  # score π's mean, or --explore around it
    # -- run --
    run_dir: str = ""  # folder of this run, new or empty; default runs/<task>-<base>-…
    resume: str = ""  # folder of a stopped run: go on exactly there; alone, or with --dataset
    load: str = ""  # a saved agent instead of pretraining; its flags are the defaults
    log_every: Count = 1000  # steps per row of metrics, a mean; more = shorter files
    checkpoint_minutes: Amount = 5.0  # minutes between checkpoints; more = more lost by a kill
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to learn; auto: cuda if found
    compile: bool = False  # torch.compile: a minute at start, a quarter faster on a GPU
    plot: tuple[str, ...] = ()  # folders: draw these runs, or all in them, and train nothing
    plot_to: str = "plot.png"  # file of that figure; any format that matplotlib knows
    video: str = ""  # a .gif: at the end film π's mean, and beside it --explore around the mean


# ==== 2. Networks ====
class EnsembleLinear(nn.Module):
    """m linear layers that share nothing, in one batched product: (m, B, in) -> (m, B, out)."""

    def __init__(self, m: int, in_dim: int, out_dim: int):
        super().__init__()
        # PyTorch's initial values, ±1/√in, drawn per member: so the critics differ.
        bound = in_dim**-0.5
        self.weight = nn.Parameter(torch.empty(m, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(m, 1, out_dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class MLP(nn.Sequential):
    """Per hidden size linear, LayerNorm if asked for, ReLU, dropout; then a last linear."""

    def __init__(self, sizes: list[int], linear=nn.Linear, dropout=0.0, layer_norm=False):
        layers = []
        for in_dim, out_dim in zip(sizes[:-1], sizes[1:-1]):
            layers.append(linear(in_dim, out_dim))
            # A ReLU network goes on linearly where it has seen nothing: there Q climbs and climbs,
            # and an argmax over a hundred candidates finds just that. LayerNorm bounds what a layer
            # hands on, so Q levels off there (RLPD, arXiv 2302.02948; PARS, arXiv 2507.08761).
            if layer_norm:  # without a learned scale, which all critics would share
                layers.append(nn.LayerNorm(out_dim, elementwise_affine=False))
            layers += [nn.ReLU(inplace=True), nn.Dropout(dropout)]
        super().__init__(*layers, linear(sizes[-2], sizes[-1]))


class Critics(nn.Module):
    """The ensemble Q_1 … Q_m: obs (B, O), actions (B, A) -> (m, B)."""

    def __init__(self, obs_dim: int, act_dim: int, m: int, hidden: list[int], layer_norm=False):
        super().__init__()
        self.m, linear = m, functools.partial(EnsembleLinear, m)
        self.net = MLP([obs_dim + act_dim, *hidden, 1], linear, layer_norm=layer_norm)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        x = torch.cat([obs, actions], -1).expand(self.m, -1, -1)  # (m, B, O + A), no copies
        return self.net(x).squeeze(-1)


# ==== 3. Losses: pure functions of tensors ====
def expectile_loss(q: Tensor, v: Tensor, expectile: float) -> Tensor:
    """IQL Eq. 5: mean of |κ − 1(Q < V)|·(Q − V)²; Q, V (B,)."""
    # Where V is too low the pull up weighs κ, where too high 1 − κ. For κ > 0.5, V settles above
    # the mean of Q over the data's actions, near the best of them as κ → 1.
    weight = (expectile - (q < v).to(q.dtype)).abs()
    return (weight * F.mse_loss(v, q, reduction="none")).mean()  # mse_loss: one kernel


def td_target(rewards, ends, next_v, gamma: float) -> Tensor:
    """IQL Eq. 6: y = r + γ(1 − d)·V(s'): (B,), or (m, B) where V(s') is."""
    return rewards + gamma * (1.0 - ends) * next_v


def ensemble_mse(q: Tensor, target: Tensor) -> Tensor:
    """IQL Eq. 6 for m critics: Σ_j mean (Q_j − y)²; q (m, B), target (B,) or (m, B)."""
    # m times the mean over all: each critic has the gradient that it would have alone.
    return len(q) * F.mse_loss(q, target.expand_as(q))


def advantage_weights(adv: Tensor, beta: float, exp_adv_max: float) -> Tensor:
    """IQL Eq. 7: min(exp(β·A), limit), A = Q − V (B,). β = 0: 1 everywhere, plain cloning."""
    # argmax_π E[A] − KL(π‖data)/β is π ∝ data·exp(β·A): cloning with these weights fits it.
    return torch.exp(beta * adv).clamp(max=exp_adv_max)


def gaussian_nll(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """−log N(x; μ, σ²) = Σᵢ [½((x − μ)/σ)² + log σ + ½·log 2π]: (B, A) -> (B,)."""
    precision = torch.exp(-2.0 * log_std)  # 1/σ²
    squares = F.mse_loss(mean, x, reduction="none")  # (x − μ)² as one kernel
    return (0.5 * precision * squares + log_std + 0.5 * np.log(2.0 * np.pi)).sum(-1)


def mixed_q(q: Tensor, doubleq_min: float) -> Tensor:
    """LAPO's Qmix = λ·min_j Q_j + (1 − λ)·max_j Q_j: (m, B) -> (B,)."""
    # Whoever maximises over Q finds its over-estimates; a low target stops that.
    return doubleq_min * q.amin(0) + (1.0 - doubleq_min) * q.amax(0)


def kl_to_standard_normal(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, I)) = ½·Σ(μ² + σ² − 1 − log σ²): (B, Z), (B, Z) -> (B,)."""
    return 0.5 * (mean**2 + log_var.exp() - 1.0 - log_var).sum(-1)


@torch.no_grad()
def polyak_(target: nn.Module, source: nn.Module, tau: float) -> None:
    """θ̂ ← (1 − τ)·θ̂ + τ·θ, in place."""
    # One launch for all weights, where a loop of lerp_ has one for each.
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


# ==== 4. The optimistic action ====
@torch.no_grad()
def optimistic_action(  # new in O3F
    obs, action, q_values: Callable, num_candidates: int, sigma: float, omega: float, generator=None
) -> tuple[Tensor, Tensor]:
    """Of N candidates around the policy's action, the critics' favourite (Algorithm 1, Eq. 2).

    obs (B, O); action (B, A) in the ±1 box; q_values: (B·N, O), (B·N, A) -> (m, B·N).
    Returns the chosen action (B, A), the first of equals, and its optimism (B,).
    """
    (B, A), N = action.shape, num_candidates
    noise = torch.randn(B, N, A, dtype=action.dtype, device=action.device, generator=generator)
    candidates = action[:, None] + sigma * noise  # new in O3F: c_i ~ N(a, σ²I), (B, N, A)
    candidates = candidates.clamp(-1.0, 1.0)  # score what will be executed
    q = q_values(obs.repeat_interleave(N, 0), candidates.flatten(0, 1)).unflatten(1, (B, N))
    q_mean = q.mean(0)  # (B, N)
    score = q_mean + omega * q.std(0, correction=0)  # new in O3F: Eq. 2, a std that divides by m
    best = score.argmax(1)  # new in O3F: which candidate is a_t
    rows = torch.arange(B, device=action.device)
    # Optimism, what the choice claims to gain: the chosen candidate's mean Q, less the mean over
    # all candidates, which --explore noise gets in expectation.
    return candidates[rows, best], q_mean[rows, best] - q_mean.mean(1)


def explore_action(agent: Base, obs: Tensor, args: Args, generator=None):
    """The action to execute, (B, O) -> (B, A), and its optimism (B,): 0 for the baselines."""
    action = agent.policy(obs, args.proposal == "sample", generator)  # a ~ π(·|s)
    if args.explore == "policy":
        return action, torch.zeros_like(action[:, 0])
    n = args.num_candidates  # new in O3F
    if args.explore == "noise":  # the paper's baseline: O3F with one candidate, so no choice
        n = 1
    return optimistic_action(obs, action, agent.q_values, n, args.sigma, args.omega, generator)


# ==== 5. Bases: offline algorithms ====
class Batch(NamedTuple):
    """B transitions, float32, on the agent's device."""

    observations: Tensor  # (B, O)
    actions: Tensor  # (B, A), in the ±1 box
    rewards: Tensor  # (B,), as the agent is to see them
    next_observations: Tensor  # (B, O)
    terminations: Tensor  # (B,), 1 at a true end


class Base(nn.Module):
    """What the offline algorithms share. Each has to define:

    Flags, __init__   Flags with standardise, or an own see_dataset; networks, the critics as qf
    update(batches) -> dict   learn from this list of raw Batch; the last's metrics, 0-dim tensors
    act(obs, sample, generator) -> (B, A)   π's sample or deterministic action at standardised obs
    """

    def __init__(self, args: Args, obs_dim: int, act_dim: int):
        super().__init__()
        self.args, self.sizes = args, (obs_dim, act_dim)
        # What a base remembers is a buffer or a parameter, changed in place: those are saved,
        # and move in a recorded update (§10), where Python's numbers are frozen.
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        # Set by main, not saved: is this the online phase, and which share of it is over?
        self.online = False
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64), persistent=False)

    def see_dataset(self, data: dict[str, np.ndarray]) -> None:
        """Take the dataset's statistics (keys of Batch); they stay as they are online."""
        if self.args.standardise:
            set_statistics(data["observations"], self.obs_mean, self.obs_std, least=0.01)

    def standardise(self, obs: Tensor) -> Tensor:
        return (obs - self.obs_mean) / self.obs_std

    def standardised(self, batch: Batch) -> Batch:
        """The batch as the networks see it."""
        both = torch.stack([batch.observations, batch.next_observations])
        obs, next_obs = self.standardise(both)
        return batch._replace(observations=obs, next_observations=next_obs)

    def descend(self, loss: Tensor, weights) -> None:
        """One step of Adam down the loss, for these weights and no others."""
        # One Adam for all networks (made in §10): it leaves alone what has no gradient.
        self.optimizer.zero_grad()
        loss.backward(inputs=list(weights))
        self.optimizer.step()

    @torch.no_grad()
    def policy(self, obs: Tensor, sample: bool, generator=None) -> Tensor:
        """π's sample or deterministic action in the ±1 box: (B, O) -> (B, A)."""
        return self.act(self.standardise(obs), sample, generator)

    @torch.no_grad()
    def q_values(self, obs: Tensor, actions: Tensor) -> Tensor:
        """What the critics, not their slow copies, say of (B, O), (B, A): -> (m, B)."""
        return self.qf(self.standardise(obs), actions)

    def critic_metrics(self, q: Tensor, loss: Tensor) -> dict[str, Tensor]:
        """For every base's log: q (m, B) of a batch, and its loss, summed over critics."""
        q, loss = q.detach(), loss.detach() / len(q)  # now a mean over critics
        return {"losses/qf": loss, "q_mean": q.mean(), "q_std": q.std(0, correction=0).mean()}


@dataclass
class WeightedArgs(Args):
    beta: Amount = 3.0  # β, IQL Eq. 7 (3, ant maze 10, kitchen 0.5, AWAC 1); 0 clones, more = picky
    online_beta: Amount | None = None  # β online (Fig. 3, AWAC: 10); None: unchanged
    anneal: Literal["step", "linear"] = "step"  # to online β, κ at once, or over the online phase
    exp_adv_max: Amount = 100.0  # limit of the weights exp(β·A) (100); more = single rows may rule
    normalise_adv: bool = False  # A / its std (ours; paper no), for any reward scale
    actor_dropout: Share = 0.0  # rate in updates (kitchen 0.1, else 0); more = smoother
    standardise: bool = True  # networks see (s - mean)/std of the data (ours; papers no)


class Weighted(Base):
    """What IQL and AWAC share: an actor that imitates the data's better actions."""

    def __init__(self, args: WeightedArgs, obs_dim: int, act_dim: int):
        super().__init__(args, obs_dim, act_dim)
        self.hidden = [args.hidden_dim] * 2
        self.qf = Critics(obs_dim, act_dim, args.num_critics, self.hidden, args.layer_norm)
        # π(a|s) = N(tanh(MLP(s)), diag(std²)), std the same for all states.
        self.actor = MLP([obs_dim, *self.hidden, act_dim], dropout=args.actor_dropout)
        self.actor.log_std = nn.Parameter(torch.zeros(act_dim))
        self.apply(orthogonal_)
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)

    def update(self, batches: list[Batch]) -> dict[str, Tensor]:
        for batch in batches:
            metrics = self.step(self.standardised(batch))
        return metrics

    def at_present(self, offline: float, online: float | None):
        """β or κ now. To change it online is O3F's rival in its Fig. 3: a new objective."""
        if not self.online or online is None:
            return offline
        share = self.progress if self.args.anneal == "linear" else 1.0
        return (1 - share) * offline + share * online

    def imitate(self, obs, actions, adv) -> tuple[Tensor, dict]:
        """Actor: −min(exp(β·A), limit)·log π(a|s) (IQL Eq. 7); adv (B,) -> its loss, metrics."""
        args = self.args
        if args.normalise_adv:  # scaled, not centred: the sign of A has a meaning
            adv = adv / (adv.std(correction=0) + 1e-6)
        beta = self.at_present(args.beta, args.online_beta)
        weight = advantage_weights(adv, beta, args.exp_adv_max)  # (B,)
        mean = torch.tanh(self.actor.train()(obs))  # dropout is on only here
        log_std = self.log_std()
        loss = (weight * gaussian_nll(actions, mean, log_std)).mean()
        # Effective sample size, a share: 1, all rows count alike; 1/B, one row rules.
        average = weight.mean()
        ess = average**2 / ((weight**2).mean() + 1e-12)
        metrics = {"losses/actor": loss.detach(), "adv_weight": average}
        return loss, metrics | {"adv_weight_ess": ess, "policy_std": log_std.detach().exp().mean()}

    def log_std(self) -> Tensor:
        return F.hardtanh(self.actor.log_std, -5.0, 2.0)  # clamped, (A,)

    def act(self, obs, sample: bool, generator=None) -> Tensor:
        action = torch.tanh(self.actor.eval()(obs))
        if sample:
            noise = torch.randn(action.shape, device=obs.device, generator=generator)
            action = action + self.log_std().exp() * noise
        return action.clamp(-1.0, 1.0)


@dataclass
class IQLArgs(WeightedArgs):
    expectile: Share = 0.7  # κ of Eq. 5 (0.7, ant maze 0.9); more = V nearer the best Q
    online_expectile: Share | None = None  # κ online (O3F's Fig. 3: 0.85); None: unchanged


class IQL(Weighted):
    """Implicit Q-learning (Kostrikov et al., arXiv 2110.06169), with m critics."""

    Flags = IQLArgs

    def __init__(self, args: IQLArgs, obs_dim: int, act_dim: int):
        super().__init__(args, obs_dim, act_dim)
        self.vf = MLP([obs_dim, *self.hidden, 1]).apply(orthogonal_)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One update in the authors' order: V, then actor and critics, then the slow copies."""
        obs, actions, rewards, next_obs, ends = batch
        # V: expectile of min_j Q̂_j(s, a) over the data's actions (Eq. 5). IQL takes the minimum of
        # its two target critics; which of the five, O3F does not say. Ours: the minimum of all.
        with torch.no_grad():
            target_q = self.qf_target(obs, actions).amin(0)  # (B,)
        expectile = self.at_present(self.args.expectile, self.args.online_expectile)
        vf_loss = expectile_loss(target_q, self.vf(obs).squeeze(-1), expectile)
        self.descend(vf_loss, self.vf.parameters())

        # From here on the *new* V: at s for the actor, at s' for the critics.
        with torch.no_grad():
            v, next_v = self.vf(torch.cat([obs, next_obs])).squeeze(-1).chunk(2)  # (B,) each
            # No max over a', but V(s'): no action outside of the data is asked about.
            target = td_target(rewards, ends, next_v, self.args.gamma)
        actor_loss, metrics = self.imitate(obs, actions, target_q - v)
        q = self.qf(obs, actions)  # (m, B)
        qf_loss = ensemble_mse(q, target)
        # The two share no parameter: one backward pass gives each network its own gradient.
        self.descend(actor_loss + qf_loss, [*self.actor.parameters(), *self.qf.parameters()])
        polyak_(self.qf_target, self.qf, self.args.tau)
        metrics = {"losses/vf": vf_loss.detach(), "v_mean": v.mean()} | metrics
        return metrics | self.critic_metrics(q, qf_loss)


class AWAC(Weighted):
    """Advantage-weighted actor-critic (Nair et al., arXiv 2006.09359): no V, but Q of samples."""

    # IQL never asks about an action outside of the data; AWAC asks about the policy's, so those
    # have to be near the data from the start. Ours: two hidden layers (released: four); weights
    # exp(β·A), limited as in IQL; its release has B·softmax(β·A) over the batch. d3rlpy's AWAC,
    # which O3F's authors ran, has batches of 1024 and weight decay 1e-4 (actor).
    Flags = WeightedArgs

    def __init__(self, args: WeightedArgs, obs_dim: int, act_dim: int):
        super().__init__(args, obs_dim, act_dim)
        nn.init.uniform_(self.actor[-1].weight, -1e-3, 1e-3)  # means near 0, as released

    def log_std(self) -> Tensor:  # as released: std e⁻³ = 0.05 at the start, 1 at most
        return -6.0 + 6.0 * torch.sigmoid(self.actor.log_std)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One update of actor and critics; both losses use the critics from before it."""
        obs, actions, rewards, next_obs, ends = batch
        with torch.no_grad():
            # y = r + γ(1 − d)·min_j Q̂_j(s', a'), a' ~ π(·|s').
            next_q = self.qf_target(next_obs, self.act(next_obs, sample=True)).amin(0)  # (B,)
            target = td_target(rewards, ends, next_q, self.args.gamma)
            # A = min_j Q_j(s, a) − min_j Q_j(s, a_π), a_π ~ π(·|s): better than the policy's own?
            v = self.qf(obs, self.act(obs, sample=True)).amin(0)
        q = self.qf(obs, actions)  # (m, B)
        actor_loss, metrics = self.imitate(obs, actions, q.detach().amin(0) - v)
        qf_loss = ensemble_mse(q, target)
        self.descend(actor_loss + qf_loss, [*self.actor.parameters(), *self.qf.parameters()])
        polyak_(self.qf_target, self.qf, self.args.tau)
        return metrics | {"v_mean": v.mean()} | self.critic_metrics(q, qf_loss)


@dataclass
class LAPOArgs(Args):
    subset_size: Count = 2  # slow critics per target (REDQ 2), at most all; more = lower targets
    doubleq_min: Share = 1.0  # λ, weight of the minimum (ant maze 0.7, else 1); more = cautious
    # limits of V's targets, from rewards seen: r/(1 - gamma), or r itself where it is paid once
    value_clamp: Literal["discounted", "once"] = "discounted"
    latent_dim: Count | None = None  # size of z (paper, None: 2·|A|); more = finer actions
    max_latent: Amount = 2.0  # limit of |z_i| (paper 2); more = rarer actions
    latent_noise: Amount = 0.1  # std on z, cut at 2 std (paper 0.1); more = smoother V
    kl_weight: Amount = 1.0  # weight of the CVAE's KL (paper 1); more = z says less
    good_weight: Share = 0.9  # weight of rows that beat V, the rest's is 1 - it (0.9); 0.5 = clone


class LAPO(Base):
    """Latent-variable advantage-weighted policy optimisation (Chen et al., arXiv 2203.08949)."""

    # A conditional VAE, encoder (s, a) → z, decoder (s, z) → a, prior z ~ N(0, I), learns to
    # reproduce the data's actions, above all those that beat V. The policy chooses z, |z_i| ≤ 2,
    # and the decoder turns it into an action: like the data's, since the prior's mass is there.
    # Networks see standardised actions, too; policy() gives, q_values() takes those of the box.
    Flags = LAPOArgs

    def __init__(self, args: LAPOArgs, obs_dim: int, act_dim: int):
        super().__init__(args, obs_dim, act_dim)
        hidden = [args.hidden_dim] * 3
        latent_dim = args.latent_dim or 2 * act_dim
        self.qf = Critics(obs_dim, act_dim, args.num_critics, hidden, args.layer_norm)
        self.vf = MLP([obs_dim, *hidden, 1])
        self.encoder = MLP([obs_dim + act_dim, *hidden, 2 * latent_dim])
        self.decoder = MLP([obs_dim + latent_dim, *hidden, act_dim])
        self.actor = MLP([obs_dim, *hidden, latent_dim])
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.decoder_target = copy.deepcopy(self.decoder).requires_grad_(False)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.register_buffer("act_mean", torch.zeros(act_dim))
        self.register_buffer("act_std", torch.ones(act_dim))
        self.register_buffer("v_min", torch.zeros(()))
        self.register_buffer("v_max", torch.zeros(()))

    def see_dataset(self, data: dict[str, np.ndarray]) -> None:
        set_statistics(data["observations"], self.obs_mean, self.obs_std, least=2e-6)
        set_statistics(data["actions"], self.act_mean, self.act_std, least=2e-6)
        self.widen(torch.as_tensor(data["rewards"], device=self.v_min.device))

    def standardised(self, batch: Batch) -> Batch:
        actions = (batch.actions - self.act_mean) / self.act_std
        return super().standardised(batch)._replace(actions=actions)

    def widen(self, rewards: Tensor) -> None:
        """Widen V's limits to what these rewards allow."""
        # A discounted return lies in [min r, max r]/(1 − γ); where r is paid once, at the end, in
        # [min r, max r]. Ours: 0, V after an end, is always within. Rewards seen online widen the
        # limits too, or the value of a policy better than the data's would be cut off.
        scale = 1.0
        if self.args.value_clamp == "discounted":
            scale = 1.0 / max(1.0 - self.args.gamma, 1e-6)
        self.v_min.clamp_(max=scale * rewards.amin())
        self.v_max.clamp_(min=scale * rewards.amax())

    def decode(self, obs, actor, decoder, noisy=False, generator=None) -> Tensor:
        """Dec(s, z), z = π_z(s) = 2·tanh(MLP(s)), noisy + clip(0.1·ε, ±0.2): (B, O) -> (B, A)."""
        z = self.args.max_latent * torch.tanh(actor(obs))
        if noisy:
            noise = torch.randn(z.shape, device=z.device, generator=generator)
            z = z + self.args.latent_noise * noise.clamp(-2.0, 2.0)
        return decoder(torch.cat([obs, z], -1))

    def target_q(self, obs, actions, members: Tensor) -> Tensor:
        """Qmix of those slow critics that members (k,) names, at k/m of the cost: (B,)."""
        x = torch.cat([obs, actions], -1).expand(len(members), -1, -1)
        net = self.qf_target.net
        chosen = {name: weight[members] for name, weight in net.named_parameters()}
        q = torch.func.functional_call(net, chosen, x).squeeze(-1)  # (k, B)
        return mixed_q(q, self.args.doubleq_min)

    def update(self, batches: list[Batch]) -> dict[str, Tensor]:
        """Critics and V once per batch, CVAE and policy once, with the last."""
        args = self.args
        for i, batch in enumerate(batches):
            batch = self.standardised(batch)
            # REDQ: a few of the slow critics make the targets, drawn for every update.
            members = torch.randperm(args.num_critics, device=batch.rewards.device)
            members = members[: args.subset_size]
            metrics = self.update_critics(batch, members)
            if i == len(batches) - 1:  # before this batch moves the slow copies
                metrics |= self.update_policy(batch, members)
                polyak_(self.decoder_target, self.decoder, args.tau)
                polyak_(self.actor_target, self.actor, args.tau)
            polyak_(self.qf_target, self.qf, args.tau)
        return metrics

    def update_critics(self, batch: Batch, members: Tensor) -> dict[str, Tensor]:
        """One step on Q and V; batch standardised."""
        obs, actions, rewards, next_obs, ends = batch
        with torch.no_grad():
            # y_Q = r + γ(1 − d)·V(s'), V no slow copy. y_V = Qmix at a noisy action of the slow
            # policy at s: V is the latent policy's value, where IQL's is that of good data.
            target = td_target(rewards, ends, self.vf(next_obs).squeeze(-1), self.args.gamma)
            policy_action = self.decode(obs, self.actor_target, self.decoder_target, noisy=True)
            v_target = self.target_q(obs, policy_action, members)
            self.widen(rewards)
            v_target = v_target.clamp(self.v_min, self.v_max)
        q, v = self.qf(obs, actions), self.vf(obs).squeeze(-1)  # (m, B), (B,)
        qf_loss = ensemble_mse(q, target)
        vf_loss = ((v - v_target) ** 2).mean()
        self.descend(qf_loss + vf_loss, [*self.qf.parameters(), *self.vf.parameters()])
        metrics = {"losses/vf": vf_loss.detach(), "v_mean": v.detach().mean()}
        return metrics | self.critic_metrics(q, qf_loss)

    def update_policy(self, batch: Batch, members: Tensor) -> dict[str, Tensor]:
        """One step on the CVAE and one on the latent policy; batch standardised."""
        obs, actions, rewards, next_obs, ends = batch
        args = self.args
        # --- CVAE: w·(Σ(â − a)² + KL), w = 0.9 where adv > 0, else 0.1 ---
        with torch.no_grad():
            # adv: one step of the data's action, then the policy, minus V(s):
            # r + γ(1 − d)·Qmix(s', Dec⁻(s', π⁻(s'))) − V(s).
            next_action = self.decode(next_obs, self.actor_target, self.decoder_target)
            next_q = self.target_q(next_obs, next_action, members)
            adv = td_target(rewards, ends, next_q, args.gamma) - self.vf(obs).squeeze(-1)
            weight = torch.where(adv > 0, args.good_weight, 1.0 - args.good_weight)  # (B,)
        mean, log_var = self.encoder(torch.cat([obs, actions], -1)).chunk(2, -1)  # (B, Z) each
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)  # gradients reach mean, log_var
        # Σ(â − a)² is −log N(a; â, ½·I) + const: with the KL, the negative ELBO of a VAE.
        error = ((self.decoder(torch.cat([obs, z], -1)) - actions) ** 2).sum(-1)  # (B,)
        kl = kl_to_standard_normal(mean, log_var)
        cvae_loss = (weight * (error + args.kl_weight * kl)).mean()
        # --- Policy: maximise mean_j Q_j(s, Dec⁻(s, π_z(s))); ours: its release takes Q₁ alone ---
        actor_loss = -self.qf(obs, self.decode(obs, self.actor, self.decoder_target)).mean()
        learners = nn.ModuleList([self.encoder, self.decoder, self.actor])
        self.descend(cvae_loss + actor_loss, learners.parameters())
        metrics = {"losses/cvae": cvae_loss.detach(), "losses/actor": actor_loss.detach()}
        return metrics | {"adv": adv.mean(), "kl": kl.detach().mean()}

    def act(self, obs, sample: bool, generator=None) -> Tensor:
        # A sample has the noise of V's targets. Through the slow decoder: policy and V are trained
        # with that one.
        action = self.decode(obs, self.actor, self.decoder_target, sample, generator)
        return (action * self.act_std + self.act_mean).clamp(-1.0, 1.0)

    @torch.no_grad()
    def q_values(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.qf(self.standardise(obs), (actions - self.act_mean) / self.act_std)


@dataclass
class SO2Args(Args):
    target_noise: Amount = 0.3  # std on a' in online targets, cut at 2 std (0.3); more = smoother Q
    online_alpha: Amount = 0.2  # α online, weight of the entropy (0.2); more = a wider policy
    standardise: bool = False  # networks see (s - mean)/std of the data (paper no)


class SO2(Base):
    """SO2 (Zhang et al., arXiv 2312.07685): SAC with m critics, and other targets online."""

    # Offline it is SAC-N (arXiv 2110.01548): one target for all critics, with the minimum over
    # them, which is low where data is thin. Online each critic has its own target, no minimum,
    # at a next action with noise (perturbed value update), and ten updates a step. The actor keeps
    # the minimum in both phases. So O3F changes what is tried, SO2 what is learned from it.
    # Ours: o3f on top of it; 5 critics (10; hopper 50), batches of 256 (2,560), no warm-up, Adam
    # carries on at 3e-4 (afresh at 1e-3); no diversity term (EDAC); PyTorch's initial weights
    # (EDAC: hidden biases 0.1, last layers ±3e-3, the actor's ±1e-3).
    Flags = SO2Args

    def __init__(self, args: SO2Args, obs_dim: int, act_dim: int):
        super().__init__(args, obs_dim, act_dim)
        hidden = [args.hidden_dim] * 3
        self.qf = Critics(obs_dim, act_dim, args.num_critics, hidden, args.layer_norm)
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.actor = MLP([obs_dim, *hidden, 2 * act_dim])
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def draw(self, obs, generator=None) -> tuple[Tensor, Tensor]:
        """a = tanh(u), u ~ N(μ(s), σ(s)²), and log π(a|s): (B, O) -> (B, A), (B,)."""
        mean, log_std = self.actor(obs).chunk(2, -1)
        log_std = F.hardtanh(log_std, -5.0, 2.0)  # clamped
        noise = torch.randn(mean.shape, device=obs.device, generator=generator)
        u = mean + log_std.exp() * noise
        # log(1 − tanh²u), of tanh's slope, as log(4/(eᵘ + e⁻ᵘ)²), which is finite for any u.
        log_slope = 2.0 * (np.log(2.0) - u - F.softplus(-2.0 * u)).sum(-1)
        log_density = -gaussian_nll(u, mean, log_std)
        return torch.tanh(u), log_density - log_slope

    def alpha(self) -> Tensor:  # learned from 1 offline, constant online
        if self.online:
            return torch.full_like(self.log_alpha, self.args.online_alpha)
        return self.log_alpha.detach().exp()

    def update(self, batches: list[Batch]) -> dict[str, Tensor]:
        for batch in batches:
            batch = self.standardised(batch)
            metrics = self.update_critics(batch)
            polyak_(self.qf_target, self.qf, self.args.tau)
        return metrics | self.update_actor(batch.observations)

    def update_critics(self, batch: Batch) -> dict[str, Tensor]:
        obs, actions, rewards, next_obs, ends = batch
        with torch.no_grad():
            # y_j = r + γ(1 − d)·(Q̂_j(s', a') − α·log π(a'|s')); offline min_k Q̂_k, not Q̂_j.
            next_action, log_prob = self.draw(next_obs)
            if self.online:  # Q̂_j at a' + clip(ε, ±2 std), log π still of a'
                noise = torch.randn_like(next_action).clamp(-2.0, 2.0)
                noisy = (next_action + self.args.target_noise * noise).clamp(-1.0, 1.0)
                next_q = self.qf_target(next_obs, noisy)  # (m, B)
            else:
                next_q = self.qf_target(next_obs, next_action).amin(0)  # (B,)
            target = td_target(rewards, ends, next_q - self.alpha() * log_prob, self.args.gamma)
        q = self.qf(obs, actions)  # (m, B)
        qf_loss = ensemble_mse(q, target)
        self.descend(qf_loss, self.qf.parameters())
        return self.critic_metrics(q, qf_loss)

    def update_actor(self, obs: Tensor) -> dict[str, Tensor]:
        action, log_prob = self.draw(obs)
        # Minimise α·log π(a|s) − min_j Q_j(s, a); α grows while the entropy is below −|A|.
        loss = (self.alpha() * log_prob - self.qf(obs, action).amin(0)).mean()
        entropy = -log_prob.detach().mean()
        alpha_loss = self.log_alpha * (entropy + self.sizes[1])
        weights = list(self.actor.parameters())
        if not self.online:
            weights.append(self.log_alpha)
        self.descend(loss + alpha_loss, weights)
        return {"losses/actor": loss.detach(), "alpha": self.alpha(), "entropy": entropy}

    def act(self, obs, sample: bool, generator=None) -> Tensor:
        if sample:
            return self.draw(obs, generator)[0]
        return torch.tanh(self.actor(obs).chunk(2, -1)[0])


BASES = {"iql": IQL, "lapo": LAPO, "awac": AWAC, "so2": SO2}


# ==== 6. Replay buffer, and both phases ====
class ReplayBuffer:
    """The dataset, then the online transitions, in one tensor: a batch is one gather."""

    def __init__(self, data: dict[str, np.ndarray], online_steps: int, device: torch.device):
        (n, O), (_, A) = data["observations"].shape, data["actions"].shape
        self.num_offline = n
        self.size = torch.tensor(n, device=device)  # rows so far; a tensor: CUDA graphs read it
        self.widths = [O, A, 1, O, 1]
        rows = np.zeros((n + online_steps, sum(self.widths)), np.float32)
        rows[:n] = np.column_stack(Batch(**data))
        self.rows = torch.from_numpy(rows).to(device)

    def add(self, obs, action, reward: float, next_obs, end: bool) -> None:
        """Append one transition, its reward as the agent is to see it. Raises: UserError."""
        row = np.concatenate([obs, action, [reward], next_obs, [end]]).astype(np.float32)
        if not np.isfinite(row).all():
            raise UserError("the environment gave NaN or inf; --load an earlier agent")
        self.rows.index_put_((self.size,), torch.from_numpy(row).to(self.rows.device))
        self.size += 1

    def sample(self, batch_size: int, batches: int = 1, offline_ratio: float | None = None):
        """A list of batches, uniform over all rows, or with this share from the dataset's."""
        draws = torch.randint(2**62, (batches, batch_size), device=self.rows.device)
        index = draws % self.size
        if offline_ratio is not None:
            k, n = round(offline_ratio * batch_size), self.num_offline
            index = torch.cat([draws[:, :k] % n, n + draws[:, k:] % (self.size - n)], 1)
        obs, actions, rewards, next_obs, ends = self.rows[index].split(self.widths, -1)
        columns = obs, actions, rewards.squeeze(-1), next_obs, ends.squeeze(-1)
        return [Batch(*batch) for batch in zip(*columns)]


def main(args: Args) -> dict:
    """Pretrain, fine-tune, evaluate -> the run's folder, scores by step. Raises: UserError."""
    args, device, saved = prepare(args)  # saved: a stopped run, an agent to load, or None
    task = get_task(args.env_id)
    # Independent streams: to evaluate more often, say, changes nothing in training.
    explore_seed, env_seed, eval_seed = np.random.SeedSequence(args.seed).generate_state(3).tolist()
    generator = torch.Generator(device).manual_seed(explore_seed)
    torch.manual_seed(args.seed)  # the global stream: what learning draws, and nothing else
    env = gym.wrappers.RecordEpisodeStatistics(make_env(args.env_id), stats_key="o3f")
    data, reward_rule = load_dataset(args, task, env, saved)  # rule: r, d to learn
    agent = make_agent(args, data, saved, device)
    buffer = ReplayBuffer(data, args.online_steps, device)
    judge = functools.partial(evaluate, agent, reward_rule, task, eval_seed)
    with Run(args, agent, buffer, generator, reward_rule, judge, saved) as run:
        # Steps up to 0 are offline updates, later ones environment steps: one axis for both.
        # recorded (§10): on a CPU the function itself, on a GPU without Python's delay.
        update = recorded(lambda: agent.update(buffer.sample(args.batch_size)), device)
        for step in run.bar("offline", range(run.step + 1, 1)):
            run.record(step, update())

        # O3F's Algorithm 1: objective (SO2 changes it), buffer and optimiser carry on.
        agent.online = True
        draw = args.batch_size, args.utd, args.offline_ratio
        update = recorded(lambda: agent.update(buffer.sample(*draw)), device)
        seen = torch.zeros(1, agent.sizes[0], device=device)  # the observation, (1, O)
        explore = recorded(lambda: explore_action(agent, seen, args, generator), device, generator)
        # Reset twice: the first draws what is drawn once (the goal of ant mazes v1), then
        # each episode has its own seed: a resumed run needs no simulator state.
        env.reset(seed=env_seed)
        obs, _ = env.reset(seed=env_seed + run.episode)
        for step in run.bar("online", range(run.step + 1, args.online_steps + 1)):
            agent.progress.fill_(step / args.online_steps)
            seen[0] = torch.from_numpy(obs)
            action, optimism = explore()
            action = action[0].cpu().numpy()
            next_obs, reward, terminated, truncated, info = env.step(action)
            # A time limit (truncated) ends the episode, not the task: d stays 0, V(s') counts.
            train_reward, end = reward_rule(obs, reward, next_obs, terminated)
            buffer.add(obs, action, train_reward, next_obs, end)
            metrics = update() | {"o3f/optimism": optimism[0]}
            run.record(step, metrics, info.pop("o3f", None))  # at an episode's end
            obs = next_obs
            if terminated or truncated:
                obs, _ = env.reset(seed=env_seed + run.episode)
        run.finish()
    if args.video:  # last: EGL's libraries, loaded before triton's, crash them
        film(judge, args)
    return dict(folder=run.folder, scores=run.scores)


# ==== 7. Tasks and environments ====
class UserError(ValueError):
    """Something that the user can put right: printed as one line, exit code 2."""


@contextlib.contextmanager
def explain(hint: str, say: Callable | None = None):
    """An exception becomes a UserError that starts with hint; with `say`, a line given to it."""
    try:
        yield
    except Exception as error:
        if say is None and isinstance(error, UserError):
            raise  # it is a line already
        reason = " ".join(str(error).split("\n")[:2])
        if not reason or isinstance(error, pickle.UnpicklingError):  # torch's is bad advice
            reason = type(error).__name__
        if say is None:
            raise UserError(f"{hint}: {reason}") from error
        say(f"{hint}: {reason}")  # a warning, or one of several failures


class Task(NamedTuple):
    family: str  # random, locomotion, kitchen, antmaze or other
    gym_id: str = ""  # empty where this file has the environment
    low: float = 0.0  # return that scores 0 (d4rl's infos.py)
    high: float = 100.0  # return that scores 100; by default the score is the return
    targets: tuple[str, ...] = ()  # sub-tasks of a kitchen that pay

    def score(self, returns):  # D4RL's, of undiscounted raw rewards
        return 100.0 * (returns - self.low) / (self.high - self.low)


ROBOTS = {  # -v4: v5 changed Walker2d's foot friction, and the healthy reward of two
    "halfcheetah": Task("locomotion", "HalfCheetah-v4", -280.178953, 12135.0),
    "hopper": Task("locomotion", "Hopper-v4", -20.272305, 3234.3),
    "walker2d": Task("locomotion", "Walker2d-v4", 1.629008, 4592.3),
}
SLIDE = Task("kitchen", "", 0.0, 4.0, ("microwave", "kettle", "light switch", "slide cabinet"))
MIXED = SLIDE._replace(targets=("microwave", "kettle", "bottom burner", "light switch"))
TASKS = {"kitchen-complete-v0": SLIDE, "kitchen-partial-v0": SLIDE, "kitchen-mixed-v0": MIXED}
for version in ("v1", "v2"):  # v0 lacks time limits, or has wrong ones
    for level in "medium medium-replay medium-expert full-replay expert".split():
        TASKS |= {f"{robot}-{level}-{version}": task for robot, task in ROBOTS.items()}
    for robot, task in ROBOTS.items():  # uniform actions: a family by their data
        TASKS[f"{robot}-random-{version}"] = task._replace(family="random")
    for maze in "umaze umaze-diverse medium-play medium-diverse large-play large-diverse".split():
        TASKS[f"antmaze-{maze}-{version}"] = Task("antmaze", "", 0.0, 1.0)
# The papers' values where they differ from Args, or ours, measured: the narrower key wins.
PRESETS = {
    "antmaze": dict(sigma=0.05),
    "kitchen": dict(sigma=0.05),
    # Measured on halfcheetah: uniform batches hardly see what is found, a row in a million.
    "iql/random": dict(normalise_adv=True, offline_ratio=0.5),
    "iql/antmaze": dict(expectile=0.9, beta=10.0, reward_transform="minus_one"),
    # Measured: samples score half as much as the mean; with σ 0.02 the optimistic action, too.
    "iql/kitchen": dict(
        beta=0.5, actor_dropout=0.1, reward_transform="none", proposal="mean", sigma=0.01
    ),
    "iql/other": dict(normalise_adv=True),  # a stranger's reward scale is unknown
    # Measured on halfcheetah-random: policy 29, with LayerNorm 20.
    "lapo": dict(batch_size=512, learning_rate=2e-4, utd=20, proposal="mean", layer_norm=False),
    "lapo/antmaze": dict(doubleq_min=0.7, value_clamp="once", reward_transform="x100"),
    "awac": dict(beta=1.0),
    "awac/antmaze": dict(reward_transform="minus_one"),
    "awac/kitchen": dict(reward_transform="none", proposal="mean"),
    "awac/other": dict(normalise_adv=True),
    # α is in the rewards' units, so they stay raw. As published, plain networks.
    "so2": dict(utd=10, reward_transform="none", layer_norm=False),
}


def get_task(env_id: str) -> Task:
    if env_id in TASKS:
        return TASKS[env_id]
    if env_id in gym.registry or ":" in env_id:  # module:Id imports the module first
        return Task("other", env_id)
    near = " or ".join(difflib.get_close_matches(env_id, [*TASKS, *gym.registry])) or "--help"
    raise UserError(f"--env-id {env_id}: there is no such task, try {near}")


def preset(env_id: str, base: str, **flags) -> Args:
    """The papers' values for a task and a base, and the flags that are given."""
    family, values = get_task(env_id).family, {}
    for key in (base, family, f"{base}/{family}"):
        values |= PRESETS.get(key, {})
    return BASES[base].Flags(env_id, base, **(values | flags))


def d4rl_dir() -> Path:  # only read: importing it needs the MuJoCo of 2021
    with explain("package d4rl is missing: pip install --no-deps d4rl==1.1"):
        return Path(importlib.util.find_spec("d4rl").submodule_search_locations[0])


def make_env(env_id: str, **kwargs) -> gym.Env:
    """A task's environment: float32 observations, actions in the ±1 box, a time limit."""
    task, steps = get_task(env_id), 1000  # an evaluation has to end
    mujoco.set_mju_user_warning(warnings.warn)  # else it writes MUJOCO_LOG.TXT
    if task.family == "kitchen":
        env, steps = KitchenEnv(task.targets, **kwargs), 280
    elif task.family == "antmaze":
        env, steps = AntMazeEnv(env_id, **kwargs), (700 if "umaze" in env_id else 1000)
    else:
        with explain(f"--env-id {env_id}: gymnasium cannot make it"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that -v4 is out of date: it is D4RL's
            env = gym.make(task.gym_id, disable_env_checker=True, **kwargs)
    space, box, wrong = env.observation_space, env.action_space, None
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        wrong = f"observations are {space}, no flat box: register it with FlattenObservation"
    elif not isinstance(box, gym.spaces.Box) or len(box.shape) != 1 or box.dtype.kind != "f":
        wrong = f"actions are {box}, no flat box of real numbers that noise could be added to"
    elif not box.is_bounded() or (box.low >= box.high).any():
        wrong = f"actions are {box}, give each a finite low and a finite, larger high"
    if wrong:
        raise UserError(f"--env-id {env_id}: {wrong}")
    # Clip: rounding may leave the box by a bit. Copy (below): some reuse what they returned.
    env = gym.wrappers.TransformAction(env, lambda a: np.clip(a, box.low, box.high), box)
    env.box = box  # its own
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    space = gym.spaces.Box(-np.inf, np.inf, space.shape, np.float32)
    env = gym.wrappers.TransformObservation(env, lambda obs: np.array(obs, np.float32), space)
    env = gym.wrappers.TransformReward(env, lambda r: np.asarray(r).item())  # of (1,), or a tensor
    if env.spec is None or env.spec.max_episode_steps is None:
        env = gym.wrappers.TimeLimit(env, steps)
    return env


class D4RLEnv(MujocoEnv):  # what kitchen and ant maze share
    metadata = {"render_modes": ant_v5.AntEnv.metadata["render_modes"]}  # gymnasium's own list

    def __init__(self, model: mujoco.MjModel, frame_skip: int, obs_dim: int, view: dict, **kwargs):
        self.model = model
        space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float64)
        kwargs |= dict(width=640, height=480, camera_id=-1, default_camera_config=view)
        super().__init__(str(Path(__file__).resolve()), frame_skip, space, **kwargs)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (model.nu,), np.float32)

    def _initialize_simulation(self):  # gymnasium's hook
        vis = self.model.vis  # a kitchen's shadows took a second a picture
        vis.global_.offwidth, vis.global_.offheight = self.width, self.height
        vis.quality.offsamples, vis.quality.shadowsize = 4, 0
        return self.model, mujoco.MjData(self.model)

    def reset_model(self) -> np.ndarray:  # all draws come from self.np_random
        qpos, qvel = self.start()
        mujoco.mj_normalizeQuat(self.model, qpos)  # MuJoCo 2 did so by itself
        self.set_state(qpos, qvel)
        return self.observe()


KITCHEN_GOALS = {  # object: where in an observation, and its goal
    "bottom burner": ([11, 12], [-0.88, -0.01]),
    "light switch": ([17, 18], [-0.69, -0.05]),
    "slide cabinet": ([19], [0.37]),
    "microwave": ([22], [-0.75]),
    "kettle": ([23, 24, 25, 26, 27, 28, 29], [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06]),
}


def kitchen_done(obs: np.ndarray, targets: tuple) -> np.ndarray:
    done = []  # which targets are near their goals: (..., ≥ 30) -> (..., k)
    for target in targets:
        index, goal = KITCHEN_GOALS[target]
        done.append(np.linalg.norm(obs[..., index] - goal, axis=-1) < 0.3)
    return np.stack(done, -1)


@functools.lru_cache(1)  # 1.3 s, once for all environments
def kitchen_model() -> mujoco.MjModel:
    scene = d4rl_dir() / "kitchen/adept_envs/franka/assets/franka_kitchen_jntpos_act_ab.xml"
    kettle = "../../../adept_models/kitchen/assets/kettle_asset.xml"
    # MuJoCo since 3.2 wants a named default class to have a parent: here an unnamed one.
    text = (scene.parent / kettle).read_text()
    text = text.replace('<default class="kettle">', '<default><default class="kettle">')
    text = text.replace("</mujocoinclude>", "</default></mujocoinclude>")
    return mujoco.MjModel.from_xml_path(str(scene), {kettle: text.encode()})


class KitchenEnv(D4RLEnv):
    """D4RL's Franka kitchen, its kitchen_multitask_v0.py, on current MuJoCo."""

    # obs (60,): 9 robot joints, 21 object joints, 30 goal entries; rad and m.
    # action (9,): ±1 is ±2 rad/s (fingers m/s), held for 0.08 s.
    # reward: 1 for each sub-task, when first satisfied; terminated once each has been.
    def __init__(self, targets: tuple[str, ...], noise_ratio: float = 0.1, **kwargs):
        view = dict(lookat=np.array([-0.2, 0.5, 2.0]), distance=2.2, azimuth=70, elevation=-35)
        super().__init__(kitchen_model(), 40, 60, view, **kwargs)  # 40 steps of 2 ms
        self.targets, self.noise_ratio = targets, noise_ratio  # 0.1 is D4RL's
        folder = d4rl_dir() / "kitchen/adept_envs/franka"
        code = (folder / "kitchen_multitask_v0.py").read_text()
        self.pose = re.search(r"init_qpos = np.array\(\[(.*?)\]", code, re.DOTALL)[1].split(",")
        joints = (folder / "robot/franka_config.xml").read_text()
        self.bounds = np.loadtxt(re.findall("pos_bound='(.*?)'", joints)[:9]).T  # (2, 9)
        self.noise_amp = np.array(re.findall("pos_noise_amp='(.*?)'", joints)[:30], float)
        self.goal = np.zeros(30)
        for target in targets:
            index, goal = KITCHEN_GOALS[target]
            self.goal[index] = goal

    def start(self):
        self.done = np.zeros(len(self.targets), bool)
        return np.array(self.pose, float), np.zeros(self.model.nv)  # not clipped, as in D4RL

    def observe(self) -> np.ndarray:
        noise = self.np_random.uniform(-1.0, 1.0, 30)  # at every look
        self.seen = self.data.qpos + self.noise_ratio * self.noise_amp * noise
        return np.concatenate([self.seen, self.goal])

    def step(self, action: np.ndarray):
        # The arm steers from its joints as last *seen*, noise included: D4RL's rule.
        ctrl = self.seen[:9] + 2.0 * np.clip(action, -1.0, 1.0) * 0.08
        self.data.ctrl[:] = ctrl.clip(*self.bounds)
        mujoco.mj_step(self.model, self.data, self.frame_skip)
        obs = self.observe()
        new = kitchen_done(obs, self.targets) & ~self.done  # each is paid once
        self.done |= new
        return obs, float(new.sum()), bool(self.done.all()), False, {"completed": self.done.copy()}


MAZES = {  # d4rl's *_MAZE_TEST; a cell is 4 m wide, the start S is at (0, 0)
    "umaze": "##### #S..# ###.# #G..# #####",  # rows, top to bottom
    "medium": "######## #S.##..# #..#...# ##...### #..#...# #.#..#.# #...#.G# ########",
    "large": "############ #S...#.....# #.##.#.#.#.# #......#...# #.####.###.# #..#.#.....# "
    "##.#.#.#.### #..#...#.G.# ############",
}


class AntMazeEnv(D4RLEnv):
    """D4RL's ant maze, its maze_env.py and ant.py, on current MuJoCo."""

    # obs (29,): qpos (x, y, z, quaternion, 8 joints), qvel (14); not the goal.
    # action (8,): ±1 is the motors' range, held for 0.1 s.
    # reward: 1 within 0.5 m of the goal, which terminates; nothing else does.
    def __init__(self, env_id: str, **kwargs):
        cells = np.array([list(row) for row in MAZES[env_id.split("-")[1]].split()])
        start = np.argwhere(cells == "S")[0]
        self.goal_cell = 4.0 * (np.argwhere(cells == "G")[0] - start)[::-1]  # (x, y), m
        spec = mujoco.MjSpec.from_file(str(d4rl_dir() / "locomotion/assets/ant.xml"))
        wall = dict(type=mujoco.mjtGeom.mjGEOM_BOX, size=[2, 2, 1], contype=1, conaffinity=1)
        for row, column in 4.0 * (np.argwhere(cells == "#") - start):
            spec.worldbody.add_geom(pos=[column, row, 1], **wall)
        # The goal's mark in films; compiled at 0, MuJoCo would take it for fixed.
        spec.worldbody.add_site(name="goal", pos=[1, 1, 0], size=[0.5] * 3)
        y, x = 2.0 * np.array(cells.shape) - 2.0 - 4.0 * start  # the middle
        view = dict(lookat=np.array([x, y, 0.0]), azimuth=90, elevation=-80)
        super().__init__(spec.compile(), 5, 29, view | dict(distance=5.5 * len(cells)), **kwargs)
        self.goal = None
        self.moves = env_id.endswith("v2")  # v1: the first draw stays

    def observe(self) -> np.ndarray:
        return np.concatenate([self.data.qpos, self.data.qvel])

    def start(self):
        # D4RL draws twice.
        jitter = self.np_random.uniform(0.0, 1.0, 2) + self.np_random.uniform(0.0, 0.5, 2)
        if self.goal is None or self.moves:
            self.goal = np.maximum(self.goal_cell + jitter, 0.0)
            self.model.site("goal").pos[:2] = self.goal
        qpos = self.model.qpos0 + self.np_random.uniform(-0.1, 0.1, self.model.nq)
        return qpos, 0.1 * self.np_random.standard_normal(self.model.nv)

    def step(self, action: np.ndarray):
        low, high = self.model.actuator_ctrlrange.T
        self.data.ctrl[:] = low + (np.clip(action, -1.0, 1.0) + 1.0) / 2.0 * (high - low)
        mujoco.mj_step(self.model, self.data, self.frame_skip)
        reached = bool(np.linalg.norm(self.data.qpos[:2] - self.goal) <= 0.5)
        return self.observe(), float(reached), reached, False, {}


# ==== 8. Data ====
COLUMNS = "observations actions rewards terminals timeouts".split()
MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main"


def find_file(args: Args) -> Path:
    """--dataset; if empty, from D4RL's cache, collected or downloaded: whole, or not at all."""
    if args.dataset not in ("", "random"):
        return Path(args.dataset)
    cache = Path(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl/datasets")
    name = re.sub("[/:]", "-", args.env_id)
    official = cache / f"{name.replace('-', '_', name.count('-') - 1)}.hdf5"
    if args.dataset == "" and official.is_file():
        return official
    if args.dataset == "random" or name.endswith("-random-v2"):
        path = cache / f"{name}.collected-uniform-{args.dataset_size}.hdf5"
        if not (args.resume and path.is_file()):  # a stopped run's checksum decides
            collect_random(args.env_id, args.dataset_size, path)
        return path
    if get_task(args.env_id).family == "other":
        raise UserError("this task has no file: --dataset FILE or --dataset random")
    table = runpy.run_path(str(d4rl_dir() / "infos.py"))["DATASET_URLS"]
    ants = (d4rl_dir() / "locomotion/__init__.py").read_text()  # has v1, the table not
    url = table.get(name) or re.search(f"'{name}'.*?'(http[^']+)'", ants, re.DOTALL)[1]
    path, failures = cache / Path(url).name, []
    if path.is_file():
        return path
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    fetch = pooch.HTTPDownloader(timeout=10, progressbar=sys.stderr.isatty())
    for source in (url, f"{MIRROR}/{path.name}"):
        with explain(source, failures.append):
            pooch.retrieve(source, None, part.name, cache, downloader=fetch)
            h5py.File(part).close()
            part.replace(path)
            return path
        part.unlink(missing_ok=True)  # an error page, say
    way = "--dataset FILE or --dataset random (kitchens: minari:D4RL/kitchen/mixed-v2 and such)"
    raise UserError(f"{path.name} cannot be downloaded, use {way}. Tried: {'; '.join(failures)}")


def uniform_rows(env_id: str, steps) -> list[np.ndarray]:
    """COLUMNS, a uniform action per item of steps: D4RL's recipe for *-random files."""
    env, rows = make_env(env_id), []
    env.action_space.seed(0)  # the same rows when made again
    obs, _ = env.reset(seed=0)
    for _ in steps:
        action = env.action_space.sample()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        rows.append((obs, action, reward, terminated, truncated and not terminated))
        obs = next_obs
        if terminated or truncated:
            obs, _ = env.reset()
    return [np.array(column, np.float32) for column in zip(*rows)]


def collect_random(env_id: str, size: int, path: Path) -> None:
    """Write so many uniform rows, unless they are there and the environment is the same."""
    if path.is_file():
        few, file = range(min(size, 1200)), read_hdf5(path)  # beyond most episodes
        first = uniform_rows(env_id, few)
        same = all(np.array_equal(x, file[name][few]) for name, x in zip(COLUMNS, first))
        if same or not all(map(np.array_equal, first, uniform_rows(env_id, few))):
            return  # unchanged, or no two runs of this environment agree
        print(f"data: {path.name} is of another version of {env_id}, collected anew")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()  # fails here, not after a million rows
    part.unlink()
    columns = uniform_rows(env_id, tqdm(range(size), f"collecting {env_id}", mininterval=2))
    with h5py.File(part, "w") as file:
        file.update(zip(COLUMNS, columns))
    part.replace(path)


def read_hdf5(path: Path) -> dict[str, np.ndarray]:
    """The columns of a file in D4RL's layout, or with truncations for timeouts."""
    with explain(f"{path}: no whole HDF5 file in D4RL's layout"), h5py.File(path) as file:
        columns = {name: file[name][...] for name in COLUMNS[:4]}
        for name in ("truncations", "timeouts", "next_observations"):
            if name in file:
                columns[name.replace("truncations", "timeouts")] = file[name][...]
    return columns


def read_minari(name: str, env: gym.Env, targets: tuple) -> dict[str, np.ndarray]:
    """A Minari dataset's columns as D4RL has them: flat, actions in the ±1 box."""
    with explain(f'--dataset {name}: needs pip install "minari[hdf5,hf]" and an ID it knows'):
        dataset = importlib.import_module("minari").load_dataset(name[7:], download=True)
    rows, box = [], dataset.action_space
    with explain(f"--dataset {name}: no flat, bounded boxes, or not this task's"):
        if not box.is_bounded():
            raise ValueError(f"its actions are in {box}")
        for episode in dataset.iterate_episodes():
            obs, rewards = episode.observations, episode.rewards
            if targets:  # (T + 1, 59): robot 9 + 9, objects 21 + 20
                state = obs["observation"]
                goal = np.broadcast_to(env.unwrapped.goal, (len(state), 30))
                obs = np.concatenate([state[:, :9], state[:, 18:39], goal], 1)
                rewards = kitchen_done(obs[:-1], targets).sum(1)
            actions = 2.0 * (episode.actions - box.low) / (box.high - box.low) - 1.0
            ends, timeouts = episode.terminations, episode.truncations.copy()
            timeouts[-1] = not ends[-1]
            rows.append((obs[:-1], actions, rewards, ends, timeouts))
        return {name: np.concatenate(column) for name, column in zip(COLUMNS, zip(*rows))}


def check_columns(columns: dict, env: gym.Env) -> None:
    """Make them (n, O), (n, A), (n,) of float32, ends of bool. Raises: ValueError."""
    obs, act = env.observation_space.shape, env.action_space.shape
    shapes = {"observations": obs, "next_observations": obs, "actions": act}
    for name, column in columns.items():
        shape = (len(columns["observations"]), *shapes.get(name, ()))
        if column.shape != shape or len(column) == 0:
            raise ValueError(f"{name} has shape {column.shape}, needs {shape} and a row at least")
        if name in ("terminals", "timeouts"):
            kind, needs, fine = bool, "0 or 1", np.isin(column, (0, 1))
        else:
            with np.errstate(over="ignore"):  # what overflows is inf, and refused
                column = column.astype(np.float32)
            kind, needs, fine = np.float32, "finite numbers", np.isfinite(column)
        if not fine.all():
            raise ValueError(f"{name} needs {needs}, row {np.argwhere(~fine)[0, 0]} has others")
        columns[name] = column.astype(kind)
    peak = np.abs(columns["actions"]).max()
    if peak > 1 + 1e-6:
        raise ValueError(f"actions reach {peak:.9g}, scale the box to ±1")


def to_transitions(columns: dict, limit: int, demonstrations: bool) -> dict[str, np.ndarray]:
    """Columns -> keys of Batch, near d4rl.qlearning_dataset; limit: an episode's steps."""
    # Ours keeps a terminal row that is also a timeout, or the last. Sets the columns' ends, too.
    ends = columns["terminals"]
    if demonstrations:  # a kitchen's last rows are terminal, solved or not
        columns["timeouts"] = ends | columns.get("timeouts", False)
        columns["terminals"] = ends = np.zeros_like(ends)
    if "timeouts" not in columns:
        rows = np.arange(len(ends))
        starts = np.maximum.accumulate(np.where(np.append(True, ends[:-1]), rows, 0))
        columns["timeouts"] = (rows - starts) % limit == limit - 1
        print(f"data: no timeouts, one is taken every {limit} rows; other resets are not seen")
    columns["timeouts"] &= ~ends
    # s' is the next row's observation, unless given; rows at a time limit go, as the last.
    # After a terminal it is another episode's, but 1 − d = 0 takes it out: such rows stay.
    columns = {"next_observations": np.roll(columns["observations"], -1, 0)} | columns
    columns["terminations"] = ends
    keep = ~columns["timeouts"]
    keep[-1] = ends[-1]
    return {name: columns[name][keep] for name in Batch._fields}


class RewardRule(NamedTuple):
    """The reward and the true end to learn from, in the file and online."""

    scale: float  # r ← scale·r + shift: --reward-transform
    shift: float
    targets: tuple[str, ...]  # a kitchen's, with --kitchen-rewards consistent

    def __call__(self, obs, rewards, next_obs, ends):
        # A kitchen's file pays the number of satisfied sub-tasks in every row, the environment
        # each once. One rule for both: satisfied(s) − 4 ≤ 0, so finishing is worth most.
        if self.targets:
            rewards = kitchen_done(obs, self.targets).sum(-1) - float(len(self.targets))
            ends = kitchen_done(next_obs, self.targets).all(-1)
        return self.scale * rewards + self.shift, ends


def scale_and_shift(transform: str, rewards, returns) -> tuple[float, float]:
    """rewards (n,): to be transformed; returns (episodes,): of the file's raw rewards."""
    if transform == "return_range":
        if np.ptp(returns) == 0:
            raise UserError("all episodes return the same: use --reward-transform none")
        return float(1000.0 / np.ptp(returns)), 0.0
    if transform == "max":
        largest, peak = rewards.max(), np.abs(rewards).max()
        if largest < 0.01 * peak:  # a kitchen's are ≤ 0: the sign would turn
            largest = peak
        return float(1.0 / (largest or 1.0)), 0.0
    return {"none": (1.0, 0.0), "minus_one": (1.0, -1.0), "x100": (100.0, 0.0)}[transform]


def load_dataset(args: Args, task: Task, env: gym.Env, saved: dict | None):
    """Find, check, convert -> transitions (keys of Batch), RewardRule."""
    targets = task.targets if args.kitchen_rewards == "consistent" else ()
    if args.dataset.startswith("minari:"):
        where, columns = args.dataset, read_minari(args.dataset, env, task.targets)
    else:
        path = find_file(args)
        where, columns = path.name, read_hdf5(path)
    with explain(f"{where}: not a dataset of {args.env_id}"):
        check_columns(columns, env)
        if task.targets and abs(columns["observations"][:, 30:] - env.unwrapped.goal).max() > 1e-3:
            raise ValueError("it is of another kitchen")
    limit = env.get_wrapper_attr("_max_episode_steps")
    data = to_transitions(columns, limit, demonstrations=bool(targets))
    if len(data["rewards"]) == 0:
        raise UserError(f"{where}: no row has a successor, each is a time limit or the last")
    over = columns["terminals"] | columns["timeouts"]
    starts = np.flatnonzero(np.append(True, over[:-1]))
    longest = np.diff(starts, append=len(over)).max()
    if longest > limit and not targets:
        print(f"data: an episode has {longest} rows, the limit is {limit}: are timeouts missing?")
    returns = np.add.reduceat(columns["rewards"], starts, dtype=np.float64)
    obs, actions, rewards, next_obs, ends = data.values()
    rewards, ends = RewardRule(1.0, 0.0, targets)(obs, rewards, next_obs, ends)
    if saved:  # its critics are in that rule's units
        scale, shift = saved["rule"]
    else:
        scale, shift = scale_and_shift(args.reward_transform, rewards, returns)
    data["rewards"] = (scale * rewards + shift).astype(np.float32)
    data["terminations"] = ends.astype(np.float32)
    if issubclass(BASES[args.base], Weighted):  # as in IQL's authors' code
        data["actions"] = actions.clip(-1 + 1e-5, 1 - 1e-5)

    size = f"{len(over):,} rows, {len(returns):,} episodes, {ends.sum():.0f} true ends"
    print(f"data: {where}, {size}, returns {returns.min():.1f} to {returns.max():.1f}")
    print(f"rewards: trained on {scale:.4g}·r{shift:+g}")
    if targets:
        print(f"rewards: r is the number of satisfied sub-tasks - {len(targets)}")
    box = env.get_wrapper_attr("box")
    within = (actions <= box.high) & (actions >= box.low)
    if within.all() and ((box.low > -1) | (box.high < 1)).any():
        print(f"data: are actions in ±1? None leaves the environment's own {box}")
    return data, RewardRule(scale, shift, targets)


# ==== 9. Evaluation ====
def kendall_tau(x, y, window: int = 10) -> np.ndarray:
    """Kendall's τ of x and y (T,) in every window: do the critics know good steps?"""
    # (pairs that x and y order alike − pairs they order oppositely) / all pairs; ties add 0.
    if len(x) < window:
        return np.zeros(0)
    i, j = np.triu_indices(window, 1)  # 45 pairs
    both = np.lib.stride_tricks.sliding_window_view([x, y], window, axis=1)  # (2, T − 9, 10)
    return np.sign(both[..., i] - both[..., j]).prod(0).mean(1)


@torch.no_grad()
def evaluate(agent: Base, rule, task: Task, seed: int, args: Args, envs: list) -> dict:
    """One episode per environment, side by side: one policy call a step for all."""
    # From the same seeds always: a change of the score is the policy's, not the draw's.
    n, device = len(envs), agent.obs_mean.device
    generator = torch.Generator(device).manual_seed(seed)
    args = replace(args, proposal="mean")
    if args.eval_action == "policy":
        args = replace(args, explore="policy")
    obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    returns, lengths = np.zeros(n), np.zeros(n, int)
    running, ended = np.ones(n, bool), np.zeros(n, bool)
    q, rewards = [], []  # by step, (n,) each; rewards are 0 after an episode's end
    while running.any():
        obs_tensor = torch.as_tensor(obs, device=device)
        actions, _ = explore_action(agent, obs_tensor, args, generator)
        q.append(agent.q_values(obs_tensor, actions).mean(0).cpu().numpy())
        rewards.append(np.zeros(n))
        lengths += running
        for i in np.flatnonzero(running):
            next_obs, reward, terminated, truncated, _ = envs[i].step(actions[i].cpu().numpy())
            rewards[-1][i], ended[i] = rule(obs[i], reward, next_obs, terminated)
            returns[i] += reward
            obs[i] = next_obs
            running[i] = not (terminated or truncated)
    for t in reversed(range(len(rewards) - 1)):  # discounted from each step on
        rewards[t] += args.gamma * rewards[t + 1]
    # Where a limit cut an episode, more would have come. τ leaves out the steps for which
    # that counts for more than 5 %: γ^k > 0.05, k steps before the end.
    tail = int(np.log(0.05) / np.log(np.clip(args.gamma, 1e-6, 1 - 1e-6)))
    kept = np.maximum(0, lengths - tail * ~ended)
    promised, came = np.transpose([q, rewards], (0, 2, 1))  # (n, T) each
    taus = np.concatenate([kendall_tau(x[:k], y[:k]) for x, y, k in zip(promised, came, kept)])
    scores = task.score(returns)
    results = {
        "eval/score": scores.mean(),
        "eval/score_std": scores.std(),
        "eval/return": returns.mean(),
        "eval/length": lengths.mean(),
        # What the critics promise at the start, and what came, in the reward trained on. While
        # the promise moves, they have not settled. IQL's aims higher, SO2's contains entropy.
        "eval/q_start": promised[:, 0].mean(),
        "eval/discounted_return": came[:, 0].mean(),
        "eval/kendall_tau": taus.sum() / max(1, len(taus)),
    }
    if task.family in ("kitchen", "antmaze"):
        results["eval/success"] = (scores >= 100.0).mean()
    return results


@explain("warning: no video (without a screen: MUJOCO_GL=egl)", print)
def film(judge: Callable, args: Args) -> None:
    """--video: an episode of the policy, and beside it one of --explore's actions."""
    import imageio.v3 as imageio

    print(f"video: {args.video}, policy beside --explore {args.explore}, can take minutes")
    films = []
    for shown in ("policy", "explore"):
        env = gym.wrappers.RenderCollection(make_env(args.env_id, render_mode="rgb_array"))
        judge(replace(args, eval_action=shown), [env])
        films.append(env.render()[::4])
        env.close()
    for pictures in films:  # the shorter one waits
        pictures += pictures[-1:] * (max(map(len, films)) - len(pictures))
    Path(args.video).parent.mkdir(parents=True, exist_ok=True)
    pictures = np.concatenate(films, 2)[:, ::2, ::2]
    imageio.imwrite(args.video, pictures, duration=50, loop=0)  # ms a picture


# ==== 10. Agents, the run's folder, the command line ====
# Flags in which a saved agent and the run that loads it must agree.
IDENTITY = "env_id base kitchen_rewards reward_transform gamma layer_norm standardise"
# What two runs of one curve need not share (--explore is a curve's name).
OWN = "seed run_dir resume load device plot plot_to video log_every checkpoint_minutes"
OWN += " versions pretraining eval_every explore"


def set_statistics(x: np.ndarray, mean: Tensor, std: Tensor, least: float) -> None:
    """Mean and std of the rows of x, in place; a std below `least` becomes 1."""
    # A constant (a kitchen's goal) or a joint that hardly moves is only centred: divided by
    # its std, its noise would be the loudest input of all.
    mean.copy_(torch.from_numpy(x.mean(0, dtype=np.float64)))
    std.copy_(torch.from_numpy(x.std(0, dtype=np.float64) + 1e-6))
    std[std < least] = 1.0


def orthogonal_(layer: nn.Module) -> None:
    """IQL's initial weights, for module.apply: orthogonal, gain √2; zero bias."""
    if isinstance(layer, (nn.Linear, EnsembleLinear)):
        for matrix in layer.weight.view(-1, *layer.weight.shape[-2:]):  # of each critic
            nn.init.orthogonal_(matrix, 2**0.5)
        nn.init.zeros_(layer.bias)


def make_agent(args: Args, data: dict | None, saved: dict | None, device) -> Base:
    """An agent that has seen the dataset, or a saved one."""
    sizes = saved["sizes"] if saved else (data["observations"].shape[1], data["actions"].shape[1])
    agent = BASES[args.base](args, *sizes).to(device)
    weights = list(agent.parameters())
    on_gpu = device.type == "cuda"
    # The rate is constant: IQL's authors let the actor's decay, but offline only.
    agent.optimizer = torch.optim.Adam(weights, args.learning_rate, fused=True, capturable=on_gpu)
    if saved:
        with explain("the saved agent does not fit its flags"):
            agent.load_state_dict(saved["agent"])
            for i, adam in saved["optimizer"]["state"].items():
                # Into memory of the weights' own shapes: Adam would write past the end of less.
                state = agent.optimizer.state[weights[i]]
                state["step"] = torch.zeros((), device=device).copy_(adam["step"])
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(weights[i]).copy_(adam[name])
    else:
        agent.see_dataset(data)
    if args.compile:
        torch._inductor.config.fallback_random = True  # the draws of the eager update
        for name in ("step", "update_critics", "update_policy", "update_actor"):
            if hasattr(agent, name):
                setattr(agent, name, torch.compile(getattr(agent, name)))
    return agent


def save(path: Path, agent: Base, rule: RewardRule, step: int, **more) -> None:
    """All of an agent, in tensors and plain values; whole or not at all."""
    state = dict(step=step, args=asdict(agent.args), sizes=agent.sizes, rule=rule[:2], **more)
    state |= dict(agent=agent.state_dict(), optimizer=agent.optimizer.state_dict())
    part = path.with_name(f"{path.name}.part")
    with explain(f"{path} cannot be written"):
        torch.save(state, part)
        part.replace(path)


def load_saved(path) -> dict:
    """A saved agent, or a run's checkpoint, with its flags as Args."""
    with explain(f"{path}: no agent (--load) or run's folder (--resume) of this o3f.py"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved["args"] = BASES[saved["args"]["base"]].Flags(**saved["args"])
        return saved


def load_agent(path: str, device: str = "cpu") -> Base:
    """To act in a make_env(id), actions in ±1: load_agent(path).policy(obs, sample=False)."""
    saved = load_saved(path)
    return make_agent(replace(saved["args"], compile=False), None, saved, torch.device(device))


def recorded(fn: Callable, device: torch.device, *generators: torch.Generator) -> Callable:
    """fn itself on a CPU; on CUDA a function that launches all of fn's kernels at once."""
    # An update is 150 kernels or more, of 2 µs each, and Python needs longer to ask for one:
    # the GPU waits, nine tenths of the time. A CUDA graph asks for all of them at once. Python's
    # numbers and branches are frozen in it: what changes is a tensor, filled in place (the buffer
    # and its size, the observation, the progress of Fig. 3).
    if device.type != "cuda":
        return fn
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def results():  # of one call of fn, then of the next
        for _ in range(3):  # real calls, since what they allocate (Adam's state) has to be there
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                result = fn()
            torch.cuda.current_stream().wait_stream(side)
            yield result
        for generator in generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            result = fn()
        while True:
            graph.replay()
            yield result  # the same tensors each time: to be read before the next call

    return results().__next__


class Run(contextlib.ExitStack):
    """A run's folder: after a step it logs, evaluates and saves what is due."""

    def __init__(self, args, agent, buffer, generator, rule, judge, saved):
        from torch.utils.tensorboard import SummaryWriter  # slow: only if needed

        super().__init__()
        self.args, self.agent, self.buffer = args, agent, buffer
        self.rule, self.judge = rule, judge
        self.device = buffer.rows.device.type
        self.streams = [generator, torch.default_generator]  # what draws
        if self.device == "cuda":
            self.streams.append(torch.cuda.default_generators[0])
        self.envs = [make_env(args.env_id) for _ in range(args.eval_episodes)]
        self.step = self.saved_step = -args.offline_steps
        self.episode = 0
        self.scores, self.columns = {}, {}  # by step; each table's names
        self.sums, self.count = torch.zeros((), device=self.device), 0  # metrics since the last row
        self.checksum = zlib.crc32(buffer.rows[: buffer.num_offline].cpu().numpy())
        name = f"{args.env_id}-{args.base}-{args.explore}-s{args.seed}"
        name = re.sub("[/:]", "-", name) + time.strftime(f"-%Y%m%d-%H%M%S-{time.time_ns() % 10**9}")
        self.folder = Path(args.resume or args.run_dir or f"runs/{name}")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:  # the system frees it, however the process ends
            self.enter_context(filelock.FileLock(self.folder / ".lock", timeout=0))
        except filelock.Timeout:
            raise UserError(f"{self.folder}: another process is writing there") from None
        except (OSError, NotImplementedError) as error:  # not every disk has locks
            print(f"warning: no lock in {self.folder}: {error}")
        print(f"run: {self.folder} on {self.device}")
        if args.resume:
            self.restore(saved)
        else:
            libraries = {x.__name__: x.__version__ for x in (torch, np, gym, mujoco)}
            config = asdict(args) | dict(versions=libraries)
            if args.load:
                self.step = 0
                config["pretraining"] = asdict(saved["args"])
            (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            self.checkpoint()  # so that it can be resumed from its first minute on
        self.board = SummaryWriter(str(self.folder), purge_step=self.step + 1)
        self.push(self.end)
        if self.step == 0 and not self.scores:  # nothing to train offline
            self.evaluate()

    def end(self, kind, error, trace) -> None:
        with explain("warning: TensorBoard's file is not whole", print):
            self.board.close()
        if kind is KeyboardInterrupt:  # like a kill: resumed, it ends as if there had been none
            print(f"\nstopped at step {self.step:,}, saved at {self.saved_step:,}; to go on:")
            print(f"python {sys.argv[0]!r} --resume {str(self.folder)!r}")

    def bar(self, phase: str, steps: range):
        """The steps that are left of a phase; in a log, a line a minute."""
        total = getattr(self.args, f"{phase}_steps")
        done, seconds = total - len(steps), (0.1 if sys.stderr.isatty() else 60.0)
        return tqdm(steps, phase, total, initial=done, mininterval=seconds, disable=not steps)

    def record(self, step: int, metrics: dict, episode: dict | None = None) -> None:
        """After a step, what is due; episode: statistics of one that has ended."""
        args, self.step = self.args, step
        with explain(f"metrics {' '.join(metrics)}: numbers, the same in every step of a phase"):
            values = [torch.as_tensor(x, device=self.device).detach() for x in metrics.values()]
            self.sums = self.sums + torch.stack(values)
        self.count += 1
        if episode:
            self.episode += 1
            score = get_task(args.env_id).score(episode["r"])
            self.log("episodes", {"return": episode["r"], "score": score, "length": episode["l"]})
        is_last = step in (0, args.online_steps)
        if step % args.log_every == 0 or is_last:
            means = dict(zip(metrics, (self.sums / self.count).tolist()))
            self.log("metrics", {"o3f/optimism": 0.0} | means)  # the same columns in both
            self.sums, self.count = self.sums.new_zeros(()), 0
        if step % args.eval_every == 0 or is_last:
            self.evaluate()
        if step == 0:
            save(self.folder / "agent_offline.pt", self.agent, self.rule, step)
        # Online only between episodes: a simulator's state within one is not saved.
        minutes = (time.monotonic() - self.saved_at) / 60
        if step == 0 or (minutes >= args.checkpoint_minutes and (step < 0 or episode)):
            self.checkpoint()

    def log(self, table: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            if not np.isfinite(value):
                raise UserError(f"{name} is {value} by step {self.step}: lower --learning-rate")
        with explain("warning: TensorBoard", tqdm.write):
            for name, value in values.items():
                tag = name if name.startswith(("eval/", "o3f/")) else f"train/{name}"
                self.board.add_scalar(tag, value, self.step)
        path, row = self.folder / f"{table}.csv", {"step": self.step} | values
        if table not in self.columns or not path.is_file():  # a first row: replaces a killed run's
            self.columns[table] = list(row)
            path.write_text(",".join(row) + "\n")
        with explain(f"{table}.csv: every step logs the same names"), open(path, "a") as file:
            csv.DictWriter(file, self.columns[table], lineterminator="\n").writerow(row)

    def evaluate(self) -> None:
        results = self.judge(self.args, self.envs)
        self.log("evaluations", results)
        self.scores[self.step] = float(results["eval/score"])
        line = "step {:>9,}: score {eval/score:.1f} ± {eval/score_std:.1f}, Q at start "
        line += "{eval/q_start:.4g}, discounted return {eval/discounted_return:.4g}"
        tqdm.write(line.format(self.step, **results))

    def checkpoint(self) -> None:
        weights = nn.utils.parameters_to_vector(self.agent.parameters())
        if not torch.isfinite(weights.sum() + self.sums.sum()):
            raise UserError(f"NaN in the agent by step {self.step}")
        buffer = self.buffer
        books = "step episode sums count scores columns".split()
        run = dict(books={x: vars(self)[x] for x in books}, checksum=self.checksum)
        run["rows"] = buffer.rows[buffer.num_offline : buffer.size].clone()  # a view is saved whole
        run["streams"] = [stream.get_state() for stream in self.streams]
        with explain(f"warning: no checkpoint at step {self.step}", tqdm.write):
            run["tables"] = {x: (self.folder / f"{x}.csv").read_text() for x in self.columns}
            save(self.folder / "checkpoint.pt", self.agent, self.rule, self.step, **run)
            self.saved_step = self.step
        self.saved_at = time.monotonic()

    def restore(self, saved: dict) -> None:
        if saved.get("checksum") != self.checksum:  # an agent's file has none
            raise UserError("--resume: the dataset has changed, or this is no checkpoint")
        with explain(f"--resume: not on {self.device}, where the run was not; --load its agent"):
            for stream, state in zip(self.streams, saved["streams"], strict=True):
                stream.set_state(state)
        vars(self).update(saved["books"])
        self.saved_step, self.saved_at = self.step, time.monotonic()
        self.sums = self.sums.to(self.device)
        self.buffer.size += len(saved["rows"])
        self.buffer.rows[self.buffer.num_offline : self.buffer.size] = saved["rows"]
        for table, text in saved["tables"].items():  # drops later rows
            (self.folder / f"{table}.csv").write_text(text)

    def finish(self) -> None:
        save(self.folder / "agent_final.pt", self.agent, self.rule, self.step)
        self.checkpoint()
        print(f"score {self.scores[self.step]:.1f}; files in {self.folder}")


def plot(folders, path) -> None:
    """Draw runs, or all in these folders: a panel per task, a curve per configuration."""
    from matplotlib.figure import Figure  # not pyplot: no screen

    tables, panels = set(), {}  # env_id -> configuration -> seed -> {step: score}
    for folder in folders:
        here = glob.escape(os.path.normpath(folder))  # glob follows links
        found = glob.glob(f"{here}/**/evaluations.csv", recursive=True)
        if not found:
            raise UserError(f"--plot {folder}: no run with an evaluation")
        tables |= set(found)
    for table in sorted(tables, key=os.path.getmtime):  # the oldest first
        with explain(f"--plot {table}: not of a whole run"), open(table) as file:
            args = json.loads(Path(table).with_name("config.json").read_text())
            curve = {int(row["step"]): float(row["eval/score"]) for row in csv.DictReader(file)}
            flags = frozenset(f"{x} {args[x]}" for x in args.keys() - set(OWN.split()))
        if len(curve) > 1:
            curves = panels.setdefault(args["env_id"], {}).setdefault((args["explore"], flags), {})
            if args["seed"] in curves:
                print(f"plot: {Path(table).parent} instead of an older run of seed {args['seed']}")
            curves[args["seed"]] = curve
    if not panels:
        raise UserError("--plot: no run there has two evaluations yet")
    figure = Figure(figsize=(7, 4 * len(panels)), dpi=120, layout="constrained")
    rows = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (env_id, groups) in zip(rows, panels.items()):
        common = frozenset.intersection(*(flags for _, flags in groups))
        for (explore, flags), curves in groups.items():
            steps = sorted(set.intersection(*map(set, curves.values())))
            if not steps:
                raise UserError("--plot: runs of one configuration share no step of evaluation")
            scores = np.array([[curve[step] for step in steps] for curve in curves.values()])
            label = ", ".join([explore, *sorted(flags - common)])[:70]
            seeds = ", ".join(map(str, sorted(curves)))
            axes.plot(steps, scores.mean(0), ".-", label=f"{label} (seed {seeds})")
            axes.fill_between(steps, scores.min(0), scores.max(0), alpha=0.2)
        axes.axvline(0, color="black", lw=0.8, ls=":")
        axes.set_ylabel(f"{env_id}: score")
        axes.legend(frameon=False, fontsize="small")
    rows[-1].set_xlabel("offline updates | environment steps, from the dotted line on")
    rows[0].set_title("line: mean over seeds; band: lowest to highest seed", fontsize="small")
    with explain(f"--plot-to {path}: cannot be drawn"):
        figure.savefig(path)
    print(f"plot: {path}; runs with one evaluation are not drawn")


def parse(argv: list[str]) -> Args:
    """Flags, read twice: task and base decide which there are, and their defaults."""
    read = functools.partial(tyro.cli, args=argv, description=__doc__.partition("\n")[0])
    first, _ = read(Args, return_unknown_args=True, add_help=False)
    given = {arg.partition("=")[0][2:].replace("-", "_") for arg in argv if arg[:2] == "--"}
    for name in given & {"resume", "load", "plot"}:
        if not getattr(first, name):
            raise UserError(f"--{name} is empty: a variable that is not set?")
    if first.resume and given - {"resume", "dataset"}:
        raise UserError("--resume takes the run's own flags (--dataset, where the file has moved)")
    if first.dataset.startswith("minari:") and not given & {"env_id", "load", "resume"}:
        raise UserError(f"--dataset {first.dataset}: name its environment with --env-id")
    if first.load:
        default = replace(load_saved(first.load)["args"], run_dir="", resume="", video="")
    else:
        default = preset(first.env_id, first.base)  # what --help shows
    return read(type(default), default=default)


def prepare(args: Args) -> tuple[Args, torch.device, dict | None]:
    """Load what a run starts from, choose a device; refuse the first flag that makes no sense."""
    saved = None
    if args.resume:
        saved = load_saved(f"{args.resume}/checkpoint.pt")
        dataset = args.dataset or saved["args"].dataset
        args = replace(saved["args"], resume=args.resume, dataset=dataset)
    elif args.load:
        saved = load_saved(args.load)
    for name, kind in get_type_hints(type(args), include_extras=True).items():
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        kinds = [kind, *get_args(kind)]
        types = [getattr(x, "__origin__", x) for x in kinds]  # without the ranges
        if isinstance(value, np.generic):  # from a notebook
            value = value.item()
        if isinstance(value, Path):
            value = str(value)
        if float in types:
            types.append(int)
        if type(value) not in types and not (type(value) is str and value in kinds):
            raise UserError(f"{flag} {value!r}: give a value of {kind}")
        setattr(args, name, value)
        for low, high in [x.__metadata__ for x in kinds if hasattr(x, "__metadata__")]:
            if value is not None and not low <= value <= high:  # NaN is in no range
                raise UserError(f"{flag} {value}: give a number from {low} to {high:g}")
    if saved:
        for name in IDENTITY.split():
            then, now = vars(saved["args"]).get(name), vars(args).get(name)
            if then != now:
                raise UserError(f"the saved agent has {name} {then}, this run {now}")
    if args.video:
        modes = make_env(args.env_id, render_mode="rgb_array").metadata.get("render_modes", [])
        if not args.video.endswith(".gif") or "rgb_array" not in modes:
            raise UserError("--video: needs a .gif, and an environment with render mode rgb_array")
    leftovers = {"config.json", "checkpoint.pt.part"}  # of a run killed before its checkpoint
    if args.run_dir and not args.resume and set(glob.glob("*", root_dir=args.run_dir)) - leftovers:
        raise UserError(f"--run-dir {args.run_dir}: not empty, choose a new one")
    if args.dataset != "random" and Path(args.dataset).is_file():
        args.dataset = str(Path(args.dataset).absolute())  # for --resume from elsewhere
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: none is found, use auto")
    device = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
    return args, torch.device(device), saved


def cli(argv: list[str]) -> int:
    """Flags in, exit code out: 0, 2 after a user's error, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="replace")  # Greek
    try:
        args = parse(argv)
        if args.plot:
            plot(args.plot, args.plot_to)
        else:
            main(args)
        return 0
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise  # a fault of the program's
        print("error:", " ".join(str(error).split()), file=sys.stderr)  # one line
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
