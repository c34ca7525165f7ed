"""Measure ResNet-50 of recipes/resnet on one GPU: images a second with images in memory, and through the input path.

    python tests/benchmarks/resnet_gpu.py                                  # 176 and 224 pixels, minutes on an H100
    python tests/benchmarks/resnet_gpu.py --sizes 176 --per_device_batch_size 512 --num_workers 16

Model, precision, compilation and optimizer are those of configs/resnet50_16_epochs.yaml. In memory, one batch lies on
the GPU and `train_update` gets it again and again. Through the input path, the recipe itself reads generated JPEGs of
500 x 375 pixels, in class folders, by data workers on this machine's cores; the smaller figure says what limits.
A figure is the median over the updates after the first ten, which compile and warm up.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import GPU_WARM_UPDATES, ROOT, commit_of_the_tree, load_recipe, run_on_gpu, say
from jpegs import make_jpeg

CONFIG = "resnet50_16_epochs"
RECIPE = ROOT / "recipes" / "resnet" / "pretrain.py"
NUM_CLASSES, TRAIN_EACH, TEST_EACH = 10, 100, 2


def write_images(folder: Path) -> None:
    """Class folders of generated JPEGs."""
    for split, number in (("train", TRAIN_EACH), ("test", TEST_EACH)):
        for label in range(NUM_CLASSES):
            (folder / split / str(label)).mkdir(parents=True)
            for index in range(number):
                seed = (label * TRAIN_EACH + index) * 2 + (split == "test")
                (folder / split / str(label) / f"{index}.jpg").write_bytes(make_jpeg(seed))


def images_in_memory(size: int, batch_size: int, updates: int) -> float:
    """Images a second of `train_update` on one batch that lies on the GPU."""
    import torch
    from accelerate import Accelerator

    fixed = {"image_size": size, "final_image_size": size, "global_batch_size": batch_size}
    flags = [f"--config={RECIPE.parent / 'configs' / f'{CONFIG}.yaml'}", *(f"--{k}={v}" for k, v in fixed.items())]
    recipe, cfg = load_recipe(RECIPE, flags)
    torch.backends.cudnn.benchmark = True  # as the recipe does
    accelerator = Accelerator(mixed_precision="bf16")
    model = recipe.build_model(cfg, tuple(map(str, range(1000)))).to(memory_format=torch.channels_last)
    model.compile(dynamic=False)
    model, optimizer = accelerator.prepare(model, recipe.build_optimizer(cfg, model))
    statistics_of_norms = recipe.RunningStatistics(model)
    pixels = torch.randint(256, (batch_size, size, size, 3), dtype=torch.uint8, device=accelerator.device)
    labels = torch.randint(1000, (batch_size,), device=accelerator.device)
    batch, seconds = {"pixel_values": pixels, "labels": labels}, []
    for _ in range(updates):
        started = time.perf_counter()
        recipe.train_update(cfg, accelerator, model, optimizer, statistics_of_norms, [batch])
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return batch_size / statistics.median(seconds[GPU_WARM_UPDATES:])


def images_through_the_input_path(folder: Path, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """What run.json and the log of the recipe say, and images a second."""
    batch_size = options.per_device_batch_size
    flags = {"data": folder, "image_size": size, "final_image_size": size, "global_batch_size": batch_size}
    flags |= {"num_workers": options.num_workers, "log_every": 1}
    found = run_on_gpu("resnet", CONFIG, options.updates, batch_size, **flags)
    return {**found, "images_per_second": batch_size / found["seconds_per_update"]}


def main() -> None:
    """Print one line of the README's table for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="176,224", help="sides of the crops in pixels")
    parser.add_argument("--updates", type=int, default=40, help="of each; more than ten")
    parser.add_argument("--per_device_batch_size", type=int, default=512, help="images of a batch")
    parser.add_argument("--num_workers", type=int, default=16, help="data workers of the input path")
    options = parser.parse_args()
    if options.updates <= GPU_WARM_UPDATES:
        parser.error(f"--updates: {options.updates}: expected more than {GPU_WARM_UPDATES}")
    with tempfile.TemporaryDirectory(prefix="resnet_gpu_") as folder:
        write_images(Path(folder))
        for size in map(int, options.sizes.split(",")):
            found = images_through_the_input_path(Path(folder), size, options)
            memory, path = (
                images_in_memory(size, options.per_device_batch_size, options.updates),
                found["images_per_second"],
            )
            limit = "the input path" if path < 0.95 * memory else "the GPU"
            cells = (
                f"ResNet-50 at {size} pixels, bf16, channels-last, compiled: images a second with images in memory, "
                f"and through the input path with {options.num_workers} data workers",
                f"{memory:,.0f}, {path:,.0f} (MFU {found['perf/mfu']:.1%}, waiting for data "
                f"{found['perf/data_wait_fraction']:.1%}); {limit} limits",
                "none set",
                f"`python tests/benchmarks/resnet_gpu.py --sizes {size}`",
                commit_of_the_tree(),
                found["hardware"],
            )
            say(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
