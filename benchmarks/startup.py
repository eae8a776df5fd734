"""How long a person waits before the first line runs: imports beyond `import torch`, in fresh processes, in turn.

    python benchmarks/startup.py [--rounds 7] [--quick]

Seconds of processor time (user + system) of `python -c "import torch; import X"` less those of `import torch`; medians. The
modules that took longest in `import interp` stand below (`-X importtime`).
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys

JOBS = {
    "interp": "import interp",
    "interp, and load_model": "import interp; interp.load_model",
    "interp, and patch, grid, PromptPairs": "from interp import patch, grid, PromptPairs",
    "transformers and nnsight": "import transformers, nnsight; transformers.AutoModelForCausalLM",
    "TransformerLens": "import transformer_lens",
    "SAELens": "import sae_lens",
}


def seconds(code: str) -> float:
    """Processor time of a process of its own that runs this after torch."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    command = [sys.executable, "-W", "ignore", "-c", f"import torch\n{code}"]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def slowest(code: str, count: int = 8) -> list[tuple[float, str]]:
    """The modules whose own import took longest, ms."""
    command = [sys.executable, "-W", "ignore", "-X", "importtime", "-c", f"import torch\n{code}"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stderr.splitlines()
    own = [line.removeprefix("import time:").split("|") for line in lines if line.startswith("import time:")]
    names = [(int(part[0]) / 1000, part[2].strip()) for part in own if part[0].strip().isdecimal()]
    behind = names[[name for _, name in names].index("torch") + 1 :]
    return sorted(behind, reverse=True)[:count]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one round")
    options = parser.parse_args()
    times: dict[str, list[float]] = {"torch": [], **{name: [] for name in JOBS}}
    for number in range(1 if options.quick else options.rounds + 1):
        for name in times:
            spent = seconds(JOBS.get(name, ""))
            if number or options.quick:  # the first round fills the disk's cache
                times[name].append(spent)
    base = times.pop("torch")
    print(f"import torch: {statistics.median(base):.2f} s of processor time\n")
    print("| beyond it | s | lowest to highest |\n| - | -: | -: |")
    for name, values in times.items():
        more = [value - own for value, own in zip(values, base, strict=True)]
        print(f"| {name} | {statistics.median(more):.2f} | {min(more):.2f} to {max(more):.2f} |")
    print(
        "\nslowest modules of `import interp`, ms: "
        + ", ".join(f"{name} {ms:.1f}" for ms, name in slowest("import interp"))
    )


if __name__ == "__main__":
    main()
