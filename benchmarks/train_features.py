"""Train a small classifier whose features samples are judged by (FID, KID) where Inception's say little: grey images.

    python benchmarks/train_features.py --data digits --out features_digits.pt
    python benchmarks/train_features.py --data fashion --out features_fashion.pt

A few minutes on one CPU thread. Accuracy is of the test images, which are not trained on. An epoch of shifted images
costs no more, and makes features that do not depend on where in the picture a shape lies.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import f2d2_lightning as f2
from f2d2_lightning.likelihood import state_images
from f2d2_lightning.metrics import SmallFeatures

EPOCHS = {"digits": 60, "fashion": 6}
SHIFT = {"digits": 1, "fashion": 2}


def shifted(images: Tensor, most: int) -> Tensor:
    """Each image moved by up to ``most`` pixels along each axis; zeros move in."""
    count, _, height, width = images.shape
    padded = nn.functional.pad(images, (most, most, most, most))
    down, right = torch.randint(0, 2 * most + 1, (2, count, 1, 1))
    rows = down + torch.arange(height)[None, :, None]
    columns = right + torch.arange(width)[None, None, :]
    return padded[torch.arange(count)[:, None, None, None], 0, rows[:, None], columns[:, None]]


@torch.no_grad()
def accuracy(network: SmallFeatures, images: Tensor, classes: Tensor) -> float:
    network.eval()
    guesses = torch.cat([network.logits(part).argmax(1) for part in images.split(1000)])
    return float((guesses == classes).double().mean())


def train(data: f2.data.FlowDataModule, epochs: int, shift: int, seed: int) -> SmallFeatures:
    torch.manual_seed(seed)
    images, classes = pictures(data, "train")
    held_out = pictures(data, "test")
    network = SmallFeatures(classes=int(classes.max()) + 1, channels=images.shape[1])
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    size = min(128, len(images) // 8)
    batches = len(images) // size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=epochs * batches)
    start = time.perf_counter()
    for epoch in range(epochs):
        network.train()
        losses = []
        for rows in torch.randperm(len(images)).split(size)[:batches]:
            logits = network.logits(shifted(images[rows], shift))
            loss = nn.functional.cross_entropy(logits, classes[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        if epoch % max(1, epochs // 6) == 0 or epoch == epochs - 1:
            mean, correct = torch.stack(losses).mean(), accuracy(network, *held_out)
            print(
                f"epoch {epoch + 1}/{epochs}: loss {mean:.3f}, held-out accuracy {correct:.4f}, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
    return network.eval()


def pictures(data: f2.data.FlowDataModule, split: str) -> tuple[Tensor, Tensor]:
    """Images ``uint8 (N, C, H, W)`` as the sample quality sees them, and classes ``(N,)``."""
    dataset = data.dataset(split)
    states, classes = dataset.__getitems__(list(range(len(dataset))))
    return state_images(states, levels=data.levels), classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "fashion"), default="fashion")
    parser.add_argument("--out", type=Path, help="file to write; by default features_DATA.pt")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out = options.out or Path(f"features_{options.data}.pt")
    if out.exists():
        parser.error(f"{out} exists; remove it, or choose another name with --out")
    data = f2.data.Digits(labels=True) if options.data == "digits" else f2.data.FashionMNIST(labels=True)
    network = train(data, options.epochs or EPOCHS[options.data], SHIFT[options.data], options.seed)
    network.save(out)
    print(f"{out}: {network.num_features} features")


if __name__ == "__main__":
    main()
