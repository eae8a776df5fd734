"""Packages that one room needs, missing or broken: that room says which command mends it, and all others work."""

from __future__ import annotations

import subprocess
import sys

import pytest

from interp.packages import wanted

CASES = {
    "bokeh": ("interp.plot_attention", "pictures need bokeh"),
    "sae_lens": ("interp.SparseAutoencoder(d_model=8, d_hidden=16)", "dictionaries need sae-lens"),
}
#: A finder before all others: the package is not there, or fails while it is imported.
BLOCK = """
import sys, importlib.abc, importlib.machinery
class Block(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == {name!r}:
            if {broken}:
                return importlib.machinery.ModuleSpec(name, self, is_package=True)
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
    def create_module(self, spec): return None
    def exec_module(self, module): raise RuntimeError('binary mismatch')
sys.meta_path.insert(0, Block())
import interp
try:
    {use}
except interp.errors.PackageError as error:
    assert isinstance(error, ImportError)
    print(error)
import torch, transformers as tf
torch.manual_seed(0)
small = tf.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1)
model = interp.load_model(tf.GPT2LMHeadModel(small).eval())
pairs = interp.PromptPairs([[3, 5, 6]], [[4, 5, 6]], [7], [8])
print(interp.patch(model, pairs, interp.heads("z")).values.sizes["head"])
print(interp.discover(model, pairs).n_edges > 0)
"""


@pytest.mark.parametrize("broken", [False, True], ids=["missing", "broken"])
@pytest.mark.parametrize("name", CASES)
def test_its_room_says_so_and_all_others_work(name: str, broken: bool) -> None:
    use, said = CASES[name]
    code = BLOCK.format(name=name, broken=broken, use=use)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    message, heads, edges = done.stdout.strip().splitlines()
    assert message.startswith(said) and (heads, edges) == ("2", "True")
    assert ("RuntimeError: binary mismatch" in message) is broken
    package = name.replace("_", "-")
    command = f"pip install {'--force-reinstall ' if broken else ''}'{package}"
    assert command in message and message.endswith("everything else works without it")


def test_the_command_asks_for_the_versions_that_are_tested() -> None:
    assert wanted("sae-lens").startswith("sae-lens<7") or wanted("sae-lens").startswith("sae-lens>=")
    assert wanted("nothing-of-ours") == "nothing-of-ours"
