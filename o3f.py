"""O3F in one file: pretrain a policy offline, then fine-tune it online by acting optimistically.

Mark, Ghadirzadeh, Chen, Finn: "Fine-Tuning Offline Policies With Optimistic Action Selection". The idea:

    offline  repeat:  π, Q₁…Q_m ← Update(π, Q, batch of D)              any offline RL algorithm
    online   repeat:  a   ~ π(·|s)
                      c_i ~ N(a, σ²I),  i = 1…N                                   # new in O3F
                      a_t = argmax_i  mean_j Q_j(s, c_i) + ω·std_j Q_j(s, c_i)    # new in O3F
                      s', r, d ← environment(a_t);   D ← D ∪ {(s, a_t, r, s', d)}
                      π, Q₁…Q_m ← Update(π, Q, batch of D)      the same Update (LAPO: critics 20×)

An offline objective keeps the policy near its data, so by itself it tries nothing new; an objective that
is changed at the switch can destroy what was learned. O3F changes only which action is tried.

Notation:  (s, a, r, s', d) a transition, d = 1 at a true end (a time limit is not one: there we bootstrap)
           π policy   Q_j critic j of m   V state value   Q̂_j, π⁻, Dec⁻ slow copies   γ discount
           IQL: κ expectile (τ in its paper)   β inverse temperature
           LAPO: z latent action   Dec(s, z) decoder   λ weight of the minimum over critics
           N, σ, ω candidates, their std, weight of the critics' std

Examples:  python o3f.py                                         halfcheetah-random-v2, collected on the spot
           python o3f.py --env-id kitchen-mixed-v0 --base iql    the paper's Franka kitchen

Reading order: 1 flags, 2 networks, 3 losses, 4 the optimistic action, 5 base algorithms, 6 replay buffer,
7 environments, 8 data, 9 evaluation, 10 files, 11 both phases. A lecture can stop after 5.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import difflib
import functools
import hashlib
import http.client
import importlib.util
import json
import os
import platform
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Callable, Literal, NamedTuple, Optional, Union

import gymnasium as gym
import h5py
import mujoco
import numpy as np
import torch
import torch.nn as nn
import tyro
from tqdm import tqdm


# ==== 1. Flags ==============================================================================================
@dataclass
class Args:
    """Where PRESETS has the flag, a default of None is the paper's value for the task family and base."""

    # -- run --
    env_id: str = "halfcheetah-random-v2"
    """task: a D4RL name (hopper-medium-v2, kitchen-mixed-v0, antmaze-large-play-v2) or a gymnasium id"""
    base: Literal["iql", "lapo"] = "iql"
    """offline algorithm that is fine-tuned"""
    seed: int = 0
    """seeds four independent streams: learning, exploration, training environment, evaluation"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where networks and replay buffer live; auto: cuda where there is one, else cpu"""
    deterministic: bool = False
    """on CUDA, choose kernels that repeat to the last bit, slower; a CPU's always do"""
    compile: bool = False
    """torch.compile the updates (a minute at start, a C++ compiler on CPU); the same results to rounding"""
    cuda_graph: bool = False
    """capture the update in a CUDA graph, sampling included: no Python per update; not with --compile"""
    run_dir: str = ""
    """folder for the outputs, new or empty; default runs/<task>-<base>-<explore>-s<seed>-<time>-<pid>"""
    resume: str = ""
    """run folder of a killed run: go on from its checkpoint as if nothing had been; without other flags"""
    checkpoint_every: int = 10_000
    """steps between checkpoints (and one at the switch; online at episode ends); 0: none; more = more lost"""
    save: bool = True
    """write agent_offline.pt after the offline phase and agent_final.pt at the end"""
    load: str = ""
    """start from this saved agent without an offline phase, so that variants share one pretraining"""
    plot: tuple[str, ...] = ()
    """draw these run folders' curves to plot.png and print their table, grouped by configuration; no run"""
    track: bool = False
    """also log to Weights & Biases (pip install wandb; not imported otherwise)"""
    # -- task and data --
    dataset: str = ""
    """empty: D4RL's file (cache, download; *-random-v2: collected); random: uniform actions; or a path"""
    dataset_size: int = 1_000_000
    """transitions to collect, where data is collected (D4RL 1M); more = slower start, wider coverage"""
    kitchen_rewards: Literal["consistent", "stock"] = "consistent"
    """consistent: satisfied sub-tasks - 4 in both phases; stock: the file's, then the environment's +1s"""
    reward_transform: Optional[Literal["none", "return_range", "minus_one", "max", "x100"]] = None
    """return_range (IQL): r*1000/(max - min return); max (LAPO): r/max r; minus_one: r - 1; x100: 100*r"""
    # -- both phases --
    offline_steps: int = 1_000_000
    """updates before the first environment step (papers 1M), logged as negative steps"""
    online_steps: int = 250_000
    """environment steps of fine-tuning; ours: a fifth of the buffer beside D4RL's 1M rows (IQL's: 1M)"""
    batch_size: Optional[int] = None
    """transitions per update (IQL 256, LAPO 512); more = less noise, slower"""
    learning_rate: Optional[float] = None
    """Adam's step size, every network, both phases (IQL 3e-4, LAPO 2e-4); more = faster, less stable"""
    gamma: float = 0.99
    """discount per step (papers 0.99); more = looks further ahead, converges later"""
    tau: float = 0.005
    """Polyak rate of all slow copies per update (papers 0.005); more = faster targets, less stable"""
    num_critics: int = 5
    """m, critics in the ensemble (paper 5); more = a lower minimum, a steadier mean, slower"""
    hidden_dim: int = 256
    """units per hidden layer (papers 256); more = larger capacity, slower"""
    # -- online --
    explore: Literal["o3f", "noise", "policy"] = "o3f"
    """o3f: best of N around a; the paper's baselines: noise, a + N(0, sigma^2), and policy, a itself"""
    num_candidates: int = 100  # new in O3F
    """N, candidates per step (paper 100); more = greedier towards the critics"""
    sigma: Optional[float] = None  # new in O3F
    """std of candidates or noise in the +-1 action box (kitchen, ant maze 0.05, else 0.2); more = bolder"""
    omega: float = 0.0  # new in O3F
    """weight of the critics' std in the score (paper 0; ablation 1); more = seeks their disagreement"""
    proposal: Optional[Literal["sample", "mean"]] = None
    """a, where all ways to explore start (paper silent): the policy's mean (LAPO, kitchen) or its sample"""
    rank_critics: Literal["online", "target"] = "online"
    """critics that score the candidates (paper silent); target = steadier, later to react"""
    clip_candidates: bool = True
    """clip candidates to +-1 before they are scored, executed and stored (paper silent)"""
    utd: Optional[int] = None
    """updates per environment step (IQL 1, LAPO 20: its critics only); more = learns faster, less stable"""
    overlap: bool = False
    """ours: update while the environment steps, without its transition; for GPUs, nothing on a CPU"""
    reset_optimizer: bool = False
    """forget Adam's moments at the switch to online (paper silent; ours: they carry over)"""
    buffer_size: Optional[int] = None
    """rows, the dataset's included; when full the oldest online row goes; None: all are kept (paper)"""
    offline_ratio: Optional[float] = None
    """ours: share (0-1) of dataset rows in online batches; None: uniform (paper); more = learns less new"""
    # -- IQL --
    expectile: Optional[float] = None
    """kappa of IQL Eq. 5 (0.7, ant maze 0.9); more = V nearer to the best action's Q, more over-estimation"""
    online_expectile: Optional[float] = None
    """the paper's Fig. 3: another kappa online (paper 0.85, no clear gain; None: the same); as expectile"""
    anneal: Literal["step", "linear"] = "step"
    """how kappa gets there: at once at the switch, or linearly over the online phase"""
    beta: Optional[float] = None
    """inverse temperature of IQL Eq. 7 (locomotion 3, ant maze 10, kitchen 0.5); 0 = clone, more = pickier"""
    exp_adv_max: float = 100.0
    """limit of exp(beta * advantage) (IQL 100); more = single actions may rule a batch"""
    actor_dropout: Optional[float] = None
    """dropout rate of the actor in updates, never in acting (kitchen 0.1, else 0); more = regularises more"""
    # -- LAPO --
    subset_size: int = 2
    """target critics that form a target, drawn anew per update (REDQ 2); more = lower values for lambda 1"""
    doubleq_min: Optional[float] = None
    """lambda, weight of the subset's minimum, 1 - it the maximum's (ant maze 0.7, else 1); more = cautious"""
    value_clamp: Optional[Literal["discounted", "once", "none"]] = None
    """limits of V's targets from the rewards seen: r/(1 - gamma), or r itself where it is paid once"""
    latent_dim: Optional[int] = None
    """size of z (paper, and None: twice the action's); more = actions are reproduced more exactly"""
    max_latent: float = 2.0
    """the policy's limit on |z| (paper 2); more = rarer actions come within reach"""
    latent_noise: float = 0.1
    """std of the noise on z in V's targets and sampled actions, cut at 2 std (paper 0.1); more = smoother"""
    kl_weight: float = 1.0
    """weight of the CVAE's KL (paper 1); more = z says less about the action, all of |z| <= 2 is in use"""
    good_weight: float = 0.9
    """weight in the CVAE's loss of actions that beat V, 1 - it of the others (paper 0.9); 0.5 = clone all"""
    # -- evaluation and output --
    eval_every: int = 10_000
    """steps between evaluations, both phases; more = faster, coarser curve"""
    eval_episodes: int = 10
    """episodes per evaluation, side by side; more = less noise, slower"""
    eval_action: Literal["policy", "optimistic"] = "policy"
    """evaluate the policy's deterministic action (paper silent) or the optimistic one around it"""
    log_every: int = 1000
    """steps between rows of training metrics, each the mean since the last; more = shorter files"""


# The papers' values by base, family, base/family: the narrower wins, and a flag that is given wins over all.
# Locomotion and "other", any environment outside D4RL, have no row: the base's suits dense rewards.
PRESETS = {
    "iql": dict(batch_size=256, learning_rate=3e-4, utd=1, proposal="sample", sigma=0.2, expectile=0.7,
                beta=3.0, actor_dropout=0.0, reward_transform="return_range"),
    "iql/antmaze": dict(expectile=0.9, beta=10.0, reward_transform="minus_one"),
    # Rewards are of order 1 as they are; a sample achieves half of what the mean does (README).
    "iql/kitchen": dict(beta=0.5, actor_dropout=0.1, reward_transform="none", proposal="mean"),
    "lapo": dict(batch_size=512, learning_rate=2e-4, utd=20, proposal="mean", sigma=0.2, doubleq_min=1.0,
                 value_clamp="discounted", reward_transform="max"),
    "lapo/antmaze": dict(doubleq_min=0.7, value_clamp="once", reward_transform="x100"),
    "antmaze": dict(sigma=0.05), "kitchen": dict(sigma=0.05)}
COUNTS = "num_candidates num_critics subset_size batch_size hidden_dim latent_dim utd eval_episodes"
SHARES = "gamma tau expectile online_expectile actor_dropout offline_ratio doubleq_min good_weight"
LIMITS = {"omega": (-1e9, 1e9), "dataset_size": (2, 1e9)} | dict.fromkeys(SHARES.split(), (0, 1))
LIMITS |= dict.fromkeys(f"{COUNTS} eval_every log_every".split(), (1, 1e9))  # all else: (0, 1e9)


class UserError(Exception):
    """Something that the user can put right: printed as one line, exit code 2."""


def resolve(args: Args, family: str) -> Args:
    """Fill None from PRESETS and check LIMITS. Raises: UserError naming flag, value and what is expected."""
    for key in (f"{args.base}/{family}", family, args.base):  # the narrower one first
        preset = PRESETS.get(key, {})
        args = replace(args, **{name: v for name, v in preset.items() if getattr(args, name) is None})
    for name, value in asdict(args).items():
        low, high = LIMITS.get(name, (0, 1e9))
        if type(value) in (int, float) and not low <= value <= high:  # not: catches nan too
            raise UserError(f"--{name.replace('_', '-')} {value}: give a number from {low} to {high:g}")
    iql = "expectile online_expectile anneal beta exp_adv_max actor_dropout"
    lapo = "subset_size doubleq_min value_clamp latent_dim max_latent latent_noise kl_weight good_weight"
    for name in {"iql": lapo, "lapo": iql}.get(args.base, "").split():
        if getattr(args, name) != getattr(Args(), name):
            raise UserError(f"--{name.replace('_', '-')}: no part of --base {args.base}, leave it out")
    if args.online_expectile is not None and args.cuda_graph:
        raise UserError("--online-expectile: not with --cuda-graph, which would freeze kappa")
    if args.base == "lapo" and args.subset_size > args.num_critics:
        raise UserError(f"--subset-size {args.subset_size}: more than --num-critics {args.num_critics}")
    return args


# ==== 2. Networks ===========================================================================================
class EnsembleLinear(nn.Module):
    """m linear layers that share nothing, in one batched product: (m, B, in) -> (m, B, out)."""

    def __init__(self, m: int, in_dim: int, out_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(m, in_dim, out_dim))
        self.bias = nn.Parameter(torch.zeros(m, 1, out_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


def mlp(sizes: list[int], linear: Callable = nn.Linear, dropout: float = 0.0, orthogonal: bool = True):
    """linear-ReLU-dropout per hidden size, then linear: an nn.Sequential.

    orthogonal: IQL's init, gain √2 in every layer, the last too, zero bias. Else LAPO's, PyTorch's own.
    """
    layers = []
    for in_dim, out_dim in zip(sizes, sizes[1:]):
        layer, bound = linear(in_dim, out_dim), in_dim**-0.5
        nn.init.uniform_(layer.bias, -bound, bound) if not orthogonal else nn.init.zeros_(layer.bias)
        # One draw per member: different starts make the critics disagree.
        for weight in layer.weight.view(-1, *layer.weight.shape[-2:]):  # (1 or m, rows, columns)
            nn.init.orthogonal_(weight, 2**0.5) if orthogonal else nn.init.uniform_(weight, -bound, bound)
        layers += [layer, nn.ReLU(inplace=True), nn.Dropout(dropout)]
    return nn.Sequential(*layers[:-2])


class Critics(nn.Module):
    """The ensemble Q_1 ... Q_m: obs (B, O), actions (B, A) -> (m, B)."""

    def __init__(self, obs_dim: int, act_dim: int, m: int, hidden: list[int], orthogonal: bool = True):
        super().__init__()
        linear = functools.partial(EnsembleLinear, m)
        self.m, self.net = m, mlp([obs_dim + act_dim, *hidden, 1], linear, orthogonal=orthogonal)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor, members: Optional[torch.Tensor] = None):
        """members: the only critics to ask, indices (k,) on their device, at k/m of the cost: -> (k, B)."""
        k = self.m if members is None else len(members)
        x = torch.cat([obs, actions], -1).expand(k, -1, -1)  # (k, B, O + A), a view: no copies
        if members is None:
            return self.net(x).squeeze(-1)
        chosen = {name: p[members] for name, p in self.net.named_parameters()}
        return torch.func.functional_call(self.net, chosen, x).squeeze(-1)


class GaussianActor(nn.Module):
    """π(a|s) = N(tanh(MLP(s)), diag(std²)), one learned log-std per action dimension for all states."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: list[int], dropout: float):
        super().__init__()
        self.net = mlp([obs_dim, *hidden, act_dim], dropout=dropout)
        self.log_std = nn.Parameter(torch.zeros(act_dim))

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tanh(self.net(obs)), self.log_std.clamp(-5.0, 2.0)  # (B, A), (A,)


# ==== 3. Losses: pure functions of tensors ==================================================================
def expectile_loss(u: torch.Tensor, expectile: float) -> torch.Tensor:
    """IQL Eq. 5: mean of |κ − 1(u < 0)|·u², with u = Q − V."""
    # Where V is too low (u > 0) the pull up weighs κ, where too high 1 − κ. For κ > 0.5, V settles above
    # the mean of Q over the data's actions, near the best as κ → 1, without asking about other actions.
    return ((expectile - (u < 0).to(u.dtype)).abs() * u**2).mean()


def td_target(rewards: torch.Tensor, ends: torch.Tensor, next_v: torch.Tensor, gamma: float) -> torch.Tensor:
    """IQL Eq. 6: y = r + γ(1 − d)·V(s'); all (B,)."""
    return rewards + gamma * (1.0 - ends) * next_v


def ensemble_mse(q: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """IQL Eq. 6 for m critics: Σ_j mean (Q_j − y)²; q (m, B), target (B,)."""
    # The sum over j, not the mean, gives each critic the gradient that it would have alone.
    return ((q - target) ** 2).mean(1).sum()


def advantage_weights(adv: torch.Tensor, beta: float, exp_adv_max: float) -> torch.Tensor:
    """IQL Eq. 7: min(exp(β·(Q − V)), limit), (B,). β = 0 gives 1 everywhere: plain cloning."""
    # The best π near the data, max E[A] − KL(π‖data)/β, is ∝ data·exp(β·A): weighted cloning.
    return torch.exp(beta * adv).clamp(max=exp_adv_max)


def mixed_q(q: torch.Tensor, doubleq_min: float) -> torch.Tensor:
    """LAPO's λ·min_j Q_j + (1 − λ)·max_j Q_j: (m, B) -> (B,). λ = 1 is the plain minimum."""
    # Whoever maximises over Q finds its over-estimates; a target that errs downwards stops that.
    return doubleq_min * q.amin(0) + (1.0 - doubleq_min) * q.amax(0)


def kl_to_standard_normal(mean: torch.Tensor, log_var: torch.Tensor) -> torch.Tensor:
    """KL(N(μ, σ²) ‖ N(0, I)) = ½·Σ(μ² + σ² − 1 − log σ²) over z: (B, Z), (B, Z) -> (B,)."""
    return 0.5 * (mean**2 + log_var.exp() - 1.0 - log_var).sum(-1)


def polyak_(target: nn.Module, source: nn.Module, tau: float) -> None:
    """θ̂ ← (1 − τ)·θ̂ + τ·θ for every parameter, in place."""
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


# ==== 4. The optimistic action ==============================================================================
@torch.no_grad()
def optimistic_action(  # new in O3F: with five critics, all that the paper adds to its base
    obs: torch.Tensor, action: torch.Tensor, q_ensemble: Callable, num_candidates: int, sigma: float,
    omega: float, clip: bool = True, generator: Optional[torch.Generator] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of N candidates around the policy's action, the one that the critics like best (Algorithm 1, Eq. 2).

    obs (B, O); action (B, A) in the ±1 box; q_ensemble maps (B·N, O), (B·N, A) to (m, B·N).
    Returns the chosen action (B, A), the first of equals, and its optimism (B,): how far its mean Q lies
    above the average candidate's.
    """
    (B, A), N = action.shape, num_candidates
    noise = torch.randn(B, N, A, dtype=action.dtype, device=action.device, generator=generator)
    candidates = action[:, None] + sigma * noise  # new in O3F: c_i ~ N(a, σ²I), (B, N, A)
    if clip:
        candidates = candidates.clamp(-1.0, 1.0)  # score what will be executed, not what would be cut off
    q = q_ensemble(obs.repeat_interleave(N, 0), candidates.flatten(0, 1)).unflatten(1, (B, N))  # (m, B, N)
    q_mean = q.mean(0)
    score = q_mean + omega * q.std(0, correction=0)  # new in O3F: Eq. 2; this std divides by m, not m − 1
    best = score.argmax(1, keepdim=True)  # new in O3F: a_t, as an index (B, 1) on the device
    chosen = candidates.gather(1, best[..., None].expand(B, 1, A)).squeeze(1)
    # The average candidate is what --explore noise executes: this is what the choice claims to gain over it.
    return chosen, q_mean.gather(1, best).squeeze(1) - q_mean.mean(1)


# ==== 5. Base algorithms ====================================================================================
class Batch(NamedTuple):
    """B transitions, float32, on the agent's device."""

    observations: torch.Tensor  # (B, O)
    actions: torch.Tensor  # (B, A), in the ±1 box
    rewards: torch.Tensor  # (B,), as the agent is to see them
    next_observations: torch.Tensor  # (B, O)
    terminations: torch.Tensor  # (B,), 1 at a true end


def make_optimizer(agent: nn.Module) -> torch.optim.Adam:
    """One Adam for all networks of an agent that is on its final device.

    Moments and count of steps are each weight's own, and a weight without gradient is left alone: this does
    what one Adam per network would.
    """
    args, params = agent.args, [p for p in agent.parameters() if p.requires_grad]
    return torch.optim.Adam(params, args.learning_rate, fused=True, capturable=args.cuda_graph)


class IQL(nn.Module):
    """Implicit Q-learning (Kostrikov et al., arXiv 2110.06169), with m critics instead of two.

    A base is a module with METRICS, args, optimizer, update, policy and q_values; COMPILED names its methods
    that work on one batch. data (keys of Batch) is the dataset: IQL wants its shapes only.
    """

    METRICS = tuple("losses/vf losses/qf losses/actor q_mean q_std v_mean adv adv_weight policy_std".split())
    COMPILED = ("step",)

    def __init__(self, data: dict[str, np.ndarray], args: Args):
        super().__init__()
        self.args, hidden = args, [args.hidden_dim] * 2
        obs_dim, act_dim = data["observations"].shape[1], data["actions"].shape[1]
        self.qf = Critics(obs_dim, act_dim, args.num_critics, hidden)
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.vf = mlp([obs_dim, *hidden, 1])
        self.actor = GaussianActor(obs_dim, act_dim, hidden, args.actor_dropout).eval()
        self.expectile = args.expectile  # κ; --online-expectile changes it

    def update(self, *batches: Batch) -> torch.Tensor:
        """A gradient step on every network per batch, METRICS' means over the batches."""
        return torch.stack([self.step(batch) for batch in batches]).mean(0)

    def step(self, batch: Batch) -> torch.Tensor:
        """One update in the authors' order V, actor, Q, targets; METRICS' values."""
        obs, actions, rewards, next_obs, ends = batch
        args = self.args
        # V: expectile of min_j Q̂_j(s, a) over the data's actions (IQL Eq. 5). IQL takes the minimum of its
        # two target critics; which of the five, the paper does not say. Ours: the minimum of all.
        with torch.no_grad():
            target_q = self.qf_target(obs, actions).amin(0)  # (B,)
        vf_loss = expectile_loss(target_q - self.vf(obs).squeeze(-1), self.expectile)
        self.optimizer.zero_grad()
        vf_loss.backward()
        self.optimizer.step()

        # From here on the *new* V: at s for the actor, at s' for the critics.
        with torch.no_grad():
            v, next_v = self.vf(torch.cat([obs, next_obs])).squeeze(-1).chunk(2)  # (B,), (B,)
            adv = target_q - v
            weight = advantage_weights(adv, args.beta, args.exp_adv_max)
            # No max over a': V(s') stands in for it, so that no action outside the data is asked about.
            target = td_target(rewards, ends, next_v, args.gamma)

        # Actor: −min(exp(β·adv), limit)·log π(a|s), imitation that favours what beat V (IQL Eq. 7).
        self.actor.train()  # dropout is on here and nowhere else
        mean, log_std = self.actor(obs)
        self.actor.eval()
        pi = torch.distributions.Normal(mean, log_std.exp(), validate_args=False)  # checks stall a GPU
        actor_loss = -(weight * pi.log_prob(actions).sum(-1)).mean()
        # Critics: every one regresses on the same r + γ(1 − d)·V(s') (IQL Eq. 6).
        q = self.qf(obs, actions)  # (m, B)
        qf_loss = ensemble_mse(q, target)
        # The two losses share no parameter: one backward pass gives each network its own gradient.
        self.optimizer.zero_grad()
        (actor_loss + qf_loss).backward()
        self.optimizer.step()
        polyak_(self.qf_target, self.qf, args.tau)
        with torch.no_grad():
            q_std = q.std(0, correction=0).mean()
            return torch.stack([vf_loss, qf_loss / len(q), actor_loss, q.mean(), q_std, v.mean(), adv.mean(),
                                weight.mean(), log_std.exp().mean()])

    @torch.no_grad()
    def policy(self, obs: torch.Tensor, sample: bool, generator: Optional[torch.Generator] = None):
        """A sample of π, or its mean, clipped to ±1: (B, O) -> (B, A)."""
        action, log_std = self.actor(obs)
        if sample:
            noise = torch.randn(action.shape, device=obs.device, generator=generator)
            action = action + log_std.exp() * noise
        return action.clamp(-1.0, 1.0)

    @torch.no_grad()
    def q_values(self, obs: torch.Tensor, actions: torch.Tensor, target: bool = False) -> torch.Tensor:
        """All critics, or their slow copies: (B, O), (B, A) -> (m, B)."""
        return (self.qf_target if target else self.qf)(obs, actions)


class LAPO(nn.Module):
    """Latent-variable advantage-weighted policy optimisation (Chen et al., arXiv 2203.08949), O3F's critics.

    A CVAE learns to reproduce actions of the data, above all those that beat V. The policy chooses a point z
    in the CVAE's latent space, |z_i| ≤ 2, and the decoder turns it into an action: where the prior N(0, I)
    has its mass, that is an action like the data's. Networks see standardised states and actions; policy and
    q_values speak the environment's units, so that σ of O3F means the same for both bases.
    """

    METRICS = tuple("losses/qf losses/vf q_mean q_std v_mean v_limit losses/cvae losses/actor adv kl".split())
    COMPILED = ("update_critics", "update_policy")

    def __init__(self, data: dict[str, np.ndarray], args: Args):
        super().__init__()
        self.args, hidden = args, [args.hidden_dim] * 3
        obs_dim, act_dim = data["observations"].shape[1], data["actions"].shape[1]
        latent_dim = args.latent_dim or 2 * act_dim
        net = functools.partial(mlp, orthogonal=False)
        self.qf = Critics(obs_dim, act_dim, args.num_critics, hidden, orthogonal=False)
        self.vf = net([obs_dim, *hidden, 1])
        self.encoder = net([obs_dim + act_dim, *hidden, 2 * latent_dim])
        self.decoder = net([obs_dim + latent_dim, *hidden, act_dim])
        self.actor = net([obs_dim, *hidden, latent_dim])
        # The authors keep slow copies of V and the encoder too, but nothing ever asks them.
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.decoder_target = copy.deepcopy(self.decoder).requires_grad_(False)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        # Buffers: saved with the agent. The dataset's statistics stay: what is learned is in their units.
        for name, x in (("obs", data["observations"]), ("act", data["actions"])):
            mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
            std = np.where(std < 1e-6, 1.0, std + 1e-6)  # a constant (a kitchen's goal) stays harmless
            self.register_buffer(f"{name}_mean", torch.tensor(mean, dtype=torch.float32))
            self.register_buffer(f"{name}_std", torch.tensor(std, dtype=torch.float32))
        self.register_buffer("v_limits", torch.zeros(2))
        self.widen(torch.from_numpy(data["rewards"]))

    def widen(self, rewards: torch.Tensor) -> None:
        """Widen V's limits to what these rewards allow, in place on the device.

        No policy is worth less than min r/(1 − γ) or more than max r/(1 − γ); where r is paid once, at
        the end, not more than r. Ours: 0, V after an end, is always within (a kitchen's −1 ≤ r ≤ −¼
        would hold V at −25 or less, however near the end is). What is seen online must widen the limits, or
        the value of a policy better than the data would be cut off.
        """
        scale = 1.0 / max(1.0 - self.args.gamma, 1e-6) if self.args.value_clamp == "discounted" else 1.0
        low, high = self.v_limits
        torch.minimum(low, scale * rewards.amin(), out=low)
        torch.maximum(high, scale * rewards.amax(), out=high)

    def standardise(self, obs: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (obs - self.obs_mean) / self.obs_std, (actions - self.act_mean) / self.act_std

    def act(self, obs: torch.Tensor, actor: nn.Module, decoder: nn.Module, noisy: bool = False,
            generator: Optional[torch.Generator] = None) -> torch.Tensor:
        """Dec(s, z), z = 2·tanh(π_z(s)) + clip(0.1·ε, ±0.2) if noisy; standardised, (B, O) -> (B, A)."""
        z, std = self.args.max_latent * torch.tanh(actor(obs)), self.args.latent_noise
        if noisy:
            noise = torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
            z = z + (std * noise).clamp(-2 * std, 2 * std)
        return decoder(torch.cat([obs, z], -1))

    def update(self, *batches: Batch) -> torch.Tensor:
        """Critics and V once per batch, CVAE and policy once, on the last (REDQ's UTD); METRICS' values."""
        args, values = self.args, []
        for i, batch in enumerate(batches):
            if i > 0:  # after each batch; after the last one below, as CVAE and policy ask the old copies
                polyak_(self.qf_target, self.qf, args.tau)
            obs, actions = self.standardise(batch.observations, batch.actions)
            next_obs = (batch.next_observations - self.obs_mean) / self.obs_std
            batch = Batch(obs, actions, batch.rewards, next_obs, batch.terminations)
            # REDQ: a few of the target critics, one draw per update for the whole batch: where the largest of
            # m uniform draws are, k different places without a loop and without leaving the device.
            members = torch.rand(args.num_critics, device=obs.device).topk(args.subset_size).indices
            values.append(self.update_critics(batch, members))
        metrics = torch.cat([torch.stack(values).mean(0), self.update_policy(batch, members)])
        for name in ("qf", "decoder", "actor"):
            polyak_(getattr(self, f"{name}_target"), getattr(self, name), args.tau)
        return metrics

    def update_critics(self, batch: Batch, members: torch.Tensor) -> torch.Tensor:
        """One step on Q and V; batch standardised."""
        obs, actions, rewards, next_obs, ends = batch
        args = self.args
        with torch.no_grad():
            # y_Q = r + γ(1 − d)·V(s'), V the online one. y_V = Qmix(s, a'), a' a noisy action of the slow
            # policy: V is the value of the latent policy; IQL's, that of the data's better actions.
            target = td_target(rewards, ends, self.vf(next_obs).squeeze(-1), args.gamma)
            policy_action = self.act(obs, self.actor_target, self.decoder_target, noisy=True)
            v_target = mixed_q(self.qf_target(obs, policy_action, members), args.doubleq_min)  # (B,)
            self.widen(rewards)
            if args.value_clamp != "none":
                v_target = v_target.clamp(*self.v_limits)
        q, v = self.qf(obs, actions), self.vf(obs).squeeze(-1)  # (m, B), (B,)
        qf_loss, vf_loss = ensemble_mse(q, target), ((v - v_target) ** 2).mean()
        self.optimizer.zero_grad()
        (qf_loss + vf_loss).backward()  # no parameter in common: each gets its own gradient
        self.optimizer.step()
        with torch.no_grad():
            return torch.stack([qf_loss / len(q), vf_loss, q.mean(), q.std(0, correction=0).mean(), v.mean(),
                                self.v_limits[1]])

    def update_policy(self, batch: Batch, members: torch.Tensor) -> torch.Tensor:
        """One step on the CVAE and one on the latent policy; batch standardised."""
        obs, actions, rewards, next_obs, ends = batch
        args = self.args
        # CVAE: w·(Σ(â − a)² + KL), w = 0.9 where adv > 0, else 0.1. adv is the data's action once, and
        # the policy's from then on, against V: r + γ(1 − d)·Qmix(s', Dec⁻(s', π⁻(s'))) − V(s).
        with torch.no_grad():
            next_action = self.act(next_obs, self.actor_target, self.decoder_target)
            next_q = mixed_q(self.qf_target(next_obs, next_action, members), args.doubleq_min)
            adv = td_target(rewards, ends, next_q, args.gamma) - self.vf(obs).squeeze(-1)
            weight = (args.good_weight - (adv <= 0).to(adv.dtype)).abs()  # (B,), 0.9 or |0.9 − 1|
        mean, log_var = self.encoder(torch.cat([obs, actions], -1)).chunk(2, -1)  # (B, Z) each
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)  # so that gradients reach mean and log_var
        # Σ(â − a)² is −log N(a; â, ½·I) + const: with the KL, the negative ELBO of a VAE.
        error = ((self.decoder(torch.cat([obs, z], -1)) - actions) ** 2).sum(-1)  # (B,)
        kl = kl_to_standard_normal(mean, log_var)
        cvae_loss = (weight * (error + args.kl_weight * kl)).mean()
        # Policy: maximise mean_j Q_j(s, Dec⁻(s, π_z(s))) through the decoder's slow copy.
        actor_loss = -self.qf(obs, self.act(obs, self.actor, self.decoder_target)).mean()
        # The two share no parameter; the critics, which actor_loss runs through, are not to learn from it.
        learners = [p for net in (self.encoder, self.decoder, self.actor) for p in net.parameters()]
        self.optimizer.zero_grad()
        (cvae_loss + actor_loss).backward(inputs=learners)
        self.optimizer.step()
        with torch.no_grad():
            return torch.stack([cvae_loss, actor_loss, adv.mean(), kl.mean()])

    @torch.no_grad()
    def policy(self, obs: torch.Tensor, sample: bool, generator: Optional[torch.Generator] = None):
        """π's action, clipped to ±1; a sample has the noise of V's targets on z: (B, O) -> (B, A)."""
        obs = (obs - self.obs_mean) / self.obs_std
        action = self.act(obs, self.actor, self.decoder, sample, generator)
        return (action * self.act_std + self.act_mean).clamp(-1.0, 1.0)

    @torch.no_grad()
    def q_values(self, obs: torch.Tensor, actions: torch.Tensor, target: bool = False) -> torch.Tensor:
        """All critics, or their slow copies: (B, O), (B, A) -> (m, B)."""
        return (self.qf_target if target else self.qf)(*self.standardise(obs, actions))


AGENTS = {"iql": IQL, "lapo": LAPO}
Base = Union[IQL, LAPO]


def explore_action(agent: Base, obs: torch.Tensor, args: Args, generator: Optional[torch.Generator] = None):
    """The action to execute in fine-tuning, (B, O) -> (B, A), and its optimism (B,): 0 for the baselines."""
    action = agent.policy(obs, args.proposal == "sample", generator)  # a ~ π(·|s)
    if args.explore == "policy":
        return action, torch.zeros_like(action[:, 0])
    n = args.num_candidates if args.explore == "o3f" else 1  # N = 1, no choice: the noise baseline
    q_ensemble = functools.partial(agent.q_values, target=args.rank_critics == "target")
    return optimistic_action(  # new in O3F
        obs, action, q_ensemble, n, args.sigma, args.omega, args.clip_candidates, generator)


# ==== 6. Replay buffer ======================================================================================
class ReplayBuffer:
    """The dataset, then the online transitions, on the agent's device.

    One (capacity, 2·O + A + 2) float32 tensor: a batch is one gather, a new transition one copy of a row.
    Dataset rows stay for ever; when the buffer is full, the oldest online row is overwritten.
    """

    def __init__(self, data: dict[str, np.ndarray], capacity: int, device: torch.device):
        self.capacity, self.num_offline = capacity, len(data["rewards"])
        self.size = self.cursor = self.num_offline
        self.device_size = torch.tensor(self.size, device=device)  # a captured update reads it as it grows
        self.widths = [int(np.prod(data[name].shape[1:])) for name in Batch._fields]  # O, A, 1, O, 1
        self.rows = torch.zeros(capacity, sum(self.widths), device=device)
        for column, name in zip(self.rows.split(self.widths, 1), Batch._fields):
            column[: self.size] = torch.from_numpy(data[name].reshape(self.size, -1))

    def add(self, obs: np.ndarray, action: np.ndarray, reward: float, next_obs: np.ndarray, end: bool):
        """Append one transition, its reward already as the agent is to see it."""
        if self.cursor == self.capacity:
            self.cursor = self.num_offline
        row = np.concatenate([obs, action, [reward], next_obs, [end]]).astype(np.float32)
        self.rows[self.cursor].copy_(torch.from_numpy(row))
        self.cursor += 1
        self.size = max(self.size, self.cursor)
        self.device_size.fill_(self.size)

    def restore(self, online_rows: torch.Tensor, cursor: int) -> None:
        self.size, self.cursor = self.num_offline + len(online_rows), cursor
        self.rows[self.num_offline : self.size] = online_rows.to(self.rows.device)
        self.device_size.fill_(self.size)

    def sample(self, batch_size: int, offline_ratio: Optional[float] = None, batches: int = 1) -> list[Batch]:
        """Uniform with replacement over all rows; with offline_ratio, that share from the dataset's rows."""
        # Modulo a size that stays on the device, so that a captured update sees it grow; the first rows are
        # the likelier by size/2³¹, a thousandth for 2M rows.
        index = torch.randint(2**31 - 1, (batches, batch_size), device=self.rows.device)
        if offline_ratio is None:
            index %= self.device_size
        else:
            n = round(offline_ratio * batch_size)
            online = self.device_size > self.num_offline
            start = self.num_offline * online  # 0, all rows, while there are no online ones
            index[:, :n] %= self.num_offline
            index[:, n:] = start + index[:, n:] % (self.device_size - start)
        obs, actions, rewards, next_obs, ends = self.rows[index].split(self.widths, -1)  # one gather for all
        return [*map(Batch, obs, actions, rewards.squeeze(-1), next_obs, ends.squeeze(-1))]


def make_learner(agent: Base, buffer: ReplayBuffer, args: Args, offline_ratio: Optional[float], utd: int):
    """A function that draws utd batches and updates the agent, -> METRICS: eager, compiled or captured."""

    def learn() -> torch.Tensor:
        return agent.update(*buffer.sample(args.batch_size, offline_ratio, utd))

    if args.compile:
        torch._inductor.config.fallback_random = True  # the draws of the eager update
        for name in agent.COMPILED:
            setattr(agent, name, torch.compile(getattr(agent, name)))
    if not args.cuda_graph:
        return learn

    # Capture: a few updates on a side stream allocate what is needed, then everything is put back in place.
    def tensors() -> list[torch.Tensor]:
        moments = [x for state in agent.optimizer.state.values() for x in state.values()]
        return [*agent.parameters(), *agent.buffers(), *moments]

    before = {id(x): x.detach().clone() for x in tensors()}
    random, stream = torch.cuda.get_rng_state(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            learn()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad():
        for x in tensors():
            x.copy_(before[id(x)]) if id(x) in before else x.zero_()
    torch.cuda.set_rng_state(random)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        metrics = learn()

    def replay() -> torch.Tensor:
        graph.replay()
        return metrics  # overwritten by the next replay

    return replay


# ==== 7. Tasks and environments =============================================================================
@dataclass(frozen=True)
class Task:
    """What a name like kitchen-mixed-v0 stands for."""

    family: str  # locomotion, kitchen, antmaze or other
    gym_id: str = ""  # for gymnasium.make; empty where the environment is this file's own
    low: float = 0.0  # returns that score 0 and 100 (d4rl's infos.py); by default the score is the return
    high: float = 100.0
    horizon: int = 0  # steps; 0: gymnasium knows it
    targets: tuple[str, ...] = ()  # the kitchen's sub-tasks
    maze: str = ""
    goal_per_reset: bool = False

    def score(self, returns):
        """D4RL's normalised score of undiscounted returns of raw rewards."""
        return 100.0 * (returns - self.low) / (self.high - self.low)


ROBOTS = {  # -v4, not -v5: v5 changed Walker2d's foot friction and the healthy reward of Hopper and Walker2d
    "halfcheetah": Task("locomotion", "HalfCheetah-v4", -280.178953, 12135.0),
    "hopper": Task("locomotion", "Hopper-v4", -20.272305, 3234.3),
    "walker2d": Task("locomotion", "Walker2d-v4", 1.629008, 4592.3)}
LEVELS = ("random", "medium", "medium-replay", "medium-expert", "full-replay", "expert")
TASKS = {f"{robot}-{level}-v{v}": ROBOTS[robot] for v in (2, 1, 0) for robot in ROBOTS for level in LEVELS
         if (v, level) != (0, "full-replay")}  # as in d4rl's table
KITCHEN = Task("kitchen", "", 0.0, 4.0, 280, ("microwave", "kettle", "light switch", "slide cabinet"))
MIXED = replace(KITCHEN, targets=("microwave", "kettle", "bottom burner", "light switch"))
TASKS |= {"kitchen-complete-v0": KITCHEN, "kitchen-partial-v0": KITCHEN, "kitchen-mixed-v0": MIXED}
ANTS = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
TASKS |= {f"antmaze-{ant}-v{v}": Task("antmaze", "", 0.0, 1.0, 700 if "umaze" in ant else 1000,
                                      maze=ant.split("-")[0], goal_per_reset=v == 2)
          for v in (2, 1, 0) for ant in ANTS}


def get_task(env_id: str) -> Task:
    """Raises: UserError with the nearest name and the list."""
    if env_id in TASKS or env_id in gym.registry:
        return TASKS.get(env_id) or Task("other", env_id)
    near = difflib.get_close_matches(env_id, [*TASKS, *gym.registry], n=1, cutoff=0)[0]
    robots, levels, ants = ",".join(ROBOTS), ",".join(LEVELS), ",".join(ANTS)
    raise UserError(f"--env-id {env_id}: no such task; did you mean {near}? Known: {{{robots}}}-{{{levels}}}-"
                    f"v2, kitchen-{{complete,partial,mixed}}-v0, antmaze-{{{ants}}}-v2, and gymnasium's ids")


def d4rl_dir() -> Path:
    """The installed d4rl as a folder of files: to import it takes the MuJoCo binaries of 2021."""
    spec = importlib.util.find_spec("d4rl")
    if spec is None:
        raise UserError("package d4rl (models, table of files) is missing: pip install --no-deps d4rl==1.1")
    return Path(spec.submodule_search_locations[0])


def make_env(env_id: str, render_mode: Optional[str] = None, **kwargs) -> gym.Env:
    """A task's environment with its time limit and actions in the ±1 box; kwargs go to its constructor.

    The kitchen takes noise_ratio (0.1; 0 switches the observation noise off).
    Raises: UserError where gymnasium cannot make it, or its spaces are no flat Box and bounded flat Box.
    """
    task = get_task(env_id)
    mujoco.set_mju_user_warning(warnings.warn)  # by itself MuJoCo writes warnings to a file in this folder
    if task.family in ("kitchen", "antmaze"):
        make = KitchenEnv if task.family == "kitchen" else AntMazeEnv
        return gym.wrappers.TimeLimit(make(task, render_mode=render_mode, **kwargs), task.horizon)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that -v4, its XML too, is out of date: it is D4RL's
            env = gym.make(task.gym_id, render_mode=render_mode, disable_env_checker=True, **kwargs)
    except Exception as e:  # an optional package is missing, mostly; gymnasium says which
        raise UserError(f"--env-id {env_id}: gymnasium cannot make it: {e}") from e
    spaces = env.observation_space, env.action_space
    flat = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in spaces)
    if not flat or not np.isfinite([spaces[1].low, spaces[1].high]).all():
        raise UserError(f"--env-id {env_id}: needs a flat Box of observations and a bounded flat Box of "
                        f"actions, found {spaces[0]} and {spaces[1]}")
    if env.spec.max_episode_steps is None:
        env = gym.wrappers.TimeLimit(env, 1000)  # an evaluation has to end
    if (spaces[1].low != -1).any() or (spaces[1].high != 1).any():
        env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return env


class MujocoEnv(gym.Env):
    """What the kitchen and the ant maze share. Draws come from reset(seed=...)'s generator and no other."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}

    def __init__(self, model: mujoco.MjModel, obs_dim: int, limit: float, render_mode: Optional[str]):
        self.model, self.data, self.renderer = model, mujoco.MjData(model), None
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(-limit, limit, (obs_dim,), np.float64)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (model.nu,), np.float32)

    def put(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Set positions (nq,) and velocities (nv,), all else as at time 0."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:], self.data.qvel[:] = qpos, qvel
        mujoco.mj_normalizeQuat(self.model, self.data.qpos)  # MuJoCo 2 did so by itself
        mujoco.mj_forward(self.model, self.data)

    def render(self) -> np.ndarray:
        """(480, 640, 3) uint8. Without a screen, set the environment variable MUJOCO_GL=egl or osmesa."""
        self.renderer = self.renderer or mujoco.Renderer(self.model, 480, 640)
        camera = mujoco.MjvCamera()
        camera.lookat[:], camera.distance, camera.azimuth, camera.elevation = self.camera
        self.renderer.update_scene(self.data, camera)
        return self.renderer.render()


# Kitchen: where in the observation a sub-task's object is, and where it must be (d4rl's kitchen_envs.py).
KITCHEN_GOALS = {
    "bottom burner": ([11, 12], [-0.88, -0.01]), "top burner": ([15, 16], [-0.92, -0.01]),
    "light switch": ([17, 18], [-0.69, -0.05]), "slide cabinet": ([19], [0.37]),
    "hinge cabinet": ([20, 21], [0.0, 1.45]), "microwave": ([22], [-0.75]),
    "kettle": ([23, 24, 25, 26, 27, 28, 29], [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06])}


def kitchen_done(obs: np.ndarray, targets: tuple[str, ...]) -> np.ndarray:
    """Which sub-tasks' objects are within 0.3 (L2) of their goals: obs (..., >= 30) -> bool (..., k)."""
    goals = [KITCHEN_GOALS[target] for target in targets]
    return np.stack([np.linalg.norm(obs[..., i] - np.array(goal), axis=-1) < 0.3 for i, goal in goals], -1)


@functools.lru_cache(1)
def kitchen_model() -> mujoco.MjModel:
    """d4rl's kitchen, compiled once (1.3 s) and shared by all environments: stepping only reads it."""
    scene = d4rl_dir() / "kitchen/adept_envs/franka/assets/franka_kitchen_jntpos_act_ab.xml"
    kettle = "../../../adept_models/kitchen/assets/kettle_asset.xml"
    # MuJoCo since 3.2 rejects the kettle's named default class at the top level: hand it a file, in memory,
    # in which the class has an unnamed parent. What is compiled is physically the same.
    text = (scene.parent / kettle).read_text().replace("</mujocoinclude>", "</default></mujocoinclude>")
    text = text.replace('<default class="kettle">', '<default><default class="kettle">')
    return mujoco.MjModel.from_xml_path(str(scene), {kettle: text.encode()})


class KitchenEnv(MujocoEnv):
    """D4RL's Franka kitchen (its kitchen_multitask_v0.py and kitchen_envs.py) on current MuJoCo.

    obs (60,): 9 robot joints, 21 object joints, 30 goal entries; rad and m, no velocities.
    action (9,): ±1 is ±2 rad/s (fingers m/s), held for 0.08 s.
    reward: 1 for each target sub-task, the first time it is satisfied; terminated once all have been.
    """

    INIT_QPOS = np.array([
        0.148388023, -1.76848573, 1.84390296, -2.4768576, 0.260252026, 0.712533105, 1.59515394, 0.0479267505,
        0.0371350919, -2.6627985e-4, -5.18043486e-5, 3.1287722e-5, -4.51199853e-5, -3.90842156e-6,
        -4.22629655e-5, 6.28065475e-5, 4.04984708e-5, 4.62730939e-4, -2.26906415e-4, -4.65501369e-4,
        -0.00644129196, -0.00177048263, 0.00108009684, -0.26939744, 0.350383255, 1.61944683, 1.00618764,
        0.0040639512, -0.00662095997, -2.68278933e-4])

    def __init__(self, task: Task, noise_ratio: float = 0.1, render_mode: Optional[str] = None):
        super().__init__(kitchen_model(), 60, 8.0, render_mode)
        self.targets, self.noise_ratio = task.targets, noise_ratio
        self.camera = (-0.2, 0.5, 2.0), 2.2, 70, -35  # look-at point, distance (m), azimuth, elevation (deg)
        config = d4rl_dir() / "kitchen/adept_envs/franka/robot/franka_config.xml"
        joints = ElementTree.parse(config).getroot()[:30]
        self.low, self.high = np.array([joint.get("pos_bound").split() for joint in joints], float).T
        self.noise_amp = np.array([joint.get("pos_noise_amp") for joint in joints], float)
        self.goal = np.zeros(30)
        for index, goal in (KITCHEN_GOALS[target] for target in self.targets):
            self.goal[index] = goal

    def _observe(self) -> np.ndarray:
        noise = self.np_random.uniform(-1.0, 1.0, 30)  # drawn anew at every look, uniform as in D4RL
        self.seen = self.data.qpos + self.noise_ratio * self.noise_amp * noise
        return np.concatenate([self.seen, self.goal])

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None):
        super().reset(seed=seed)
        self.put(self.INIT_QPOS, np.zeros(self.model.nv))  # D4RL does not clip it to the joint bounds
        self.done = np.zeros(len(self.targets), bool)
        return self._observe(), {"completed": []}

    def step(self, action: np.ndarray):
        # The arm steers from its joints as it last *saw* them, noise included: D4RL's rule.
        ctrl = self.seen[:9] + 2.0 * np.clip(action, -1.0, 1.0) * 0.08
        self.data.ctrl[:] = ctrl.clip(self.low[:9], self.high[:9])
        mujoco.mj_step(self.model, self.data, 40)  # 40 steps of 2 ms
        obs = self._observe()
        new = kitchen_done(obs, self.targets) & ~self.done
        self.done |= new
        completed = [target for target, is_new in zip(self.targets, new) if is_new]
        return obs, float(new.sum()), bool(self.done.all()), False, {"completed": completed}


# Row i is at y = 4·i m, column j at x = 4·j m, from the start S; G is the goal's cell (d4rl's *_MAZE_TEST).
MAZES = """
    #####  ########  ############
    #S..#  #S.##..#  #S...#.....#
    ###.#  #..#...#  #.##.#.#.#.#
    #G..#  ##...###  #......#...#
    #####  #..#...#  #.####.###.#
           #.#..#.#  #..#.#.....#
           #...#.G#  ##.#.#.#.###
           ########  #..#...#.G.#
                     ############
"""
MAZE_COLUMNS = {"umaze": slice(4, 9), "medium": slice(11, 19), "large": slice(21, 33)}


class AntMazeEnv(MujocoEnv):
    """D4RL's ant maze (its maze_env.py, ant.py, goal_reaching_env.py) on current MuJoCo.

    obs (29,): qpos (x, y, z, quaternion, 8 joints) and qvel (14); m, rad, s. The goal is not in it.
    action (8,): ±1 is the motors' range, held for 0.1 s.
    reward: 1 within 0.5 m of the goal, which terminates; an ant on its back goes on.
    """

    metadata = MujocoEnv.metadata | {"render_fps": 10}

    def __init__(self, task: Task, render_mode: Optional[str] = None):
        rows = [line[MAZE_COLUMNS[task.maze]] for line in MAZES.splitlines()]
        cells = np.array([list(row) for row in rows if row.strip()])  # (rows, columns)
        where = {mark: 4.0 * np.argwhere(cells == mark)[:, ::-1] for mark in "SG#"}  # (k, 2): x and y in m
        self.goal_cell, self.walls = where["G"] - where["S"], where["#"] - where["S"]  # the start is (0, 0)
        spec = mujoco.MjSpec.from_file(str(d4rl_dir() / "locomotion/assets/ant.xml"))
        for x, y in self.walls:
            spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, pos=[x, y, 1], size=[2, 2, 1], contype=1,
                                    conaffinity=1, rgba=[0.7, 0.5, 0.3, 1])
        # For the eye only. A site compiled at 0 would stay there, wherever its pos is moved to.
        spec.worldbody.add_site(name="goal", pos=[1, 1, 0], size=[0.5] * 3, rgba=[1, 0, 0, 1])
        super().__init__(spec.compile(), 29, np.inf, render_mode)
        centre = (self.walls.min(0) + self.walls.max(0)) / 2
        self.camera = (*centre, 0.0), 5.5 * max(cells.shape[0], 0.75 * cells.shape[1]), 90, -90
        self.goal, self.goal_per_reset = None, task.goal_per_reset

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None):
        super().reset(seed=seed)
        jitter = self.np_random.uniform(0.0, 1.0, 2) + self.np_random.uniform(0.0, 0.5, 2)
        if self.goal is None or self.goal_per_reset:  # v0 and v1: the first draw stays
            self.goal = np.maximum(self.goal_cell[0] + jitter, 0.0)
            self.model.site("goal").pos[:2] = self.goal
        qpos = self.model.qpos0 + self.np_random.uniform(-0.1, 0.1, self.model.nq)
        self.put(qpos, 0.1 * self.np_random.standard_normal(self.model.nv))
        return np.concatenate([self.data.qpos, self.data.qvel]), {}

    def step(self, action: np.ndarray):
        low, high = self.model.actuator_ctrlrange.T
        self.data.ctrl[:] = low + (np.clip(action, -1.0, 1.0) + 1.0) / 2.0 * (high - low)
        mujoco.mj_step(self.model, self.data, 5)  # 5 steps of 20 ms
        reached = bool(np.linalg.norm(self.data.qpos[:2] - self.goal) <= 0.5)
        return np.concatenate([self.data.qpos, self.data.qvel]), float(reached), reached, False, {}


# ==== 8. Data ===============================================================================================
KNOWN_SHA256 = {  # where it has been reported: a download that differs is refused
    "kitchen-mixed-v0": "a30382a50278fdaea2e2d88e5f2836a95bcf9b581d252617872fd6537302721b",
    "kitchen-partial-v0": "57bfd9c5fe88a7cf702bbaf8b7cd800d30cd869e7f73416007238d26cd859800",
    "kitchen-complete-v0": "cd797c38cd52dfbe3f960cef73935cc724847abd189e47a703a7a2315ed60a81"}


def find_dataset(args: Args) -> Path:
    """--dataset, else D4RL's cache, else collected (*-random-v2), else downloaded. Raises: UserError."""
    if args.dataset not in ("", "random"):
        if not Path(args.dataset).is_file():
            raise UserError(f"--dataset {args.dataset}: no such file; give one in D4RL's layout, or `random`")
        return Path(args.dataset)
    cache = Path(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl/datasets")
    cache.mkdir(parents=True, exist_ok=True)
    if not args.dataset:
        if args.env_id not in TASKS:
            raise UserError(f"--env-id {args.env_id} has no file: use --dataset FILE or --dataset random")
        if args.env_id.endswith("-random-v2"):  # D4RL's name for it, without need of the package
            urls, name = [], args.env_id.replace("-random", "_random") + ".hdf5"
        else:
            table = runpy.run_path(str(d4rl_dir() / "infos.py"))["DATASET_URLS"]
            ants = (d4rl_dir() / "locomotion/__init__.py").read_text()  # has their v1, which the table lacks
            registered = re.findall(f"'{args.env_id}'.*?'(http[^']+)'", ants, re.DOTALL)
            urls = [table.get(args.env_id) or registered[0]]
            name = Path(urls[0]).name
        if (cache / name).is_file():
            return cache / name
        if urls:
            mirror = f"https://huggingface.co/datasets/imone/D4RL/resolve/main/{name}"  # MuJoCo v2
            return download([*urls, mirror], cache / name, KNOWN_SHA256.get(args.env_id))
    path = cache / f"{args.env_id.replace('/', '-')}.collected-uniform-{args.dataset_size}.hdf5"
    if not path.is_file():
        collect_random(args.env_id, args.dataset_size, path)
    print(f"data: {path.name} is collected here by D4RL's recipe, uniform actions; not D4RL's own file")
    return path


def download(urls: list[str], path: Path, digest: Optional[str] = None) -> Path:
    """Fetch from the first source that answers; what breaks off stays as .part and is resumed next time."""
    import fcntl  # POSIX; nothing else here needs it
    part, failures = path.with_name(path.name + ".part"), []
    with open(part, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # a second process waits here, and then finds the file
        while urls and not path.is_file():
            url, *urls = urls
            try:
                have = os.fstat(file.fileno()).st_size
                request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
                with urllib.request.urlopen(request, timeout=8) as response:
                    if response.status != 206:  # this server starts over
                        have = file.truncate(0)
                    total = have + response.length if response.length else None
                    bar = tqdm.wrapattr(response, "read", total=total, initial=have, desc=path.name)
                    with bar as source:
                        shutil.copyfileobj(source, file, 1 << 20)
                    file.flush()
                if total and (have := part.stat().st_size) != total:
                    raise OSError(f"broke off after {have} of {total} bytes: run again to resume")
                if digest and hashlib.sha256(part.read_bytes()).hexdigest() != digest:
                    file.truncate(0)
                    raise OSError("its sha256 is not the known one, the copy was removed")
                part.replace(path)
            except (OSError, http.client.HTTPException) as e:  # HTTPError and time-outs are OSErrors
                failures.append(f"{url} ({getattr(e, 'reason', None) or e})")
                if have and getattr(e, "code", None) == 416:  # no rest to fetch: another file, or all of it
                    file.truncate(0)
                    urls = [*urls, url]  # once more, from its start
    if part.exists() and (path.is_file() or not part.stat().st_size):
        part.unlink()
    if path.is_file():
        return path
    raise UserError(f"no source for {path.name}: not in {path.parent}; {'; '.join(failures)}. Ways on: "
                    "--dataset FILE (your copy), --dataset random (uniform actions), or plain python o3f.py")


def collect_random(env_id: str, size: int, path: Path) -> None:
    """Write `size` steps of uniform actions in D4RL's layout: how its *-random files were made."""
    env = make_env(env_id)
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    data = {"observations": np.empty((size, *obs.shape), np.float32),
            "actions": np.empty((size, *env.action_space.shape), np.float32),
            **{name: np.empty(size, np.float32) for name in ("rewards", "terminals", "timeouts")}}
    for i in tqdm(range(size), desc=f"collecting {env_id}", unit="step"):
        action = env.action_space.sample()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        row = (obs, action, reward, terminated, truncated and not terminated)
        for column, value in zip(data.values(), row):
            column[i] = value
        obs = env.reset()[0] if terminated or truncated else next_obs
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # renamed when whole: a kill leaves no half file
    with h5py.File(part, "w") as file:
        for name, column in data.items():
            file.create_dataset(name, data=column, compression="gzip", compression_opts=1)
    part.replace(path)


def load_hdf5(path: Path, obs_dim: int, act_dim: int) -> dict[str, np.ndarray]:
    """Read and check a file in D4RL's layout. Raises: UserError with what was found and what is needed."""
    shapes = dict(observations=(obs_dim,), actions=(act_dim,), rewards=(), terminals=(), timeouts=())
    raw = {}
    try:
        with np.errstate(all="ignore"), h5py.File(path, "r") as file:
            if not set(shapes) - {"timeouts"} <= set(file):
                raise UserError(f"{path.name}: found the keys {', '.join(file) or '(none)'}, needs "
                                f"{', '.join(shapes)} (the last is optional)")
            rows = getattr(file["observations"], "shape", ())[:1]
            # A damaged or hostile file can claim any size; no compression makes more than 1,100 bytes of one.
            claimed, most = 4 * (obs_dim + act_dim) * rows[0] if rows else 0, 1100 * path.stat().st_size
            if claimed > most:
                raise UserError(f"{path.name}: claims {rows[0]:,} rows, more than it can hold: get it again")
            for name, column in ((name, file[name]) for name in shapes if name in file):
                fits = getattr(column, "shape", None) == rows + shapes[name] and column.dtype.kind in "fbiu"
                if not fits or rows < (2,):
                    raise UserError(f"{path.name}: {name} is {column}; this task needs numbers of shape "
                                    f"{(*rows, *shapes[name])}, 2 rows or more")
                raw[name] = column[...].astype(bool if name in ("terminals", "timeouts") else np.float32)
    except UserError:
        raise
    except Exception as e:  # h5py's many ways to say that a file is damaged
        raise UserError(f"{path}: not a whole HDF5 file ({e}); download or write it again") from e
    for name in ("observations", "actions", "rewards"):
        if (bad := ~np.isfinite(raw[name].reshape(*rows, -1)).all(1)).any():
            raise UserError(f"{path.name}: {name} has NaN or inf in {bad.sum()} rows, the first is row "
                            f"{bad.argmax()}; expected numbers: remove these rows")
    if (peak := np.abs(raw["actions"]).max()) > 1 + 1e-6:
        raise UserError(f"{path.name}: actions reach {peak:.4g}, expected within ±1: rescale the box, "
                        "2·(a − low)/(high − low) − 1")
    return raw


def mark_time_limits(terminals: np.ndarray, horizon: int) -> np.ndarray:
    """Time limits of a file that does not mark them, bool (rows,): every horizon-th row of an episode.

    d4rl counts from 1 after a terminal, from 0 after a limit: a quirk that we copy to get its arrays.
    """
    limits, start, count = np.zeros_like(terminals), 0, 0
    for end in np.append(np.flatnonzero(terminals), len(terminals) - 1):  # per episode, not per row
        limits[start + horizon - 1 - count : end + 1 : horizon] = True
        start, count = end + 1, int(not limits[end])
    return limits


def to_transitions(raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of a file -> transitions (keys of Batch), the same arrays as d4rl.qlearning_dataset.

    s' of row t is row t+1's observation: so the last row goes, and each row at a time limit. After a terminal
    the successor is another episode's too, but 1 − d = 0 takes it out.
    """
    keep = np.flatnonzero(~raw["timeouts"][:-1])
    data = {name: raw[name][keep] for name in ("observations", "actions", "rewards")}
    return data | {"next_observations": raw["observations"][keep + 1], "terminations": raw["terminals"][keep]}


class RewardRule(NamedTuple):
    """The reward and the true end that the agent learns from: one rule for the file and for online steps."""

    scale: float  # r ← scale·r + shift: --reward-transform with the dataset's constants
    shift: float
    targets: tuple[str, ...]  # of a kitchen with --kitchen-rewards consistent, else empty

    def __call__(self, obs, rewards, next_obs, ends):
        """obs (..., O), rewards (...), next_obs (..., O), ends (...) -> rewards (...), ends (...)."""
        if self.targets:
            # A kitchen file pays the number of satisfied sub-tasks in every row, the environment each once:
            # two reward functions, which must not meet in one buffer. satisfied(s) − 4 is at most 0, so
            # finishing is worth most and waiting never pays. The one true end is all four at once.
            rewards = kitchen_done(obs, self.targets).sum(-1) - float(len(self.targets))
            ends = kitchen_done(next_obs, self.targets).all(-1)
        return self.scale * rewards + self.shift, ends


def load_dataset(args: Args, task: Task, env: gym.Env) -> tuple[dict[str, np.ndarray], RewardRule, dict]:
    """Find, check, convert: transitions (keys of Batch), their RewardRule, and facts for summary.json."""
    path = find_dataset(args)
    raw = load_hdf5(path, env.observation_space.shape[0], env.action_space.shape[0])
    if task.family == "kitchen" and np.abs(raw["observations"][:, 30:] - env.unwrapped.goal).max() > 1e-3:
        raise UserError(f"{path.name}: its observations hold the goals of another kitchen than {args.env_id}")
    targets = task.targets if args.kitchen_rewards == "consistent" else ()
    if targets:  # a kitchen file calls each demonstration's last row terminal, solved or not: a time limit
        raw["timeouts"] = raw["terminals"] | raw.get("timeouts", False)
        raw["terminals"] = np.zeros_like(raw["timeouts"])
    elif "timeouts" not in raw:
        horizon = task.horizon or env.spec.max_episode_steps or len(raw["terminals"])
        raw["timeouts"] = mark_time_limits(raw["terminals"], horizon)
    if task.family == "antmaze":  # a row whose successor is more than a cell away ends its episode
        jumps = np.append(np.linalg.norm(np.diff(raw["observations"][:, :2], axis=0), axis=1) > 4.0, False)
        jumps &= ~(raw["timeouts"] | raw["terminals"])
        raw["timeouts"] |= jumps
        if jumps.any() or args.env_id.endswith("-v0"):
            print(f"warning: {jumps.sum()} teleports, steps of over a cell without a time-out, are dropped"
                  + "; v0's time-outs are out of step: prefer v2" * args.env_id.endswith("-v0"))
    data, ends = to_transitions(raw), raw["terminals"] | raw["timeouts"]
    returns = np.add.reduceat(raw["rewards"], np.flatnonzero(np.append(True, ends[:-1])), dtype=np.float64)
    print(reward_check(raw, ends, task, env))
    columns = [data[name] for name in ("observations", "rewards", "next_observations", "terminations")]
    rewards, _ = RewardRule(1.0, 0.0, targets)(*columns)
    # Where no reward is positive (the kitchen's satisfied − 4), the largest would turn the signs, or divide
    # by 0: there the largest in magnitude takes its place, and rewards lie in [−1, 0].
    largest = rewards.max() if rewards.max() > 0 else np.abs(rewards).max()
    with np.errstate(divide="ignore"):
        scales = {"return_range": 1000.0 / np.ptp(returns), "max": 1.0 / largest, "x100": 100.0}
    scale = float(scales.get(args.reward_transform, 1.0))
    shift = -1.0 if args.reward_transform == "minus_one" else 0.0
    if not np.isfinite(scale):
        raise UserError(f"{path.name}: all episodes return {returns[0]:g}, no range to scale by: use "
                        "--reward-transform none")
    rule = RewardRule(scale, shift, targets)
    data["rewards"], data["terminations"] = (x.astype(np.float32) for x in rule(*columns))
    if args.base == "iql":  # as in its authors' code
        data["actions"] = data["actions"].clip(-1 + 1e-5, 1 - 1e-5)
    values = [f"{value:.3g}" for value in np.unique(raw["rewards"])]
    facts = {
        "file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "rows": len(ends),
        "dropped": len(ends) - len(data["rewards"]), "episodes": len(returns), "return_min": returns.min(),
        "return_mean": returns.mean(), "return_max": returns.max(), "ends": data["terminations"].sum(),
        "rewards": ", ".join(values) if len(values) < 7 else f"{values[0]}…{values[-1]}",
        "trained_on": f"{scale:.4g}·{'(satisfied sub-tasks − 4)' if targets else 'r'}{shift:+g}"}
    print("data: {file}: {rows:,} rows, {episodes:,} episodes, return min/mean/max {return_min:.1f}/"
          "{return_mean:.1f}/{return_max:.1f}, rewards {rewards}; dropped {dropped:,} rows without successor;"
          " {ends:.0f} true ends; trained on {trained_on}".format(**facts))
    return data, rule, facts


def reward_check(raw: dict[str, np.ndarray], ends: np.ndarray, task: Task, env: gym.Env) -> str:
    """One line: do the file and the environment pay the same reward?"""
    obs, rewards, env = raw["observations"], raw["rewards"], env.unwrapped
    if task.family == "kitchen":
        episodes = np.split(obs, np.flatnonzero(ends) + 1)
        once = sum(kitchen_done(episode, task.targets).any(0).sum() for episode in episodes)
        same = rewards.sum() == once
        words = f"the file pays {rewards.sum():.0f}, the environment would pay {once}, +1 once per sub-task"
    elif task.family == "antmaze":
        paid = obs[1:, :2][rewards[:-1] > 0]
        near = np.linalg.norm(paid - paid.clip(env.goal_cell, env.goal_cell + 1.5), axis=1) <= 0.5
        same = near.all()
        words = f"{len(paid)} rows pay, {near.sum()} of them within 0.5 m of where the goal can be"
    elif task.family == "locomotion":
        # An observation is (qpos without x, qvel), and no reward depends on x: replay some rows.
        errors = []
        env.reset(seed=0)  # the run seeds it anew
        for t in np.linspace(0, len(rewards) - 2, 200).astype(int):
            qpos, qvel = np.split(np.append(0.0, obs[t]), [env.model.nq])
            # Hopper and Walker2d hide what is faster than 10: such a state cannot be restored.
            if np.abs(qvel).max() < 10 or task.gym_id == "HalfCheetah-v4":
                env.set_state(qpos, qvel)
                errors.append(abs(env.step(raw["actions"][t])[1] - rewards[t]))
        worst = max(errors, default=np.inf)
        same = worst < 1e-2
        words = f"{len(errors)} rows replayed in {task.gym_id}, largest difference {worst:.1e}"
    else:
        return "rewards: the file's, unchecked (this environment cannot be set to a row's state)"
    hint = "as in D4RL's files, see --kitchen-rewards" if task.targets else "is this the right file?"
    return f"rewards: {'the same' if same else f'NOT the same, {hint}'}: {words}"


# ==== 9. Evaluation =========================================================================================
EVALS = tuple(f"eval/{x}" for x in "score score_std return length q_start discounted_return success".split())


@torch.no_grad()
def evaluate(agent: Base, envs: list[gym.Env], rule: RewardRule, task: Task, args: Args, seed: int) -> dict:
    """One episode in each environment, side by side, with a single policy call per step for all of them.

    Always from the same seeds, so that a change of the score is the policy's and not the draw's. q_start is
    mean Q at the first states, discounted_return what the episodes then gave of the reward trained on, up to
    the time limit: while q_start still moves, or lies far off, the critics are not to be trusted.
    """
    n, device = len(envs), next(agent.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    args = replace(args, proposal="mean", explore="o3f" if args.eval_action == "optimistic" else "policy")
    obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    returns, discounted, lengths, q_start, running = np.zeros(n), np.zeros(n), np.zeros(n), None, np.arange(n)
    while len(running):
        obs_tensor = torch.as_tensor(obs[running], dtype=torch.float32, device=device)
        actions, _ = explore_action(agent, obs_tensor, args, generator)
        q_start = agent.q_values(obs_tensor, actions).mean().item() if q_start is None else q_start
        steps = [envs[i].step(action)[:4] for i, action in zip(running, actions.cpu().numpy())]
        next_obs, rewards, terminated, truncated = (np.stack(column) for column in zip(*steps))
        train_rewards, _ = rule(obs[running], rewards, next_obs, terminated)
        obs[running] = next_obs
        returns[running] += rewards
        discounted[running] += args.gamma ** lengths[running] * train_rewards
        lengths[running] += 1
        running = running[~(terminated | truncated)]
    scores = task.score(returns)
    success = (scores >= 100.0).mean()  # the goal of a maze, all sub-tasks of a kitchen
    values = scores.mean(), scores.std(), returns.mean(), lengths.mean(), q_start, discounted.mean(), success
    return dict(zip(EVALS, map(float, values)))


# ==== 10. Files =============================================================================================
VERSION = 2  # of saved files


def write_whole(path: Path, state: dict, keep: Optional[Path] = None) -> None:
    """torch.save, there whole or not at all; the file that was there before becomes `keep`, or goes."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # a renamed file that is still in memory would not survive a power cut
        if keep and path.exists():
            path.replace(keep)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_saved(paths: list[Path], flag: str) -> dict:
    """The first of the files that is whole and of this version. Raises: UserError with what is wrong."""
    problems = []
    for path in paths:
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)  # data only: runs no code of it
            if saved["version"] == VERSION:
                if problems:
                    print(f"warning: {'; '.join(problems)}: going on from {path.name}, step {saved['step']}")
                return saved
            problems.append(f"{path.name} is of version {saved['version']}, not {VERSION}")
        except Exception as e:  # torch.load has many ways to fail
            problems.append(f"{path.name} is no whole file of this program ({type(e).__name__})")
    raise UserError(f"{flag}: {'; '.join(problems)}: give what this program saved")


def agent_state(agent: Base, rule: RewardRule, step: int) -> dict:
    """Networks, targets, optimiser and what another run must share with them, as tensors and plain values."""
    names = ("env_id", "base", "kitchen_rewards", "num_critics", "hidden_dim", "latent_dim")
    identity = {name: getattr(agent.args, name) for name in names}
    identity |= {"reward scale": rule.scale, "reward shift": rule.shift}
    return {"version": VERSION, "step": step, "args": asdict(agent.args), "identity": identity,
            "agent": agent.state_dict(), "optimizer": agent.optimizer.state_dict()}


def put_agent(saved: dict, agent: Base, rule: RewardRule, flag: str) -> None:
    """Restore an agent in place. Raises: UserError where it is of another task, base, size or reward."""
    for name, now in agent_state(agent, rule, 0)["identity"].items():
        then = saved["identity"].get(name)
        if then != now and not (name[:6] == "reward" and np.isclose(then, now)):
            raise UserError(f"{flag}: trained with {name} {then}, this run has {now}: change one of them")
    agent.load_state_dict(saved["agent"])
    agent.optimizer.load_state_dict(saved["optimizer"])
    agent.optimizer.param_groups[0].update(lr=agent.args.learning_rate, capturable=agent.args.cuda_graph)


class RunLog:
    """The run's folder: config.json, metrics.csv, episodes.csv, TensorBoard, summary.json, curve.png.

    The rows stay in memory too: checkpoint and summary are made from them. What is added to the next row of
    metrics stays on the device until that row is written.
    """

    def __init__(self, folder: Path, args: Args, metrics: tuple[str, ...], saved: Optional[dict] = None):
        from torch.utils.tensorboard import SummaryWriter  # seconds to import, and only a run needs it
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
        if args.track:
            wandb = importlib.import_module("wandb")
            wandb.init(project="o3f", name=folder.name, config=asdict(args), sync_tensorboard=True)
        saved = saved or {"next_step": None, "rows": {}, "sums": {}, "seconds": {}, "laps": {}}
        self.folder, self.sums = folder, saved["sums"]
        self.board = SummaryWriter(str(folder), purge_step=saved["next_step"], flush_secs=5)
        self.seconds, self.laps = Counter(saved["seconds"]), Counter(saved["laps"])
        self.last_lap = time.perf_counter()
        columns = {"metrics": ["step", "phase", *EVALS, *metrics],
                   "episodes": ["step", "return", "score", "length"]}
        self.rows = {table: saved["rows"].get(table, []) for table in columns}
        self.csv = {table: csv.DictWriter(open(folder / f"{table}.csv", "w", 1, newline=""), names)
                    for table, names in columns.items()}
        for table, writer in self.csv.items():
            writer.writeheader()
            writer.writerows(self.rows[table])

    def lap(self, name: str) -> None:
        """Book the time since the last lap under this name."""
        self.seconds[name] += time.perf_counter() - self.last_lap
        self.laps[name] += 1
        self.last_lap = time.perf_counter()

    def write(self, table: str, step: int, values: dict[str, float]) -> None:
        phase = {"phase": "online" if step > 0 else "offline"} if table == "metrics" else {}
        self.rows[table].append({"step": step, **phase, **values})
        self.csv[table].writerow(self.rows[table][-1])
        for name, value in self.sound(step, values).items():
            self.board.add_scalar(name if "/" in name else f"{table}/{name}", value, step)

    def sound(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """The same values. Raises: UserError where one is no number: the run is lost from there."""
        for name, value in values.items():
            if not np.isfinite(value):
                raise UserError(f"{name} is {value} by step {step}: training diverged and has stopped; lower "
                                f"--learning-rate, --load an earlier agent (if one was saved, it is in "
                                f"{self.folder})")
        return values

    def add(self, names: tuple[str, ...], values: torch.Tensor) -> None:
        """Sum metrics, values (len(names),), without leaving their device."""
        total, count = self.sums.get(names, (0.0, 0))
        self.sums[names] = total + values, count + 1

    def means(self, step: int) -> dict[str, float]:
        """What was added, averaged; UserError as above."""
        return self.sound(step, {name: mean for names, (total, count) in self.sums.items()
                                 for name, mean in zip(names, (total / count).tolist())})

    def flush(self, step: int) -> None:
        """Write what was added, if anything was, as one row."""
        if self.sums:
            self.write("metrics", step, self.means(step))
            self.sums.clear()

    def finish(self, facts: dict) -> dict:
        """Write summary.json and curve.png; returns the summary."""
        evals = {row["step"]: row for row in self.rows["metrics"] if "eval/score" in row}
        scores = [row["eval/score"] for row in evals.values()] or [None]
        successes = [row["eval/success"] for row in evals.values()] or [None]
        online = sum(self.seconds[name] for name in ("act", "environment", "add", "online update"))
        summary = {
            "score_offline": evals[0]["eval/score"] if 0 in evals else None, "score_final": scores[-1],
            "score_best": max(scores), "success_final": successes[-1],
            "offline_updates_per_s": self.laps["offline update"] / (self.seconds["offline update"] or 1),
            "online_steps_per_s": self.laps["online update"] / (online or 1),
            "seconds": self.seconds, **facts}
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2, default=float) + "\n")
        self.board.close()
        if 0 in evals:
            plot([self.folder], self.folder / "curve.png")
        return summary


def plot(folders: list[Path], path: Path) -> str:
    """Draw runs' curves to a file, grouped by configuration; returns their table in Markdown.

    Figure, per group: the mean over seeds, with its 95 % bootstrap interval; of a single run, one standard
    deviation over the evaluation's episodes. Table: means, and in brackets every run's own number, by seed;
    area is the mean score of the online phase. Raises: UserError.
    """
    from matplotlib.figure import Figure  # not pyplot: no screen, no global state
    own = "seed run_dir load save device track log_every checkpoint_every compile cuda_graph".split()
    groups, columns = {}, ("eval/score", "eval/score_std")
    for folder in folders:
        try:
            config = json.loads((folder / "config.json").read_text())
            rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
            curve = {int(row["step"]): [float(row[x]) for x in columns] for row in rows if row[columns[0]]}
            curve[0], config["seed"], config["eval_episodes"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"--plot {folder}: no run with an evaluation at step 0 ({e!r})") from e
        key = json.dumps({name: value for name, value in config.items() if name not in own})
        groups.setdefault(key, []).append((config["seed"], curve))
    configs = [json.loads(key) for key in groups]
    differ = [name for name in asdict(Args()) if len({str(config.get(name)) for config in configs}) > 1]
    # A curve's name: the way to explore, and the flags in which it departs from most of the others.
    usual = {name: Counter(str(config.get(name)) for config in configs).most_common(1)[0] for name in differ}
    usual = {name: value for name, (value, n) in usual.items() if n > len(configs) / 2 and name != "explore"}
    figure = Figure(figsize=(7, 3.8 + 0.18 * len(groups)), dpi=120, layout="constrained")
    axes, rng = figure.subplots(), np.random.default_rng(0)
    header = f"runs (else {', '.join(map(' '.join, usual.items()))})" if usual else "runs"
    table = f"| {header} | seeds | offline | final | best | area | episodes |\n{'|---' * 7}|\n"
    for config, runs in zip(configs, groups.values()):
        seeds, curves = zip(*sorted(runs, key=lambda run: run[0]))
        steps = np.array(sorted(set.intersection(*map(set, curves))))  # evaluated in every run of the group
        scores, stds = np.array([[curve[step] for step in steps] for curve in curves]).transpose(2, 0, 1)
        mean = scores.mean(0)
        draws = scores[rng.integers(len(scores), size=(2000, len(scores)))].mean(1)
        band = np.percentile(draws, (2.5, 97.5), axis=0) if len(curves) > 1 else mean + [-stds[0], stds[0]]
        names = [name for name in differ if usual.get(name) != str(config.get(name))]
        label = ", ".join(f"{name} {config.get(name)}" for name in names or ("env_id", "base", "explore"))
        (line,) = axes.plot(steps, mean, ".-", label=label)
        axes.fill_between(steps, *band, color=line.get_color(), alpha=0.2, lw=0)
        x, y = steps[steps >= 0], scores[:, steps >= 0]  # (evaluations,), (runs, evaluations)
        area = ((y[:, 1:] + y[:, :-1]) / 2 * np.diff(x)).sum(1) / x[-1] if x[-1] else y[:, 0]
        cells = [", ".join(map(str, seeds))]
        for values in (y[:, 0], y[:, -1], y.max(1), area):
            each = ", ".join(f"{value:.1f}" for value in values)
            cells.append(f"{values.mean():.1f} ({each})" if len(curves) > 1 else each)
        table += f"| {label} | {' | '.join(cells)} | {config['eval_episodes']} |\n"
    axes.axvline(0, color="black", lw=0.8, ls=":")
    axes.set(xlabel="offline updates (below 0), environment steps (above)", ylabel="score")
    figure.legend(loc="outside lower left", frameon=False, fontsize="small")
    figure.savefig(path)
    return table


def provenance(device: torch.device) -> dict:
    """Versions, device and commit: what a number needs beside it."""
    describe = "describe --always --dirty --abbrev=40 --exclude=*".split()
    git = ["git", "-C", str(Path(__file__).resolve().parent), *describe]
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} cores"
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    packages = {package.__name__: package.__version__ for package in (torch, gym, mujoco, np, h5py)}
    return {"device": f"{device} ({platform.machine()}, {hardware}, {torch.get_num_threads()} threads)",
            "git_commit": commit or None, "versions": {"python": platform.python_version(), **packages}}


# ==== 11. Both phases =======================================================================================
@contextlib.contextmanager
def heed_signals():
    """Yields a list that Ctrl-C or SIGTERM fills, to be looked at between steps; once more stops at once."""
    seen = []

    def note(signum, frame):
        seen.append(signum)
        for either in before:
            signal.signal(either, signal.default_int_handler)
        os.write(2, b"\nfinishing this step, then the files; once more stops at once\n")  # print may be busy

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def main(args: Args) -> dict:
    """Set-up, offline phase, online phase, files; returns the summary."""
    saved, folder, flag = None, Path(args.resume), f"--resume {args.resume}"
    if args.resume:
        if replace(args, resume="") != Args():
            raise UserError("--resume takes every flag from the run that it resumes: drop the others")
        saved = load_saved([folder / "checkpoint.pt", folder / "checkpoint_previous.pt"], flag)
        args = Args(**saved["args"])
    task = get_task(args.env_id)
    args = resolve(args, task.family)
    found = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    args = replace(args, device=args.device.replace("auto", "cuda" if found == "cuda" else "cpu"))
    device = torch.device(args.device)
    if args.dataset not in ("", "random"):  # a run may be resumed from another folder
        args = replace(args, dataset=str(Path(args.dataset).absolute()))
    compilers = any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))
    name = f"{args.env_id.replace('/', '-')}-{args.base}-{args.explore}-s{args.seed}"
    if not saved:
        folder = Path(args.run_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    for wrong, message in (
        (device.type not in ("cpu", found), f"--device {device}: torch finds only {found} here; use auto"),
        (args.cuda_graph and (args.compile or device.type != "cuda"),
         f"--cuda-graph: needs --device cuda (here: {device}), and --compile left out"),
        (args.compile and device.type == "cpu" and not compilers,
         "--compile: finds no C++ compiler: install g++ or clang++, or leave the flag out"),
        (args.track and importlib.util.find_spec("wandb") is None,
         "--track: package wandb is missing: pip install wandb"),
        (not saved and folder.is_dir() and any(folder.iterdir()),
         f"--run-dir {folder}: not empty; choose a new folder, or --resume {folder}"),
    ):
        if wrong:
            raise UserError(message)
    if args.load and not saved:
        flag, loaded = f"--load {args.load}", load_saved([Path(args.load)], f"--load {args.load}")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    # Independent streams of random draws: evaluating more often, say, changes nothing in training.
    explore_seed, env_seed, eval_seed = np.random.SeedSequence(args.seed).generate_state(3).tolist()
    explore_generator = torch.Generator(device).manual_seed(explore_seed)
    learning = torch if device.type == "cpu" else torch.get_device_module(device)
    torch.manual_seed(args.seed)  # the global stream: whatever learning draws, and nothing else
    env = gym.wrappers.RecordEpisodeStatistics(make_env(args.env_id))
    eval_envs = [make_env(args.env_id) for _ in range(args.eval_episodes)]
    data, rule, data_facts = load_dataset(args, task, env)
    rows = len(data["rewards"])
    if args.batch_size > rows:
        raise UserError(f"--batch-size {args.batch_size}: more than the dataset's {rows} transitions")
    if args.buffer_size is not None and args.buffer_size <= rows:
        raise UserError(f"--buffer-size {args.buffer_size}: give more than the dataset's {rows} transitions")
    agent = AGENTS[args.base](data, args).to(device)
    agent.optimizer = make_optimizer(agent)
    buffer = ReplayBuffer(data, args.buffer_size or rows + args.online_steps, device)
    # Steps up to 0 are offline updates, the others online steps, so that both phases share one axis.
    first, episode = 1 if args.load else 1 - args.offline_steps, 0
    if saved:
        if saved["sha256"] != data_facts["sha256"]:
            raise UserError(f"{flag}: {data_facts['file']} has changed: put back the file whose sha256 is "
                            f"{saved['sha256']}")
        put_agent(saved, agent, rule, flag)
        first, episode = saved["next_step"], saved["episode"]
        buffer.restore(saved["online_rows"], saved["cursor"])
        explore_generator.set_state(saved["explore_state"])
        learning.set_rng_state(saved["learning_state"])
        saved["sums"] = {names: (total.to(device), n) for names, (total, n) in saved["sums"].items()}
    elif args.load:
        put_agent(loaded, agent, rule, flag)
    log = RunLog(folder, args, (*agent.METRICS, "o3f/optimism"), saved)
    print(f"run: {folder} on {device}, {sum(p.numel() for p in agent.parameters()):,} parameters")
    last_checkpoint = step = first - 1

    def checkpoint(step: int) -> None:
        """All that a resumed run needs; online only between episodes, when no simulator is in mid-air."""
        log.means(step)  # raises where a metric is no number, and the next line where a weight is none
        log.sound(step, {"the sum of weights": sum(p.sum() for p in agent.parameters()).item()})
        state = agent_state(agent, rule, step) | {
            "next_step": step + 1, "episode": episode,
            "online_rows": buffer.rows[buffer.num_offline : buffer.size].clone(), "cursor": buffer.cursor,
            "explore_state": explore_generator.get_state(), "learning_state": learning.get_rng_state(),
            "sha256": data_facts["sha256"], "rows": log.rows, "sums": log.sums,
            "seconds": dict(log.seconds), "laps": dict(log.laps)}
        try:
            write_whole(folder / "checkpoint.pt", state, folder / "checkpoint_previous.pt")
        except OSError as e:
            tqdm.write(f"warning: no checkpoint at step {step}, the older one stays: {e}")
        log.lap("checkpoint")

    def keep_books(step: int, last: int, at_rest: bool = True) -> None:
        """After every step: log, evaluate, save, whichever is due."""
        nonlocal last_checkpoint
        if step % args.log_every == 0 or step == last:
            log.flush(step)
        if step % args.eval_every == 0 or step == last:
            results = evaluate(agent, eval_envs, rule, task, args, eval_seed)
            log.write("metrics", step, results)
            log.lap("evaluation")
            phase = "online" if step > 0 else "offline"
            success = "; success {:.0%}" if task.family in ("kitchen", "antmaze") else ""
            tqdm.write(("{} {:>8,}: score {:7.1f} ± {:.1f} (return {:.1f}, length {:.0f}); Q at start "
                        "{:.1f}, discounted return {:.1f}" + success).format(phase, step, *results.values()))
        due = step == 0 or step - last_checkpoint >= args.checkpoint_every
        if at_rest and args.checkpoint_every and due:
            checkpoint(step)
            last_checkpoint = step

    with heed_signals() as signals:
        def progress(steps: range, phase: str, unit: str):
            for step in tqdm(steps, desc=phase, unit=unit, mininterval=1.0, disable=None):
                if signals:
                    return
                yield step

        # -- offline --
        learn = make_learner(agent, buffer, args, None, 1) if first < 1 else None
        for step in progress(range(first, 1), "offline", "update"):
            log.add(agent.METRICS, learn())
            log.lap("offline update")
            keep_books(step, last=0)
        if first == 1 and not (saved or signals):
            keep_books(0, last=0)
        if step == 0 and not signals:
            if args.save and not args.load:
                write_whole(folder / "agent_offline.pt", agent_state(agent, rule, 0))
            if args.reset_optimizer:
                agent.optimizer = make_optimizer(agent)

        # -- online, O3F Algorithm 1: objective, buffer and optimiser carry on --
        learn = make_learner(agent, buffer, args, args.offline_ratio, args.utd)
        # Every episode has a seed of its own: a resumed run needs no simulator's inner state. The first reset
        # draws what an environment draws once, the goal of an ant maze v0 or v1, in a resumed run too.
        env.reset(seed=env_seed)
        obs, _ = env.reset(seed=env_seed + episode)
        for step in progress(range(max(first, 1), args.online_steps + 1), "online", "step"):
            if args.online_expectile is not None:
                share = step / args.online_steps if args.anneal == "linear" else 1.0
                agent.expectile = (1 - share) * args.expectile + share * args.online_expectile
            obs_tensor = torch.as_tensor(obs, dtype=torch.float32, device=device)[None]  # (1, O)
            action, optimism = explore_action(agent, obs_tensor, args, explore_generator)
            log.add(("o3f/optimism",), optimism)
            action = action[0].cpu().numpy()
            log.lap("act")
            if args.overlap:  # a GPU's work is only launched here, and goes on while MuJoCo steps
                log.add(agent.METRICS, learn())
                log.lap("online update")
            next_obs, reward, terminated, truncated, info = env.step(action)
            if not (np.isfinite(next_obs).all() and np.isfinite(reward)):
                raise UserError(f"the environment gave NaN or inf at step {step} (reward {reward}): unstable "
                                f"simulation; --load an earlier agent (if one was saved, it is in {folder})")
            log.lap("environment")
            # A time limit (truncated) ends the episode, not the task: d stays 0 and V(s') counts.
            train_reward, end = rule(obs, reward, next_obs, terminated)
            buffer.add(obs, action, train_reward, next_obs, end)
            log.lap("add")
            if not args.overlap:
                log.add(agent.METRICS, learn())
                log.lap("online update")
            obs, done = next_obs, terminated or truncated
            if done:
                stats, episode = info["episode"], episode + 1  # of raw rewards
                values = {"return": float(stats["r"]), "score": float(task.score(stats["r"]))}
                log.write("episodes", step, values | {"length": int(stats["l"])})
                obs, _ = env.reset(seed=env_seed + episode)
            keep_books(step, args.online_steps, done)

    finished = step == args.online_steps
    if not finished:
        if step <= 0 and args.checkpoint_every:
            checkpoint(step)
        log.flush(step)  # not part of the checkpoint, and gone again once the run is resumed
        way_back = f"--resume {folder} goes on from its checkpoint"
        print(way_back if (folder / "checkpoint.pt").exists() else "there is no checkpoint", file=sys.stderr)
    facts = {"status": "finished" if finished else "interrupted", "last_step": step, "args": asdict(args)}
    summary = log.finish(facts | {"dataset": data_facts} | provenance(device))
    if args.save:
        write_whole(folder / "agent_final.pt", agent_state(agent, rule, step))
    scores = [f"{name[6:]} {x:.1f}" for name, x in summary.items() if name[:6] == "score_" and x is not None]
    print(f"score: {', '.join(scores)}; files in {folder}")
    return summary


def cli(argv: Optional[list[str]] = None) -> int:
    """Flags in, exit code out: 0, 2 after a user's error, 130 after Ctrl-C or SIGTERM."""
    try:
        args = tyro.cli(Args, args=argv, description=__doc__)
        if args.plot:
            print(plot([Path(folder) for folder in args.plot], Path("plot.png")), "\nfigure: plot.png")
            return 0
        return 0 if main(args)["status"] == "finished" else 130
    except UserError as e:
        print("error:", " ".join(str(e).split()), file=sys.stderr)  # one line, whatever a library put in it
        return 2
    except OSError as e:  # of a path that cannot be written or read, or a full disk: the message names it
        print(f"error: {e}: is the path right (--run-dir, $D4RL_DATASET_DIR)? any room?", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # a second Ctrl-C, or one before there was anything to finish
        return 130


if __name__ == "__main__":
    sys.exit(cli())
