"""The recipes of dictionaries, on the bundled model and a little text: they write what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

import interp
from interp.circuits import FeatureCircuit

from .test_recipes import recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small documents: pages of this project."""
    folder = tmp_path_factory.mktemp("texts")
    for page in sorted((Path(__file__).parents[1] / "docs").glob("*.md")):
        (folder / f"{page.stem}.txt").write_text(page.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return folder


@pytest.fixture
def own(bundled: interp.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model is the one that other tests have loaded."""
    monkeypatch.setattr(interp, "load_model", lambda *_, **__: bundled)


@pytest.mark.usefixtures("own")
def test_an_autoencoder(texts: Path, tmp_path: Path, bundled: interp.Model) -> None:
    out = tmp_path / "out"
    sizes = ["--tokens", "6000", "--width", "1", "--k", "8", "--held", "2", "--eval-tokens", "400", "--features", "5"]
    recipe("train_sae").main(["--layer", "4", "--texts", str(texts), "--out", str(out), *sizes])
    assert {path.name for path in out.iterdir()} == {
        "acts", "run", "sae", "history.csv", "table.csv", "summary.md", "features.html",
    }  # fmt: skip
    table = pd.read_csv(out / "table.csv", index_col=0)
    assert table.index.tolist() == ["topk", "untrained", "PCA-32", "PCA-64", "PCA-128"]
    assert table.loc["topk", "explained_variance"] > table.loc["untrained", "explained_variance"]
    assert table.loc["PCA-128", "loss_spliced"] < table.loc["PCA-32", "loss_spliced"] < table.loc["PCA-32", "loss_zero"]
    saved = interp.load_sae(out / "sae", bundled)
    assert saved.cfg.metadata["corpus"] and saved.cfg.metadata["model_name"] == "smollm2-135m"


@pytest.mark.usefixtures("own")
def test_a_transcoder(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = ["--tokens", "6000", "--width", "1", "--k", "8", "--held", "2", "--eval-tokens", "400"]
    recipe("train_transcoder").main(["--layer", "4", "--texts", str(texts), "--out", str(out), *sizes])
    assert json.loads((out / "transcoder" / "cfg.json").read_text())["architecture"] == "jumprelu_transcoder"
    assert pd.read_csv(out / "table.csv", index_col=0).index.tolist() == [
        "transcoder", "linear map", "PCA-32 of the output",
    ]  # fmt: skip


@pytest.mark.usefixtures("own")
def test_a_circuit_of_features(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = ["--tokens", "4000", "--k", "8", "--n", "2", "--top", "12", "--layers", "4", "8"]
    recipe("feature_circuit").main(["--texts", str(texts), "--out", str(out), *sizes])
    circuit = FeatureCircuit.from_json(out / "circuit.json")
    assert len(circuit.nodes) == 12
    curve = pd.read_csv(out / "faithfulness.csv")
    assert curve["n_nodes"].tolist() == [1, 2, 5, 10, 12]
    assert (out / "circuit.html").stat().st_size < 5_000_000
