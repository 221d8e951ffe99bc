"""CapeHead against direct evaluation of the published formula: time and peak memory.

    python tests/benchmarks/cape_head.py                  # two minutes on one core, 4 GiB
    python tests/benchmarks/cape_head.py --device cuda
    python tests/benchmarks/cape_head.py --quick          # seconds: one setting

It fails where both sides disagree, or where the head's memory comes near to the formula's. Times
are printed and not judged.

Both sides get the same tensors and compute the same numbers: the maps (forward), or the
distillation loss and its gradients for all parameters of the head (forward + backward). The direct
side is spared what it does not need for that: the released code evaluates both temperatures every
time. The difference of the results is float32 rounding, nearly all of it the direct side's (against
float64: 1e-3 there, 3e-5 here, both in the gradient of t2).

* Time: both sides in one process, taking turns, each the best of at least three runs and of as many
  as fit in a second. One thread unless asked otherwise: with several on a busy machine, small
  operations measure the wait for a free core.
* Memory: beyond what is there before the step, at its highest. On CUDA the allocator's peak. On
  the CPU the growth of the resident set as the kernel counts it (VmHWM, Linux only), each side in
  a fresh process that has only run a tiny step before; so scratch space of the BLAS library counts,
  and memory that an allocator keeps from earlier steps cannot hide anything.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "cape")]

from direct_formula import direct_distillation_loss, direct_logits, direct_maps  # noqa: E402

from fam_plugins.cape import CapeHead, cape_loss  # noqa: E402


def problem(classes, side, batch, channels, device):
    """A head, its features and a teacher; the same for both sides."""
    torch.manual_seed(0)
    head = CapeHead(channels, classes).to(device)
    features = torch.randn(batch, channels, side, side, device=device).relu()
    teacher = torch.randn(batch, classes, device=device)
    return head, features, teacher


def ours(head, features, teacher, training):
    """One step of this package."""
    if not training:
        with torch.no_grad():
            return (head.probability_maps(features),)
    loss = cape_loss(head, features, teacher, alpha=0)
    return torch.autograd.grad(loss, list(head.parameters()))


def direct(head, features, teacher, training):
    """The same step through the [B, K, N, N] tensor."""
    logits = direct_logits(features, head.weight, head.bias)
    if not training:
        with torch.no_grad():
            return (direct_maps(logits.detach(), head.t1, head.t2),)
    p_soft = direct_maps(logits, head.t1, head.t2, head.t3).sum(dim=(2, 3))
    loss = direct_distillation_loss(p_soft, teacher)
    return torch.autograd.grad(loss, list(head.parameters()))


SIDES = {"ours": ours, "direct": direct}


def synchronise(device):
    """Wait for the GPU, so that the clock and the allocator's peak mean something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_times(setting, training, device):
    """Seconds per step of both sides, and the largest difference of their results."""
    inputs = problem(*setting, device)
    results = {name: step(*inputs, training) for name, step in SIDES.items()}
    gap = max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
        for a, b in zip(results["ours"], results["direct"], strict=True)
    )
    results.clear()
    best = dict.fromkeys(SIDES, float("inf"))
    for _ in range(3):
        for name, step in SIDES.items():
            turn = time.perf_counter()
            while True:
                synchronise(device)
                start = time.perf_counter()
                step(*inputs, training)
                synchronise(device)
                best[name] = min(best[name], time.perf_counter() - start)
                if time.perf_counter() - turn > 1 / 3:
                    break
    return best, gap


def status_bytes(field):
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{field} not found in /proc/self/status")


def peak_here(side, setting, training, device):
    """Peak memory of one step, measured in this process."""
    step = SIDES[side]
    step(*problem(3, 2, 1, 4, device), training)
    inputs = problem(*setting, device)
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(*inputs, training)
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to the present size
    before = status_bytes("VmRSS")
    step(*inputs, training)
    return status_bytes("VmHWM") - before


def peak(side, setting, training, device):
    """Peak memory of one step in bytes, in a process of its own on the CPU."""
    if device.type == "cuda":
        return peak_here(side, setting, training, device)
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    task = ",".join([side, *map(str, setting), str(int(training))])
    # A fixed threshold makes glibc return every large block at once instead of keeping it.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    threads = torch.get_num_threads()
    command = [sys.executable, __file__, "--measure", task, "--threads", str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def main():
    """Print the table, or (as a child process) one number."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--channels", type=int, default=2048, help="2048 is ResNet-50's")
    parser.add_argument("--quick", action="store_true", help="one setting, few channels")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    if options.measure:
        side, *numbers = options.measure.split(",")
        *setting, training = map(int, numbers)
        print(peak_here(side, tuple(setting), bool(training), device))
        return

    all_classes, sides = ((200,), (14,)) if options.quick else ((200, 1000), (7, 14))
    if options.quick:
        options.channels = 256
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} thread(s), float32, "
        f"batch {options.batch}, {options.channels} channels\n"
    )
    print(
        "| classes | map | step | time, ours | direct | times faster | memory, ours | direct "
        "| times less | largest relative difference |"
    )
    print("|---" * 10 + "|")
    for classes in all_classes:
        for side in sides:
            for training in (False, True):
                setting = (classes, side, options.batch, options.channels)
                seconds, gap = best_times(setting, training, device)
                held = {name: peak(name, setting, training, device) for name in SIDES}
                step = "forward + backward" if training else "forward"
                print(
                    f"| {classes} | {side}x{side} | {step} "
                    f"| {seconds['ours'] * 1e3:.1f} ms | {seconds['direct'] * 1e3:.0f} ms "
                    f"| {seconds['direct'] / seconds['ours']:.0f} "
                    f"| {held['ours'] / 2**20:.1f} MiB | {held['direct'] / 2**20:.0f} MiB "
                    f"| {held['direct'] / held['ours']:.0f} | {gap:.0e} |",
                    flush=True,
                )
                assert gap < 1e-2, f"the head is {gap:.0e} away from the published formula"
                # No number where the system does not count memory.
                less = held["direct"] / held["ours"]
                assert not less < 4, f"the head needs only {less:.1f} times less memory"


if __name__ == "__main__":
    main()
