"""A few-step policy whose log q comes with the action: PPO by likelihood ratios, on a task with two ways round.

A mass in the plane starts opposite its goal, and crossing the disk in between costs. Four policies are trained by
proximal policy optimisation (Schulman et al., 2017, https://arxiv.org/abs/1707.06347), with ``-log q`` of each action
in the reward (entropy):

- ``gaussian``: mean by a network, one deviation for each axis;
- ``ode``: a flow; actions and their log q by 20 evaluations and exact divergences;
- ``jump``: one step of a flow map, its log q by the exact determinant of its own jump, its noise for an action by an
  inversion that begins where the action came from;
- ``head``: the same, but log q as the divergence head says it; in each update the head learns the determinants of a
  share of the actions.

A round of updates is taken back where the mean ratio over the old policy's actions is not 1, as that of two densities
is. Minutes of one core each; ``--rounds 2`` shows that it runs. What was measured is in ``docs/POLICIES.md``.

    python examples/policy.py --policy jump --seeds 0 1 2 3 4
"""

from __future__ import annotations

import argparse
import time

import torch
from policy_maps import POLICIES, Flow, Gaussian, policy
from policy_task import LENGTH, SEEN, Field
from torch import Tensor, nn

import f2d2_lightning as f2


@torch.no_grad()
def episodes(actor: Gaussian | Flow, critic: nn.Module, envs: int, entropy: float) -> tuple[list[Tensor], float, int]:
    """Observations, actions, log q, noise, advantages and what is to come, ``(LENGTH * envs, ...)`` each.

    Then the mean return, and the evaluations of an action. Advantages are Schulman's generalised ones, undiscounted.
    """
    field, kept = Field(envs), []
    for _ in range(LENGTH):
        seen = field.see()
        made = actor.act(seen)
        kept.append((seen, *made[:3], field.push(made.action), critic(seen)[:, 0]))
    seen, action, log_q, noise, reward, value = map(torch.stack, zip(*kept, strict=True))
    error = reward - entropy * log_q + torch.cat((value[1:], torch.zeros_like(value[:1]))) - value
    for step in reversed(range(LENGTH - 1)):
        error[step] += 0.95 * error[step + 1]
    rows = (seen, action, log_q, noise, (error - error.mean()) / error.std(), error + value)
    return [part.flatten(0, 1) for part in rows], float(reward.sum(0).mean()), made.evaluations


def train(actor: Gaussian | Flow, options: argparse.Namespace) -> None:
    """Proximal policy optimisation; prints the mean of ten rounds."""
    critic = nn.Sequential(nn.Linear(SEEN, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=options.rate, eps=1e-5)
    evaluations, back, begin, returns = 0, 0, time.process_time(), []
    for number in range(1, options.rounds + 1):
        (seen, action, before, noise, advantage, goal), reward, each = episodes(
            actor, critic, options.envs, options.entropy
        )
        returns, evaluations = [*returns, reward][-10:], evaluations + each * len(seen)
        kept = {name: value.clone() for name, value in actor.state_dict().items()}
        for _ in range(options.epochs):
            for rows in torch.randperm(len(seen)).split(options.batch):
                told = actor.of(action[rows], seen[rows], noise[rows])
                noise[rows], found = told.noise, told.log_q.isfinite()
                apart, more = actor.refresh(seen[rows], told.noise)
                evaluations += told.evaluations * len(rows) + more
                ratio, gains = (told.log_q - before[rows])[found].exp(), advantage[rows][found]
                loss = (critic(seen[rows])[:, 0] - goal[rows]).square().mean() + apart
                if float((ratio - 1 - ratio.log()).detach().mean()) < options.moved:
                    loss = loss - torch.minimum(ratio * gains, ratio.clamp(0.8, 1.2) * gains).mean()
                optimizer.zero_grad()
                loss.backward()
                for part in (actor, critic):
                    nn.utils.clip_grad_norm_(part.parameters(), 1.0)
                optimizer.step()
        # of densities the mean is 1: a map that begins to fold counts some actions twice and finds no noise for others
        with torch.no_grad():
            ratio = (actor.of(action, seen, noise).log_q - before).exp()
        evaluations += told.evaluations * len(seen)
        if not abs(float(ratio.nanmean()) - 1) < 0.03 or float(ratio.isnan().float().mean()) > 0.002:
            actor.load_state_dict(kept)
            back += 1
        if number % 10 == 0 or number == options.rounds:
            text = f"  round {number}: return {sum(returns) / len(returns):.3f}, {evaluations / 1e6:.2f} million "
            text += f"evaluations, {time.process_time() - begin:.1f} s, {back} rounds taken back, "
            print(f"{text}mean ratio {float(ratio.nanmean()):.3f}{faith(actor, seen, noise)}", flush=True)


@torch.no_grad()
def faith(actor: Gaussian | Flow, seen: Tensor, noise: Tensor) -> str:
    """How far the head is from the jumps' determinants."""
    if not isinstance(actor, Flow) or actor.determinant or not isinstance(actor.joint, f2.JointFlowMap):
        return ""
    ask = {"steps": actor.steps, "cond": seen, "with_log_prob": True}
    said, own = (f2.sample(actor.joint, noise, determinant=how, **ask).log_prob for how in (None, "exact"))
    return f", head off by {float((said - own).abs().mean()):.3f} nats"


def main() -> None:
    """Train policies from several seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=60, help="of episodes and updates")
    parser.add_argument("--envs", type=int, default=64, help="episodes in a round")
    parser.add_argument("--epochs", type=int, default=4, help="times a round's actions are learned from")
    parser.add_argument("--batch", type=int, default=640)
    parser.add_argument("--rate", type=float, default=5e-4, help="of learning")
    parser.add_argument("--moved", type=float, default=0.02, help="nats from the old policy where updates pause")
    parser.add_argument("--entropy", type=float, default=0.03, help="weight of -log q in the reward")
    parser.add_argument("--width", type=int, default=64, help="of the network")
    parser.add_argument("--steps", type=int, default=1, help="jumps of the flow map")
    parser.add_argument("--share", type=float, default=1.0, help="of an update's actions, that refresh the head")
    options = parser.parse_args()
    for name in options.policy:
        for seed in options.seeds:
            torch.manual_seed(seed)
            print(f"{name}, seed {seed}", flush=True)
            train(policy(name, options.width, options.steps, options.share), options)


if __name__ == "__main__":
    main()
