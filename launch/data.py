"""`llama4 data ACTION`: its actions, each a module as a command is."""

ACTIONS = {
    "inspect": ("launch.data_inspect", "show what a run would read, and what its batches hold"),
    "convert": ("launch.data_convert", "turn JSONL, Parquet, text and tars into ArrayRecord shards"),
    "ledger": ("launch.data_ledger", "show which documents a checkpoint has seen"),
}
