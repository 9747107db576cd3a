"""What a run reads: the data section of a run's configuration. Imports nothing, so that `--help` stays fast."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DataConfig:
    """Where the documents come from, how they are mixed, and with which tokenizer they are read."""

    jsonl: str = ""
    """Your own documents: a .jsonl file or a folder of them, one {"text": ..., "domain": ...} a line ("domain" is
    optional). Empty: the embedded corpora."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of the tokens by domain; domains not named share what is left by their size. Empty: by size."""
    tokenizer: str = ""
    """A sentencepiece .model, Llama 4's tokenizer.model (tiktoken's format), a Hugging Face tokenizer.json, or a folder
    with one; `llama4`: Llama 4's, from the installed llama-models package; empty: a BPE is trained on the corpus."""
    vocab_size: int = 4096
    """Size of the vocabulary when the tokenizer is trained here."""
    heldout: float = 0.02
    """Share of the documents held out for evaluation, chosen by the hash of their content."""

    def __post_init__(self):
        if not 0 < self.heldout < 0.5:
            raise ValueError(f"data.heldout must lie between 0 and 0.5, not {self.heldout}")
        if self.vocab_size < 300:
            raise ValueError(f"data.vocab_size must be at least 300 (256 bytes and the specials): {self.vocab_size}")
