"""The server's model actor on a CPU: NDIF's own, with what touches a GPU left out, and a line written for every run.

Chosen by NDIF_DEFAULT_MODEL_ACTOR_CLASS. The lines (`id began` and `id ended`) are what tests count runs by.
"""

from __future__ import annotations

import gc
import os

import ray
from ndif.services.ray.deployments.modeling import base
from nnsight.modeling.huggingface import HuggingFaceModel


class OnCPU(base.BaseModelDeployment):
    """Loads on the CPU; the controller believes in a GPU that is booked for it."""

    def __init__(self, model_key, execution_timeout=None, gpu_mem_bytes_by_id=None, dtype="float32", **more):
        super().__init__(model_key, execution_timeout, {}, dtype, **more)

    def load_from_disk(self):
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        return model

    def execute(self, request):
        self._count(request.id, "began")
        done = super().execute(request)
        self._count(request.id, "ended")
        return done

    @staticmethod
    def _count(id, what):
        with open(os.environ["INTERP_NDIF_RUNS"], "a") as file:  # one short line: written whole
            file.write(f"{id} {what} {os.getpid()}\n")

    async def to_cache(self):
        await self.cancel(base.KILL_REASON_PREEMPTED)
        self.cached = True

    def from_cache(self, gpu_mem_bytes_by_id):
        self.cached = False

    def cleanup(self):
        self.kill_switch.clear()
        self.kill_reason = self.execution_ident = None
        self.model.interleaver.cancel()
        gc.collect()


@ray.remote(num_cpus=1, max_restarts=-1)
class CPUActor(OnCPU):
    """What Ray makes of it."""
