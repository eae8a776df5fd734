"""A sweep on a model that is elsewhere, as a job: it goes on after whatever ends this process.

    python recipes/remote_sweep.py                              # a worker process of this machine, the bundled model
    python recipes/remote_sweep.py --host http://127.0.0.1:18086 --model interp-tests/smollm2-135m   # `make ndif-up`
    python recipes/remote_sweep.py --host ndif --model meta-llama/Llama-3.1-70B      # NDIF's own; needs NDIF_API_KEY
    python recipes/remote_sweep.py --resume artifacts/remote_sweep/sweep.job         # after Ctrl-C, a kill, a reboot

What it does, in Python:

    model = interp.load_model("org/name", backend="http://host:port")
    print(interp.remote_status("http://host:port"), model.estimate(plan, pairs))
    job = interp.submit(interp.patch, model, pairs, plan)
    job.save("sweep.job")
    effects = job.result()                            # or, tomorrow, in another process: interp.Job.load("sweep.job").result()
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import interp


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="simulated", help='"simulated", "ndif", or http://host:port')
    parser.add_argument("--model", default="smollm2-135m", help="the name under which the server knows the model")
    parser.add_argument("--resume", type=Path, help="the file of a job to go on with")
    parser.add_argument("--task", default="ioi", help="a task of interp.tasks")
    parser.add_argument("--n", type=int, default=8, help="prompt pairs")
    parser.add_argument("--layers", type=int, nargs="*", help="of the sweep; all by default")
    parser.add_argument("--in-flight", type=int, default=4, help="requests on their way at once")
    parser.add_argument(
        "--out", type=Path, default=Path("artifacts/remote_sweep"), help="the folder of job and results"
    )
    return parser.parse_args(arguments)


def begin(options: argparse.Namespace) -> interp.Job:
    """Ask what it will take, submit it, and keep its file."""
    if options.host.startswith("http") or options.host == "ndif":
        print(interp.remote_status(None if options.host == "ndif" else options.host))
    model = interp.load_model(options.model, backend=options.host)
    pairs = interp.studies.aligned_pairs(model, options.task, n=options.n, seed=0)
    plan = interp.grid(["resid_pre", "attn_out", "mlp_out"], layers=options.layers)
    print(model.estimate(plan, pairs))
    job = interp.submit(interp.patch, model, pairs, plan, in_flight=options.in_flight, root=options.out / "jobs")
    job.save(options.out / "sweep.job")
    return job


def main(arguments: list[str] | None = None) -> Path:
    """Run the sweep, or go on with one; the page that shows it."""
    options = parse(arguments)
    job = interp.Job.load(options.resume) if options.resume else begin(options)
    print(f"{job}\nif this ends, go on with: python recipes/remote_sweep.py --resume {job.path}")
    while job.status == "running":
        time.sleep(1)
        print(f"\r{job.progress!r}   ", end="", flush=True)
    print()
    effects = job.result()
    assert isinstance(effects, interp.Effects)
    effects.save(job.path.with_suffix(".nc"))
    page = job.path.with_suffix(".html")
    interp.plot_activation_patching_results(effects).save(page)
    print(f"{page}, {page.with_suffix('.nc')}")
    return page


if __name__ == "__main__":
    main()
