"""What this package does on a GPU: everything against float64, training, speed, and Fashion-MNIST at full size.

    python benchmarks/gpu.py devices training --folder runs/gpu
    python benchmarks/gpu.py speed
    python benchmarks/gpu.py teacher sampler sampler-both student --data FOLDER_OF_FASHION_MNIST
    python benchmarks/gpu.py report --out docs/GPU.md
    python benchmarks/gpu.py devices training speed teacher sampler student report --tiny --device cpu

A stage writes a JSON file and its pictures to the folder, takes at most nine minutes on one H100 or H200, goes on where
it was cut off, and is not run again once it is done. Samplers and students need what ``teacher`` wrote
(``teacher/``, at most 16 MB). No network is needed; what is missing is said before anything starts.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from f2d2_lightning.data.images.fashion import SYSTEM_FOLDER
from gpu_stages import devices, fashion, report, speed, training
from gpu_stages.kept import DONE, Kept

PACKAGES = ("lightning", "torchmetrics", "torchdiffeq", "jsonargparse", "omegaconf", "safetensors", "sklearn", "rich")
FASHION = ("teacher", *fashion.STUDENTS)
FILES = ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")


def missing(stages: list[str], data: Path, folder: Path) -> list[str]:
    """What the stages need and is not there."""
    lacking = [f"the package {name}" for name in PACKAGES if importlib.util.find_spec(name) is None]
    if set(stages) & set(FASHION):
        lacking += [f"{data / name} (--data)" for name in FILES if not (data / name).exists()]
    if "teacher" not in stages and set(stages) & set(fashion.STUDENTS) and not (folder / "teacher").exists():
        lacking.append(f"{folder / 'teacher'}, which the stage teacher writes")
    return lacking


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=("devices", "training", "speed", *FASHION, "report"))
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu"), help="results, pictures, weights")
    parser.add_argument("--data", type=Path, default=Path(SYSTEM_FOLDER), help="Fashion-MNIST's gzipped files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small networks and few steps: shows that it runs")
    parser.add_argument("--seconds", type=float, default=400.0, help="of each training, and of speed's tables")
    parser.add_argument("--seed", type=int, default=0, help="of trainings; give each a folder, with the same teacher/")
    parser.add_argument("--again", action="store_true", help="run stages whose results are there")
    parser.add_argument("--out", type=Path, help="file of the report; by default report.md in the folder")
    options = parser.parse_args()
    device, folder = torch.device(options.device), options.folder
    lacking = missing(options.stages, options.data, folder)
    if lacking:
        parser.error("missing: " + "; ".join(lacking))
    folder.mkdir(parents=True, exist_ok=True)
    sizes = fashion.Sizes(options.tiny, options.seconds, options.seed)
    calls: dict[str, Callable[[Kept], None]] = {
        "devices": lambda kept: devices.run(device, options.tiny, kept),
        "training": lambda kept: training.run(device, options.tiny, kept),
        "speed": lambda kept: speed.run(device, options.tiny, kept, options.seconds),
        "teacher": lambda kept: kept.result.update(fashion.teach(folder, options.data, device, sizes)),
    }
    for stage in fashion.STUDENTS:
        calls[stage] = lambda kept, stage=stage: kept.result.update(
            fashion.study(stage, folder, options.data, device, sizes)
        )
    for stage in options.stages:
        if stage == "report":
            report.write(folder, options.out or folder / "report.md")
            continue
        kept = Kept(folder / f"{stage}.json", options.again)
        if DONE in kept.result:
            print(f"{stage}: {kept.path} is there; --again runs it anew")
            continue
        start = time.perf_counter()
        kept.result |= {
            "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "torch": torch.__version__,
            "tiny": options.tiny,
        }
        calls[stage](kept)
        kept.result[DONE] = time.perf_counter() - start
        kept.save()
        print(f"{stage}: {kept.result[DONE]:.0f} s, {kept.path}", flush=True)


if __name__ == "__main__":
    main()
