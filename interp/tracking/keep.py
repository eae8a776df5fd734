"""Figures, effects, circuits, dictionaries and tables as files of a run, without the secrets that they might hold."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..effects import Effects
from ..errors import InterpError, TrackerError
from ..files import path_of, write_atomically
from .folder import free, safe
from .redact import Redactor

if TYPE_CHECKING:
    import pandas as pd

    from ..circuits import AttributionGraph, Circuit, FeatureCircuit

#: Where each kind of thing stands in a run's folder.
PLACES = {
    "figure": "figures",
    "effects": "effects",
    "circuit": "circuits",
    "sae": "saes",
    "table": "tables",
    "artifact": "files",
}
_PAGE = "<!doctype html>\n<meta charset='utf-8'>\n<title>{title}</title>\n{body}\n"


def keep_figure(place: Path, name: str, figure: object) -> Path:
    """A picture: a page (`.html`) of ours, of bokeh, plotly or altair, or of what shows itself as HTML; a `.png` of matplotlib
    or PIL; or a file, as it is.

    Raises:
        TrackerError: none of these, or it cannot be drawn.
    """
    if isinstance(figure, str | Path):
        return keep_file(place, name, figure)
    try:
        suffix, data = _drawn(name, figure)
    except InterpError:
        raise
    except Exception as error:  # every library fails in its own way
        raise TrackerError(
            f"the figure {name!r}, a {type(figure).__name__}, cannot be drawn: {type(error).__name__}: {error}"
        ) from error
    if suffix == ".html":
        data = Redactor().sure(data.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
    path = free(place, safe(name), suffix)
    write_atomically(path, data)
    return path


def _drawn(name: str, figure: object) -> tuple[str, bytes]:
    """The suffix and the bytes of a picture."""
    library = type(figure).__module__.split(".")[0]
    if library == "bokeh":
        from ..plots.page import Figure

        return ".html", Figure(figure, name).html().encode()  # type: ignore[arg-type]
    if callable(page := getattr(figure, "html", None)):  # ours
        return ".html", str(page()).encode()
    if callable(page := getattr(figure, "to_html", None)) and library in ("plotly", "altair"):
        return ".html", str(page()).encode()
    drawn = io.BytesIO()
    if callable(write := getattr(figure, "savefig", None) or getattr(getattr(figure, "figure", None), "savefig", None)):
        write(drawn, format="png", dpi=150, bbox_inches="tight")  # of matplotlib, or axes of it
        return ".png", drawn.getvalue()
    if library == "PIL":
        figure.save(drawn, "PNG")  # type: ignore[attr-defined]
        return ".png", drawn.getvalue()
    if callable(shown := getattr(figure, "_repr_html_", None)) and (body := shown()):
        return ".html", _PAGE.format(title=name, body=body).encode()
    raise TrackerError(
        f"the figure {name!r} is a {type(figure).__name__}; log_figure takes what interp.plot_... gives, a figure of bokeh, "
        "plotly, altair or matplotlib, a PIL image, or the path of a file"
    )


def keep_effects(place: Path, name: str, effects: object) -> Path:
    """Effects, as a .nc file. TrackerError: they are none."""
    if not isinstance(effects, Effects):
        raise TrackerError(
            f"the effects {name!r} are a {type(effects).__name__}; give what interp.patch and its kind return"
        )
    clean = Redactor().data(effects.provenance)
    return replace(effects, provenance=clean).save(free(place, safe(name), ".nc"))  # type: ignore[arg-type]


def keep_circuit(place: Path, name: str, circuit: object) -> Path:
    """A circuit, a circuit of features or an attribution graph, as JSON. TrackerError: it is none."""
    from ..circuits import AttributionGraph, Circuit, FeatureCircuit

    if not isinstance(circuit, Circuit | FeatureCircuit | AttributionGraph):
        raise TrackerError(
            f"the circuit {name!r} is a {type(circuit).__name__}; give what interp.discover, iterative_pruning or "
            "attribution_graph return"
        )
    meta = Redactor().data(circuit.meta)
    circuit, path = replace(circuit, meta=meta), free(place, safe(name), ".json")  # type: ignore[arg-type]
    if isinstance(circuit, AttributionGraph):
        circuit.save(path)
    else:
        circuit.to_json(path)
    return path


def keep_sae(place: Path, name: str, sae: object) -> Path:
    """A dictionary, as the folder that `interp.save_sae` writes."""
    from ..saes import save_sae

    if not hasattr(sae, "cfg"):
        raise TrackerError(
            f"the dictionary {name!r} is a {type(sae).__name__}; give what interp.SparseAutoencoder or load_sae made"
        )
    path = save_sae(sae, free(place, safe(name), ""))  # type: ignore[arg-type]
    for file in path.glob("*.json"):
        data = json.loads(file.read_text(encoding="utf-8"))
        if (clean := Redactor().data(data)) != data:
            write_atomically(file, json.dumps(clean, indent=1).encode())
    return path


def keep_table(place: Path, name: str, table: object) -> Path:
    """A DataFrame, or what makes one (rows as dictionaries, columns as lists), as a .csv file."""
    import pandas as pd

    try:
        frame = table if isinstance(table, pd.DataFrame) else pd.DataFrame(table)  # type: ignore[call-overload]
    except (ValueError, TypeError) as error:
        raise TrackerError(
            f"the table {name!r} is a {type(table).__name__}, which makes no DataFrame: {error}"
        ) from None
    index = not isinstance(frame.index, pd.RangeIndex)
    path = free(place, safe(name), ".csv")
    write_atomically(path, Redactor().sure(frame.to_csv(index=index)).encode())
    return path


def keep_file(place: Path, name: str, given: object) -> Path:
    """A copy of a file or folder, as it is. TrackerError: nothing is there, or it cannot be read."""
    source = path_of(given, TrackerError)
    if not source.exists():
        raise TrackerError(f"{name!r}: there is no file or folder {source}")
    stem = safe(name).removesuffix(source.suffix) if source.suffix else safe(name)
    path = free(place, stem, source.suffix if source.is_file() else "")
    try:
        if source.is_dir():
            shutil.copytree(source, path)
        else:
            shutil.copyfile(source, path)
    except (OSError, shutil.Error) as error:
        raise TrackerError(f"{source} cannot be copied to {path}: {error}") from error
    return path


KEEPERS: dict[str, Callable[[Path, str, object], Path]] = {
    "figure": keep_figure,
    "effects": keep_effects,
    "circuit": keep_circuit,
    "sae": keep_sae,
    "table": keep_table,
    "artifact": keep_file,
}


def read_circuit(path: Path) -> Circuit | FeatureCircuit | AttributionGraph:
    """What `keep_circuit` wrote, whichever kind it was."""
    from ..circuits import AttributionGraph, Circuit, FeatureCircuit, NeuronCircuit

    try:
        schema = str(json.loads(path.read_text(encoding="utf-8")).get("schema"))
    except (OSError, ValueError, AttributeError) as error:
        raise TrackerError(f"{path} cannot be read: {error}") from error
    if "attribution-graph" in schema:
        return AttributionGraph.load(path)
    if "neuron-circuit" in schema:
        return NeuronCircuit.from_json(path)
    return FeatureCircuit.from_json(path) if "feature-circuit" in schema else Circuit.from_json(path)


def read_table(path: Path) -> pd.DataFrame:
    """What `keep_table` wrote."""
    import pandas as pd

    frame = pd.read_csv(path)
    return (
        frame.set_index(frame.columns[0]).rename_axis(None) if str(frame.columns[0]).startswith("Unnamed: 0") else frame
    )
