"""What a run reads: the data section of a run's configuration. Imports nothing, so that `--help` stays fast."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DataConfig:
    """Where the documents come from, how they are mixed, and with which tokenizer they are read."""

    sources: dict[str, str] = field(default_factory=dict)
    """Where documents are, by domain: a path, or KIND:PLACE with a kind of data/sources.py (jsonl, parquet,
    array_record, text, tfds, hf, embedded). A record's own "domain" goes before. Empty: the embedded corpora."""
    synthetic: bool = False
    """Random tokens instead of documents, `vocab_size` of them or a named tokenizer's: for a run's speed and mechanics.
    Nothing is read and nothing trained; it goes with no sources."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of the tokens by domain; domains not named share what is left by their size. Empty: by size."""
    repeats: dict[str, float] = field(default_factory=dict)
    """Most passes over a domain in a run, all its stages together; when they are made the others share what is left.
    Not named: no bound."""
    caps: dict[str, int] = field(default_factory=dict)
    """Most tokens of a domain in a run, all its stages together; then the others share what is left (a lane reads the
    document that it is at to its end). Not named: no bound."""
    tokenizer: str = ""
    """A sentencepiece .model, Llama 4's tokenizer.model (tiktoken's format), a Hugging Face tokenizer.json, or a folder
    with one; `llama4`: Llama 4's, from the installed llama-models package; empty: a BPE is trained on the corpus."""
    vocab_size: int = 4096
    """Size of the vocabulary when the tokenizer is trained here."""
    image_tiles: int = 16
    """Most tiles that an image is cut into, beside the one that shows it whole; frames of videos are one tile."""
    heldout: float = 0.02
    """Share of the documents held out for evaluation, chosen by the hash of their content."""
    bad_records: float = 0.001
    """Largest share of the records of a source that may be bad: they are skipped and counted. 0: stop at the first."""

    def __post_init__(self):
        for name, place in self.sources.items():
            if not name or not place:
                raise ValueError(f"data.sources needs a domain and a place for it, not {name!r}: {place!r}")
        if self.synthetic and self.sources:
            raise ValueError(
                "data.synthetic takes the place of documents, and data.sources names some "
                f"({', '.join(self.sources)}): give one of them"
            )
        if not 0 < self.heldout < 0.5:
            raise ValueError(f"data.heldout must lie between 0 and 0.5, not {self.heldout}")
        for name, most in (*self.repeats.items(), *self.caps.items()):
            if not most > 0:
                raise ValueError(f"data.repeats and data.caps must be above 0; {name!r} has {most}")
        if not 0 <= self.bad_records < 1:
            raise ValueError(f"data.bad_records is a share of the records, from 0 to below 1, not {self.bad_records}")
        if not 1 <= self.image_tiles <= 16:
            raise ValueError(f"data.image_tiles lies between 1 and 16, not {self.image_tiles}")
        if self.vocab_size < 300:
            raise ValueError(f"data.vocab_size must be at least 300 (256 bytes and the specials): {self.vocab_size}")
