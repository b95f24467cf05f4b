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

Trained on an offline objective, a policy stays near its data and tries nothing new online; to
change the objective there can destroy what was learned. O3F changes only which action is tried.

Notation   (s, a, r, s', d) a transition, d = 1 at a true end (a time limit is not one)
           π policy, Q_j critic j of m, V state value, γ discount; Q̂, π⁻, Dec⁻ slow copies
           IQL: κ expectile (τ in its paper), β inverse temperature
           LAPO: z latent action, Dec(s, z) decoder, λ weight of the minimum over critics
           SO2: α weight of the entropy, |A| number of an action's coordinates
           N, σ, ω  number of candidates, their std, weight of the critics' std

Run it     python o3f.py    halfcheetah, on data that is collected here
           python o3f.py --env-id kitchen-mixed-v0 --base iql    the paper's Franka kitchen
           python o3f.py --env-id kitchen-mixed-v0 --help    all flags, with this task's values

Read it    1 flags, 2 networks, 3 losses, 4 the optimistic action, 5 bases, 6 buffer, both phases.
           That is all of the algorithm. Then 7 tasks, 8 data, 9 evaluation, 10 the run's folder.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import ctypes.util
import functools
import importlib.util
import json
import os
import re
import runpy
import signal
import sys
import textwrap
import time
import warnings
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Callable, Literal, NamedTuple, Optional, get_args, get_type_hints

import filelock
import gymnasium as gym
import h5py

if re.search("--(video|resume)", " ".join(sys.argv)) and not os.environ.get("DISPLAY"):
    # Films (a resumed run may owe one) without a screen: MuJoCo reads at import what draws them.
    for library in ("EGL", "OSMesa"):
        if sys.platform == "linux" and ctypes.util.find_library(library):
            os.environ.setdefault("MUJOCO_GL", library.lower())
import mujoco
import numpy as np
import pooch
import torch
import torch.nn as nn
import tyro
from tqdm import tqdm


# ==== 1. Flags ====
@dataclass
class Args:
    """Defaults: the papers' for locomotion under IQL, or marked as ours; the rest: PRESETS, §7."""

    # -- run --
    env_id: str = "halfcheetah-random-v2"  # a D4RL task, or any gymnasium id (also module:Id)
    base: Literal["iql", "lapo", "awac", "so2"] = "iql"  # offline algorithm that is fine-tuned
    seed: int = 0  # of four independent streams: learning, exploration, environment, evaluation
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if found
    compile: bool = False  # torch.compile the updates: a minute at start, for GPUs
    # of hidden layers in updates; bfloat16: faster where a processor has it (AVX512-BF16, AMX, GPU)
    precision: Literal["float32", "bfloat16"] = "float32"
    run_dir: str = ""  # folder of this run, new or empty; default runs/<task>-<base>-…
    resume: str = ""  # folder of a stopped run: go on exactly there; takes no other flag
    load: str = ""  # a saved agent instead of pretraining; its flags are the defaults
    checkpoint_minutes: float = 5.0  # between checkpoints (0: always); more = more lost by a kill
    plot: tuple[str, ...] = ()  # draw these runs, or all in these folders
    plot_to: str = "plot.png"  # file of that figure; any format that matplotlib knows
    video: str = ""  # .gif or .mp4: at the end film the policy beside the optimistic action
    # -- task and data --
    dataset: str = ""  # D4RL's (*-random-v2: collected), random (collected), minari:ID or a file
    dataset_size: int = 1_000_000  # rows to collect (D4RL 1M); more = wider data
    # satisfied sub-tasks - 4 in both phases, or the file's, then the environment's
    kitchen_rewards: Literal["consistent", "stock"] = "consistent"
    # max (LAPO's; ours for all): r / largest r; return_range (IQL's): 1000r / (best - worst return)
    reward_transform: Literal["none", "return_range", "max", "minus_one", "x100"] = "max"
    # -- both phases --
    offline_steps: int = 1_000_000  # updates before the first environment step (papers 1M)
    online_steps: int = 250_000  # steps of fine-tuning (ours; IQL's paper 1M)
    batch_size: int = 256  # rows per update (IQL 256, LAPO 512); more = less noise, slower
    learning_rate: float = 3e-4  # of Adam (IQL 3e-4, LAPO 2e-4); more = faster, less stable
    gamma: float = 0.99  # γ, discount per step (papers 0.99); more = looks further ahead
    tau: float = 0.005  # rate of the slow copies per update (papers 0.005); more = less stable
    num_critics: int = 5  # m (paper 5); more = a lower minimum, a steadier mean, slower
    hidden_dim: int = 256  # units per hidden layer (papers 256); more = slower
    layer_norm: bool = True  # ours (papers, LAPO, SO2: no): in the critics' hidden layers, see MLP
    # -- online --
    explore: Literal["o3f", "noise", "policy"] = "o3f"  # best of N; a + N(0, σ²); a itself
    num_candidates: int = 100  # N per step (paper 100); more = greedier towards the critics
    # std of candidates, noise in ±1 (0.2; ant maze, kitchen 0.05; IQL's, ours: 0.01); more = bolder
    sigma: float = 0.2
    omega: float = 0.0  # weight of the critics' std (paper 0); more = seeks disagreement
    # a, where every way to explore starts: the policy's sample or its mean (paper silent)
    proposal: Literal["sample", "mean"] = "sample"
    utd: int = 1  # updates per step (IQL 1, critics of LAPO 20, of SO2 10); more = learns faster
    # ours: share of dataset rows in online batches (paper, None: uniform over all)
    offline_ratio: Optional[float] = None
    # -- IQL, AWAC --
    beta: float = 3.0  # β, Eq. 7 (3, ant maze 10, kitchen 0.5, AWAC 1); 0 = clone, more = pickier
    online_beta: Optional[float] = None  # β online (Fig. 3, AWAC: 10); None: unchanged
    anneal: Literal["step", "linear"] = "step"  # β, κ get there at once, or over the online phase
    exp_adv_max: float = 100.0  # limit of exp(β·A) (100); more = single rows may rule
    normalise_adv: bool = False  # ours (paper: no): A / its std, for any reward scale
    actor_dropout: float = 0.0  # rate in updates (kitchen 0.1, else 0); more = smoother
    standardise: bool = True  # ours (papers: no): IQL, AWAC, SO2 see (s - mean)/std of data
    # -- IQL --
    expectile: float = 0.7  # κ of Eq. 5 (0.7, ant maze 0.9); more = V nearer the best Q
    online_expectile: Optional[float] = None  # κ online (O3F's Fig. 3: 0.85); None: unchanged
    # -- LAPO --
    subset_size: int = 2  # slow critics per target (REDQ 2); more = lower targets
    doubleq_min: float = 1.0  # λ, weight of the minimum (ant maze 0.7, else 1); more = cautious
    # limits of V's targets, from rewards seen: r/(1 - gamma), or r itself where it is paid once
    value_clamp: Literal["discounted", "once"] = "discounted"
    latent_dim: Optional[int] = None  # size of z (paper, None: 2·|A|); more = finer actions
    max_latent: float = 2.0  # limit of |z_i| (paper 2); more = rarer actions
    latent_noise: float = 0.1  # std on z, cut at 2 std (paper 0.1); more = smoother V
    kl_weight: float = 1.0  # of the CVAE's KL (paper 1); more = z says less
    good_weight: float = 0.9  # of what beats V, 1 - it of the rest (paper 0.9); 0.5 = clone
    # -- SO2 --
    target_noise: float = 0.3  # std on a' in online targets, cut at 2 std (0.3); more = smoother Q
    online_alpha: float = 0.2  # α online, weight of the entropy (0.2); more = a wider policy
    # -- evaluation --
    eval_every: int = 10_000  # steps between evaluations; more = faster, coarser
    eval_episodes: int = 10  # per evaluation; more = less noise, slower
    # the policy's deterministic action (paper silent), or the optimistic one around it
    eval_action: Literal["policy", "optimistic"] = "policy"
    log_every: int = 1000  # steps per row of metrics, a mean; more = shorter files


# ==== 2. Networks ====
class EnsembleLinear(nn.Module):
    """m linear layers that share nothing, in one batched product: (m, B, in) -> (m, B, out)."""

    def __init__(self, m: int, in_dim: int, out_dim: int):
        super().__init__()
        # PyTorch's initial values, ±1/√in, drawn per member: so the critics differ.
        bound = in_dim**-0.5
        self.weight = nn.Parameter(torch.empty(m, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(m, 1, out_dim).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class MLP(nn.Sequential):
    """linear, LayerNorm if asked for, ReLU, dropout per hidden size, then linear."""

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *hidden, last = self
        for layer in hidden:  # in bfloat16 during updates, if --precision says so
            x = layer(x)
        with torch.autocast(x.device.type, enabled=False):  # but what comes out is never rounded
            return last(x.to(last.weight.dtype))


class Critics(nn.Module):
    """The ensemble Q_1 … Q_m: obs (B, O), actions (B, A) -> (m, B)."""

    def __init__(self, obs_dim: int, act_dim: int, m: int, hidden: list[int], layer_norm=False):
        super().__init__()
        self.m, linear = m, functools.partial(EnsembleLinear, m)
        self.net = MLP([obs_dim + act_dim, *hidden, 1], linear, layer_norm=layer_norm)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([obs, actions], -1).expand(self.m, -1, -1)  # (m, B, O + A), no copies
        return self.net(x).squeeze(-1)

    def ask(self, obs: torch.Tensor, actions: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
        """Only the critics whose numbers are in members (k,), at k/m of the cost: -> (k, B)."""
        x = torch.cat([obs, actions], -1).expand(len(members), -1, -1)
        chosen = {name: weight[members] for name, weight in self.net.named_parameters()}
        return torch.func.functional_call(self.net, chosen, x).squeeze(-1)


class GaussianActor(nn.Module):
    """π(a|s) = N(tanh(MLP(s)), diag(std²)): obs (B, O) -> mean (B, A), log std (A,)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: list[int], dropout: float):
        super().__init__()
        self.net = MLP([obs_dim, *hidden, act_dim], dropout=dropout)
        self.log_std = nn.Parameter(torch.zeros(act_dim))  # one for all states

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tanh(self.net(obs)), self.log_std.clamp(-5.0, 2.0)


# ==== 3. Losses: pure functions of tensors ====
def expectile_loss(u: torch.Tensor, expectile: float) -> torch.Tensor:
    """IQL Eq. 5: mean of |κ − 1(u < 0)|·u², with u = Q − V (B,)."""
    # Where V is too low (u > 0) the pull up weighs κ, where too high 1 − κ. For κ > 0.5, V settles
    # above the mean of Q over the data's actions, near the best of them as κ → 1.
    return ((expectile - (u < 0).to(u.dtype)).abs() * u**2).mean()


def td_target(rewards, ends, next_v, gamma: float) -> torch.Tensor:
    """IQL Eq. 6: y = r + γ(1 − d)·V(s'): (B,), or (m, B) where V(s') is."""
    return rewards + gamma * (1.0 - ends) * next_v


def ensemble_mse(q: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """IQL Eq. 6 for m critics: Σ_j mean (Q_j − y)²; q (m, B), target (B,) or (m, B)."""
    # The sum over j, not the mean, gives each critic the gradient that it would have alone.
    return ((q - target) ** 2).mean(1).sum()


def advantage_weights(adv: torch.Tensor, beta: float, exp_adv_max: float) -> torch.Tensor:
    """IQL Eq. 7: min(exp(β·A), limit), A = Q − V (B,). β = 0: 1 everywhere, plain cloning."""
    # argmax_π E[A] − KL(π‖data)/β is π ∝ data·exp(β·A): cloning with these weights fits it.
    return torch.exp(beta * adv).clamp(max=exp_adv_max)


def mixed_q(q: torch.Tensor, doubleq_min: float) -> torch.Tensor:
    """LAPO: λ·min_j Q_j + (1 − λ)·max_j Q_j: (m, B) -> (B,)."""
    # Whoever maximises over Q finds its over-estimates; a low target stops that.
    return doubleq_min * q.amin(0) + (1.0 - doubleq_min) * q.amax(0)


def kl_to_standard_normal(mean: torch.Tensor, log_var: torch.Tensor) -> torch.Tensor:
    """KL(N(μ, σ²) ‖ N(0, I)) = ½·Σ(μ² + σ² − 1 − log σ²): (B, Z), (B, Z) -> (B,)."""
    return 0.5 * (mean**2 + log_var.exp() - 1.0 - log_var).sum(-1)


@torch.no_grad()
def polyak_(target: nn.Module, source: nn.Module, tau: float) -> None:
    """θ̂ ← (1 − τ)·θ̂ + τ·θ, in place."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


# ==== 4. The optimistic action ====
@torch.no_grad()
def optimistic_action(  # new in O3F
    obs, action, q_values: Callable, num_candidates: int, sigma: float, omega: float, generator=None
) -> tuple[torch.Tensor, torch.Tensor]:
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
    best = score.argmax(1)  # new in O3F: a_t
    rows = torch.arange(B, device=action.device)
    # Optimism: the chosen candidate's mean Q, less the mean over all candidates, which is what
    # --explore noise gets in expectation. So this is what the choice claims to gain.
    return candidates[rows, best], q_mean[rows, best] - q_mean.mean(1)


# ==== 5. Bases: offline algorithms ====
class Batch(NamedTuple):
    """B transitions, float32, on the agent's device."""

    observations: torch.Tensor  # (B, O)
    actions: torch.Tensor  # (B, A), in the ±1 box
    rewards: torch.Tensor  # (B,), as the agent is to see them
    next_observations: torch.Tensor  # (B, O)
    terminations: torch.Tensor  # (B,), 1 at a true end


class Base(nn.Module):
    """What the offline algorithms share. Each has to define:

    qf: Critics   and, at the end of its __init__, self.make_optimizer()
    update(batches) -> dict   learn from this list of Batch; 0-dim tensors to log, of the last one
    policy(obs, sample, generator) -> (B, A)   π's sample or deterministic action at obs (B, O)
    """

    def __init__(self, args: Args, obs_dim: int, act_dim: int):
        super().__init__()
        self.args, self.sizes = args, (obs_dim, act_dim)
        self.register_buffer("obs_mean", torch.zeros(obs_dim))  # saved with the agent
        self.register_buffer("obs_std", torch.ones(obs_dim))

    def see_dataset(self, data: dict[str, np.ndarray]) -> None:
        """Take the dataset's statistics (keys of Batch); they stay as they are online."""
        if self.args.standardise:
            set_statistics(data["observations"], self.obs_mean, self.obs_std, least=0.01)

    def set_progress(self, share: float) -> None:
        """Told before every online step: how much of the online phase is over, 0 to 1."""

    def standardise(self, obs: torch.Tensor) -> torch.Tensor:
        return (obs - self.obs_mean) / self.obs_std

    def make_optimizer(self) -> None:
        # One Adam for all networks: its moments are each weight's own, and a weight without
        # gradient is left alone, so this does what one Adam per network would.
        learned = [weight for weight in self.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.Adam(learned, self.args.learning_rate, fused=True)

    def descend(self, loss: torch.Tensor, learners: Optional[list] = None) -> None:
        """One step of Adam; learners: the only weights that are to learn from this loss."""
        self.optimizer.zero_grad()
        with torch.autocast(loss.device.type, enabled=False):  # the last layer's is exact too
            loss.backward(inputs=learners)
        self.optimizer.step()

    @torch.no_grad()
    def q_values(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """What the critics, not their slow copies, say of (B, O), (B, A): -> (m, B)."""
        return self.qf(self.standardise(obs), actions)

    def critic_metrics(self, q: torch.Tensor, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """For every base's log: q (m, B) of a batch, and its loss, summed over critics."""
        q = q.detach()
        return {
            "losses/qf": loss.detach() / self.args.num_critics,  # a mean over critics
            "q_mean": q.mean(),
            "q_std": q.std(0, correction=0).mean(),
        }


def set_statistics(x: np.ndarray, mean: torch.Tensor, std: torch.Tensor, least: float) -> None:
    """Mean and std of the rows of x, in place; a std below `least` becomes 1."""
    # A constant (a kitchen's goal) or a joint that hardly moves is only centred: divided by its
    # std, the noise of its sensor would be the loudest input of all.
    mean.copy_(torch.from_numpy(x.mean(0, dtype=np.float64)))
    std.copy_(torch.from_numpy(x.std(0, dtype=np.float64) + 1e-6))
    std[std < least] = 1.0


def orthogonal_(layer: nn.Module) -> None:
    """IQL's initial weights, for module.apply: orthogonal, gain √2, in every layer; zero bias."""
    if isinstance(layer, (nn.Linear, EnsembleLinear)):
        for weight in layer.weight.view(-1, *layer.weight.shape[-2:]):  # one draw per member
            nn.init.orthogonal_(weight, 2**0.5)
        nn.init.zeros_(layer.bias)


class IQL(Base):
    """Implicit Q-learning (Kostrikov et al., arXiv 2110.06169), with m critics instead of two."""

    def __init__(self, args: Args, obs_dim: int, act_dim: int):
        super().__init__(args, obs_dim, act_dim)
        hidden = [args.hidden_dim] * 2
        self.qf = Critics(obs_dim, act_dim, args.num_critics, hidden, args.layer_norm)
        self.vf = MLP([obs_dim, *hidden, 1])
        self.actor = GaussianActor(obs_dim, act_dim, hidden, args.actor_dropout).eval()
        self.apply(orthogonal_)
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.expectile, self.beta = args.expectile, args.beta  # set_progress moves them
        self.make_optimizer()

    def set_progress(self, share: float) -> None:
        # O3F's Fig. 3, the experiment that motivates it: another objective online.
        args = self.args
        if args.anneal == "step":
            share = 1.0
        if args.online_expectile is not None:
            self.expectile = (1 - share) * args.expectile + share * args.online_expectile
        if args.online_beta is not None:
            self.beta = (1 - share) * args.beta + share * args.online_beta

    def update(self, batches: list[Batch]) -> dict[str, torch.Tensor]:
        for batch in batches:
            metrics = self.step(batch)
        return metrics

    def step(self, batch: Batch) -> dict[str, torch.Tensor]:
        """One update in the authors' order: V, then actor and critics, then the slow copies."""
        obs, actions, rewards, next_obs, ends = batch
        obs, next_obs = self.standardise(obs), self.standardise(next_obs)
        # V: expectile of min_j Q̂_j(s, a) over the data's actions (Eq. 5). IQL takes the minimum of
        # its two target critics; which of the five, O3F does not say. Ours: the minimum of all.
        with torch.no_grad():
            target_q = self.qf_target(obs, actions).amin(0)  # (B,)
        vf_loss = expectile_loss(target_q - self.vf(obs).squeeze(-1), self.expectile)
        self.descend(vf_loss)

        # From here on the *new* V: at s for the actor, at s' for the critics.
        with torch.no_grad():
            v, next_v = self.vf(torch.cat([obs, next_obs])).squeeze(-1).chunk(2)  # (B,) each
            # No max over a', but V(s'): no action outside of the data is asked about.
            target = td_target(rewards, ends, next_v, self.args.gamma)
        actor_loss, metrics = self.imitate(obs, actions, target_q - v)
        # Critics: every one regresses on the same r + γ(1 − d)·V(s') (Eq. 6).
        q = self.qf(obs, actions)  # (m, B)
        qf_loss = ensemble_mse(q, target)
        # The two share no parameter: one backward pass gives each network its own gradient.
        self.descend(actor_loss + qf_loss)
        polyak_(self.qf_target, self.qf, self.args.tau)
        metrics = {"losses/vf": vf_loss.detach(), "v_mean": v.mean()} | metrics
        return metrics | self.critic_metrics(q, qf_loss)

    def imitate(self, obs, actions, adv) -> tuple[torch.Tensor, dict]:
        """Actor: −min(exp(β·A), limit)·log π(a|s) (IQL Eq. 7); A (B,) -> its loss, metrics."""
        if self.args.normalise_adv:  # scaled, not centred: the sign of A has a meaning
            adv = adv / (adv.std(correction=0) + 1e-6)
        weight = advantage_weights(adv, self.beta, self.args.exp_adv_max)  # (B,)
        self.actor.train()  # dropout is on here and nowhere else
        mean, log_std = self.actor(obs)
        self.actor.eval()
        # Checks would read values back from the GPU, and wait for it.
        pi = torch.distributions.Normal(mean, log_std.exp(), validate_args=False)
        loss = -(weight * pi.log_prob(actions).sum(-1)).mean()
        return loss, {
            "losses/actor": loss.detach(),
            "adv_weight": weight.mean(),
            # Effective sample size: 1, all rows count alike; 1/B, one row rules.
            "adv_weight_ess": weight.mean() ** 2 / (weight**2).mean(),
            "policy_std": log_std.detach().exp().mean(),
        }

    @torch.no_grad()
    def policy(self, obs: torch.Tensor, sample: bool, generator=None) -> torch.Tensor:
        action, log_std = self.actor(self.standardise(obs))
        if sample:
            noise = torch.randn(action.shape, device=obs.device, generator=generator)
            action = action + log_std.exp() * noise
        return action.clamp(-1.0, 1.0)


class LAPO(Base):
    """Latent-variable advantage-weighted policy optimisation (Chen et al., arXiv 2203.08949)."""

    # A conditional VAE, encoder (s, a) → z, decoder (s, z) → a, prior z ~ N(0, I), learns to
    # reproduce the data's actions, above all those that beat V. The policy chooses z, |z_i| ≤ 2,
    # and the decoder turns it into an action: where the prior has its mass, one like the data's.
    # Networks see standardised states and actions; policy and q_values speak the environment's
    # units, so that σ means the same for every base.

    def __init__(self, args: Args, obs_dim: int, act_dim: int):
        super().__init__(args, obs_dim, act_dim)
        hidden = [args.hidden_dim] * 3
        self.latent_dim = latent_dim = args.latent_dim or 2 * act_dim
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
        self.make_optimizer()

    def see_dataset(self, data: dict[str, np.ndarray]) -> None:
        set_statistics(data["observations"], self.obs_mean, self.obs_std, least=2e-6)
        set_statistics(data["actions"], self.act_mean, self.act_std, least=2e-6)  # as published
        self.widen(torch.from_numpy(data["rewards"]))

    def widen(self, rewards: torch.Tensor) -> None:
        """Widen V's limits to what these rewards allow."""
        # A discounted return lies in [min r, max r]/(1 − γ); where r is paid once, at the end, in
        # [min r, max r]. Ours: 0, V after an end, is always within. Rewards seen online widen the
        # limits too, or the value of a policy better than the data's would be cut off.
        scale = 1.0
        if self.args.value_clamp == "discounted":
            scale = 1.0 / max(1.0 - self.args.gamma, 1e-6)
        self.v_min.clamp_(max=scale * rewards.amin())
        self.v_max.clamp_(min=scale * rewards.amax())

    def act(self, obs, actor, decoder, noise=None) -> torch.Tensor:
        """Dec(s, z), z = 2·tanh(π_z(s)) + clip(0.1·ε, ±0.2); standardised, (B, O) -> (B, A)."""
        z = self.args.max_latent * torch.tanh(actor(obs))
        if noise is not None:  # ε (B, Z)
            z = z + self.args.latent_noise * noise.clamp(-2.0, 2.0)
        return decoder(torch.cat([obs, z], -1))

    def update(self, batches: list[Batch]) -> dict[str, torch.Tensor]:
        """Critics and V once per batch, CVAE and policy once, with the last."""
        args = self.args
        for i, batch in enumerate(batches):
            obs, next_obs = map(self.standardise, (batch.observations, batch.next_observations))
            actions = (batch.actions - self.act_mean) / self.act_std
            batch = Batch(obs, actions, batch.rewards, next_obs, batch.terminations)
            # REDQ: a few of the slow critics make the targets, drawn for every update.
            members = torch.randperm(args.num_critics, device=obs.device)[: args.subset_size]
            metrics = self.update_critics(batch, members)
            if i == len(batches) - 1:  # before this batch moves the slow copies
                metrics |= self.update_policy(batch, members)
                polyak_(self.decoder_target, self.decoder, args.tau)
                polyak_(self.actor_target, self.actor, args.tau)
            polyak_(self.qf_target, self.qf, args.tau)
        return metrics

    def update_critics(self, batch: Batch, members: torch.Tensor) -> dict[str, torch.Tensor]:
        """One step on Q and V; batch standardised."""
        obs, actions, rewards, next_obs, ends = batch
        with torch.no_grad():
            # y_Q = r + γ(1 − d)·V(s'), V the online one. y_V = mixed_q at a noisy action of the
            # slow policy at s: V is the latent policy's value, where IQL's is that of good data.
            target = td_target(rewards, ends, self.vf(next_obs).squeeze(-1), self.args.gamma)
            noise = torch.randn(len(obs), self.latent_dim, device=obs.device)
            policy_action = self.act(obs, self.actor_target, self.decoder_target, noise)
            few = self.qf_target.ask(obs, policy_action, members)
            v_target = mixed_q(few, self.args.doubleq_min)  # (B,)
            self.widen(rewards)
            v_target = v_target.clamp(self.v_min, self.v_max)
        q, v = self.qf(obs, actions), self.vf(obs).squeeze(-1)  # (m, B), (B,)
        qf_loss, vf_loss = ensemble_mse(q, target), ((v - v_target) ** 2).mean()
        self.descend(qf_loss + vf_loss)  # no parameter in common: each gets its own gradient
        metrics = {"losses/vf": vf_loss.detach(), "v_mean": v.detach().mean()}
        return metrics | self.critic_metrics(q, qf_loss)

    def update_policy(self, batch: Batch, members: torch.Tensor) -> dict[str, torch.Tensor]:
        """One step on the CVAE and one on the latent policy; batch standardised."""
        obs, actions, rewards, next_obs, ends = batch
        args = self.args
        # CVAE: w·(Σ(â − a)² + KL), w = 0.9 where adv > 0, else 0.1. adv: one step of the data's
        # action, then the policy, minus V(s): r + γ(1 − d)·Qmix(s', Dec⁻(s', π⁻(s'))) − V(s).
        with torch.no_grad():
            next_action = self.act(next_obs, self.actor_target, self.decoder_target)
            next_q = mixed_q(self.qf_target.ask(next_obs, next_action, members), args.doubleq_min)
            adv = td_target(rewards, ends, next_q, args.gamma) - self.vf(obs).squeeze(-1)
            weight = torch.where(adv > 0, args.good_weight, 1.0 - args.good_weight)  # (B,)
        mean, log_var = self.encoder(torch.cat([obs, actions], -1)).chunk(2, -1)  # (B, Z) each
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)  # gradients reach both
        # Σ(â − a)² is −log N(a; â, ½·I) + const: with the KL, the negative ELBO of a VAE.
        error = ((self.decoder(torch.cat([obs, z], -1)) - actions) ** 2).sum(-1)  # (B,)
        kl = kl_to_standard_normal(mean, log_var)
        cvae_loss = (weight * (error + args.kl_weight * kl)).mean()
        # Policy: maximise mean_j Q_j(s, Dec⁻(s, π_z(s))) through the decoder's slow copy.
        actor_loss = -self.qf(obs, self.act(obs, self.actor, self.decoder_target)).mean()
        # actor_loss runs through the critics, which are not to learn from it.
        learners = nn.ModuleList([self.encoder, self.decoder, self.actor])
        self.descend(cvae_loss + actor_loss, list(learners.parameters()))
        return {
            "losses/cvae": cvae_loss.detach(),
            "losses/actor": actor_loss.detach(),
            "adv": adv.mean(),
            "kl": kl.detach().mean(),
        }

    @torch.no_grad()
    def policy(self, obs: torch.Tensor, sample: bool, generator=None) -> torch.Tensor:
        noise = None
        if sample:  # the noise of V's targets
            noise = torch.randn(len(obs), self.latent_dim, device=obs.device, generator=generator)
        action = self.act(self.standardise(obs), self.actor, self.decoder, noise)
        return (action * self.act_std + self.act_mean).clamp(-1.0, 1.0)

    @torch.no_grad()
    def q_values(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return self.qf(self.standardise(obs), (actions - self.act_mean) / self.act_std)


class AWAC(IQL):
    """Advantage-weighted actor-critic (Nair et al., arXiv 2006.09359): IQL's actor, no V."""

    # IQL never asks about an action outside of the data; AWAC asks about the policy's. Ours: the
    # weights exp(β·A), limited as in IQL; its release has B·softmax(A/λ) over the batch, λ = 1/β.
    # d3rlpy's AWAC, which O3F's authors ran, has batches of 1024 and weight decay 1e-4 (actor).

    def step(self, batch: Batch) -> dict[str, torch.Tensor]:
        """One update of actor and critics, both from the critics before it."""
        obs, actions, rewards, next_obs, ends = batch
        obs, next_obs = self.standardise(obs), self.standardise(next_obs)
        with torch.no_grad():
            # y = r + γ(1 − d)·min_j Q̂_j(s', a'), a' ~ π(·|s').
            next_action = self.policy(batch.next_observations, sample=True)
            next_q = self.qf_target(next_obs, next_action).amin(0)  # (B,)
            target = td_target(rewards, ends, next_q, self.args.gamma)
            # A = min_j Q_j(s, a) − min_j Q_j(s, a_π), a_π ~ π(·|s): better than the policy's own?
            v = self.qf(obs, self.policy(batch.observations, sample=True)).amin(0)
        q = self.qf(obs, actions)  # (m, B)
        actor_loss, metrics = self.imitate(obs, actions, q.detach().amin(0) - v)
        qf_loss = ensemble_mse(q, target)
        self.descend(actor_loss + qf_loss)  # no parameter in common; IQL's V gets no gradient
        polyak_(self.qf_target, self.qf, self.args.tau)
        return metrics | {"v_mean": v.mean()} | self.critic_metrics(q, qf_loss)


class SO2(Base):
    """SO2 (Zhang et al., arXiv 2312.07685): SAC with m critics, and other targets online."""

    # Offline it is SAC-N (arXiv 2110.01548): one target for all critics, with the minimum over
    # them, which is low where data is thin. Online each critic has its own target, no minimum,
    # at a next action with noise (perturbed value update), and ten updates a step. The actor keeps
    # the minimum in both phases. So O3F changes what is tried, SO2 what is learned from it.
    # Ours: o3f on top of it; no diversity term (EDAC), no warm-up; Adam, batch, rate carry on.

    def __init__(self, args: Args, obs_dim: int, act_dim: int):
        super().__init__(args, obs_dim, act_dim)
        hidden = [args.hidden_dim] * 3
        self.qf = Critics(obs_dim, act_dim, args.num_critics, hidden, args.layer_norm)
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.actor = MLP([obs_dim, *hidden, 2 * act_dim])
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.online = False
        self.make_optimizer()

    def set_progress(self, share: float) -> None:
        self.online = True  # the switch, from the first online step on

    def draw(self, obs, generator=None) -> tuple[torch.Tensor, torch.Tensor]:
        """a = tanh(u), u ~ N(μ(s), σ(s)²), and log π(a|s): (B, O) -> (B, A), (B,)."""
        mean, log_std = self.actor(obs).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp(), validate_args=False)
        u = mean + normal.stddev * torch.randn(mean.shape, device=obs.device, generator=generator)
        # log(1 − tanh²u), tanh's slope, as log(4/(eᵘ + e⁻ᵘ)²), which is finite for any u.
        log_slope = 2.0 * (np.log(2.0) - u - nn.functional.softplus(-2.0 * u))
        return torch.tanh(u), (normal.log_prob(u) - log_slope).sum(-1)

    def alpha(self) -> torch.Tensor:  # learned from 1 offline, constant online
        learned = self.log_alpha.detach().exp()
        return torch.full_like(learned, self.args.online_alpha) if self.online else learned

    def update(self, batches: list[Batch]) -> dict[str, torch.Tensor]:
        for batch in batches:
            metrics = self.update_critics(batch)
            polyak_(self.qf_target, self.qf, self.args.tau)
        return metrics | self.update_actor(self.standardise(batch.observations))

    def update_critics(self, batch: Batch) -> dict[str, torch.Tensor]:
        obs, actions, rewards, next_obs, ends = batch
        obs, next_obs = self.standardise(obs), self.standardise(next_obs)
        with torch.no_grad():
            # y_j = r + γ(1 − d)·(Q̂_j(s', a') − α·log π(a'|s')); offline min_j Q̂_j for all j.
            next_action, log_prob = self.draw(next_obs)
            if self.online:  # Q̂_j at a' + clip(ε, ±2 std), log π still of a'
                noise = torch.randn_like(next_action).clamp(-2.0, 2.0)
                next_action = (next_action + self.args.target_noise * noise).clamp(-1.0, 1.0)
            next_q = self.qf_target(next_obs, next_action)  # (m, B)
            if not self.online:
                next_q = next_q.amin(0)  # (B,)
            target = td_target(rewards, ends, next_q - self.alpha() * log_prob, self.args.gamma)
        q = self.qf(obs, actions)  # (m, B)
        qf_loss = ensemble_mse(q, target)
        self.descend(qf_loss)
        return self.critic_metrics(q, qf_loss)

    def update_actor(self, obs: torch.Tensor) -> dict[str, torch.Tensor]:
        action, log_prob = self.draw(obs)
        # Minimise α·log π(a|s) − min_j Q_j(s, a); α grows while the entropy is below −|A|.
        loss = (self.alpha() * log_prob - self.qf(obs, action).amin(0)).mean()
        alpha_loss = -self.log_alpha * (log_prob.detach().mean() - self.sizes[1])
        learners = list(self.actor.parameters())
        if not self.online:
            learners.append(self.log_alpha)
        self.descend(loss + alpha_loss, learners)
        entropy = -log_prob.detach().mean()
        return {"losses/actor": loss.detach(), "alpha": self.alpha(), "entropy": entropy}

    @torch.no_grad()
    def policy(self, obs: torch.Tensor, sample: bool, generator=None) -> torch.Tensor:
        obs = self.standardise(obs)
        if sample:
            return self.draw(obs, generator)[0]
        return torch.tanh(self.actor(obs).chunk(2, -1)[0])


BASES = {"iql": IQL, "lapo": LAPO, "awac": AWAC, "so2": SO2}


def explore_action(agent: Base, obs: torch.Tensor, args: Args, generator=None):
    """The action to execute, (B, O) -> (B, A), and its optimism (B,): 0 for the baselines."""
    action = agent.policy(obs, args.proposal == "sample", generator)  # a ~ π(·|s)
    if args.explore == "policy":
        return action, torch.zeros_like(action[:, 0])
    # new in O3F: N candidates to choose from; noise is one, without a choice
    n = {"o3f": args.num_candidates, "noise": 1}[args.explore]
    return optimistic_action(obs, action, agent.q_values, n, args.sigma, args.omega, generator)


# ==== 6. Replay buffer, and both phases ====
class ReplayBuffer:
    """The dataset, then the online transitions, on the agent's device."""

    # One float32 tensor of O, A, 1, O, 1 columns: a batch is one gather.
    def __init__(self, data: dict[str, np.ndarray], online_steps: int, device: torch.device):
        self.size = self.num_offline = len(data["rewards"])
        self.widths = [int(np.prod(data[name].shape[1:])) for name in Batch._fields]
        shape = self.size + online_steps, sum(self.widths)
        # numpy's: where memory is short, its error says of what.
        self.rows = torch.from_numpy(np.zeros(shape, np.float32)).to(device)
        for column, name in zip(self.rows.split(self.widths, 1), Batch._fields):
            column[: self.size] = torch.from_numpy(data[name].reshape(self.size, -1))

    def add(self, obs, action, reward: float, next_obs, end: bool) -> None:
        """Append one transition, its reward as the agent is to see it. Raises: UserError (§7)."""
        row = np.concatenate([obs, action, [reward], next_obs, [end]]).astype(np.float32)
        if not np.isfinite(row).all():
            raise UserError("the environment gave NaN or inf; --load an earlier agent")
        self.rows[self.size].copy_(torch.from_numpy(row))
        self.size += 1

    def sample(self, batch_size: int, batches: int = 1, offline_ratio: Optional[float] = None):
        """A list of batches, uniform over all rows, or with this share from the dataset's."""
        device = self.rows.device
        index = torch.randint(self.size, (batches, batch_size), device=device)
        if offline_ratio is not None and self.size > self.num_offline:
            n = round(offline_ratio * batch_size)
            shape = (batches, batch_size - n)
            index[:, :n] = torch.randint(self.num_offline, (batches, n), device=device)
            index[:, n:] = torch.randint(self.num_offline, self.size, shape, device=device)
        obs, actions, rewards, next_obs, ends = self.rows[index].split(self.widths, -1)
        columns = obs, actions, rewards.squeeze(-1), next_obs, ends.squeeze(-1)
        return [Batch(*batch) for batch in zip(*columns)]


def learn(agent: Base, buffer: ReplayBuffer, args: Args, utd: int, offline_ratio=None) -> dict:
    """The base's own Update on fresh batches, in both phases -> metrics."""
    device, rounded = buffer.rows.device.type, args.precision == "bfloat16"
    # Only here: to rank in bfloat16 would change half of the choices (measured: kitchen, σ 0.05).
    with torch.autocast(device, torch.bfloat16, rounded, cache_enabled=False):  # Adam moves weights
        return agent.update(buffer.sample(args.batch_size, utd, offline_ratio))


def main(args: Args) -> dict:
    """Pretrain, fine-tune, evaluate -> what summary.json holds. Raises: UserError."""
    saved = load_saved(args)  # a stopped run, an agent to load, or None
    if args.resume:
        args = replace(Args(**saved["args"]), resume=args.resume)
    check(args, saved)
    task = get_task(args.env_id)
    device = get_device(args)
    # Independent streams: to evaluate more often, say, changes nothing in training.
    draw = np.random.SeedSequence(args.seed).generate_state
    explore_seed, env_seed, eval_seed = draw(3).tolist()
    generator = torch.Generator(device).manual_seed(explore_seed)
    torch.manual_seed(args.seed)  # the global stream: what learning draws, and nothing else

    env = gym.wrappers.RecordEpisodeStatistics(make_env(args.env_id))
    # rule(obs, r, next_obs, end) -> the r and d to learn from; facts: file, sha256, rows
    data, rule, facts = load_dataset(args, task, env, saved)
    agent = make_agent(args, data, saved, device)
    buffer = ReplayBuffer(data, args.online_steps, device)
    with Run(args, task, agent, buffer, rule, generator, facts, eval_seed, saved) as run:
        # The same functions with a stopwatch, for summary.json.
        timed_learn, timed_explore = run.timed(learn), run.timed(explore_action)
        timed_step = run.timed(env.step)

        # Steps up to 0 are offline updates, later ones environment steps: one axis for both.
        for step in run.steps("offline", last=0):
            run.record(step, timed_learn(agent, buffer, args, utd=1))

        # O3F's Algorithm 1: objective (SO2 changes it), buffer and optimiser carry on.
        # Reset twice: the first draws what is drawn once (the goal of ant mazes v1), then
        # each episode has its own seed: a resumed run needs no simulator state.
        env.reset(seed=env_seed)
        obs, _ = env.reset(seed=env_seed + run.episode)
        for step in run.steps("online", last=args.online_steps):
            agent.set_progress(step / args.online_steps)
            obs_tensor = torch.as_tensor(obs, dtype=torch.float32, device=device)[None]  # (1, O)
            action, optimism = timed_explore(agent, obs_tensor, args, generator)
            action = action[0].cpu().numpy()
            next_obs, reward, terminated, truncated, info = timed_step(action)
            # A time limit (truncated) ends the episode, not the task: d stays 0, V(s') counts.
            train_reward, end = rule(obs, reward, next_obs, terminated)
            buffer.add(obs, action, train_reward, next_obs, end)
            metrics = timed_learn(agent, buffer, args, args.utd, args.offline_ratio)
            metrics["o3f/optimism"] = optimism[0]
            run.record(step, metrics, info.get("episode"))  # counts run.episode
            obs = next_obs
            if terminated or truncated:
                obs, _ = env.reset(seed=env_seed + run.episode)
        return run.finish()


# ==== 7. Tasks and environments ====
# The algorithm is over. From here on: what feeds it, and keeps what comes of it.
class UserError(ValueError):
    """Something that the user can put right: printed as one line, exit code 2."""


@contextlib.contextmanager
def explain(hint: str, say: Optional[Callable] = None):
    """An exception of the body becomes a UserError that starts with hint, or goes to `say`."""
    try:
        yield
    except Exception as error:
        if say is None:
            raise UserError(f"{hint}: {error}") from error
        say(f"{hint}: {error}")  # a warning, or one of several failures


class Task(NamedTuple):
    family: str  # locomotion, kitchen, antmaze or other
    gym_id: str = ""  # for gymnasium.make; empty where this file has the environment
    low: float = 0.0  # return that scores 0 (d4rl's infos.py)
    high: float = 100.0  # that scores 100; without a range the score is the return

    def score(self, returns):  # D4RL's normalised score of undiscounted raw rewards
        return 100.0 * (returns - self.low) / (self.high - self.low)


LEVELS = "(random|medium|medium-replay|medium-expert|full-replay|expert)-v[012]"
# Not v0: its files' time limits are out of step with their episodes.
MAZE = "(umaze|umaze-diverse|medium-play|medium-diverse|large-play|large-diverse)-v[12]"
TASKS = {  # by pattern of their names
    # -v4: v5 changed Walker2d's foot friction, and the healthy reward of two.
    f"halfcheetah-{LEVELS}": Task("locomotion", "HalfCheetah-v4", -280.178953, 12135.0),
    f"hopper-{LEVELS}": Task("locomotion", "Hopper-v4", -20.272305, 3234.3),
    f"walker2d-{LEVELS}": Task("locomotion", "Walker2d-v4", 1.629008, 4592.3),
    "kitchen-(complete|partial|mixed)-v0": Task("kitchen", "", 0.0, 4.0),
    f"antmaze-{MAZE}": Task("antmaze", "", 0.0, 1.0),
}
KITCHENS = {  # sub-tasks that pay
    "kitchen-complete-v0": ("microwave", "kettle", "light switch", "slide cabinet"),
    "kitchen-partial-v0": ("microwave", "kettle", "light switch", "slide cabinet"),
    "kitchen-mixed-v0": ("microwave", "kettle", "bottom burner", "light switch"),
}
# The papers' values where they differ from Args, or ours, as measured: the narrower key wins.
PRESETS = {
    "antmaze": dict(sigma=0.05),
    "kitchen": dict(sigma=0.05),
    "iql/antmaze": dict(expectile=0.9, beta=10.0, reward_transform="minus_one"),
    # Rewards are of order 1 as they are. Measured: samples score half as much as the mean (9,876
    # rows); with σ 0.02 the optimistic action half as much as the policy, at most (14,085).
    "iql/kitchen": dict(
        beta=0.5, actor_dropout=0.1, reward_transform="none", proposal="mean", sigma=0.01
    ),
    "iql/other": dict(normalise_adv=True),  # a stranger's reward scale is unknown
    # Measured on wide data (halfcheetah-random): policy 29, with LayerNorm 20. There plain critics
    # hold at σ 0.2; on narrow data (the medium stand-in) they do not: 52 to 9.
    "lapo": dict(batch_size=512, learning_rate=2e-4, utd=20, proposal="mean", layer_norm=False),
    "lapo/antmaze": dict(doubleq_min=0.7, value_clamp="once", reward_transform="x100"),
    "awac": dict(beta=1.0),
    "awac/antmaze": dict(reward_transform="minus_one"),
    "awac/kitchen": dict(actor_dropout=0.1, reward_transform="none", proposal="mean"),
    "awac/other": dict(normalise_adv=True),
    # α is in the rewards' units, so they stay raw. As published, plain networks.
    "so2": dict(utd=10, reward_transform="none", layer_norm=False, standardise=False),
}


def get_task(env_id: str) -> Task:
    for pattern, task in TASKS.items():
        if re.fullmatch(pattern, env_id):
            return task
    if env_id in gym.registry or ":" in env_id:  # module:Id imports the module first
        return Task("other", env_id)
    known = ", ".join(TASKS)
    raise UserError(f"--env-id {env_id}: no such task, known: {known}, gymnasium's")


def preset(env_id: str, base: str, **flags) -> Args:
    """The papers' values for a task and a base, and the flags that are given."""
    family, values = get_task(env_id).family, {}
    for key in (base, family, f"{base}/{family}"):  # the narrower later
        values |= PRESETS.get(key, {})
    return Args(env_id, base, **(values | flags))


def d4rl_dir() -> Path:  # d4rl as a folder: to import it takes the MuJoCo of 2021
    spec = importlib.util.find_spec("d4rl")
    if spec is None:
        raise UserError("package d4rl is missing: pip install --no-deps d4rl==1.1")
    return Path(spec.submodule_search_locations[0])  # found without running it


def make_env(env_id: str, **kwargs) -> gym.Env:
    """A task's environment, with a time limit and actions in the ±1 box."""
    task = get_task(env_id)
    mujoco.set_mju_user_warning(warnings.warn)  # not into a file
    if task.family == "kitchen":
        return gym.wrappers.TimeLimit(KitchenEnv(KITCHENS[env_id], **kwargs), 280)
    if task.family == "antmaze":
        limit = 700 if "umaze" in env_id else 1000
        return gym.wrappers.TimeLimit(AntMazeEnv(env_id, **kwargs), limit)
    with explain(f"--env-id {env_id}: gymnasium cannot make it"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that -v4 is out of date: it is D4RL's
        env = gym.make(task.gym_id, disable_env_checker=True, **kwargs)
    box = env.action_space
    with explain(f"--env-id {env_id}: needs flat boxes of observations and bounded actions"):
        if len(env.observation_space.shape + box.shape) != 2 or not box.is_bounded():
            raise ValueError(f"{env.observation_space}, {box}")
        if (box.low != -1).any() or (box.high != 1).any():
            env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    if env.spec.max_episode_steps is None:
        env = gym.wrappers.TimeLimit(env, 1000)  # an evaluation has to end
    return env


class MujocoEnv(gym.Env):  # what kitchen and ant maze share
    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}
    renderer = None  # made at the first picture: training needs no OpenGL

    def __init__(self, model: mujoco.MjModel, obs_dim: int, limit: float, render_mode):
        if render_mode not in (None, "rgb_array"):
            raise UserError(f"render_mode {render_mode}: only rgb_array is here, or None")
        self.model, self.data = model, mujoco.MjData(model)
        self.render_mode, self.camera = render_mode, mujoco.MjvCamera()  # free, it is moved below
        self.observation_space = gym.spaces.Box(-limit, limit, (obs_dim,), np.float64)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (model.nu,), np.float32)

    def put(self, qpos, qvel) -> None:  # all else as at time 0
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = qpos
        self.data.qvel[:] = qvel
        mujoco.mj_normalizeQuat(self.model, self.data.qpos)  # MuJoCo 2 did so by itself
        mujoco.mj_forward(self.model, self.data)

    def reset(self, *, seed: Optional[int] = None, options: Optional[dict] = None):
        super().reset(seed=seed)  # all draws come from this generator
        self.put(*self.start())
        return self.observe(), {}

    def render(self) -> np.ndarray:  # (480, 640, 3); without a screen: MUJOCO_GL=egl
        if self.renderer is None:
            # Drawn on a CPU, a kitchen took 1.4 s, most of it for the shadows of four lamps, then
            # for eight samples a pixel of a frame 16 times as large as ours. So it takes 0.2 s.
            self.model.vis.quality.offsamples = 4
            self.model.vis.global_.offwidth, self.model.vis.global_.offheight = 640, 480
            self.renderer = mujoco.Renderer(self.model, 480, 640)
            self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        self.renderer.update_scene(self.data, self.camera)
        return self.renderer.render()


KITCHEN_GOALS = {  # where an observation has the object, and where it must be
    "bottom burner": ([11, 12], [-0.88, -0.01]),
    "light switch": ([17, 18], [-0.69, -0.05]),
    "slide cabinet": ([19], [0.37]),
    "microwave": ([22], [-0.75]),
    "kettle": ([23, 24, 25, 26, 27, 28, 29], [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06]),
}


def kitchen_done(obs: np.ndarray, targets: tuple) -> np.ndarray:
    done = []  # which sub-tasks' objects are near their goals: (..., ≥ 30) -> (..., k)
    for target in targets:
        index, goal = KITCHEN_GOALS[target]
        done.append(np.linalg.norm(obs[..., index] - goal, axis=-1) < 0.3)
    return np.stack(done, -1)


@functools.lru_cache(1)  # 1.3 s, once for all environments: stepping only reads it
def kitchen_model() -> mujoco.MjModel:
    scene = d4rl_dir() / "kitchen/adept_envs/franka/assets/franka_kitchen_jntpos_act_ab.xml"
    kettle = "../../../adept_models/kitchen/assets/kettle_asset.xml"
    # MuJoCo since 3.2 wants a named default class to have a parent: an unnamed one
    # gives it, in memory, and changes nothing else.
    text = (scene.parent / kettle).read_text()
    text = text.replace('<default class="kettle">', '<default><default class="kettle">')
    text = text.replace("</mujocoinclude>", "</default></mujocoinclude>")
    return mujoco.MjModel.from_xml_path(str(scene), {kettle: text.encode()})


class KitchenEnv(MujocoEnv):
    """D4RL's Franka kitchen, its kitchen_multitask_v0.py, on current MuJoCo."""

    # obs (60,): 9 robot joints, 21 object joints, 30 goal entries; rad and m.
    # action (9,): ±1 is ±2 rad/s (fingers m/s), held for 0.08 s.
    # reward: 1 for each sub-task, when first satisfied; terminated once all are.
    INIT_QPOS = np.array([
        0.148388023, -1.76848573, 1.84390296, -2.4768576, 0.260252026, 0.712533105, 1.59515394,
        0.0479267505, 0.0371350919, -2.6627985e-4, -5.18043486e-5, 3.1287722e-5, -4.51199853e-5,
        -3.90842156e-6, -4.22629655e-5, 6.28065475e-5, 4.04984708e-5, 4.62730939e-4, -2.26906415e-4,
        -4.65501369e-4, -0.00644129196, -0.00177048263, 0.00108009684, -0.26939744, 0.350383255,
        1.61944683, 1.00618764, 0.0040639512, -0.00662095997, -2.68278933e-4])  # fmt: skip

    def __init__(self, targets: tuple[str, ...], noise_ratio: float = 0.1, render_mode=None):
        super().__init__(kitchen_model(), 60, 8.0, render_mode)
        self.targets, self.noise_ratio = targets, noise_ratio  # 0.1 is D4RL's
        self.camera.lookat, self.camera.distance = [-0.2, 0.5, 2.0], 2.2  # m; D4RL's view
        self.camera.azimuth, self.camera.elevation = 70, -35
        config = d4rl_dir() / "kitchen/adept_envs/franka/robot/franka_config.xml"
        joints = ElementTree.parse(config).getroot()[:30]
        self.bounds = np.array([x.get("pos_bound").split() for x in joints], float).T  # (2, 30)
        self.noise_amp = np.array([x.get("pos_noise_amp") for x in joints], float)
        self.goal = np.zeros(30)
        for target in targets:
            index, goal = KITCHEN_GOALS[target]
            self.goal[index] = goal

    def start(self):
        self.done = np.zeros(len(self.targets), bool)
        return self.INIT_QPOS, 0.0  # D4RL does not clip it to the bounds

    def observe(self) -> np.ndarray:
        noise = self.np_random.uniform(-1.0, 1.0, 30)  # drawn at every look, as in D4RL
        self.seen = self.data.qpos + self.noise_ratio * self.noise_amp * noise
        return np.concatenate([self.seen, self.goal])

    def step(self, action: np.ndarray):
        # The arm steers from its joints as last *seen*, noise included: D4RL's rule.
        ctrl = self.seen[:9] + 2.0 * np.clip(action, -1.0, 1.0) * 0.08
        self.data.ctrl[:] = ctrl.clip(*self.bounds[:, :9])
        mujoco.mj_step(self.model, self.data, 40)  # 40 steps of 2 ms
        obs = self.observe()
        new = kitchen_done(obs, self.targets) & ~self.done  # each is paid once
        self.done |= new  # once done, always done
        info = {"completed": self.done.copy()}
        return obs, float(new.sum()), bool(self.done.all()), False, info


MAZES = {  # d4rl's *_MAZE_TEST; a cell is 4 m wide, the start S is at (0, 0)
    "umaze": "##### #S..# ###.# #G..# #####",  # rows, top to bottom
    "medium": "######## #S.##..# #..#...# ##...### #..#...# #.#..#.# #...#.G# ########",
    "large": "############ #S...#.....# #.##.#.#.#.# #......#...# #.####.###.# #..#.#.....# "
    "##.#.#.#.### #..#...#.G.# ############",
}


class AntMazeEnv(MujocoEnv):
    """D4RL's ant maze, its maze_env.py and ant.py, on current MuJoCo."""

    # obs (29,): qpos (x, y, z, quaternion, 8 joints), qvel (14); not the goal.
    # action (8,): ±1 is the motors' range, held for 0.1 s.
    # reward: 1 within 0.5 m of the goal, which terminates; nothing else does.
    def __init__(self, env_id: str, render_mode: Optional[str] = None):
        cells = np.array([list(row) for row in MAZES[env_id.split("-")[1]].split()])
        start = np.argwhere(cells == "S")[0]
        self.goal_cell = 4.0 * (np.argwhere(cells == "G")[0] - start)[::-1]  # (x, y), m
        spec = mujoco.MjSpec.from_file(str(d4rl_dir() / "locomotion/assets/ant.xml"))
        wall = dict(type=mujoco.mjtGeom.mjGEOM_BOX, size=[2, 2, 1], contype=1, conaffinity=1)
        for row, column in 4.0 * (np.argwhere(cells == "#") - start):
            spec.worldbody.add_geom(pos=[column, row, 1], **wall)
        # A visible goal. Compiled at 0, MuJoCo would take it for fixed.
        spec.worldbody.add_site(name="goal", pos=[1, 1, 0], size=[0.5] * 3)
        super().__init__(spec.compile(), 29, np.inf, render_mode)
        middle = 2.0 * np.array(cells.shape) - 2.0 - 4.0 * start
        self.camera.lookat = [middle[1], middle[0], 0.0]
        self.camera.azimuth, self.camera.elevation = 90, -80  # from above, x to the right
        self.camera.distance = 5.5 * len(cells)
        self.goal = None
        self.moves = env_id.endswith("v2")  # v1: the first draw stays

    def observe(self) -> np.ndarray:
        return np.concatenate([self.data.qpos, self.data.qvel])

    def start(self):
        # D4RL draws both.
        jitter = self.np_random.uniform(0.0, 1.0, 2) + self.np_random.uniform(0.0, 0.5, 2)
        if self.goal is None or self.moves:
            self.goal = np.maximum(self.goal_cell + jitter, 0.0)
            self.model.site("goal").pos[:2] = self.goal
        qpos = self.model.qpos0 + self.np_random.uniform(-0.1, 0.1, self.model.nq)
        return qpos, 0.1 * self.np_random.standard_normal(self.model.nv)

    def step(self, action: np.ndarray):
        low, high = self.model.actuator_ctrlrange.T
        self.data.ctrl[:] = low + (np.clip(action, -1.0, 1.0) + 1.0) / 2.0 * (high - low)
        mujoco.mj_step(self.model, self.data, 5)  # 5 steps of 20 ms
        reached = bool(np.linalg.norm(self.data.qpos[:2] - self.goal) <= 0.5)
        return self.observe(), float(reached), reached, False, {}


# ==== 8. Data ====
MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main"
KEYS = "observations actions rewards terminals timeouts".split()  # of D4RL's files


def find_dataset(args: Args, env: gym.Env) -> Path:
    """--dataset, else D4RL's cache, else collected (*-random-v2), else downloaded."""
    # d4rl's own folder and names: its downloads are found.
    cache = Path(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl/datasets")
    if args.dataset.startswith("minari:"):
        path = cache / re.sub("[/:]", "-", f"{args.dataset}.{args.env_id}.hdf5")
        convert_minari(args, env, path)
        return path
    if args.dataset not in ("", "random"):
        if not Path(args.dataset).is_file():
            raise UserError(f"--dataset {args.dataset}: there is no such file")
        return Path(args.dataset)
    name = re.sub("[/:]", "-", args.env_id)
    random = cache / f"{name}.collected-uniform-{args.dataset_size}.hdf5"
    official = cache / f"{name.replace('-', '_', name.count('-') - 1)}.hdf5"  # hopper_medium-v2
    if args.dataset == "" and official.is_file():
        return official
    if args.dataset == "random" or name.endswith("-random-v2"):
        if not random.is_file():
            collect_random(args.env_id, args.dataset_size, random)
        return random
    if get_task(args.env_id).family == "other":
        raise UserError("this task has no file: --dataset FILE or --dataset random")
    return download(args.env_id, cache, env)


def download(env_id: str, cache: Path, env: gym.Env) -> Path:
    """D4RL's file, from its server or a mirror, whole or not at all."""
    table = runpy.run_path(str(d4rl_dir() / "infos.py"))["DATASET_URLS"]
    ants = (d4rl_dir() / "locomotion/__init__.py").read_text()  # has v1, the table not
    urls = re.findall(f"'{env_id}'.*?'(http[^']+)'", ants, re.DOTALL)
    url = table.get(env_id, *urls[:1])
    if url is None:
        raise UserError(f"d4rl knows no file of {env_id}: --dataset FILE")
    path, failures = cache / Path(url).name, []
    if path.is_file():
        return path
    fetch = pooch.HTTPDownloader(timeout=10, progressbar=sys.stderr.isatty())
    for source in (url, f"{MIRROR}/{path.name}"):
        with explain(source, failures.append):
            pooch.retrieve(source, None, path.name, cache, downloader=fetch)
            load_hdf5(path, env)
            return path
        path.unlink(missing_ok=True)  # an error page, say
    ways = "--dataset FILE, random"
    if get_task(env_id).family == "kitchen":  # the same demonstrations, simulated anew
        ways += f", minari:D4RL/kitchen/{env_id.split('-')[1]}-v2"
    raise UserError(f"no source for {path.name}: {failures}. Ways on: {ways}")


def open_minari(dataset: str):
    """minari:ID as a minari.MinariDataset, from its own folder or its server."""
    with explain(f'--dataset {dataset}: needs pip install "minari[hdf5,hf]" and an ID it knows'):
        return importlib.import_module("minari").load_dataset(dataset[7:], download=True)


def convert_minari(args: Args, env: gym.Env, path: Path) -> None:
    """Write a Minari dataset in D4RL's layout: flat observations, actions in the ±1 box."""
    dataset, targets = open_minari(args.dataset), KITCHENS.get(args.env_id)
    rows = []
    with explain(f"--dataset {args.dataset}: no flat boxes, nor of {args.env_id}"):
        low, high = dataset.action_space.low, dataset.action_space.high
        if not dataset.action_space.is_bounded():
            raise ValueError(f"its actions are in {dataset.action_space}, without bounds")
        for episode in dataset.iterate_episodes():
            obs, rewards = episode.observations, episode.rewards
            if targets:  # (T + 1, 59): 9 + 9 of the robot, 21 + 20 of objects, joints + velocities
                state = obs["observation"]
                goal = np.broadcast_to(env.unwrapped.goal, (len(state), 30))
                obs = np.concatenate([state[:, :9], state[:, 18:39], goal], 1)
                rewards = kitchen_done(obs[:-1], targets).sum(1)  # as in D4RL's files
            actions = 2.0 * (episode.actions - low) / (high - low) - 1.0
            ends, timeouts = episode.terminations, episode.truncations.copy()
            timeouts[-1] = not ends[-1]
            rows.append((obs[:-1], actions, rewards, ends, timeouts))
        columns = [np.concatenate(column).astype(np.float32) for column in zip(*rows)]
        for column, space in zip(columns, (env.observation_space, env.action_space)):
            if column.shape[1:] != space.shape:
                raise ValueError(f"it has {column.shape[1:]} where {space.shape} is needed")
    write_hdf5(path, columns)


def collect_random(env_id: str, size: int, path: Path) -> None:
    env, rows = make_env(env_id), []  # how D4RL's *-random files were made
    env.action_space.seed(0)  # the same file when made again
    obs, _ = env.reset(seed=0)
    for _ in tqdm(range(size), f"collecting {env_id}", disable=None):
        action = env.action_space.sample()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        rows.append((obs, action, reward, terminated, truncated and not terminated))
        obs = next_obs
        if terminated or truncated:
            obs, _ = env.reset()
    write_hdf5(path, zip(*rows))


def write_hdf5(path: Path, columns) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # a kill leaves no half file
    part.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(part, "w") as file:
        for name, column in zip(KEYS, columns):
            file[name] = np.array(column, np.float32)
    part.replace(path)  # a rename is whole or not at all


def load_hdf5(path: Path, env: gym.Env) -> dict[str, np.ndarray]:
    """D4RL's arrays, checked: observations (n, O), actions (n, A), the rest (n,); bool ends."""
    shapes = {"observations": env.observation_space.shape, "actions": env.action_space.shape}
    raw = {}
    with explain(f"{path}: no whole HDF5 file of this task"), h5py.File(path) as file:
        for name in KEYS:
            if name == "timeouts" and name not in file:
                continue  # mark_ends finds them
            kind = bool if name in ("terminals", "timeouts") else np.float32
            with np.errstate(over="ignore"):  # becomes inf, and is refused
                raw[name] = file[name][...].astype(kind)  # h5py says which one is missing
            shape = (len(raw["observations"]), *shapes.get(name, ()))
            if raw[name].shape != shape:
                raise ValueError(f"{name} has shape {raw[name].shape}, needs {shape}")
            bad = np.argwhere(~np.isfinite(raw[name]))
            if len(bad):
                raise ValueError(f"NaN or inf in {name}, row {bad[0, 0]}: remove it")
        peak = np.abs(raw["actions"]).max()
        if peak > 1 + 1e-6:
            raise ValueError(f"actions reach {peak:.4g}, expected within ±1")
    return raw


def to_transitions(raw: dict) -> dict[str, np.ndarray]:  # d4rl.qlearning_dataset
    # s' is the next row's observation: the last row goes, and each at a time limit.
    # After a terminal it is another episode's too, but 1 − d = 0 takes it out.
    keep = np.flatnonzero(~raw["timeouts"][:-1])  # rows that have a successor
    return {
        "observations": raw["observations"][keep],
        "actions": raw["actions"][keep],
        "rewards": raw["rewards"][keep],
        "next_observations": raw["observations"][keep + 1],
        "terminations": raw["terminals"][keep],
    }


class RewardRule(NamedTuple):
    """The reward and the true end to learn from: one rule for file and online steps."""

    scale: float  # r ← scale·r + shift
    shift: float  # both: --reward-transform with the dataset's constants
    targets: tuple[str, ...]  # a kitchen's, with --kitchen-rewards consistent

    def __call__(self, obs, rewards, next_obs, ends):  # rows, or one: -> rewards, ends
        # A kitchen's file pays the number of satisfied sub-tasks in every row, the
        # environment each once: two reward functions, not to meet in one buffer.
        # satisfied(s) − 4 ≤ 0, so finishing is worth most; the end is all four at s'.
        if self.targets:
            rewards = kitchen_done(obs, self.targets).sum(-1) - float(len(self.targets))
            ends = kitchen_done(next_obs, self.targets).all(-1)
        return self.scale * rewards + self.shift, ends


def make_rule(transform: str, targets: tuple, rewards, returns) -> RewardRule:
    """rewards (n,): those to be transformed; returns (episodes,): of the file's raw rewards."""
    scale = {"x100": 100.0}.get(transform, 1.0)
    if transform == "return_range":
        if np.ptp(returns) == 0:
            raise UserError("all episodes return the same: use --reward-transform none")
        scale = 1000.0 / np.ptp(returns)
    if transform == "max":
        largest = rewards.max()
        if largest <= 0:  # a kitchen's satisfied − 4: dividing would turn the signs
            largest = np.abs(rewards).max()
        scale = 1.0 / (largest or 1.0)
    return RewardRule(float(scale), {"minus_one": -1.0}.get(transform, 0.0), targets)


def mark_ends(args: Args, task: Task, env: gym.Env, raw: dict) -> None:
    """Put terminals and timeouts right, in place."""
    obs, ends = raw["observations"], raw["terminals"]
    if task.family == "kitchen" and np.abs(obs[:, 30:] - env.unwrapped.goal).max() > 1e-3:
        raise UserError(f"--dataset is of another kitchen than {args.env_id}")
    if task.family == "kitchen" and args.kitchen_rewards == "consistent":
        # A file calls a demonstration's last row terminal, solved or not: a time limit.
        raw["timeouts"] = ends | raw.get("timeouts", False)
        raw["terminals"] = np.zeros_like(ends)
    if "timeouts" not in raw:
        raw["timeouts"], step = np.zeros_like(ends), 0
        limit = env.get_wrapper_attr("_max_episode_steps")
        for t, end in enumerate(ends):
            step += 1
            if step == limit:
                raw["timeouts"][t] = True
                step = 0  # d4rl counts from 0 after a limit,
            elif end:
                step = 1  # from 1 after a terminal


def load_dataset(args: Args, task: Task, env: gym.Env, saved: Optional[dict] = None):
    """Find, check, convert: transitions (keys of Batch), RewardRule, facts."""
    path = find_dataset(args, env)
    raw = load_hdf5(path, env)
    mark_ends(args, task, env, raw)
    data = to_transitions(raw)
    if len(data["rewards"]) == 0:
        raise UserError(f"{path.name}: every row is a time limit")
    over = raw["terminals"] | raw["timeouts"]  # last rows of episodes
    starts = np.flatnonzero(np.append(True, over[:-1]))
    returns = np.add.reduceat(raw["rewards"], starts, dtype=np.float64)  # one per episode
    targets = ()
    if args.kitchen_rewards == "consistent":
        targets = KITCHENS.get(args.env_id, ())
    obs, next_obs = data["observations"], data["next_observations"]
    plain = RewardRule(1.0, 0.0, targets)  # the transform's constants are of its rewards
    rewards, ends = plain(obs, data["rewards"], next_obs, data["terminations"])
    rule = make_rule(args.reward_transform, targets, rewards, returns)
    if saved:  # its critics are in that rule's units, whatever the data
        rule = RewardRule(*saved["rule"], targets)
    data["rewards"] = (rule.scale * rewards + rule.shift).astype(np.float32)
    data["terminations"] = ends.astype(np.float32)
    if args.base in ("iql", "awac"):  # as in IQL's authors' code
        data["actions"] = data["actions"].clip(-1 + 1e-5, 1 - 1e-5)

    # Two lines to read before hours are spent.
    rows, low, high = len(raw["rewards"]), returns.min(), returns.max()
    size = f"{rows:,} rows, {len(returns):,} episodes, {ends.sum():.0f} true ends"
    print(f"data: {path.name}, {size}, returns {low:.1f} to {high:.1f}")
    line = f"rewards: trained on {rule.scale:.4g}·r{rule.shift:+g}"
    if targets:
        line += f", r = satisfied sub-tasks − {len(targets)}"
    print(line)
    return data, rule, dict(file=path.name, sha256=pooch.file_hash(path), rows=rows)


# ==== 9. Evaluation ====
def kendall_tau(x, y, window: int = 10) -> np.ndarray:
    """Kendall's τ of x and y (T,) in every window of ten steps, (T − 9,); SO2's diagnostic."""
    # τ = (pairs that x and y order alike − pairs they order oppositely) / all pairs; ties add 0.
    if len(x) < window:
        return np.zeros(0)
    i, j = np.triu_indices(window, 1)  # 45 pairs
    both = np.lib.stride_tricks.sliding_window_view([x, y], window, axis=1)  # (2, T − 9, 10)
    return np.sign(both[..., i] - both[..., j]).prod(0).mean(1)


@torch.no_grad()
def evaluate(agent: Base, envs: list, rule, task: Task, args: Args, seed: int) -> dict:
    """One episode per environment, side by side: one policy call a step for all."""
    # From the same seeds always: a change of the score is the policy's, not the draw's.
    n, device = len(envs), next(agent.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    explore = {"policy": "policy", "optimistic": "o3f"}[args.eval_action]
    args = replace(args, explore=explore, proposal="mean")  # no sample of the policy
    obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    q, rewards = [[] for _ in envs], [[] for _ in envs]  # of each episode's steps
    returns, ended, cut = np.zeros(n), np.zeros(n, bool), np.zeros(n, bool)
    while not ended.all():
        running = np.flatnonzero(~ended)
        obs_tensor = torch.as_tensor(obs[running], dtype=torch.float32, device=device)
        actions, _ = explore_action(agent, obs_tensor, args, generator)
        expected = agent.q_values(obs_tensor, actions).mean(0).tolist()
        for i, action, q_now in zip(running, actions.cpu().numpy(), expected):
            next_obs, reward, terminated, truncated, _ = envs[i].step(action)
            train_reward, end = rule(obs[i], reward, next_obs, terminated)
            returns[i] += reward
            q[i].append(q_now)
            rewards[i].append(float(train_reward))
            obs[i] = next_obs
            ended[i] = terminated or truncated
            cut[i] = not end  # of its last step
    for episode in rewards:  # becomes the discounted return from each step on
        for t in reversed(range(len(episode) - 1)):
            episode[t] += args.gamma * episode[t + 1]
    # Where a limit cut an episode, more would have come. τ leaves out the steps for which that
    # counts for more than 5 %: those k before the end with γ^k > 0.05.
    tail = int(np.log(0.05) / np.log(np.clip(args.gamma, 1e-6, 1 - 1e-6)))
    taus = []
    for i in range(n):
        kept = max(0, len(q[i]) - tail * cut[i])
        taus.extend(kendall_tau(q[i][:kept], rewards[i][:kept]))
    scores = task.score(returns)
    results = {
        "eval/score": scores.mean(),
        "eval/score_std": scores.std(),
        "eval/return": returns.mean(),
        "eval/length": np.mean([len(episode) for episode in q]),
        # What the critics promise at the start, and what came, in the reward trained on. While the
        # promise still moves, they have not settled. IQL's aims higher, SO2's contains entropy.
        "eval/q_start": np.mean([episode[0] for episode in q]),
        "eval/discounted_return": np.mean([episode[0] for episode in rewards]),
        # Do the critics know good steps from bad? 1: always; 0: no, or all episodes are too short.
        "eval/kendall_tau": np.mean(taus or 0.0),
    }
    if task.family in ("kitchen", "antmaze"):
        results["eval/success"] = (scores >= 100.0).mean()  # all sub-tasks, or the goal
    return results


class Camera(gym.Wrapper):
    """Keeps a picture of every k-th step, about 150 of a whole episode, and of the last."""

    def __init__(self, env: gym.Env, label: str):
        super().__init__(env)
        self.label, self.pictures, self.t, self.returned = label, [], 0, 0.0
        self.every = max(1, round(env.get_wrapper_attr("_max_episode_steps") / 150))

    def step(self, action):
        from PIL import Image, ImageDraw  # a part of matplotlib

        obs, reward, terminated, truncated, info = self.env.step(action)
        self.t += 1
        self.returned += float(reward)
        if self.t % self.every == 0 or terminated or truncated:
            picture = Image.fromarray(self.env.render())
            text = f"{self.label}   step {self.t}   return {self.returned:.1f}"
            ImageDraw.Draw(picture).text((8, 8), text, "red", font_size=24)
            self.pictures.append(picture)
        return obs, reward, terminated, truncated, info


def film(agent: Base, rule, task: Task, args: Args, seed: int) -> None:
    """--video: an evaluation episode of the policy, and beside it one of the optimistic action."""
    import imageio.v3 as imageio  # a part of gymnasium[mujoco]

    films = []
    for shown in ("policy", "optimistic"):
        env = Camera(make_env(args.env_id, render_mode="rgb_array"), shown)
        renderer = getattr(env.unwrapped, "mujoco_renderer", None)  # of gymnasium's tasks
        if renderer and renderer.model.ncam:
            renderer.camera_id = 0  # the model's own, which goes along
        evaluate(agent, [env], rule, task, replace(args, eval_action=shown), seed)
        env.close()
        films.append(env.pictures)
    for pictures in films:  # who is done first waits for the other
        pictures += pictures[-1:] * (max(map(len, films)) - len(pictures))
    Path(args.video).parent.mkdir(parents=True, exist_ok=True)
    pictures = [np.concatenate(pair, 1) for pair in zip(*films)]
    if args.video.endswith(".gif"):  # half as wide and high: a tenth of the bytes
        imageio.imwrite(args.video, [x[::2, ::2] for x in pictures], duration=50, loop=0)  # in ms
    else:
        imageio.imwrite(args.video, pictures, fps=20, macro_block_size=2)  # sizes stay as they are
    drawn = os.environ.get("MUJOCO_GL", "the screen's OpenGL")
    print(f"video: {args.video}, {len(pictures)} frames (MuJoCo's are drawn by {drawn})")


# ==== 10. Saved agents, the run's folder, the command line ====
VERSION = 5  # of saved files
# What a saved agent and the run that loads it must agree in.
IDENTITY = "env_id base kitchen_rewards reward_transform num_critics hidden_dim latent_dim".split()
IDENTITY += ["gamma", "layer_norm", "standardise"]
# Flags that not every base reads.
ACTOR = "beta online_beta anneal exp_adv_max normalise_adv actor_dropout standardise".split()
FLAGS = {
    "iql": [*ACTOR, "expectile", "online_expectile"],
    "lapo": "subset_size doubleq_min value_clamp latent_dim max_latent latent_noise kl_weight "
    "good_weight".split(),
    "awac": ACTOR,
    "so2": ["target_noise", "online_alpha", "standardise"],
}
# In which the runs of one curve may differ.
OWN = "seed run_dir resume load device plot plot_to video log_every checkpoint_minutes".split()
# Numbers from 0 to 1.
SHARES = "gamma tau expectile online_expectile actor_dropout offline_ratio doubleq_min good_weight"


def save(path: Path, agent: Base, rule: RewardRule, step: int, **more) -> None:
    """All of an agent, in tensors and plain values; there whole or not at all."""
    state = dict(version=VERSION, step=step, args=asdict(agent.args), sizes=agent.sizes)
    state |= dict(rule=[rule.scale, rule.shift], agent=agent.state_dict())
    state |= dict(optimizer=agent.optimizer.state_dict(), **more)
    part = path.with_name(f"{path.name}.part")
    with contextlib.ExitStack() as stack, explain(f"{path} cannot be written"):
        stack.callback(part.unlink, missing_ok=True)
        with open(part, "wb") as file:
            torch.save(state, file)
        part.replace(path)  # never a moment without a whole file


def load_saved(args: Args) -> Optional[dict]:
    if not (args.resume or args.load):
        return None
    path = Path(args.resume, "checkpoint.pt") if args.resume else Path(args.load)
    if not path.is_file():
        wrong = f"{args.resume or args.load}: no checkpoint there yet, or no such file"
        raise UserError(f"{wrong}; --resume takes a run's folder, --load a file")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["version"] != VERSION:
            raise ValueError
    except Exception:  # torch would advise to run the file's code
        wrong = f"{path} is no whole file of this version of o3f.py"
        raise UserError(f"{wrong}: use the one that wrote it") from None
    if args.resume and "rows" not in saved:
        raise UserError(f"{path} is an agent, no checkpoint: use --load")
    return saved


def get_device(args: Args) -> torch.device:
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def make_agent(args: Args, data: Optional[dict], saved: Optional[dict], device) -> Base:
    """An agent that has seen the dataset (keys of Batch), or a saved one."""
    if saved:
        agent = BASES[args.base](args, *saved["sizes"]).to(device)
        weights = agent.optimizer.param_groups[0]["params"]
        with explain("the saved agent does not fit its flags"):
            agent.load_state_dict(saved["agent"])
            for i, adam in saved["optimizer"]["state"].items():
                # Adam checks no shapes, and writes past the end of what is too small.
                if not adam["exp_avg"].shape == adam["exp_avg_sq"].shape == weights[i].shape:
                    raise ValueError(f"Adam's state of weight {i} has another shape")
            agent.optimizer.load_state_dict(saved["optimizer"])
        agent.optimizer.param_groups[0]["lr"] = args.learning_rate  # not the file's
    else:
        sizes = data["observations"].shape[1], data["actions"].shape[1]
        agent = BASES[args.base](args, *sizes).to(device)
        agent.see_dataset(data)
    if args.compile:
        torch._inductor.config.fallback_random = True  # the draws of the eager update
        for name in ("step", "update_critics", "update_policy", "update_actor"):
            if hasattr(agent, name):  # what a base does with one batch
                setattr(agent, name, torch.compile(getattr(agent, name)))
    return agent


def load_agent(path: str, device: str = "cpu") -> Base:
    """A saved agent, to act with: load_agent(path).policy(obs, sample=False)."""
    saved = load_saved(Args(load=str(path)))
    args = replace(Args(**saved["args"]), compile=False)
    return make_agent(args, None, saved, torch.device(device))


class Run(contextlib.ExitStack):
    """A run's folder, books and checkpoints; gives the algorithm its steps."""

    BOOKS = "step episode sums count seconds scores".split()  # a checkpoint has them all

    def __init__(self, args, task, agent, buffer, rule, generator, facts, eval_seed, saved):
        super().__init__()  # what is opened here is closed at the end of main's `with`
        self.args, self.task, self.rule = args, task, rule
        self.agent, self.buffer, self.facts = agent, buffer, facts
        self.generator, self.eval_seed = generator, eval_seed
        self.step = -args.offline_steps  # the last one that is done
        self.episode, self.seconds, self.scores = 0, {}, {}
        self.sums, self.count = torch.zeros((), device=buffer.rows.device), 0  # of metrics
        self.open_folder(saved)
        self.stop, self.saved_step, self.saved_at = False, self.step, time.monotonic()
        self.envs = [make_env(args.env_id) for _ in range(args.eval_episodes)]
        for signum in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # only the main thread may
                self.callback(signal.signal, signum, signal.signal(signum, self.note_signal))
        print(f"run: {self.folder} on {buffer.rows.device}")

    def open_folder(self, saved: Optional[dict]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow: only if needed

        args, config = self.args, asdict(self.args)
        name = re.sub("[/:]", "-", f"{args.env_id}-{args.base}-{args.explore}-s{args.seed}")
        name = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self.folder = Path(args.resume or args.run_dir or name)
        self.folder.mkdir(parents=True, exist_ok=True)
        # The system frees this lock however the process ends.
        with explain(f"{self.folder}: another process is writing there"):
            self.enter_context(filelock.FileLock(self.folder / ".lock", timeout=0))
        if args.resume:
            self.restore(saved)
        else:
            if len(os.listdir(self.folder)) > 1:  # more than the lock
                raise UserError(f"--run-dir {self.folder}: not empty, choose a new one")
            if args.load:
                self.step, config["pretraining"] = 0, saved["args"]
            (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        self.board = SummaryWriter(str(self.folder), purge_step=self.step + 1)
        self.callback(self.board.close)  # however the run ends
        charts = {  # of TensorBoard's tab "custom scalars": where to look first
            "score": ["eval/score", "train/score"],
            "what the critics promise, and what came": ["eval/q_start", "eval/discounted_return"],
            "what the choice claims to gain": ["o3f/optimism"],
        }
        layout = {title: ["Multiline", tags] for title, tags in charts.items()}
        self.board.add_custom_scalars({"O3F": layout})

    def note_signal(self, signum, frame) -> None:
        self.stop = True
        signal.signal(signum, signal.default_int_handler)  # for the second one
        # print may be in the middle of something, so:
        os.write(2, b"\nstopping after this step; once more stops at once\n")

    def timed(self, function: Callable) -> Callable:
        def stopwatch(*args, **kwargs):  # on a GPU, the time to launch, not to compute
            start = time.perf_counter()
            result = function(*args, **kwargs)
            name = f"{self.phase} {function.__name__}"
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return stopwatch

    def steps(self, phase: str, last: int):
        """Yields the steps of a phase that are still to do, until Ctrl-C or SIGTERM."""
        self.phase = phase
        if phase == "offline" and self.step == 0 and not self.args.resume:
            self.evaluate()  # where a loaded agent starts from
            self.checkpoint()  # so that it can be resumed
        seconds = 0.1 if sys.stderr.isatty() else 60.0  # between looks at the bar: logs need few
        todo = range(self.step + 1, last + 1)
        for step in tqdm(todo, phase, mininterval=seconds, disable=self.stop or not todo):
            if self.stop:  # a signal came
                return
            yield step  # the loop's body runs here

    def record(self, step: int, metrics: dict, episode: Optional[dict] = None) -> None:
        """After a step, what is due; episode: statistics of one that has ended."""
        args, self.step = self.args, step
        self.sums = self.sums + torch.stack(list(metrics.values()))
        self.count += 1
        if episode:
            self.episode += 1
            score = self.task.score(episode["r"])
            values = {"return": episode["r"], "score": score, "length": episode["l"]}
            self.log("episodes", values)
        is_last = step in (0, args.online_steps)  # of its phase
        if step % args.log_every == 0 or is_last:
            means = dict(zip(metrics, (self.sums / self.count).tolist()))
            self.log("metrics", {"o3f/optimism": 0.0} | means)  # the same columns offline
            self.sums, self.count = self.sums.new_zeros(()), 0
        if step % args.eval_every == 0 or is_last:
            self.evaluate()
        if step == 0:
            save(self.folder / "agent_offline.pt", self.agent, self.rule, step)
        # Online only between episodes, when no simulator is in mid-air.
        minutes = (time.monotonic() - self.saved_at) / 60
        if step == 0 or (minutes >= args.checkpoint_minutes and (step < 0 or episode)):
            self.checkpoint()

    def log(self, table: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            if not np.isfinite(value):
                wrong = f"{name} is {value} by step {self.step}: training diverged"
                raise UserError(f"{wrong}; lower --learning-rate")
            tag = name if name.startswith(("eval/", "o3f/")) else f"train/{name}"
            self.board.add_scalar(tag, value, self.step)  # for TensorBoard
        # Closed after each row: nothing waits in a buffer.
        with open(self.folder / f"{table}.csv", "a") as file:
            writer = csv.writer(file, lineterminator="\n")  # as restore writes them
            if file.tell() == 0:  # a new file
                writer.writerow(["step", *values])
            writer.writerow([self.step, *values.values()])

    def evaluate(self) -> None:
        parts = self.agent, self.envs, self.rule, self.task, self.args, self.eval_seed
        results = self.timed(evaluate)(*parts)
        self.log("evaluations", results)
        self.scores[self.step] = float(results["eval/score"])
        line = "step {:>9,}: score {eval/score:.1f} ± {eval/score_std:.1f}, Q at start "
        line += "{eval/q_start:.4g}, discounted return {eval/discounted_return:.4g}"
        if results["eval/kendall_tau"]:
            line += ", Kendall's τ {eval/kendall_tau:.2f}"
        tqdm.write(line.format(self.step, **results))

    def checkpoint(self) -> None:  # if it cannot be written, the older one stays
        weights = sum(weight.sum() for weight in self.agent.parameters())
        if not torch.isfinite(weights + self.sums.sum()):
            raise UserError(f"NaN in the agent by step {self.step}")
        buffer = self.buffer
        run = {
            "books": {name: getattr(self, name) for name in self.BOOKS},
            # A slice would be saved with all that it is a slice of.
            "rows": buffer.rows[buffer.num_offline : buffer.size].clone(),
            "streams": [self.generator.get_state(), torch.get_rng_state()],
            "cuda": torch.cuda.get_rng_state_all(),  # empty without
            "csv": {path.name: path.stat().st_size for path in self.folder.glob("*.csv")},
            "sha256": self.facts["sha256"],
        }
        with explain(f"warning: no checkpoint at step {self.step}", tqdm.write):
            save(self.folder / "checkpoint.pt", self.agent, self.rule, self.step, **run)
            self.saved_step = self.step
        self.saved_at = time.monotonic()  # after a failure too

    def restore(self, saved: dict) -> None:
        if saved["sha256"] != self.facts["sha256"]:
            raise UserError(f"--resume: {self.facts['file']} has changed, put it back")
        vars(self).update(saved["books"])  # step, sums, … go on where they were
        buffer, rows = self.buffer, saved["rows"]
        self.sums = self.sums.to(buffer.rows.device)
        buffer.rows[buffer.size : buffer.size + len(rows)] = rows.to(buffer.rows.device)
        buffer.size += len(rows)
        self.generator.set_state(saved["streams"][0])
        torch.set_rng_state(saved["streams"][1])
        torch.cuda.set_rng_state_all(saved["cuda"])
        for path in self.folder.glob("*.csv"):  # drop what came later, or half a line
            os.truncate(path, min(path.stat().st_size, saved["csv"].get(path.name, 0)))

    def finish(self) -> dict:
        step, finished = self.step, self.step == self.args.online_steps  # or stopped
        if finished:
            save(self.folder / "agent_final.pt", self.agent, self.rule, step)
        elif step <= 0:  # stopped offline: nothing is lost
            self.checkpoint()
        summary = dict(finished=finished, last_step=step, scores=self.scores)
        summary |= dict(seconds=self.seconds, dataset=self.facts, args=asdict(self.args))
        summary |= dict(versions=dict(torch=torch.__version__, mujoco=mujoco.__version__))
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        if finished:
            print(f"score {self.scores[step]:.1f}; files in {self.folder}")
            self.close()  # the folder is done with, and Ctrl-C stops a film at once
            if self.args.video:
                with explain(f"--video {self.args.video}: not made, all else is saved"):
                    film(self.agent, self.rule, self.task, self.args, self.eval_seed)
        else:
            lost = step - self.saved_step
            print(f"stopped; {lost:,} steps after the last checkpoint are lost")
            print(f"python {sys.argv[0]!r} --resume {str(self.folder)!r}")
        return summary


def plot(folders: list[Path], path: Path) -> str:
    """Draw runs, or all in these folders; returns a Markdown table of their scores."""
    from matplotlib.figure import Figure  # not pyplot: no screen, no global state

    runs, groups = [], {}  # groups: flags -> seed -> {step: score}
    for folder in folders:
        runs += [x.parent for x in sorted(folder.rglob("evaluations.csv"))] or [folder]
    for run in runs:
        with explain(f"--plot {run}: no run with an evaluation"):
            args = json.loads((run / "config.json").read_text())
            lines = (run / "evaluations.csv").read_text().splitlines()
            curve = {int(x["step"]): float(x["eval/score"]) for x in csv.DictReader(lines)}
            max(curve)  # raises where there is none
        flags = {f"{name} {args[name]}" for name in args.keys() - {"pretraining", *OWN}}
        before = args.get("pretraining", {})
        flags |= {f"pretrained with {name} {before[name]}" for name in before.keys() - set(OWN)}
        curves, seed = groups.setdefault(frozenset(flags), {}), args["seed"]
        if seed in curves:
            raise UserError(f"--plot {run}: a second run of seed {seed}")
        curves[seed] = curve
    axes = Figure(figsize=(7, 4), dpi=120, layout="constrained").subplots()
    table = f"| runs | seeds | first | last |\n{'|---' * 4}|\n"
    for flags, curves in groups.items():
        steps = sorted(set.intersection(*map(set, curves.values())))  # those of all
        scores = np.array([[curves[seed][step] for step in steps] for seed in sorted(curves)])
        # A curve's name: the flags that not all have.
        label = ", ".join(sorted(flags - frozenset.intersection(*groups)))
        label = label or f"{args['env_id']} {args['base']} {args['explore']}"
        lines = textwrap.wrap(label, 90)
        axes.plot(steps, scores.mean(0), ".-", label="\n".join(lines))
        axes.figure.set_figheight(axes.figure.get_figheight() + 0.2 * len(lines))
        axes.fill_between(steps, scores.min(0), scores.max(0), alpha=0.2)
        table += f"| {label} | {sorted(curves)}"
        for i in (0, -1):
            table += f" | step {steps[i]:,}: {scores[:, i].mean():.1f} {scores[:, i].round(1)}"
        table += " |\n"
    axes.axvline(0, color="black", lw=0.8, ls=":")
    axes.set_xlabel("offline updates | environment steps, from the dotted line on")
    is_return = get_task(args["env_id"]).family == "other"
    axes.set_ylabel("return" if is_return else "D4RL's normalised score")
    axes.set_title("line: mean over seeds; band: lowest to highest seed", fontsize="small")
    axes.figure.legend(loc="outside lower left", frameon=False, fontsize="small")
    with explain(f"--plot-to {path}: cannot be drawn"):
        axes.figure.savefig(path)
    return table


def parse(argv: Optional[list[str]] = None) -> Args:
    """Flags, read twice: task and base decide the others' defaults."""
    argv = sys.argv[1:] if argv is None else argv
    # So --help shows the chosen task's values.
    twice = functools.partial(tyro.cli, Args, args=argv, description=__doc__.partition("\n")[0])
    first, _ = twice(return_unknown_args=True, add_help=False)
    given = {arg.partition("=")[0][2:].replace("-", "_") for arg in argv if arg[:2] == "--"}
    given = {name.removeprefix("no_") for name in given}  # --no-compile
    if first.resume and given != {"resume"}:
        raise UserError("--resume takes the run's own flags: drop the others")
    if "plot" in given and not first.plot:
        raise UserError("--plot: name the folders of runs")
    known = dict(env_id=first.env_id, base=first.base)
    if first.dataset.startswith("minari:") and not given & {"env_id", "load"}:
        spec = open_minari(first.dataset).env_spec
        if spec is None:
            raise UserError(f"--dataset {first.dataset}: it names no environment, give --env-id")
        plain = gym.registry.get(spec.id, spec)
        if (spec.kwargs, spec.max_episode_steps) != (plain.kwargs, plain.max_episode_steps):
            raise UserError(f"--dataset {first.dataset}: of a changed {spec.id}, give --env-id")
        known["env_id"] = spec.id
    default = preset(**known)
    if first.load:  # the objective that the agent had, unless a flag changes it; see check
        default = Args(**load_saved(first)["args"] | dict(run_dir="", resume="", video=""))
    return twice(default=default)


def check(args: Args, saved: Optional[dict] = None) -> None:
    """Refuse the first flag that makes no sense, and say what would."""
    types = get_type_hints(Args)
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        choices = get_args(types[name])
        if choices and isinstance(choices[0], str) and value not in choices:
            raise UserError(f"{flag} {value}: choose one of {', '.join(choices)}")
        low, high = 0, 1e9  # NaN is in no range
        if name in SHARES.split():
            high = 1
        if types[name] in (int, Optional[int]) and not name.endswith(("steps", "seed")):
            low = 1
        if name == "omega":
            low = -high
        if type(value) in (int, float) and not low <= value <= high:
            raise UserError(f"{flag} {value}: give a number from {low} to {high:g}")
        if saved and name in IDENTITY and saved["args"][name] != value:
            then = saved["args"][name]
            raise UserError(f"the saved agent has {name} {then}, this run {value}")
    several = set().union(*FLAGS.values())
    for name in sorted(several - set(FLAGS.get(args.base, several))):
        if getattr(args, name) != getattr(Args, name):  # it would do nothing
            raise UserError(f"--{name.replace('_', '-')}: no part of --base {args.base}")
    if args.base == "lapo" and args.subset_size > args.num_critics:
        raise UserError(f"--subset-size {args.subset_size}: more than there are critics")
    path = Path(args.video)
    if args.video and (path.suffix not in (".gif", ".mp4") or path.is_dir()):
        raise UserError(f"--video {args.video}: give a file that ends in .gif or .mp4")
    if args.video.endswith(".mp4") and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise UserError('--video: a gif needs nothing, mp4 needs pip install "imageio[ffmpeg]"')
    kind = get_device(args).type
    if args.device == "cuda" and kind == "cpu":
        raise UserError("--device cuda: none is found, use auto")
    if args.precision == "bfloat16" and kind == "cpu":
        if not torch.cpu._is_avx512_bf16_supported():
            raise UserError("--precision bfloat16: slower on this processor, use float32")


def cli(argv: Optional[list[str]] = None) -> int:
    """Flags in, exit code out: 0, 2 after a user's error, 130 after a signal."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without Greek shows "?"
    try:
        args = parse(argv)
        if args.plot:
            print(plot([Path(folder) for folder in args.plot], Path(args.plot_to)))
            return 0
        return 0 if main(args)["finished"] else 130
    except (UserError, OSError, MemoryError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)  # one line
        return 2
    except KeyboardInterrupt:  # a second Ctrl-C, or an early one
        return 130


if __name__ == "__main__":
    sys.exit(cli())
