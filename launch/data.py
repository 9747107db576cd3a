"""`llama4 data ACTION`: what a run reads. Each action is a module like a command's (`launch/cli.py`)."""

ACTIONS = {
    "inspect": ("launch.data_inspect", "show what a run's batches hold: documents, loss mask, mixture, packing"),
    "convert": ("launch.data_convert", "turn JSONL, Parquet, text and tars into ArrayRecord shards"),
    "verify": ("launch.data_verify", "check converted shards against the hashes in their manifest"),
    "ledger": ("launch.data_ledger", "show which documents a checkpoint has seen"),
}
